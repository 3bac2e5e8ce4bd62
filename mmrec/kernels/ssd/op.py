"""Mamba 2's recurrence as a torch op, with the names and shapes of mamba-ssm.

Axes: B batch, L time, H heads, P head width, G groups of heads, N state size, S sequences.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmrec.kernels._channel_tiles import check_seq_idx, sequence_runs
from mmrec.kernels._math import cdiv
from mmrec.kernels._register import register
from mmrec.kernels._simd import LANES
from mmrec.kernels._tensors import (
    cast,
    check_input,
    check_tensor,
    empty,
    flat,
    flat_with_strides,
    make_sequence_bounds,
    require_finite,
    sequence_count,
)
from mmrec.kernels.causal_conv1d.op import causal_conv1d_fn
from mmrec.kernels.ssd import kernel


def _runs(x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> np.ndarray:
    """(S, 5) as kernel.py describes it."""
    batch, time = x.shape[:2]
    if cu_seqlens is None:
        found = sequence_runs(seq_idx, batch, time)
        runs = np.full((len(found), 5), -1, np.int64)
        runs[:, :3] = found[:, :3]
        runs[:, 3] = np.where(found[:, 3] == 1, found[:, 0], -1)
        runs[:, 4] = np.where(found[:, 2] == time, found[:, 0], -1)
        return runs
    bounds = make_sequence_bounds(batch, time, cu_seqlens)
    if seq_idx is not None:
        edges = set(bounds[:, 1:].flatten().tolist())
        told = set(sequence_runs(seq_idx, batch, time)[:, 1:3].flatten().tolist())
        if edges != told:
            raise ValueError(
                f"seq_idx and cu_seqlens must cut at the same steps; got {sorted(told)[:8]} and "
                f"{sorted(edges)[:8]}"
            )
    numbers = np.arange(len(bounds))[:, None]
    return np.concatenate((bounds, numbers, numbers), 1)


def _slices(x: Tensor, b: Tensor) -> int:
    """Tasks per group and sequence."""
    return cdiv(x.shape[2] // b.shape[2], kernel.SLICE)


def _work(x: Tensor, b: Tensor) -> float:
    """Estimate of the nanoseconds that the forward pass takes on one thread."""
    return x.numel() * (kernel.CHUNK + 4 * b.shape[3]) / 25


def _forward(
    x: Tensor,
    dt: Tensor,
    g: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial: Tensor,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, final, chunk_states = (
        empty(x, y.shape)
        for y in _forward_fake(x, dt, g, b, c, skip, initial, seq_idx, cu_seqlens, save_states)
    )
    runs = _runs(x, seq_idx, cu_seqlens)
    kernel.ssd_fwd(
        runs,
        b.shape[2],
        *flat_with_strides(x),
        flat(dt),
        flat(g),
        *flat_with_strides(b),
        *flat_with_strides(c),
        flat(skip),
        initial.contiguous().numpy(),
        out.numpy(),
        final.numpy(),
        chunk_states.numpy(),
        tasks=len(runs) * b.shape[2] * _slices(x, b),
        work=_work(x, b),
    )
    return out, final, chunk_states


def _forward_fake(
    x: Tensor,
    dt: Tensor,
    g: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial: Tensor,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, heads, width = x.shape
    chunks = cdiv(time, kernel.CHUNK) if save_states else 0
    padded = (cdiv(size, LANES) * LANES for size in (b.shape[3], width))
    chunk_states = x.new_empty(batch, chunks, heads, *padded)
    return x.new_empty(x.shape), initial.new_empty(initial.shape), chunk_states


def _backward(
    x: Tensor,
    dt: Tensor,
    g: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial: Tensor,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, ...]:
    runs = _runs(x, seq_idx, cu_seqlens)
    dx, ddt, dg, dinitial = (empty(like, like.shape) for like in (x, dt, g, initial))
    slices = _slices(x, b)
    db, dc = empty(b, (slices, *b.shape)), empty(c, (slices, *c.shape))
    dskip = skip.new_empty(len(runs), *skip.shape)
    kernel.ssd_bwd(
        runs,
        b.shape[2],
        *flat_with_strides(x),
        flat(dt),
        flat(g),
        *flat_with_strides(b),
        *flat_with_strides(c),
        flat(skip),
        initial.contiguous().numpy(),
        chunk_states.numpy(),
        *flat_with_strides(dy),
        dfinal.contiguous().numpy(),
        dx.numpy(),
        ddt.numpy(),
        dg.numpy(),
        db.numpy(),
        dc.numpy(),
        dskip.numpy(),
        dinitial.numpy(),
        tasks=len(runs) * b.shape[2] * slices,
        work=3 * _work(x, b),
    )
    # NumPy adds the parts in their order
    db, dc, dskip = (torch.from_numpy(part.numpy().sum(0)) for part in (db, dc, dskip))
    return dx, ddt, dg, db, dc, dskip, dinitial


def _backward_fake(
    x: Tensor,
    dt: Tensor,
    g: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial: Tensor,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(like.shape) for like in (x, dt, g, b, c, skip, initial))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.save_states = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradient(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.save_states:
        raise RuntimeError("mmrec::ssd has a gradient only with save_states=True")
    return *_backward_op(*ctx.saved_tensors, dy, dfinal), None, None, None


_INPUTS = (
    "Tensor x, Tensor dt, Tensor g, Tensor b, Tensor c, Tensor skip, Tensor initial, "
    "Tensor? seq_idx, Tensor? cu_seqlens, "
)
_backward_op = register(
    "ssd_bwd",
    f"({_INPUTS}Tensor chunk_states, Tensor dy, Tensor dfinal) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "ssd",
    f"({_INPUTS}bool save_states) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def _check_chunk_size(chunk_size: int) -> None:
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer >= 1; got {chunk_size!r}")


def _skip(name: str, D: Tensor | None, x: Tensor) -> Tensor:
    """D as (H, P)."""
    heads, width = x.shape[2:]
    if D is None:
        return x.new_zeros(heads, width)
    if isinstance(D, Tensor) and D.ndim == 1:
        check_tensor(name, D, (heads,), "H")
        return D[:, None].expand(heads, width)
    check_tensor(name, D, (heads, width), "H, P")
    return D


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    *,
    check: bool = False,
) -> Any:
    """The recurrence of Mamba 2 (SSD), with the names, shapes and results of mamba-ssm.

    ``S_t = exp(δ_t A) S_{t-1} + δ_t x_t B_tᵀ`` and ``y_t = (S_t C_t + D x_t) silu(z_t)`` per head,
    with ``δ = clamp(softplus(dt + dt_bias), *dt_limit)``.

    For the backward pass one state in 64 steps is stored; without a gradient, none is.

    Args:
        x: (B, L, H, P) float32, float64, bfloat16 or float16.
        dt: (B, L, H), the step sizes.
        A: (H,); the decay per step is exp(dt A), so A < 0 as a rule.
        B: (B, L, G, N), G groups of H / G heads each.
        C: like B.
        chunk_size: steps of a chunk in mamba-ssm. Here the kernel has its own chunks, and the
            results do not depend on it.
        D: (H,) or (H, P) skip connection, or None.
        z: (B, L, H, P) gate, or None.
        dt_bias: (H,) added to dt, or None.
        initial_states: (B, H, P, N), S before the first step; zero if None. (S, H, P, N) with
            cu_seqlens.
        seq_idx: (B, L) int32 or int64: packs sequences in a row. Equal neighbours belong to one
            sequence, and nothing passes from one to the next. The initial state is that of the
            first sequence of a row, the final state that of the last.
        cu_seqlens: (S + 1,) int32 or int64: packs S sequences in one row, B = 1: sequence n has the
            steps from cu_seqlens[n] up to cu_seqlens[n + 1]. Where seq_idx is given too, it cuts at
            the same steps.
        dt_softplus: use softplus(dt + dt_bias).
        dt_limit: smallest and largest δ.
        return_final_states: also return the last state of each row (B, H, P, N).
        return_varlen_states: also return the last state of each of the S sequences of cu_seqlens.
        check: also raise ValueError for NaN and infinity; costs a pass over the inputs.

    Returns:
        out (B, L, H, P) of the dtype of x; or a tuple of out, then the final states, then the
        states of the sequences, as asked for. States are float32 (float64 if x is). All are
        differentiable once, in reverse mode, with respect to every tensor.

    Raises:
        ValueError: an argument is not as above.

    Source: Dao, Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), section 6.
    """
    check_input("x", x, "B, L, H, P", cu_seqlens)
    batch, time, heads, width = x.shape
    _check_chunk_size(chunk_size)
    check_tensor("dt", dt, (batch, time, heads), "B, L, H")
    check_tensor("A", A, (heads,), "H")
    if not isinstance(B, Tensor) or B.ndim != 4:
        got = tuple(B.shape) if isinstance(B, Tensor) else type(B).__name__
        raise ValueError(f"B must have axes (B, L, G, N); got {got}")
    groups, states = B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"G of B must divide H = {heads}; got {groups}")
    for name, selection in {"B": B, "C": C}.items():
        check_tensor(name, selection, (batch, time, groups, states), "B, L, G, N")
    skip = _skip("D", D, x)
    if z is not None:
        check_tensor("z", z, (batch, time, heads, width), "B, L, H, P")
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, (heads,), "H")
    if seq_idx is not None:
        check_seq_idx(seq_idx, batch, time)
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states needs cu_seqlens; got None")
    rows = sequence_count(batch, cu_seqlens)
    state_shape = (rows, heads, width, states)
    if initial_states is not None:
        check_tensor("initial_states", initial_states, state_shape, "B or S, H, P, N")
    if check:
        names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
        values = (x, dt, A, B, C, D, z, dt_bias, initial_states)
        require_finite(**dict(zip(names, values, strict=True)))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = cast(dt, dtype)
    if dt_bias is not None:
        step = step + cast(dt_bias, dtype)
    if dt_softplus:
        step = functional.softplus(step)
    if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
        step = step.clamp(*dt_limit)
    initial = initial_states
    if initial is None:
        initial = x.new_zeros(state_shape, dtype=dtype)
    tensors = [cast(t, dtype) for t in (x, step, step * cast(A, dtype), B, C, skip, initial)]
    save_states = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    y, last, _ = _op(*tensors, seq_idx, cu_seqlens, save_states)
    if z is not None:
        y = y * functional.silu(cast(z, dtype))
    results = [cast(y, x.dtype)]
    if return_final_states:
        results.append(last if cu_seqlens is None else last[-1:])
    if return_varlen_states:
        results.append(last)
    return results[0] if len(results) == 1 else tuple(results)


def _rms_norm_gated(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """RMS norm within groups of channels, times silu(z) after it or before it; in float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gate, y = functional.silu(cast(z, dtype)), cast(x, dtype)
    if not norm_before_gate:
        y = y * gate
    y = functional.rms_norm(y.unflatten(-1, (-1, group_size)), (group_size,), eps=eps).flatten(-2)
    y = y * cast(weight, dtype)
    return cast(y * gate if norm_before_gate else y, x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """The inner part of a Mamba 2 layer: convolution, recurrence, gated norm, output projection.

    Names, shapes and results are those of mamba-ssm; dim = H P, and channels of the convolution
    are dim + 2 G N.

    Args:
        zxbcdt: (B, L, 2 dim + 2 G N + H), the input projection: gate, channels of the convolution,
            step sizes. Columns beyond that, in front, are an MLP: the first half gates the second
            by silu, and its outputs come in front of the others.
        conv1d_weight: (dim + 2 G N, W).
        conv1d_bias: (dim + 2 G N,) or None.
        dt_bias: (H,).
        A: (H,).
        D: (H,) or (H, P).
        chunk_size: see ``mamba_chunk_scan_combined``.
        initial_states: (B, H, P, N) or None.
        seq_idx: (B, L) int32 or int64, packs sequences in a row, or None.
        dt_limit: smallest and largest step size.
        return_final_states: also return the last states (B, H, P, N).
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: (dim,) of the gated RMS norm over groups of dim / G channels. None: the
            gate multiplies the outputs, and there is no norm.
        rmsnorm_eps: added to the mean square.
        outproj_weight: (M, outputs) or None for no output projection.
        outproj_bias: (M,) or None.
        headdim: P, needed if D is (H,).
        ngroups: G.
        norm_before_gate: whether the norm comes before the multiplication by silu(z).

    Returns:
        out (B, L, dim) or (B, L, M); with return_final_states the pair (out, final states).

    Raises:
        ValueError: an argument is not as above.
    """
    check_input("zxbcdt", zxbcdt, "B, L, columns", None)
    columns = zxbcdt.shape[2]
    if not isinstance(D, Tensor) or D.ndim not in (1, 2) or (D.ndim == 1 and headdim is None):
        raise ValueError(
            "D must have axes (H, P), or (H) with headdim given; got "
            f"{tuple(D.shape) if isinstance(D, Tensor) else type(D).__name__}, headdim={headdim}"
        )
    heads = D.shape[0]
    width = D.shape[1] if D.ndim == 2 else int(headdim or 0)
    dim = heads * width
    if ngroups < 1 or heads % ngroups:
        raise ValueError(f"ngroups must divide H = {heads}; got {ngroups}")
    channels = conv1d_weight.shape[0]
    states = (channels - dim) // ngroups // 2
    mlp = (columns - dim - channels - heads) // 2
    if states < 1 or mlp < 0 or channels != dim + 2 * ngroups * states:
        raise ValueError(
            f"zxbcdt must have 2 dim + 2 G N + H columns and conv1d_weight dim + 2 G N rows, with "
            f"dim = {dim}, G = {ngroups}, H = {heads}; got {columns} and {channels}"
        )
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError("outproj_bias needs outproj_weight; got None")
    before, z, xbc, dt = zxbcdt.split([2 * mlp, dim, channels, heads], -1)
    convolved = causal_conv1d_fn(
        xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation
    ).transpose(1, 2)
    x, b, c = convolved.split([dim, ngroups * states, ngroups * states], -1)
    z = z.unflatten(-1, (heads, width))
    y, final = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, width)),
        dt,
        A,
        b.unflatten(-1, (ngroups, states)),
        c.unflatten(-1, (ngroups, states)),
        chunk_size,
        D=D,
        z=z if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    out = y.flatten(2)
    if rmsnorm_weight is not None:
        check_tensor("rmsnorm_weight", rmsnorm_weight, (dim,), "dim")
        out = _rms_norm_gated(
            out, z.flatten(2), rmsnorm_weight, rmsnorm_eps, dim // ngroups, norm_before_gate
        )
    if mlp > 0:
        gate, value = before.chunk(2, -1)
        out = torch.cat((functional.silu(gate) * value, out), -1)
    if outproj_weight is not None:
        out = functional.linear(cast(out, outproj_weight.dtype), outproj_weight, outproj_bias)
    return (out, final) if return_final_states else out
