"""What a configuration costs, counted from the real model without allocating it."""

from dataclasses import replace
from typing import Any

import torch

from mmrec.config import ModelConfig, TrainConfig
from mmrec.model import Model
from mmrec.profiling.memory import generation, training
from mmrec.runtime.hardware import matrix_product_rate

PARTS = {
    "embedding": ("embedding",),
    "pairs and triples": ("ngrams",),
    "projections": ("in_proj.weight", "out_proj.weight"),
    "recurrent weights": ("recurrent_weight",),
    "feed-forward": ("up_proj.weight", "down_proj.weight"),
    "convolutions": ("conv_weight",),
}


def parameters(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part, and in total."""
    with torch.device("meta"):
        model = Model(config)
    counts = dict.fromkeys([*PARTS, "norms and biases"], 0)
    for name, p in model.named_parameters():
        part = next((k for k, ends in PARTS.items() if name.endswith(ends)), "norms and biases")
        counts[part] += p.numel()
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: ModelConfig) -> dict[str, int]:
    """Floating-point operations of ``forward``, ``training``, and training with ``recompute``.

    A multiply and an add are two: twice the parameters that meet a token in a product, plus 8 P² a
    head for the long-term memory. Training takes three times the forward, and with ``recompute``
    that of the layers once more.
    """
    counts, size = parameters(config), config.head_width
    layers = counts["projections"] + counts["recurrent weights"] + counts["feed-forward"]
    long = sum(k in "lb" for k in config.resolved_layer_types)
    again = 2 * layers + long * config.heads * 8 * size * size
    forward = again + 2 * counts["embedding"]
    return {"forward": forward, "training": 3 * forward, "recompute": 3 * forward + again}


def describe(config: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    """Parameters by part, FLOPs a token, bytes of training and generation, seconds a token here.

    Bytes are those of ``mmrec.profiling.memory``, for training as ``train`` says, with and without
    ``recompute``. The time assumes products at the rate
    measured just now and is a lower bound of what training will take.
    """
    flops = flops_per_token(config)
    dtype = torch.bfloat16 if train.precision == "bfloat16" else torch.float32
    made = {
        "training": training(config, replace(train, recompute=False)),
        "recompute": training(config, replace(train, recompute=True)),
        "generation": generation(config),
    }
    return {
        "parameters": parameters(config),
        "flops_per_token": flops,
        "bytes": {name: parts | {"total": sum(parts.values())} for name, parts in made.items()},
        "seconds_per_million_tokens": 1e6 * flops["training"] / matrix_product_rate(dtype),
    }
