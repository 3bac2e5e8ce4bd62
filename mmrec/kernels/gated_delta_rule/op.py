"""The gated delta rule as torch ops.

Axes: B batch, T time, H key heads, HV value heads, K key width, V value width, N sequences (B, or
the packed sequences of one row).
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._math import cdiv
from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    KERNEL_DTYPES,
    LOW_PRECISION,
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

MAX_WIDTH = 256
"""Largest K and V."""
FEW_STEPS = 8
"""T up to which going step by step is faster than filling panels for blocks of steps."""


class Options(NamedTuple):
    """What the library ops take besides tensors."""

    scale: float
    normalise: bool
    g_is_logit: bool
    beta_is_logit: bool


_OPTIONS = "float scale, bool normalise, bool g_is_logit, bool beta_is_logit"


def max_chunks(batch: int, time: int, chunk_size: int, cu_seqlens: Tensor | None) -> int:
    """Number of chunks of all sequences, known from shapes alone: an upper bound if packed."""
    chunks = cdiv(time, chunk_size)
    return batch * chunks if cu_seqlens is None else chunks + cu_seqlens.shape[0] - 1


def _work(k: Tensor, v: Tensor) -> float:
    """Estimate of the nanoseconds that the forward pass takes on one thread."""
    rows = v.shape[0] * v.shape[1] * v.shape[2]
    return rows * (60 + 0.08 * k.shape[-1] * v.shape[-1])


def _make_chunk_bounds(
    q: Tensor, chunk_size: int, cu_seqlens: Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """``sequence_bounds`` (N, 3), and (N + 1,) the first chunk of each sequence, then their number.

    Sequence n has the chunks from entry n up to entry n + 1.
    """
    sequence_bounds = make_sequence_bounds(q.shape[0], q.shape[1], cu_seqlens)
    chunks = cdiv(sequence_bounds[:, 2] - sequence_bounds[:, 1], chunk_size)
    return sequence_bounds, np.concatenate((np.zeros(1, np.int64), np.cumsum(chunks)))


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _saved_shapes(
    k: Tensor, v: Tensor, cu_seqlens: Tensor | None, save_states: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the chunk states and of the errors."""
    (batch, time, value_heads, values), keys = v.shape, k.shape[-1]
    panels, rows = cdiv(values, kernel.LANES), cdiv(keys, kernel.LANES) * kernel.LANES
    if not save_states:
        return (0, value_heads, panels, rows, kernel.LANES), (0, time, value_heads, values)
    chunks = max_chunks(batch, time, kernel.choose_chunk_size(keys, values), cu_seqlens)
    return (chunks, value_heads, panels, rows, kernel.LANES), tuple(v.shape)


def _run_forward(
    inputs: tuple[Tensor, ...],
    state: Tensor,
    out: Tensor,
    chunk_states: Tensor,
    errors: Tensor,
    cu_seqlens: Tensor | None,
    options: Options,
) -> None:
    """Fill out, chunk_states and errors, and move the state in place."""
    q, k, v = inputs[:3]
    chunk_size = kernel.choose_chunk_size(k.shape[-1], v.shape[-1])
    sequence_bounds, first_chunks = _make_chunk_bounds(q, chunk_size, cu_seqlens)
    chunk_states[first_chunks[-1] :].zero_()  # beyond the chunks that packed sequences have
    kernel.gated_delta_rule_fwd(
        sequence_bounds,
        first_chunks,
        chunk_size,
        *[item for x in inputs for item in flat_with_strides(x)],
        *options,
        q.shape[2],
        state.numpy(),
        _as_array(out),
        errors.numpy(),
        chunk_states.numpy(),
        tasks=len(sequence_bounds) * v.shape[2],
        work=_work(k, v),
    )


def _as_array(x: Tensor) -> np.ndarray:
    """A tensor as an array; bfloat16 as its bits."""
    array: np.ndarray = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return array


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    save_states: bool,
    scale: float,
    normalise: bool,
    g_is_logit: bool,
    beta_is_logit: bool,
) -> tuple[Tensor, ...]:
    out, state = empty(v), empty(initial_state)
    saved_shapes = _saved_shapes(k, v, cu_seqlens, save_states)
    chunk_states, errors = (empty(state, shape) for shape in saved_shapes)
    state.copy_(initial_state)
    options = Options(scale, normalise, g_is_logit, beta_is_logit)
    _run_forward((q, k, v, g, beta), state, out, chunk_states, errors, cu_seqlens, options)
    return out, state, chunk_states, errors


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    save_states: bool,
    scale: float,
    normalise: bool,
    g_is_logit: bool,
    beta_is_logit: bool,
) -> tuple[Tensor, ...]:
    saved = (
        initial_state.new_empty(shape) for shape in _saved_shapes(k, v, cu_seqlens, save_states)
    )
    return v.new_empty(v.shape), initial_state.new_empty(initial_state.shape), *saved


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_states: Tensor,
    errors: Tensor,
    cu_seqlens: Tensor | None,
    dout: Tensor,
    dfinal: Tensor,
    scale: float,
    normalise: bool,
    g_is_logit: bool,
    beta_is_logit: bool,
) -> tuple[Tensor, ...]:
    (batch, time, heads, keys), value_heads = q.shape, v.shape[2]
    grouped = value_heads != heads  # then dq and dk are summed over the value heads of a key head
    like, shape = (dfinal if grouped else q), (batch, time, value_heads, keys)
    dq, dk, dstate = empty(like, shape), empty(like, shape), empty(dfinal)
    dv, dg, dbeta = empty(v), empty(g), empty(beta)
    dstate.copy_(dfinal)
    chunk_size = kernel.choose_chunk_size(keys, v.shape[-1])
    sequence_bounds, first_chunks = _make_chunk_bounds(q, chunk_size, cu_seqlens)
    kernel.gated_delta_rule_bwd(
        sequence_bounds,
        first_chunks,
        chunk_size,
        *[item for x in (q, k, g, beta) for item in flat_with_strides(x)],
        *Options(scale, normalise, g_is_logit, beta_is_logit),
        heads,
        errors.numpy(),
        chunk_states.numpy(),
        *flat_with_strides(dout),
        dstate.numpy(),
        *[_as_array(x) for x in (dq, dk, dv, dg, dbeta)],
        tasks=len(sequence_bounds) * value_heads,
        work=2 * _work(k, v),
    )
    if grouped:
        dq, dk = (x.unflatten(2, (heads, -1)).sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dstate


def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_states: Tensor,
    errors: Tensor,
    cu_seqlens: Tensor | None,
    dout: Tensor,
    dfinal: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g, beta, dfinal))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, cu_seqlens = inputs[:5], inputs[6]
    ctx.save_for_backward(*tensors, *output[2:], cu_seqlens)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_states, ctx.options = inputs[7], inputs[8:]


def _gradient(ctx: Any, dout: Tensor, dfinal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.save_states:
        raise RuntimeError("mmrec::gated_delta_rule has a gradient only with save_states=True")
    gradients = _backward_op(*ctx.saved_tensors, dout, dfinal, *ctx.options)
    return *gradients, None, None, None, None, None, None


def _run_steps(
    inputs: tuple[Tensor, ...],
    initial_state: Tensor,
    state: Tensor,
    out: Tensor,
    cu_seqlens: Tensor | None,
    options: Options,
) -> None:
    """Fill out and state, step by step. initial_state may be state."""
    q, k, v = inputs[:3]
    sequence_bounds = make_sequence_bounds(q.shape[0], q.shape[1], cu_seqlens)
    kernel.gated_delta_rule_step(
        sequence_bounds,
        *[item for x in inputs for item in flat_with_strides(x)],
        *options,
        q.shape[2],
        initial_state.numpy(),
        state.numpy(),
        _as_array(out),
        tasks=len(sequence_bounds) * v.shape[2],
        work=v.numel() * k.shape[-1] * 0.3,
    )


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    normalise: bool,
    g_is_logit: bool,
    beta_is_logit: bool,
) -> tuple[Tensor, Tensor]:
    out, state = empty(v), empty(initial_state)
    options = Options(scale, normalise, g_is_logit, beta_is_logit)
    _run_steps((q, k, v, g, beta), initial_state.contiguous(), state, out, cu_seqlens, options)
    return out, state


def _steps_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), initial_state.new_empty(initial_state.shape)


def _update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    normalise: bool,
    g_is_logit: bool,
    beta_is_logit: bool,
) -> Tensor:
    inputs = tuple(x.unsqueeze(1) for x in (q, k, v, g, beta))
    out, options = empty(inputs[2]), Options(scale, normalise, g_is_logit, beta_is_logit)
    _run_steps(inputs, state, state, out, None, options)
    return out.squeeze(1)


def _update_fake(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *options: Any
) -> Tensor:
    return v.new_empty(v.shape)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta"
_backward_op = register(
    "gated_delta_rule_bwd",
    f"({_INPUTS}, Tensor chunk_states, Tensor errors, Tensor? cu_seqlens, Tensor dout, "
    f"Tensor dfinal, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "gated_delta_rule",
    f"({_INPUTS}, Tensor initial_state, Tensor? cu_seqlens, bool save_states, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)
_steps_op = register(
    "gated_delta_rule_steps",
    f"({_INPUTS}, Tensor initial_state, Tensor? cu_seqlens, {_OPTIONS}) -> (Tensor, Tensor)",
    _steps,
    _steps_fake,
)
# It changes its state, so it has no gradient, and torch registers none.
torch.library.define(
    "mmrec::gated_delta_rule_update",
    f"(Tensor(a!) state, {_INPUTS}, {_OPTIONS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("mmrec::gated_delta_rule_update", "CPU", _update)
torch.library.register_fake("mmrec::gated_delta_rule_update", _update_fake)


def _check_gate(name: str, x: Any, shape: tuple[int, ...], axes: str, q: Tensor) -> Tensor:
    """Broadcast a gate, and cast it to the dtype of the state."""
    dtype = _state_dtype(q)
    allowed = (*LOW_PRECISION, torch.float32, dtype)
    if isinstance(x, Tensor) and x.dtype in allowed:
        return cast(broadcast_to(name, x, shape, axes, x.dtype), dtype)
    return broadcast_to(name, x, shape, axes, q.dtype)  # raises


def _check_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    axes: str,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """The five inputs, checked, in the dtypes that the kernels take.

    ``axes`` are those of batch and time, such as "B, T".
    """
    q, k, v = promote(q, k, v)
    check_input("q", q, f"{axes}, H, K", cu_seqlens)
    check_tensor("k", k, tuple(q.shape), f"{axes}, H, K", q.dtype)
    check_input("v", v, f"{axes}, HV, V", None)
    *outer, heads, keys = q.shape
    *_, value_heads, values = v.shape
    check_tensor("v", v, (*outer, value_heads, values), f"{axes}, HV, V", q.dtype)
    if heads == 0 or value_heads == 0 or value_heads % heads:
        raise ValueError(
            f"v must have a multiple of the {heads} heads of q and k, at least 1; got {value_heads}"
        )
    for name, axis, width in (("q", "K", keys), ("v", "V", values)):
        if not 1 <= width <= MAX_WIDTH:
            raise ValueError(
                f"{name} must have a head width {axis} from 1 to {MAX_WIDTH}; got {width}"
            )
    gates = [
        _check_gate(name, x, (*outer, value_heads), f"{axes}, HV", q)
        for name, x in (("g", g), ("beta", beta))
    ]
    qkv = [x if x.dtype in KERNEL_DTYPES else to_compute_dtype(x) for x in (q, k, v)]
    return *qkv, *gates


def _make_options(
    scale: float | None, keys: int, normalise: bool, g_is_logit: bool, beta_is_logit: bool
) -> Options:
    if scale is None:
        scale = keys**-0.5
    elif not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be finite and not 0, or None for K^-0.5; got {scale}")
    return Options(float(scale), bool(normalise), bool(g_is_logit), bool(beta_is_logit))


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    cu_seqlens: Tensor | None,
    use_logsigmoid_in_kernel: bool,
    check: bool,
    few_steps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments of ``gated_delta_rule`` and compute it.

    ``few_steps``: go step by step where T is at most FEW_STEPS and no gradient is needed.
    """
    inputs = _check_sequences(q, k, v, g, beta, "B, T", cu_seqlens)
    batch, _, value_heads, values = inputs[2].shape
    keys = inputs[0].shape[-1]
    options = _make_options(
        scale, keys, use_qk_l2norm_in_kernel, use_logsigmoid_in_kernel, use_beta_sigmoid_in_kernel
    )
    shape = (sequence_count(batch, cu_seqlens), value_heads, keys, values)
    axes = "B, HV, K, V" if cu_seqlens is None else "N, HV, K, V"
    inputs = (*inputs, resolve_initial_state(initial_state, inputs[3], shape, axes))
    if check:
        names = ("q", "k", "v", "g", "beta", "initial_state")
        require_finite(**dict(zip(names, inputs, strict=True)))
        if not use_logsigmoid_in_kernel and bool((inputs[3] > 0).any()):
            raise ValueError(
                f"g must be a log decay, at most 0; its largest value is {inputs[3].max():g}"
            )
    save_states = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if few_steps and not save_states and q.shape[1] <= FEW_STEPS:
        out, final_state = _steps_op(*inputs, cu_seqlens, *options)
    else:
        out, final_state, *_ = _op(*inputs, cu_seqlens, save_states, *options)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return cast(out, dtype), final_state if output_final_state else None


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    use_logsigmoid_in_kernel: bool = False,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule: a matrix S per value head that keys write to and queries read from.

    ``S_t = α_t S_{t-1} + k_t β_t (v_t - α_t S_{t-1}ᵀ k_t)ᵀ`` and ``o_t = scale S_tᵀ q_t`` with
    ``α = exp(g)``. Value head h uses the queries and keys of head ``h // (HV / H)``. Names, order,
    shapes and defaults are those of ``chunk_gated_delta_rule`` of flash-linear-attention.

    For the backward pass one state in 16 or 32 steps is stored, and an array like v. Without a
    gradient, nothing is.

    Args:
        q: (B, T, H, K) float32, float64, bfloat16 or float16, queries; 1 <= K <= 256.
        k: like q, keys. Their norms should not exceed 1, or S may grow without bound.
        v: (B, T, HV, V), of the dtype of q, values; HV is a multiple of H, 1 <= V <= 256.
        g: (B, T, HV) or a shape that broadcasts to it, log decay of the state, <= 0. Of the dtype
            of q, or float32, bfloat16 or float16.
        beta: like g, writing strength, in [0, 1].
        scale: factor of the queries; K^-0.5 if None.
        initial_state: (N, HV, K, V), S before the first step; zero if None. N is B, or the number
            of packed sequences. float32 if q is bfloat16 or float16, else of the dtype of q.
        output_final_state: return the last S of each sequence, instead of None.
        use_qk_l2norm_in_kernel: divide q by (\\|q\\|² + 1e-6)^½, and k likewise.
        use_beta_sigmoid_in_kernel: beta holds logits; the writing strength is their sigmoid.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1: sequence n has the
            steps from cu_seqlens[n] up to cu_seqlens[n + 1]. None: each batch row is one sequence.
        use_logsigmoid_in_kernel: g holds logits; α is their sigmoid.
        check: also raise ValueError for NaN and infinity, and for g above 0 where it is the log
            decay; costs a pass over the inputs.

    Returns:
        o: (B, T, HV, V), of the dtype of q.
        final_state: (N, HV, K, V), or None.

        Both are differentiable once, in reverse mode. bfloat16 and float16 are computed in float32,
        and the final state is float32 then. A sequence that is cut at a multiple of 16 steps
        and continued with the final state gives the same bits, at other steps up to rounding.

    Raises:
        ValueError: a shape, dtype, device, scale or cu_seqlens is not as above.
        RuntimeError: a second derivative, or one in forward mode, is asked for.

    Source: Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule"
    (arXiv:2412.06464), eq. 10.
    """
    return _compute(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel,
        cu_seqlens,
        use_logsigmoid_in_kernel,
        check,
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    use_logsigmoid_in_kernel: bool = False,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``gated_delta_rule`` for decoding, where T is 1 or a few. Arguments and results are those.

    Without a gradient, up to 8 steps go one by one and read the initial state where it lies;
    otherwise it is ``gated_delta_rule`` itself. Both agree to rounding.
    ``gated_delta_rule_update`` takes one step in place.
    """
    return _compute(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel,
        cu_seqlens,
        use_logsigmoid_in_kernel,
        check,
        few_steps=True,
    )


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Delta rule: ``gated_delta_rule`` without decay, g = 0.

    Names, order, shapes and defaults are those of ``chunk_delta_rule`` of flash-linear-attention.
    Arguments, results and errors are those of ``gated_delta_rule``.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
    Length" (arXiv:2406.06484).
    """
    g = torch.zeros(())
    return gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        check=check,
    )


def gated_delta_rule_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    *,
    use_logsigmoid_in_kernel: bool = False,
) -> Tensor:
    """One step of ``gated_delta_rule`` for decoding, in place on a state.

    Args:
        state: (B, HV, K, V) float32, or float64 if q is, contiguous; S before the step, and after
            the call S after it.
        q: (B, H, K), queries, as in ``gated_delta_rule`` without the axis T.
        k: like q, keys.
        v: (B, HV, V), values.
        g: (B, HV) or a shape that broadcasts to it, log decay.
        beta: like g, writing strength.
        scale: see ``gated_delta_rule``; so are the three flags.
        use_qk_l2norm_in_kernel: normalise q and k.
        use_beta_sigmoid_in_kernel: beta holds logits.
        use_logsigmoid_in_kernel: g holds logits.

    Returns:
        o (B, HV, V), of the dtype of q.

    Raises:
        ValueError: a shape, dtype, device or scale is not as above.
        RuntimeError: a gradient is asked for; a step in place has none.
    """
    inputs = _check_sequences(q, k, v, g, beta, "B", None)
    batch, value_heads, values = inputs[2].shape
    keys = inputs[0].shape[-1]
    check_tensor("state", state, (batch, value_heads, keys, values), "B, HV, K, V", inputs[3].dtype)
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous; got strides {state.stride()}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (state, *inputs)):
        raise RuntimeError(
            "gated_delta_rule_update has no gradient: use gated_delta_rule, or torch.no_grad()"
        )
    options = _make_options(
        scale, keys, use_qk_l2norm_in_kernel, use_logsigmoid_in_kernel, use_beta_sigmoid_in_kernel
    )
    out: Tensor = torch.ops.mmrec.gated_delta_rule_update(state, *inputs, *options)
    return cast(out, q.dtype)
