"""Linear attention with decay as a torch op, and Kimi Delta Attention as its public form.

``mmrec.kernels.gla`` holds the forms without delta rule.

Axes: B batch, T time, H key heads, HV value heads, K and V head widths, N sequences (B, or the
packed sequences of one row).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._math import cdiv
from mmrec.kernels._register import register
from mmrec.kernels._simd import LANES
from mmrec.kernels._tensors import (
    KERNEL_DTYPES,
    LOW_PRECISION,
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
)
from mmrec.kernels.kda import kernel

_BLOCK_STEPS = kernel.CHUNK * kernel.BLOCK


def _make_block_bounds(
    batch: int, time: int, cu_seqlens: Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """``sequence_bounds`` (N, 3), and (N + 1,) the first block of each sequence, then their number.

    Sequence n has the blocks from entry n up to entry n + 1.
    """
    sequence_bounds = make_sequence_bounds(batch, time, cu_seqlens)
    blocks = cdiv(sequence_bounds[:, 2] - sequence_bounds[:, 1], _BLOCK_STEPS)
    return sequence_bounds, np.concatenate((np.zeros(1, np.int64), np.cumsum(blocks)))


def _block_states_shape(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, save_states: bool
) -> tuple[int, ...]:
    """Shape of the states that backward needs: an upper bound if sequences are packed."""
    blocks = 0
    if save_states:
        blocks = cdiv(q.shape[1], _BLOCK_STEPS)
        blocks = q.shape[0] * blocks if cu_seqlens is None else blocks + cu_seqlens.shape[0] - 1
    size = cdiv(q.shape[3], LANES) * cdiv(v.shape[3], LANES) * LANES * LANES
    return blocks, v.shape[2], size


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    scale: float,
    normalise: bool,
) -> list[Any]:
    """The arguments that all kernels share."""
    arrays: list[Any] = [item for x in (q, k, v, g) for item in flat_with_strides(x)]
    if beta is None:
        arrays += [np.empty(0, arrays[9].dtype), 0, 0]
    else:
        arrays += flat_with_strides(beta)
    return [*arrays, q.shape[2], g.ndim == 3, beta is not None, normalise, scale]


def _work(q: Tensor, v: Tensor) -> float:
    """Estimate of the nanoseconds that the forward pass takes on one thread."""
    batch, time, heads, width = v.shape
    return batch * time * heads * (100 + 0.07 * q.shape[3] * width)


def _numpy(x: Tensor) -> np.ndarray:
    """A contiguous tensor as an array; bfloat16 comes as uint16."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    normalise: bool,
    save_states: bool,
) -> tuple[Tensor, ...]:
    out, state = empty(v), empty(initial_state)
    state.copy_(initial_state)
    block_states = empty(state, _block_states_shape(q, v, cu_seqlens, save_states))
    sequence_bounds, first_blocks = _make_block_bounds(q.shape[0], q.shape[1], cu_seqlens)
    block_states[first_blocks[-1] :].zero_()  # beyond the blocks that packed sequences have
    kernel.linear_attention_fwd(
        sequence_bounds,
        first_blocks,
        *_arguments(q, k, v, g, beta, scale, normalise),
        state.numpy(),
        _numpy(out),
        block_states.numpy(),
        tasks=len(sequence_bounds) * v.shape[2],
        work=_work(q, v),
    )
    return out, state, block_states


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    normalise: bool,
    save_states: bool,
) -> tuple[Tensor, ...]:
    block_states = g.new_empty(_block_states_shape(q, v, cu_seqlens, save_states))
    return v.new_empty(v.shape), initial_state.new_empty(initial_state.shape), block_states


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    block_states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    normalise: bool,
    dout: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, ...]:
    batch, time, heads, width = q.shape
    groups = v.shape[2] // heads
    shape = (batch, time, v.shape[2], width)  # one gradient per value head
    dq, dk, dv, dg = empty(q, shape), empty(q, shape), empty(v), empty(g)
    db = empty(g, (0, 0, 0) if beta is None else v.shape[:3])
    dstate = empty(dfinal)
    dstate.copy_(dfinal)
    sequence_bounds, first_blocks = _make_block_bounds(batch, time, cu_seqlens)
    kernel.linear_attention_bwd(
        sequence_bounds,
        first_blocks,
        *_arguments(q, k, v, g, beta, scale, normalise),
        block_states.numpy(),
        *flat_with_strides(dout),
        *[_numpy(x) for x in (dstate, dq, dk, dv, dg.view(-1), db)],
        tasks=len(sequence_bounds) * v.shape[2],
        work=3 * _work(q, v),
    )
    if groups > 1:
        dq, dk = (x.unflatten(2, (heads, groups)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dg, db, dstate


def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    block_states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    normalise: bool,
    dout: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, ...]:
    db = g.new_empty((0, 0, 0) if beta is None else v.shape[:3])
    return *(x.new_empty(x.shape) for x in (q, k, v, g)), db, dfinal.new_empty(dfinal.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, beta, _, cu_seqlens, ctx.scale, ctx.normalise, ctx.save_states = inputs
    ctx.save_for_backward(q, k, v, g, beta, output[2], cu_seqlens)
    ctx.mark_non_differentiable(output[2])


def _gradient(ctx: Any, dout: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.save_states:
        raise RuntimeError("mmrec::linear_attention has a gradient only with save_states=True")
    saved = ctx.saved_tensors
    *dinputs, db, dstate = _backward_op(*saved, ctx.scale, ctx.normalise, dout, dfinal)
    return *dinputs, None if saved[4] is None else db, dstate, None, None, None, None


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    out, state = torch.empty_like(v, memory_format=torch.contiguous_format), empty(initial_state)
    sequence_bounds = make_sequence_bounds(q.shape[0], q.shape[1], cu_seqlens)
    kernel.linear_attention_step(
        sequence_bounds,
        *_arguments(q, k, v, g, beta, scale, normalise),
        initial_state.contiguous().numpy(),
        state.numpy(),
        _numpy(out),
        tasks=len(sequence_bounds) * v.shape[2],
        work=v.numel() * q.shape[3] * 0.3,
    )
    return out, state


def _step_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), initial_state.new_empty(initial_state.shape)


_backward_op = register(
    "linear_attention_bwd",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor block_states, "
    "Tensor? cu_seqlens, float scale, bool normalise, Tensor dout, Tensor dfinal) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "linear_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor initial_state, "
    "Tensor? cu_seqlens, float scale, bool normalise, bool save_states) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)
_step_op = register(
    "linear_attention_step",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor initial_state, "
    "Tensor? cu_seqlens, float scale, bool normalise) -> (Tensor, Tensor)",
    _step,
    _step_fake,
)


def check_log_decay(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    axes: str,
    dtype: torch.dtype,
    check: bool = False,
) -> Tensor:
    """Log decays in the dtype that is computed in: float32 and lower ones go together.

    Args:
        name: of the argument, for messages.
        x: the log decays.
        shape: that x must have.
        axes: its axes, for messages.
        dtype: of the other inputs.
        check: also refuse NaN, infinity and x > 0.

    Raises:
        ValueError: x is not such a tensor.
    """
    x = _gate(name, x, shape, axes, dtype)
    if check:
        require_finite(**{name: x})
        if bool((x > 0).any()):
            raise ValueError(f"{name} must hold logarithms of decays, <= 0; got {float(x.max())}")
    return x


def _gate(name: str, x: Tensor, shape: tuple[int, ...], axes: str, dtype: torch.dtype) -> Tensor:
    """A gate in the dtype that is computed in: float32 and lower ones go together."""
    check_tensor(name, x, shape, axes)
    compute = torch.float32 if dtype in LOW_PRECISION else dtype
    if x.dtype not in (compute, *LOW_PRECISION):
        check_tensor(name, x, shape, axes, dtype)
    return cast(x, compute)


def _require_beta(beta: Any) -> None:
    """Raise ValueError if beta is missing, which ``linear_attention`` would take for gla."""
    if not isinstance(beta, Tensor):
        raise ValueError(f"beta must be a tensor of shape (B, T, HV); got {type(beta).__name__}")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    normalise: bool,
    cu_seqlens: Tensor | None,
    check: bool,
    few_steps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments of ``kda``, or of ``gla`` where beta is None, and compute it.

    Args:
        q: (B, T, H, K).
        k: (B, T, H, K).
        v: (B, T, HV, V).
        g: (B, T, HV, K), or (B, T, HV) for one decay per head.
        beta: (B, T, HV), or None for no delta rule.
        scale: K^-½ if None.
        initial_state: (N, HV, K, V), or None.
        output_final_state: return the final state, else None.
        normalise: q and k.
        cu_seqlens: (N + 1,), or None.
        check: values too.
        few_steps: go step by step, unless a gradient is needed.

    Raises:
        ValueError: as ``kda``.
    """
    q, k, v = promote(q, k, v)
    check_input("q", q, "B, T, H, K", cu_seqlens)
    batch, time, heads, size = q.shape
    if heads == 0 or size == 0:
        raise ValueError(
            f"q must have at least one head and a head width K >= 1; got shape {tuple(q.shape)}"
        )
    check_tensor("k", k, (batch, time, heads, size), "B, T, H, K", q.dtype)
    value_heads = "HV" if beta is not None else "H"
    axes = f"B, T, {value_heads}, V"
    if not isinstance(v, Tensor) or v.ndim != 4:
        got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v must have axes ({axes}); got {got}")
    many, values = v.shape[2:]
    if beta is None:
        check_tensor("v", v, (batch, time, heads, values), axes, q.dtype)
    check_tensor("v", v, (batch, time, many, values), axes, q.dtype)
    if many == 0 or many % heads != 0 or values == 0:
        raise ValueError(
            f"v must have heads that are a multiple of the {heads} of q, and a head width V >= 1; "
            f"got shape {tuple(v.shape)}"
        )
    by_step = isinstance(g, Tensor) and g.ndim == 3
    shape = (batch, time, many) if by_step else (batch, time, many, size)
    g_axes = f"B, T, {value_heads}" if by_step else f"B, T, {value_heads}, K"
    g = check_log_decay("g", g, shape, g_axes, q.dtype, check)
    if beta is not None:
        beta = _gate("beta", beta, (batch, time, many), "B, T, HV", q.dtype)
    shape = (sequence_count(batch, cu_seqlens), many, size, values)
    sequences = "B" if cu_seqlens is None else "N"
    state = resolve_initial_state(initial_state, g, shape, f"{sequences}, {value_heads}, K, V")
    if scale is None:
        scale = size**-0.5
    if check:
        require_finite(q=q, k=k, v=v, beta=beta, initial_state=state)
    dtype = q.dtype
    if dtype not in KERNEL_DTYPES:
        q, k, v = q.float(), k.float(), v.float()
    inputs = (q, k, v, g, beta, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if few_steps and not save:
        out, final_state = _step_op(*inputs, cu_seqlens, float(scale), normalise)
    else:
        out, final_state, _ = _op(*inputs, cu_seqlens, float(scale), normalise, save)
    return cast(out, dtype), final_state if output_final_state else None


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention: the delta rule with a decay per key channel.

    ``S_t = (I - β_t k_t k_tᵀ) diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ`` and ``o_t = scale S_tᵀ q_t``.
    Names, shapes and results are those of ``chunk_kda`` in flash-linear-attention. It computes in
    chunks of 16 steps, so a sequence that is cut at a multiple of 16 gives the same bits.

    For the backward pass one state in 64 steps is stored; without a gradient, none is.

    Args:
        q: (B, T, H, K) float32, float64, bfloat16 or float16, queries.
        k: like q, keys.
        v: (B, T, HV, V) of the dtype of q, values. HV is a multiple of H, and value head i reads
            key head i // (HV / H).
        g: (B, T, HV, K) of the dtype of q, or of float32 or lower, logarithms of the decays, <= 0.
            (B, T, HV) is one decay for all channels of a head.
        beta: (B, T, HV) of the dtype of q, or of float32 or lower, writing strengths.
        scale: factor of the outputs; K^-½ if None.
        initial_state: (N, HV, K, V), S before the first step; zero if None. N is B, or the number
            of packed sequences. float32 if q is bfloat16 or float16, else of the dtype of q.
        output_final_state: return the final state, else None in its place.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(|x|² + 1e-6) first.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1: sequence n has the
            steps from cu_seqlens[n] up to cu_seqlens[n + 1]. None: each batch row is one sequence.
        check: also raise ValueError for NaN, infinity and g > 0; costs passes over the inputs.

    Returns:
        o: (B, T, HV, V), of the dtype of q.
        final_state: (N, HV, K, V), the last S of each sequence, or None.

        Both are differentiable once, in reverse mode. bfloat16 and float16 are computed in float32,
        and the final state is float32 then.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.
        RuntimeError: a second derivative, or one in forward mode, is asked for.

    Source: Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture"
    (arXiv:2510.26692), section 3.
    """
    _require_beta(beta)
    return linear_attention(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        check,
    )


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``kda`` step by step: for decoding, where T is 1 or a few. Arguments and results are those.

    Where a gradient is needed, it is ``kda`` itself. Both agree to rounding.
    """
    _require_beta(beta)
    return linear_attention(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        check,
        few_steps=True,
    )
