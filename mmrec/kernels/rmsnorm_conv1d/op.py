"""RMS norm and causal depthwise convolution as one torch op.

Axes: B batch, T time, D channels, K kernel size, N sequences (B, or the packed ones of one row).
"""

from typing import Any

import torch
from torch import Tensor

from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    cast,
    check_input,
    check_tensor,
    empty,
    flat,
    flat_with_strides,
    make_sequence_bounds,
    resolve_initial_state,
    sequence_count,
    to_compute_dtype,
)
from mmrec.kernels.rmsnorm_conv1d import kernel


def _forward(
    x: Tensor, weight: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None, output_bf16: bool
) -> tuple[Tensor, Tensor]:
    u, final_state = _forward_fake(x, weight, initial_state, cu_seqlens, output_bf16)
    sequence_bounds = make_sequence_bounds(x.shape[0], x.shape[1], cu_seqlens)
    kernel.rmsnorm_conv1d_fwd(
        *flat_with_strides(x),
        flat(weight),
        weight.shape[0],
        flat(initial_state),
        sequence_bounds,
        x.shape[1],
        flat(u),
        flat(final_state),
        tasks=len(sequence_bounds),
        work=0.3 * x.numel() * (1 + weight.shape[0] / 2),
    )
    return u, final_state


def _forward_fake(
    x: Tensor, weight: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None, output_bf16: bool
) -> tuple[Tensor, Tensor]:
    u = x.new_empty(x.shape, dtype=torch.bfloat16) if output_bf16 else empty(x)
    return u, initial_state.new_empty(initial_state.shape)


def _backward(
    du: Tensor,
    dfinal: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dinitial = empty(x), empty(initial_state)
    dweight = weight.new_empty((initial_state.shape[0], *weight.shape))
    sequence_bounds = make_sequence_bounds(x.shape[0], x.shape[1], cu_seqlens)
    kernel.rmsnorm_conv1d_bwd(
        *flat_with_strides(x),
        *flat_with_strides(du),
        flat(weight),
        weight.shape[0],
        flat(initial_state),
        flat(dfinal),
        sequence_bounds,
        x.shape[1],
        flat(dx),
        flat(dweight),
        flat(dinitial),
        tasks=len(sequence_bounds),
        work=0.5 * x.numel() * (1 + weight.shape[0] / 2),
    )
    # dweight has a matrix per sequence; NumPy adds them in their order
    return dx, torch.from_numpy(dweight.numpy().sum(0)), dinitial


def _backward_fake(
    du: Tensor,
    dfinal: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dinitial = initial_state.new_empty(initial_state.shape)
    return x.new_empty(x.shape), torch.empty_like(weight), dinitial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, initial_state, cu_seqlens, _ = inputs
    ctx.save_for_backward(x, weight, initial_state, cu_seqlens)


def _gradient(ctx: Any, du: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(du, dfinal, *ctx.saved_tensors), None, None


_backward_op = register(
    "rmsnorm_conv1d_bwd",
    "(Tensor du, Tensor dfinal, Tensor x, Tensor weight, Tensor initial_state, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "rmsnorm_conv1d",
    "(Tensor x, Tensor weight, Tensor initial_state, Tensor? cu_seqlens, bool output_bf16) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def rmsnorm_conv1d(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    output_bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMS norm, then a causal depthwise convolution over time, in one pass.

    ``u_t = Σ_k weight_k n_{t-K+1+k}`` with ``n_t = x_t / rms(x_t)``. With K = 1 it is
    ``torch.nn.functional.rms_norm`` with a weight.

    Args:
        x: (B, T, D) float32, float64, bfloat16 or float16.
        weight: (K, D), K >= 1; its last row weighs the newest step. float64 if x is, else float32,
            bfloat16 or float16.
        initial_state: (N, K - 1, D), the rows of n before the first step; zero if None. N is B, or
            the number of packed sequences. float64 if x is, else float32.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1, as in ``scan``.
        output_bf16: round the output to bfloat16, for a matrix product that takes it so.

    Returns:
        output: u (B, T, D), of the dtype of x, or bfloat16.
        final_state: (N, K - 1, D), the last rows of n of each sequence; float64 if x is, else
            float32.

        Both are differentiable once, in reverse mode. bfloat16 and float16 are computed in float32.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.

    Source: the norm is that of Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"
    (arXiv:1910.07467, eq. 4), without a weight of its own.
    """
    check_input("x", x, "B, T, D", cu_seqlens)
    dtype = torch.bfloat16 if output_bf16 else x.dtype
    x, weight = to_compute_dtype(x), to_compute_dtype(weight)
    kernel_size = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 1
    width = x.shape[2]
    check_tensor("weight", weight, (max(1, kernel_size), width), "K, D", x.dtype)
    shape = (sequence_count(x.shape[0], cu_seqlens), kernel_size - 1, width)
    axes = "B, K - 1, D" if cu_seqlens is None else "N, K - 1, D"
    initial_state = resolve_initial_state(initial_state, x, shape, axes)
    # the kernel writes bfloat16 itself
    u, final_state = _op(x, weight, initial_state, cu_seqlens, dtype == torch.bfloat16)
    return cast(u, dtype), final_state
