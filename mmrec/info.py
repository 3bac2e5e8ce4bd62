"""What a configuration costs, counted from the real model on torch's meta device."""

import time
from typing import Any

import torch

from mmrec.config import ModelConfig
from mmrec.model import Model

PARTS = {
    "embedding": ("embedding",),
    "pairs and triples": ("ngrams",),
    "projections": ("project.weight", "merge.weight"),
    "recurrent weights": ("recurrent",),
    "feed-forward": ("ffn_in.weight", "ffn_out.weight"),
    "convolutions": ("taps",),
}
BATCH, SEQ_LEN = 8, 256  # of the memory estimate


def parameters(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part, and in total."""
    with torch.device("meta"):
        model = Model(config)
    counts = dict.fromkeys([*PARTS, "norms and biases"], 0)
    for name, p in model.named_parameters():
        part = next((k for k, ends in PARTS.items() if name.endswith(ends)), "norms and biases")
        counts[part] += p.numel()
    return counts | {"total": sum(counts.values())}


def matmul_rate() -> float:
    """This machine's float32 matrix-product rate in FLOP/s, measured for a fifth of a second."""
    a, b = torch.randn(1024, 512), torch.randn(512, 512)
    a @ b
    runs, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < 0.2:
        a @ b
        runs += 1
    return runs * 2 * 1024 * 512 * 512 / (time.perf_counter() - begin)


def describe(config: ModelConfig) -> dict[str, Any]:
    """Parameters by part, FLOPs a token, bytes for training and generation, seconds a token here.

    FLOPs count a multiply and an add as two: twice the parameters that meet a token in a product,
    plus 8 P² a head for the long-term memory; training costs three times the forward. Training
    memory is weights, gradients and Muon's moment or AdamW's two, 12 or 16 bytes a parameter, and
    activations kept for backward at batch 8 of 256 tokens. The time assumes products at the rate
    measured just now and is a lower bound of what training will take.
    """
    counts = parameters(config)
    width, size = config.width, config.head_width
    kinds = config.kinds
    long, short = sum(k in "lb" for k in kinds), sum(k in "sbn" for k in kinds)
    read = ("convolutions", "norms and biases", "pairs and triples")  # met without a product
    products = counts["total"] - sum(counts[k] for k in read)
    matrices = products - counts["embedding"]
    forward = 2 * products + long * config.heads * 8 * size * size
    # what a layer keeps for backward, in widths a token: residual, norms, taps, gates, activations
    kept = config.depth * (11 * width + 3 * config.hidden) + short * 7 * width + long * 6 * width
    state = config.depth * (config.conv - 1) * width + short * width + long * width * size
    training = 16 * counts["total"] - 4 * matrices + 4 * BATCH * SEQ_LEN * kept
    return {
        "parameters": counts,
        "flops_per_token": {"forward": forward, "training": 3 * forward},
        "bytes": {
            "training": training,
            "generation": 4 * (counts["total"] + state),
            "state": 4 * state,
        },
        "seconds_per_million_tokens": 3e6 * forward / matmul_rate(),
    }
