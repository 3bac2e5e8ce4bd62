"""Ops that write to an argument: for decoding, where a state moves on by one step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._channel_tiles import span
from mmrec.kernels._tensors import check_tensor, flat


def register_in_place(
    name: str, schema: str, forward: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define ``mmrec::name``, whose schema marks what it writes to, and return its caller.

    torch gives such an op no gradient. Where one is needed, the caller computes in plain torch.
    """
    full_name = f"mmrec::{name}"
    torch.library.define(full_name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(full_name, "CPU", forward)
    torch.library.register_fake(full_name, fake)
    op = getattr(torch.ops.mmrec, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def array_of(x: Tensor) -> np.ndarray:
    """The memory of a float32 or float64 tensor as a 1-D array, at little cost per call.

    Strides of 0 are allowed: a number that stands for several is there once.
    """
    if x.requires_grad:
        x = x.detach()
    if x.is_contiguous():
        return x.numpy().reshape(-1)
    return span(x)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient with respect to one of the tensors can be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_places(name: str, places: Tensor, batch: int) -> None:
    """Raise ValueError unless it is an integer tensor (B,) on the CPU."""
    check_tensor(name, places, (batch,), "B")
    if places.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must have dtype int32 or int64; got {places.dtype}")


def places_of(name: str, places: Tensor | None, batch: int, states: int) -> np.ndarray:
    """The number of the state of each batch row; -1 where a row is padding.

    Raises:
        ValueError: a number is outside the states, or two rows have the same state.
    """
    if places is None:
        return np.arange(batch)
    numbers = flat(places).astype(np.int64)
    used = numbers[numbers >= 0]
    if (numbers >= states).any() or len(np.unique(used)) < len(used):
        raise ValueError(
            f"{name} must be different numbers below the {states} states, or negative for padding; "
            f"got {numbers.tolist()[:8]}"
        )
    return np.maximum(numbers, -1)
