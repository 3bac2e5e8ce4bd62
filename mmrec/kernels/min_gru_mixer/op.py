"""The minGRU mixer as a torch op: scan, gates, RMS norm and output gate in one pass.

Axes: B batch, T time, D channels, N sequences (B, or the packed sequences of one row).
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
from mmrec.kernels.min_gru_mixer import kernel


def _forward(
    projected: Tensor,
    forget_bias: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, final_state = _forward_fake(
        projected, forget_bias, initial_state, cu_seqlens, save_states
    )
    batch, time = projected.shape[:2]
    sequence_bounds = make_sequence_bounds(batch, time, cu_seqlens)
    kernel.min_gru_mixer_fwd(
        *flat_with_strides(projected),
        flat(forget_bias),
        flat(initial_state),
        sequence_bounds,
        time,
        flat(y),
        flat(h),
        flat(final_state),
        tasks=len(sequence_bounds),
        work=2.0 * y.numel(),
    )
    return y, h, final_state


def _forward_fake(
    projected: Tensor,
    forget_bias: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*projected.shape[:2], forget_bias.shape[0])
    h = empty(forget_bias, shape if save_states else (0,))
    return empty(projected, shape), h, empty(initial_state)


def _backward(
    dy: Tensor,
    dfinal: Tensor,
    projected: Tensor,
    forget_bias: Tensor,
    initial_state: Tensor,
    h: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dprojected, dbias, dinitial = empty(projected), empty(initial_state), empty(initial_state)
    batch, time = projected.shape[:2]
    sequence_bounds = make_sequence_bounds(batch, time, cu_seqlens)
    kernel.min_gru_mixer_bwd(
        *flat_with_strides(projected),
        *flat_with_strides(dy),
        flat(forget_bias),
        flat(initial_state),
        flat(h),
        flat(dfinal),
        sequence_bounds,
        time,
        flat(dprojected),
        flat(dbias),
        flat(dinitial),
        tasks=len(sequence_bounds),
        work=3.0 * dy.numel(),
    )
    # dbias has a row per sequence; NumPy adds the rows in their order
    return dprojected, torch.from_numpy(dbias.numpy().sum(0)), dinitial


def _backward_fake(
    dy: Tensor,
    dfinal: Tensor,
    projected: Tensor,
    forget_bias: Tensor,
    initial_state: Tensor,
    h: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dinitial = initial_state.new_empty(initial_state.shape)
    return projected.new_empty(projected.shape), torch.empty_like(forget_bias), dinitial


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    projected, forget_bias, initial_state, cu_seqlens, _ = inputs
    ctx.save_for_backward(projected, forget_bias, initial_state, output[1], cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dy: Tensor | None, _: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor | None, ...]:
    projected, forget_bias, initial_state, h, cu_seqlens = ctx.saved_tensors
    dy = projected.new_zeros(()).expand(h.shape).contiguous() if dy is None else dy
    dfinal = torch.zeros_like(initial_state) if dfinal is None else dfinal
    gradients = _backward_op(dy, dfinal, projected, forget_bias, initial_state, h, cu_seqlens)
    return *gradients, None, None


_backward_op = register(
    "min_gru_mixer_bwd",
    "(Tensor dy, Tensor dfinal, Tensor projected, Tensor forget_bias, Tensor initial_state, "
    "Tensor h, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "min_gru_mixer",
    "(Tensor projected, Tensor forget_bias, Tensor initial_state, Tensor? cu_seqlens, "
    "bool save_states) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def min_gru_mixer(
    projected: Tensor,
    forget_bias: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """minGRU with an RMS norm and an output gate: a sequence mixer between two projections.

    ``h_t = (1 - γ_t) z_t σ(g_t) + γ_t h_{t-1}`` with ``γ_t = σ(f_t + forget_bias)``, and
    ``y_t = rms_norm(h_t) silu(r_t)``. This is ``gated_recurrence`` without a weight, then a norm
    and a gate, for at most a quarter of the memory traffic.

    Args:
        projected: (B, T, 4 D) float32, float64, bfloat16 or float16: z, f, g and r, each (B, T, D),
            side by side along the last axis, as one projection of the input gives them.
        forget_bias: (D,), added to the forget logits f. float64 if projected is, else float32,
            bfloat16 or float16.
        initial_state: (N, D), h before the first step; zero if None. N is B, or the number of
            packed sequences. float64 if projected is, else float32.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1, as in ``scan``.

    Returns:
        output: y (B, T, D) of the dtype of projected.
        final_state: (N, D), the last h of each sequence; float64 if projected is, else float32.

        Both are differentiable once, in reverse mode. bfloat16 and float16 are computed in float32.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.

    Source: Feng et al. 2024, "Were RNNs All We Needed?" (arXiv:2410.01201), section 3.1; the input
    gate g, the norm and the output gate are MM-Rec's.
    """
    check_input("projected", projected, "B, T, 4 D", cu_seqlens)
    if projected.shape[2] % 4:
        raise ValueError(
            f"projected must have axes (B, T, 4 D); got shape {tuple(projected.shape)}"
        )
    width, dtype = projected.shape[2] // 4, projected.dtype
    if dtype == torch.float16:  # the kernel reads and writes bfloat16 itself
        projected = projected.float()
    forget_bias = to_compute_dtype(forget_bias)
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    check_tensor("forget_bias", forget_bias, (width,), "D", compute_dtype)
    shape = (sequence_count(projected.shape[0], cu_seqlens), width)
    axes = "B, D" if cu_seqlens is None else "N, D"
    initial_state = resolve_initial_state(initial_state, forget_bias, shape, axes)
    inputs = (projected, forget_bias, initial_state)
    save_states = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, _, final_state = _op(*inputs, cu_seqlens, save_states)
    return cast(y, dtype), final_state
