"""Squared ReLU as a torch op: one pass forward and one backward, in bfloat16 too."""

from typing import Any

import torch
from torch import Tensor

from mmrec.kernels._math import cdiv
from mmrec.kernels._register import register
from mmrec.kernels._tensors import FULL_PRECISION, LOW_PRECISION, cast, empty, flat
from mmrec.kernels.relu_squared import kernel


def _forward(x: Tensor) -> Tensor:
    y = _forward_fake(x)
    tasks = cdiv(x.numel(), kernel.BLOCK)
    kernel.relu_squared_fwd(flat(x), flat(y), tasks=tasks, work=0.2 * x.numel())
    return y


def _forward_fake(x: Tensor) -> Tensor:
    return empty(x)


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = _backward_fake(dy, x)
    tasks = cdiv(x.numel(), kernel.BLOCK)
    kernel.relu_squared_bwd(flat(x), flat(dy), flat(dx), tasks=tasks, work=0.3 * x.numel())
    return dx


def _backward_fake(dy: Tensor, x: Tensor) -> Tensor:
    return empty(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dy: Tensor) -> Tensor:
    dx: Tensor = _backward_op(dy, *ctx.saved_tensors)
    return dx


_backward_op = register(
    "relu_squared_bwd", "(Tensor dy, Tensor x) -> Tensor", _backward, _backward_fake
)
_op = register(
    "relu_squared",
    "(Tensor x) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def relu_squared(x: Tensor) -> Tensor:
    """Squared ReLU, ``max(x, 0)²``, elementwise.

    Args:
        x: float32, float64, bfloat16 or float16, any shape.

    Returns:
        A tensor of the shape and dtype of x. Differentiable once, in reverse mode. bfloat16 and
        float16 are computed in float32 and rounded once.

    Raises:
        ValueError: x has another dtype, or is not on the CPU.

    Source: So et al. 2021, "Primer: Searching for Efficient Transformers for Language Modeling"
    (arXiv:2109.08668, section 3).
    """
    if x.dtype not in (*FULL_PRECISION, *LOW_PRECISION) or x.device.type != "cpu":
        raise ValueError(
            "x must be float32, float64, bfloat16 or float16 on the CPU; got "
            f"{x.dtype} on {x.device}"
        )
    # the kernel reads and writes bfloat16 itself
    y: Tensor = _op(x.float() if x.dtype == torch.float16 else x)
    return cast(y, x.dtype)
