"""Public squared relu: one pass forward and one backward, in bfloat16 too."""

from typing import Any

from torch import Tensor

from mmrec.kernels._bf16 import TYPES, line
from mmrec.kernels._register import register
from mmrec.kernels._tensors import empty
from mmrec.kernels.relu_squared import kernel


def _run(x: Tensor) -> Tensor:
    y = _run_fake(x)
    kernel.squared_relu_fwd(line(x), line(y), tasks=kernel.tasks(x.numel()), work=0.2 * x.numel())
    return y


def _run_bwd(dy: Tensor, x: Tensor) -> Tensor:
    dx = _run_fake(x)
    kernel.squared_relu_bwd(
        line(x), line(dy), line(dx), tasks=kernel.tasks(x.numel()), work=0.3 * x.numel()
    )
    return dx


def _run_fake(x: Tensor) -> Tensor:
    return empty(x)


def _run_bwd_fake(dy: Tensor, x: Tensor) -> Tensor:
    return empty(x)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    dx: Tensor = _op_bwd(dy, *ctx.saved_tensors)
    return dx


_op_bwd = register("squared_relu_bwd", "(Tensor dy, Tensor x) -> Tensor", _run_bwd, _run_bwd_fake)
_op = register(
    "squared_relu", "(Tensor x) -> Tensor", _run, _run_fake, setup=_setup, backward=_backward
)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)², elementwise, differentiable once.

    Args:
        x: float32, float64 or bfloat16, any shape.

    Raises:
        ValueError: another dtype, or not on the CPU.

    Source: So et al. 2021, "Primer" (arXiv:2109.08668, section 3).
    """
    if x.dtype not in TYPES or x.device.type != "cpu":
        raise ValueError(
            f"x must be float32, float64 or bfloat16 on the CPU; got {x.dtype} on {x.device}"
        )
    y: Tensor = _op(x)
    return y
