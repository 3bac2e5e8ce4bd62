"""The gated delta rule as a torch op.

Axes: B batch, T time, H heads, P head width, N sequences (B, or the packed sequences of one row).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._math import cdiv
from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    broadcast_to,
    cast,
    check_input,
    check_tensor,
    empty,
    flat_with_strides,
    make_sequence_bounds,
    promote,
    require_finite,
    resolve_initial_state,
    sequence_count,
    to_compute_dtype,
)
from mmrec.kernels.gated_delta_rule import kernel


def max_chunks(batch: int, time: int, cu_seqlens: Tensor | None) -> int:
    """Number of chunks of all sequences, known from shapes alone: an upper bound if packed."""
    chunks = cdiv(time, kernel.CHUNK)
    return batch * chunks if cu_seqlens is None else chunks + cu_seqlens.shape[0] - 1


def _work(q: Tensor) -> float:
    """Estimate of the nanoseconds that the forward pass takes on one thread."""
    width = q.shape[-1]
    return q.numel() / max(width, 1) * (60 + 0.1 * width * width)


def _make_chunk_bounds(q: Tensor, cu_seqlens: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """``sequence_bounds`` (N, 3), and (N + 1,) the first chunk of each sequence, then their number.

    Sequence n has the chunks from entry n up to entry n + 1.
    """
    sequence_bounds = make_sequence_bounds(q.shape[0], q.shape[1], cu_seqlens)
    chunks = cdiv(sequence_bounds[:, 2] - sequence_bounds[:, 1], kernel.CHUNK)
    return sequence_bounds, np.concatenate((np.zeros(1, np.int64), np.cumsum(chunks)))


def _result_shapes(
    q: Tensor, cu_seqlens: Tensor | None, save_states: bool
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the output, the final state and the chunk states."""
    batch, time, heads, width = q.shape
    chunks = max_chunks(batch, time, cu_seqlens) if save_states else 0
    sequences = sequence_count(batch, cu_seqlens)
    return q.shape, (sequences, heads, width, width), (chunks, heads, width, width)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_logits: Tensor,
    beta_logits: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    save_states: bool,
) -> tuple[Tensor, ...]:
    shapes = _result_shapes(q, cu_seqlens, save_states)
    out, state, chunk_states = (empty(q, shape) for shape in shapes)
    state.copy_(initial_state)
    sequence_bounds, first_chunks = _make_chunk_bounds(q, cu_seqlens)
    chunk_states[first_chunks[-1] :].zero_()  # beyond the chunks that packed sequences have
    inputs = (q, k, v, g_logits, beta_logits)
    kernel.gated_delta_rule_fwd(
        sequence_bounds,
        first_chunks,
        *[item for x in inputs for item in flat_with_strides(x)],
        state.numpy(),
        out.numpy(),
        chunk_states.numpy(),
        tasks=len(sequence_bounds) * q.shape[2],
        work=_work(q),
    )
    return out, state, chunk_states


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_logits: Tensor,
    beta_logits: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    save_states: bool,
) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(shape) for shape in _result_shapes(q, cu_seqlens, save_states))


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_logits: Tensor,
    beta_logits: Tensor,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    dout: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, ...]:
    inputs = (q, k, v, g_logits, beta_logits)
    *gradients, dstate = (empty(x) for x in (*inputs, dfinal))
    dstate.copy_(dfinal)
    sequence_bounds, first_chunks = _make_chunk_bounds(q, cu_seqlens)
    kernel.gated_delta_rule_bwd(
        sequence_bounds,
        first_chunks,
        *[item for x in inputs for item in flat_with_strides(x)],
        chunk_states.numpy(),
        *flat_with_strides(dout),
        dstate.numpy(),
        *[x.numpy() for x in gradients],
        tasks=len(sequence_bounds) * q.shape[2],
        work=3 * _work(q),
    )
    return *gradients, dstate


def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_logits: Tensor,
    beta_logits: Tensor,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    dout: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(x.shape) for x in (q, k, v, g_logits, beta_logits, dfinal))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, cu_seqlens, save_states = inputs
    ctx.save_for_backward(*tensors, output[2], cu_seqlens)
    ctx.mark_non_differentiable(output[2])
    ctx.save_states = save_states


def _gradient(ctx: Any, dout: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.save_states:
        raise RuntimeError("mmrec::gated_delta_rule has a gradient only with save_states=True")
    return *_backward_op(*ctx.saved_tensors, dout, dfinal), None, None


_backward_op = register(
    "gated_delta_rule_bwd",
    "(Tensor q, Tensor k, Tensor v, Tensor g_logits, Tensor beta_logits, Tensor chunk_states, "
    "Tensor? cu_seqlens, Tensor dout, Tensor dfinal) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g_logits, Tensor beta_logits, Tensor initial_state, "
    "Tensor? cu_seqlens, bool save_states) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_logits: Tensor,
    beta_logits: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule: a matrix S per head that keys write to and queries read from.

    ``S_t = α_t S_{t-1} + k̂_t β_t (v_t - α_t S_{t-1}ᵀ k̂_t)ᵀ`` and ``o_t = S_tᵀ q̂_t``, where
    ``k̂ = k / |k|``, ``q̂ = q / |q|``, ``α = σ(g_logits)`` and ``β = σ(beta_logits)``. The
    normalisation and the sigmoids run inside the kernel. (flash-linear-attention takes log α and β
    themselves; here both gates are logits.)

    For the backward pass one state in 16 steps is stored; without a gradient, none is.

    Args:
        q: (B, T, H, P) float32, float64, bfloat16 or float16, queries, P >= 1.
        k: like q, keys.
        v: like q, values.
        g_logits: (B, T, H) or a shape that broadcasts to it, of the dtype of q, logits of the decay
            α of the state.
        beta_logits: like g_logits, logits of the writing strength β.
        initial_state: (N, H, P, P), S before the first step, indexed [key, value]; zero if None. N
            is B, or the number of packed sequences. float32 if q is bfloat16 or float16, else of
            the dtype of q.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1: sequence n has the
            steps from cu_seqlens[n] up to cu_seqlens[n + 1]. None: each batch row is one sequence.
        check_finite: also raise ValueError for NaN and infinity; costs a pass over the inputs.

    Returns:
        output: o (B, T, H, P), of the dtype of q.
        final_state: (N, H, P, P), the last S of each sequence.

        Both are differentiable once, in reverse mode. bfloat16 and float16 are computed in float32,
        and the final state is float32 then.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.
        RuntimeError: a second derivative, or one in forward mode, is asked for.

    Source: Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule"
    (arXiv:2412.06464), eq. 10.
    """
    q, k, v, g_logits, beta_logits = promote(q, k, v, g_logits, beta_logits)
    check_input("q", q, "B, T, H, P", cu_seqlens)
    batch, time, heads, width = q.shape
    if width == 0:
        raise ValueError(f"q must have a head width P of at least 1; got shape {tuple(q.shape)}")
    check_tensor("k", k, (batch, time, heads, width), "B, T, H, P", q.dtype)
    check_tensor("v", v, (batch, time, heads, width), "B, T, H, P", q.dtype)
    gates_shape = (batch, time, heads)
    g_logits = broadcast_to("g_logits", g_logits, gates_shape, "B, T, H", q.dtype)
    beta_logits = broadcast_to("beta_logits", beta_logits, gates_shape, "B, T, H", q.dtype)
    inputs = [to_compute_dtype(x) for x in (q, k, v, g_logits, beta_logits)]
    shape = (sequence_count(batch, cu_seqlens), heads, width, width)
    axes = "B, H, P, P" if cu_seqlens is None else "N, H, P, P"
    inputs.append(resolve_initial_state(initial_state, inputs[0], shape, axes))
    if check_finite:
        names = ("q", "k", "v", "g_logits", "beta_logits", "initial_state")
        require_finite(**dict(zip(names, inputs, strict=True)))
    save_states = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    out, final_state, _ = _op(*inputs, cu_seqlens, save_states)
    return cast(out, q.dtype), final_state
