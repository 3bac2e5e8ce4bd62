"""What a configuration costs, counted from the real model without allocating it."""

from typing import Any

import torch

from mmrec.config import ModelConfig, TrainConfig
from mmrec.model import flops_per_token, parameter_counts
from mmrec.profiling.memory import generation_memory, training_memory
from mmrec.runtime.hardware import matrix_product_rate


def estimate_cost(config: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    """Estimate what training and generation cost.

    Args:
        config: the model.
        train: training settings; see ``memory.training_memory`` for those that count.

    Returns:
        Plain values. "parameters": counts by group, see ``parameter_counts``. "flops_per_token":
        see ``mmrec.model.flops_per_token``. "bytes": memory of "training", of training with
        "activation_checkpointing", and of "generation", each by part and in "total".
        "seconds_per_million_tokens": a lower bound of the training time on this machine, if all
        matrix products run at the rate measured just now.
    """
    flops = flops_per_token(config)
    memory = {
        "training": training_memory(config, train.replace(activation_checkpointing=False)),
        "activation_checkpointing": training_memory(
            config, train.replace(activation_checkpointing=True)
        ),
        "generation": generation_memory(config),
    }
    bf16 = train.optimizer.precision == "bfloat16"
    rate = matrix_product_rate(torch.bfloat16 if bf16 else torch.float32)
    return {
        "parameters": parameter_counts(config),
        "flops_per_token": flops,
        "bytes": {name: parts | {"total": sum(parts.values())} for name, parts in memory.items()},
        "seconds_per_million_tokens": 1e6 * flops["training"] / rate,
    }
