"""Mamba's selective scan as torch ops, with the names and shapes of mamba-ssm.

Axes: B batch, D channels, L time, N state size, G groups, H heads, P head width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmrec.kernels._channel_tiles import TILE_STEPS, empty_like, span, with_strides
from mmrec.kernels._in_place import (
    array_of,
    check_places,
    needs_gradient,
    places_of,
    register_in_place,
)
from mmrec.kernels._math import cdiv
from mmrec.kernels._register import register
from mmrec.kernels._simd import LANES
from mmrec.kernels._tensors import (
    cast,
    check_input,
    check_tensor,
    flat,
    require_finite,
    resolve_initial_state,
)
from mmrec.kernels.causal_conv1d.op import causal_conv1d_fn
from mmrec.kernels.selective_scan import kernel, reference


def _grouped(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A tensor (B, G, N, L) as a 1-D array, and its strides."""
    return span(x), np.array(x.stride(), np.int64)


def _strided(x: Tensor | None, like: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``with_strides`` of a tensor (B, D, L), or of none: an empty array."""
    return with_strides(like.new_empty((0, 0, 0)) if x is None else x)


def _vector(x: Tensor | None, like: Tensor) -> np.ndarray:
    """A tensor (D,), or zeros."""
    return flat(like.new_zeros(like.shape[1]) if x is None else x)


def _shapes(u: Tensor, b: Tensor) -> tuple[np.ndarray, int]:
    """(G, D / G, N, L) and the number of slices per group."""
    groups, states = b.shape[1:3]
    size = u.shape[1] // groups
    slices = cdiv(cdiv(size, LANES), kernel.SLICE)
    return np.array((groups, size, states, u.shape[2]), np.int64), slices


def _tile_states_shape(u: Tensor, b: Tensor, save_states: bool) -> tuple[int, ...]:
    groups, states = b.shape[1:3]
    blocks = groups * cdiv(u.shape[1] // groups, LANES)
    tiles = cdiv(u.shape[2], TILE_STEPS) if save_states else 0
    return (u.shape[0], tiles, blocks, states, LANES)


def _forward(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor,
    delta_softplus: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, final, tile_states = _forward_fake(
        u, delta, a, b, c, d, z, delta_bias, initial, delta_softplus, save_states
    )
    sizes, slices = _shapes(u, b)
    kernel.selective_scan_fwd(
        sizes,
        delta_softplus,
        *_strided(u, u),
        *_strided(delta, u),
        *_strided(z, u),
        flat(a),
        *_grouped(b),
        *_grouped(c),
        _vector(d, u),
        _vector(delta_bias, u),
        flat(initial),
        *_strided(out, u),
        flat(final),
        flat(tile_states),
        tasks=u.shape[0] * b.shape[1] * slices,
        work=0.4 * u.numel() * b.shape[2],
    )
    return out, final, tile_states


def _forward_fake(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor,
    delta_softplus: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tile_states = u.new_empty(_tile_states_shape(u, b, save_states))
    return empty_like(delta), initial.new_empty(initial.shape), tile_states


def _backward(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    tile_states: Tensor,
    dout: Tensor,
    dfinal: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    sizes, slices = _shapes(u, b)
    batch, channels = u.shape[:2]
    du, ddelta = empty_like(u), empty_like(delta)
    dz = u.new_empty(0) if z is None else empty_like(z)
    da, dinitial = u.new_empty(batch, *a.shape), u.new_empty(dfinal.shape)
    db, dc = u.new_empty(slices, *b.shape), u.new_empty(slices, *c.shape)
    dd, dbias = u.new_empty(batch, channels), u.new_empty(batch, channels)
    kernel.selective_scan_bwd(
        sizes,
        delta_softplus,
        *_strided(u, u),
        *_strided(delta, u),
        *_strided(z, u),
        flat(a),
        *_grouped(b),
        *_grouped(c),
        _vector(d, u),
        _vector(delta_bias, u),
        flat(tile_states),
        *_strided(dout, u),
        flat(dfinal),
        *_strided(du, u),
        *_strided(ddelta, u),
        *_strided(None if z is None else dz, u),
        flat(da),
        flat(db),
        flat(dc),
        flat(dd),
        flat(dbias),
        flat(dinitial),
        tasks=batch * b.shape[1] * slices,
        work=0.8 * u.numel() * b.shape[2],
    )
    # NumPy adds the parts in their order
    sums = (torch.from_numpy(x.numpy().sum(0)) for x in (da, db, dc, dd, dbias))
    return du, ddelta, *sums, dz, dinitial


def _backward_fake(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    tile_states: Tensor,
    dout: Tensor,
    dfinal: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    dz = u.new_empty(0) if z is None else empty_like(z)
    vectors = (u.new_empty(u.shape[1]), u.new_empty(u.shape[1]))
    shared = (u.new_empty(x.shape) for x in (a, b, c))
    return empty_like(u), empty_like(delta), *shared, *vectors, dz, u.new_empty(dfinal.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.delta_softplus, ctx.save_states = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradient(ctx: Any, dout: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.save_states:
        raise RuntimeError("mmrec::selective_scan has a gradient only with save_states=True")
    saved = ctx.saved_tensors
    d, z, delta_bias = saved[5:8]
    du, ddelta, da, db, dc, dd, dbias, dz, dinitial = _backward_op(
        *saved, dout, dfinal, ctx.delta_softplus
    )
    return (
        du,
        ddelta,
        da,
        db,
        dc,
        None if d is None else dd,
        None if z is None else dz,
        None if delta_bias is None else dbias,
        dinitial,
        None,
        None,
    )


_INPUTS = (
    "Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, "
    "Tensor? delta_bias, "
)
_backward_op = register(
    "selective_scan_bwd",
    f"({_INPUTS}Tensor tile_states, Tensor dout, Tensor dfinal, bool delta_softplus) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "selective_scan",
    f"({_INPUTS}Tensor initial, bool delta_softplus, bool save_states) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def _check_selection(name: str, x: Tensor, u: Tensor, states: int) -> Tensor:
    """B or C of ``selective_scan_fn`` as (B, G, N, L)."""
    batch, channels, time = u.shape
    if not isinstance(x, Tensor) or x.ndim not in (2, 3, 4):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must have axes (D, N), (B, N, L) or (B, G, N, L); got {got}")
    if x.ndim == 2:
        check_tensor(name, x, (channels, states), "D, N")
        return x[None, :, :, None].expand(batch, channels, states, time)
    if x.ndim == 3:
        check_tensor(name, x, (batch, states, time), "B, N, L")
        return x[:, None]
    groups = x.shape[1]
    check_tensor(name, x, (batch, groups, states, time), "B, G, N, L")
    if groups == 0 or channels % groups:
        raise ValueError(f"G of {name} must divide D = {channels}; got {groups}")
    return x


def _require_real(name: str, x: Any) -> None:
    if isinstance(x, Tensor) and not x.is_floating_point():
        raise ValueError(f"{name} must be real floating-point numbers; got {x.dtype}")


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    check: bool = False,
) -> Any:
    """Selective scan of Mamba, with the names, shapes and results of mamba-ssm.

    ``h_t = exp(δ_t A) h_{t-1} + δ_t B_t u_t`` and ``out_t = (C_t · h_t + D u_t) silu(z_t)`` per
    channel, with ``δ = softplus(delta + delta_bias)``.

    For the backward pass one state in 32 steps is stored; without a gradient, none is.

    Args:
        u: (B, D, L) float32, float64, bfloat16 or float16, in any memory order.
        delta: (B, D, L), the step sizes.
        A: (D, N), real. The decay per step is exp(delta A), so A < 0 as a rule.
        B: (B, N, L), (B, G, N, L) with G groups of D / G channels each, or (D, N) if it does not
            depend on time (correct, but slow).
        C: like B.
        D: (D,) skip connection, or None.
        z: (B, D, L) gate, or None.
        delta_bias: (D,) added to delta, or None.
        delta_softplus: use softplus(delta + delta_bias).
        return_last_state: also return the last state.
        initial_state: (B, D, N) state before the first step; zero if None. (mamba-ssm has none.)
        check: also raise ValueError for NaN and infinity; costs a pass over the inputs.

    Returns:
        out (B, D, L) of the dtype of u and in the memory order of delta; with return_last_state
        the pair (out, h (B, D, N)), where h is float32 (float64 if u is). Both are differentiable
        once, in reverse mode, with respect to every tensor.

    Raises:
        ValueError: a shape, dtype or device is not as above; A is complex.

    Source: Gu, Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    (arXiv:2312.00752).
    """
    check_input("u", u, "B, D, L", None)
    batch, channels, time = u.shape
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    for name, x in {"delta": delta, "A": A, "B": B, "C": C}.items():
        _require_real(name, x)
    check_tensor("delta", delta, (batch, channels, time), "B, D, L")
    states = A.shape[-1] if isinstance(A, Tensor) and A.ndim else 1
    check_tensor("A", A, (channels, states), "D, N")
    b, c = _check_selection("B", B, u, states), _check_selection("C", C, u, states)
    groups = max(b.shape[1], c.shape[1])  # B and C may be grouped differently: take the finer
    if groups % b.shape[1] or groups % c.shape[1]:
        raise ValueError(
            f"the numbers of groups of B and C must divide one another; got {b.shape[1]} and "
            f"{c.shape[1]}"
        )
    b, c = (
        x.repeat_interleave(groups // x.shape[1], 1) if x.shape[1] < groups else x for x in (b, c)
    )
    for name, vector in {"D": D, "delta_bias": delta_bias}.items():
        if vector is not None:
            check_tensor(name, vector, (channels,), "D")
    if z is not None:
        check_tensor("z", z, (batch, channels, time), "B, D, L")
    state_shape = (batch, channels, states)
    like = u if u.dtype == dtype else u.new_empty(0, dtype=dtype)
    initial = resolve_initial_state(initial_state, like, state_shape, "B, D, N")
    if check:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
        values = (u, delta, A, B, C, D, z, delta_bias, initial)
        require_finite(**dict(zip(names, values, strict=True)))
    tensors = [
        None if x is None else cast(x, dtype)
        for x in (u, delta, A, b, c, D, z, delta_bias, initial)
    ]
    save_states = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    )
    out, last, _ = _op(*tensors, delta_softplus, save_states)
    out = cast(out, u.dtype)
    return (out, last) if return_last_state else out


def _headed(x: Tensor) -> tuple[int, int, int]:
    """The strides of a tensor (B, H, P), or (B, P) of one head."""
    strides = x.stride()
    return (strides[0], 0, strides[1]) if len(strides) == 2 else strides  # type: ignore[return-value]


def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    z: Tensor | None,
    bias: Tensor,
    places: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    batch, width = x.shape[0], x.shape[-1]
    heads = x.shape[1] if x.ndim == 3 else 1
    numbers = places_of("state_batch_indices", places, batch, state.shape[0])
    out = x.new_empty(x.shape) if places is None else x.new_zeros(x.shape)
    kernel.selective_state_update(
        dt_softplus,
        numbers,
        array_of(state),
        array_of(x.contiguous()),
        array_of(dt),
        *_headed(dt),
        array_of(a),
        *((0, *a.stride()) if a.ndim == 2 else a.stride()),
        array_of(b.contiguous()),
        array_of(c.contiguous()),
        b.shape[1] if b.ndim == 3 else 1,
        array_of(skip.contiguous()),
        array_of(out[:0] if z is None else z.contiguous()),
        array_of(bias),
        *((0, *bias.stride()) if bias.ndim == 1 else bias.stride()),
        array_of(out),
        heads,
        width,
        a.shape[-1],
        tasks=batch * heads * cdiv(width, kernel.BLOCK),
        work=batch * heads * width * (5.0 + a.shape[-1]),
    )
    return out


def _update_fake(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    z: Tensor | None,
    bias: Tensor,
    places: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    return x.new_empty(x.shape)


_update_op = register_in_place(
    "selective_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor skip, Tensor? z, "
    "Tensor bias, Tensor? places, bool dt_softplus) -> Tensor",
    _update,
    _update_fake,
)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the selective scan of Mamba, or of Mamba 2's recurrence; the state moves on.

    ``state = exp(δ A) state + δ B x`` and ``out = (C · state + D x) silu(z)`` per channel.

    Args:
        state: (B, D, N) or (B, H, P, N), written to.
        x: (B, D) or (B, H, P) float32, float64, bfloat16 or float16. A tensor without the axis of
            heads means one head, here and below.
        dt: like x, the step sizes.
        A: (D, N) or (H, P, N), real.
        B: (B, N) or (B, G, N).
        C: like B.
        D: (D,) or (H, P) skip connection, or None.
        z: like x, gate, or None.
        dt_bias: (D,) or (H, P) added to dt, or None.
        dt_softplus: use softplus(dt + dt_bias).
        state_batch_indices: (B,) int32 or int64: state has more rows than x, and this says which
            row of it belongs to each row of x. A negative number marks a row that is padding: its
            output is 0.

    Returns:
        out, of the shape and dtype of x. If a gradient is asked for, plain torch computes it.

    Raises:
        ValueError: an argument is not as above.
    """
    if not isinstance(state, Tensor) or state.ndim not in (3, 4):
        got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"state must have axes (B, D, N) or (B, H, P, N); got {got}")
    has_heads = state.ndim == 4

    def headed(value: Any, axis: int, ndim: int) -> Any:
        """A tensor without the axis of heads, or groups, where the state has it."""
        short = has_heads and isinstance(value, Tensor) and value.ndim == ndim - 1
        return value.unsqueeze(axis) if short else value

    if has_heads:
        x_, dt, B, C, z = (headed(value, 1, 3) for value in (x, dt, B, C, z))
        A, D, dt_bias = headed(A, 0, 3), headed(D, 0, 2), headed(dt_bias, 0, 2)
    else:
        x_ = x
    channels = "H, P" if has_heads else "D"
    check_input("x", x_, f"B, {channels}", None)
    batch, sizes, states = x_.shape[0], tuple(state.shape[1:-1]), state.shape[-1]
    heads = sizes[0] if has_heads else 1
    rows = batch if state_batch_indices is None else state.shape[0]
    check_tensor("state", state, (rows, *sizes, states), f"B, {channels}, N")
    check_tensor("x", x_, (batch, *sizes), f"B, {channels}")
    check_tensor("dt", dt, (batch, *sizes), f"B, {channels}")
    _require_real("A", A)
    check_tensor("A", A, (*sizes, states), f"{channels}, N")
    grouped = isinstance(B, Tensor) and B.ndim == 3
    groups = B.shape[1] if grouped else 1
    if groups == 0 or heads % groups:
        raise ValueError(f"G of B must divide H = {heads}; got {groups}")
    for name, selection in {"B": B, "C": C}.items():
        shape = (batch, groups, states) if grouped else (batch, states)
        check_tensor(name, selection, shape, "B, G, N" if grouped else "B, N")
    if grouped and not has_heads:
        B, C = B[:, 0], C[:, 0]
    for name, vector in {"D": D, "dt_bias": dt_bias}.items():
        if vector is not None:
            check_tensor(name, vector, sizes, channels)
    if z is not None:
        check_tensor("z", z, (batch, *sizes), f"B, {channels}")
    if state_batch_indices is not None:
        check_places("state_batch_indices", state_batch_indices, batch)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs, step, a, b, c = (cast(t, dtype) for t in (x_, dt, A, B, C))
    skip, gate, bias = (None if t is None else cast(t, dtype) for t in (D, z, dt_bias))
    if needs_gradient(state, inputs, step, a, b, c, skip, gate, bias):
        numbers = places_of("state_batch_indices", state_batch_indices, batch, rows)
        used = torch.from_numpy(np.flatnonzero(numbers >= 0))
        places = torch.from_numpy(numbers)[used]
        past, gates = cast(state, dtype)[places], None if gate is None else gate[used]
        now, by, b, c = (t[used] for t in (inputs, step, b, c))
        result, moved = reference.selective_state_update(
            past, now, by, a, b, c, skip, gates, bias, dt_softplus
        )
        state.index_copy_(0, places, cast(moved, state.dtype))
        out = torch.zeros_like(inputs).index_copy(0, used, result)
    else:
        direct = state.dtype == dtype and state.is_contiguous()
        work = state if direct else state.to(dtype).contiguous()
        if skip is None or bias is None:
            zeros = inputs.new_zeros(()).expand(sizes)
            skip, bias = (zeros if t is None else t for t in (skip, bias))
        a = a if a.stride(-1) in (0, 1) else a.contiguous()
        out = _update_op(
            work, inputs, step, a, b, c, skip, gate, bias, state_batch_indices, dt_softplus
        )
        if not direct:
            state.copy_(work)
    return cast(out, x.dtype).view(x.shape)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The inner part of a Mamba layer: convolution, projections, selective scan, projection.

    Names, shapes and results are those of mamba-ssm. R is the rank of the projection of delta.

    Args:
        xz: (B, 2 D, L), the inputs x and the gates z.
        conv1d_weight: (D, 1, W).
        conv1d_bias: (D,) or None.
        x_proj_weight: (R + 2 N, D), or fewer rows where B or C is given.
        delta_proj_weight: (D, R).
        out_proj_weight: (M, D).
        out_proj_bias: (M,) or None.
        A: (D, N), real.
        B: (D, N), (B, N, L) or (B, G, N, L); None: projected from x.
        C: like B.
        D: (D,) or None.
        delta_bias: (D,) or None.
        B_proj_bias: (N,) added to the projected B, or None.
        C_proj_bias: (N,) added to the projected C, or None.
        delta_softplus: use softplus(delta + delta_bias).
        checkpoint_lvl: 0 or 1. In mamba-ssm, 1 computes the convolution and delta again in the
            backward pass; here they are always kept.
        b_rms_weight: (N,) weight of an RMS norm of the projected B, or None for no norm.
        c_rms_weight: (N,), the same for C.
        dt_rms_weight: (D,), the same for delta.
        b_c_dt_rms_eps: added to the mean squares.

    Returns:
        out (B, L, M).

    Raises:
        ValueError: an argument is not as above.
    """
    check_input("xz", xz, "B, 2 D, L", None)
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1; got {checkpoint_lvl!r}")
    _require_real("A", A)
    if not isinstance(conv1d_weight, Tensor) or conv1d_weight.ndim != 3:
        got = tuple(conv1d_weight.shape) if isinstance(conv1d_weight, Tensor) else conv1d_weight
        raise ValueError(f"conv1d_weight must have axes (D, 1, W); got {got}")
    if xz.shape[1] != 2 * conv1d_weight.shape[0]:
        raise ValueError(
            f"xz must have 2 D = {2 * conv1d_weight.shape[0]} channels; got {xz.shape[1]}"
        )
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.chunk(2, 1)

    u = causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    projected = functional.linear(u.transpose(1, 2), x_proj_weight)
    delta = functional.linear(projected[..., :rank], delta_proj_weight)
    if dt_rms_weight is not None:
        delta = functional.rms_norm(delta, delta.shape[-1:], dt_rms_weight, b_c_dt_rms_eps)

    def selection(given: Tensor | None, found: Tensor, bias: Any, weight: Any) -> Tensor:
        if given is not None:
            return given
        if bias is not None:
            found = found + cast(bias, found.dtype)
        if weight is not None:
            found = functional.rms_norm(found, found.shape[-1:], weight, b_c_dt_rms_eps)
        return found.transpose(1, 2)

    b = selection(B, projected[..., rank : rank + states], B_proj_bias, b_rms_weight)
    c = selection(C, projected[..., -states:], C_proj_bias, c_rms_weight)
    y = selective_scan_fn(u, delta.transpose(1, 2), A, b, c, D, z, delta_bias, delta_softplus)
    return functional.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
