"""Activation checkpointing by layer: backward keeps a layer's input and computes the rest again.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174,
section 3), through torch's own checkpoint.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recompute(
    layer: Callable[..., Result], *inputs: Any, dice: torch.Generator | None = None, **settings: Any
) -> Result:
    """What ``layer(*inputs, dice=dice, **settings)`` returns, at the cost of its inputs in memory.

    Backward calls the layer a second time, with ``dice`` as it was before the first, so results and
    gradients are those of the plain call, bit for bit. Without ``dice`` the global generator is
    put back in the same way; then no two threads may do this at once.
    """
    before: Tensor | None = None

    def run(*inputs: Any) -> Result:
        nonlocal before
        if dice is None:
            return layer(*inputs, dice=None, **settings)
        now = dice.get_state()
        if before is None:
            before = now
            return layer(*inputs, dice=dice, **settings)
        try:
            return layer(*inputs, dice=dice.set_state(before), **settings)
        finally:
            dice.set_state(now)

    made: Result = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=dice is None)
    return made
