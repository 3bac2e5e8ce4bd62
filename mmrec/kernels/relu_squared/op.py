"""Squared ReLU as a torch op: one pass forward and one backward, in bfloat16 too."""

from typing import Any

from torch import Tensor

from mmrec.kernels._math import cdiv
from mmrec.kernels._register import register
from mmrec.kernels._tensors import KERNEL_DTYPES, empty, flat
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
        x: float32, float64 or bfloat16, any shape.

    Returns:
        A tensor of the shape and dtype of x. Differentiable once, in reverse mode. bfloat16 is
        computed in float32 and rounded once.

    Raises:
        ValueError: x has another dtype, or is not on the CPU.

    Source: So et al. 2021, "Primer: Searching for Efficient Transformers for Language Modeling"
    (arXiv:2109.08668, section 3).
    """
    if x.dtype not in KERNEL_DTYPES or x.device.type != "cpu":
        raise ValueError(
            f"x must be float32, float64 or bfloat16 on the CPU; got {x.dtype} on {x.device}"
        )
    y: Tensor = _op(x)
    return y
