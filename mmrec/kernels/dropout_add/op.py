"""Dropout and a residual addition as one torch op."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._math import cdiv
from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    FULL_PRECISION,
    LOW_PRECISION,
    check_tensor,
    empty,
    flat,
    to_compute_dtype,
)
from mmrec.kernels.dropout_add import kernel


def _scalars(key: Tensor, p: float, dtype: torch.dtype) -> tuple[Any, ...]:
    """The key words, the bits below which an element drops, and the factor of the others."""
    words = key.numpy().view(np.uint32)
    scale = torch.tensor(1 / (1 - p), dtype=dtype).numpy()[()]
    return words[0], words[1], np.uint32(int(p * 2**32)), scale


def _forward(x: Tensor, residual: Tensor, key: Tensor, p: float) -> Tensor:
    y = _forward_fake(x, residual, key, p)
    kernel.dropout_add_fwd(
        flat(x),
        flat(residual),
        *_scalars(key, p, residual.dtype),
        flat(y),
        tasks=cdiv(x.numel(), kernel.BLOCK),
        work=0.3 * x.numel(),
    )
    return y


def _forward_fake(x: Tensor, residual: Tensor, key: Tensor, p: float) -> Tensor:
    return empty(residual)


def _backward(dy: Tensor, key: Tensor, p: float, to_bf16: bool) -> Tensor:
    dx = _backward_fake(dy, key, p, to_bf16)
    kernel.dropout_add_bwd(
        flat(dy),
        *_scalars(key, p, dy.dtype),
        flat(dx),
        tasks=cdiv(dy.numel(), kernel.BLOCK),
        work=0.3 * dy.numel(),
    )
    return dx


def _backward_fake(dy: Tensor, key: Tensor, p: float, to_bf16: bool) -> Tensor:
    return dy.new_empty(dy.shape, dtype=torch.bfloat16) if to_bf16 else empty(dy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, key, ctx.p = inputs
    ctx.to_bf16 = x.dtype == torch.bfloat16
    ctx.save_for_backward(key)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(dy, *ctx.saved_tensors, ctx.p, ctx.to_bf16), dy, None, None


_backward_op = register(
    "dropout_add_bwd",
    "(Tensor dy, Tensor key, float p, bool to_bf16) -> Tensor",
    _backward,
    _backward_fake,
)
_op = register(
    "dropout_add",
    "(Tensor x, Tensor residual, Tensor key, float p) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def dropout_add(
    x: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``residual + torch.nn.functional.dropout(x, p, training)`` in one pass, without a mask.

    The mask is computed from two random words and the numbers of the elements, in the backward pass
    as well. It does not depend on the number of threads.

    Args:
        x: float32, float64, bfloat16 or float16, any shape.
        residual: of the shape of x; float64 if x is, else float32, bfloat16 or float16.
        p: probability that an element drops, in [0, 1).
        training: whether elements drop at all.
        generator: what the two words are drawn from; None for torch's global generator. Nothing is
            drawn if p is 0 or ``training`` is False.

    Returns:
        A tensor of the shape and dtype of residual. Differentiable once, in reverse mode. bfloat16
        and float16 are computed in float32 and rounded once.

    Raises:
        ValueError: a shape, dtype or device, or p, is not as above.

    Source: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting" (JMLR 15); the mask as in Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3".
    """
    if x.dtype not in (*FULL_PRECISION, *LOW_PRECISION) or x.device.type != "cpu":
        raise ValueError(
            "x must be float32, float64, bfloat16 or float16 on the CPU; got "
            f"{x.dtype} on {x.device}"
        )
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1); got {p}")
    dtype = residual.dtype
    computed = to_compute_dtype(residual)
    check_tensor("residual", computed, tuple(x.shape), "the shape of x", to_compute_dtype(x).dtype)
    if not training or p == 0:
        if x.dtype == dtype:
            return residual + x
        key, p = torch.zeros(2, dtype=torch.int32), 0.0
    else:
        key = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, generator=generator)
    # the kernel reads bfloat16 itself
    y: Tensor = _op(x.float() if x.dtype == torch.float16 else x, computed, key, p)
    return y if y.dtype == dtype else y.to(dtype)
