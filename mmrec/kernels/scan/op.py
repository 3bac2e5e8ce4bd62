"""Public scans: checked once, then compiled kernels behind ops of torch's library.

Axes: N sequences (B batch rows, or the packed pieces of one row), T time, D channels.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._launch import sequences
from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    DTYPES,
    HALF,
    check_lead,
    check_values,
    count,
    empty,
    expand,
    flat,
    narrowed,
    start,
    widen,
)
from mmrec.kernels.scan import kernel

COMPLEX = (torch.complex64, torch.complex128)


def _gate(a: Tensor) -> tuple[np.ndarray, int, int, int]:
    """Like ``flat``, but a step's one value for all channels stays one; with the stride over D."""
    if a.shape[2] > 1 and a.stride(2) == 0:
        return *flat(a[:, :, :1]), 0
    return *flat(a), 1


def _scan(
    a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    batch, time, width = b.shape
    seqs = sequences(batch, time, cu_seqlens)
    h, h0, last = empty(b), h0.contiguous(), empty(h0)
    inputs = (*_gate(a), *flat(b), *(x.numpy() for x in (h0, h, last)), seqs)
    work = 0.3 * h.numel() + 10 * batch * time
    narrow = 4 <= width <= kernel.NARROW
    (kernel.narrow_fwd if narrow else kernel.scan_fwd)(*inputs, reverse, tasks=len(seqs), work=work)
    return h, last


def _scan_fake(
    a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), h0.new_empty(h0.shape)


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, h0, cu_seqlens, ctx.reverse = inputs
    ctx.save_for_backward(a, h0, output[0], cu_seqlens)
    ctx.save_for_forward(a, h0, output[0], cu_seqlens)


def _scan_grad(ctx: Any, dh: Tensor, dht: Tensor) -> tuple[Tensor | None, ...]:
    a, h0, h, cu_seqlens = ctx.saved_tensors
    return *scan_bwd(a, h0, h, dh, dht, cu_seqlens, ctx.reverse), None, None


def _scan_bwd(
    a: Tensor,
    h0: Tensor,
    h: Tensor,
    dh: Tensor,
    dht: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, width = h.shape
    seqs = sequences(batch, time, cu_seqlens)
    da, db, dh0 = empty(h), empty(h), empty(h0)
    h0, h, dht = (x.contiguous().resolve_conj() for x in (h0, h, dht))
    outputs = [x.numpy() for x in (dht, da, db, dh0)]
    inputs = (*_gate(a), h0.numpy(), h.numpy(), *flat(dh), *outputs, seqs)
    work = 0.6 * h.numel() + 15 * batch * time
    narrow = 4 <= width <= kernel.NARROW
    (kernel.narrow_bwd if narrow else kernel.scan_bwd)(*inputs, reverse, tasks=len(seqs), work=work)
    return da, db, dh0


def _scan_bwd_fake(
    a: Tensor,
    h0: Tensor,
    h: Tensor,
    dh: Tensor,
    dht: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)


def _shift(x: Tensor, edge: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """x one step later in the walk, and ``edge`` (N, D) at the first step of each sequence."""
    if x.shape[1] == 0:
        return x
    if cu_seqlens is None:
        parts = (x[:, 1:], edge[:, None]) if reverse else (edge[:, None], x[:, :-1])
        return torch.cat(parts, 1)
    full = cu_seqlens[1:] > cu_seqlens[:-1]  # an empty sequence has no first step
    at = (cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1])[full].long()
    return x.roll(-1 if reverse else 1, 1).index_copy(1, at, edge[full][None])


def _scan_bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, h0, h, _, _, cu_seqlens, ctx.reverse = inputs
    ctx.save_for_backward(a, h0, h, output[1], cu_seqlens)


def _scan_bwd_grad(ctx: Any, dda: Tensor, ddb: Tensor, ddh0: Tensor) -> tuple[Tensor | None, ...]:
    """Adjoint of the adjoint, out of the scan itself, so that derivatives of any order exist.

    With k_t = (ddb_t + dda_t h_{t-1}) + a_t k_{t-1} and k_0 = ddh0: dg = k for dh and k_T for dht;
    a_t gets g_t k*_{t-1}, and h_{t-1} gets g_t dda*_t.
    """
    a, h0, h, g, cu_seqlens = ctx.saved_tensors
    before = _shift(h, h0, cu_seqlens, ctx.reverse)
    k, k_last = scan_op(a, ddb + dda * before, ddh0, cu_seqlens, ctx.reverse)
    a_grad = g * _shift(k, ddh0, cu_seqlens, ctx.reverse).conj()
    both = g * dda.conj()  # of h_{t-1}: of h one step before, or of h0 at a sequence's first step
    zero = torch.zeros_like(h0)
    h_grad = _shift(both, zero, cu_seqlens, not ctx.reverse)
    h0_grad = _edges(both, cu_seqlens, h0.shape[0], ctx.reverse)
    return a_grad, h0_grad, h_grad, k, k_last, None, None


def _edges(x: Tensor, cu_seqlens: Tensor | None, rows: int, reverse: bool) -> Tensor:
    """x (B, T, D) at the first step of each sequence's walk, (N, D); zero for empty sequences."""
    if x.shape[1] == 0:
        return x.new_zeros(rows, x.shape[2])
    if cu_seqlens is None:
        return x[:, -1 if reverse else 0]
    at = (cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1]).long().clamp(0, x.shape[1] - 1)
    full = cu_seqlens[1:] > cu_seqlens[:-1]
    return x[0, at] * full[:, None]


def _fold(size: int, axis: int | None, x: Tensor) -> Tensor:
    """Fold a mapped axis of that size (a broadcast one if None) into the channels."""
    x = x.unsqueeze(-2) if axis is None else x.movedim(axis, -2)
    return x.expand(*x.shape[:-2], size, x.shape[-1]).flatten(-2)


def _mapped(name: str) -> Any:
    """The vmap rule of an op whose tensors all have channels last: channels never meet."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        *tensors, cu_seqlens, reverse = args
        if in_dims[-2] is not None:
            raise RuntimeError(f"{name} cannot be mapped over cu_seqlens: pack the sequences")
        size = info.batch_size
        folded = [_fold(size, axis, x) for x, axis in zip(tensors, in_dims, strict=False)]
        made = (scan_bwd if name == "scan_bwd" else scan_op)(*folded, cu_seqlens, reverse)
        parts = tuple(x.unflatten(-1, (size, -1)).movedim(-2, 0) for x in made)
        return parts, (0,) * len(parts)

    return rule


def _scan_jvp(ctx: Any, da: Any, db: Any, dh0: Any, *_: None) -> tuple[Tensor, Tensor]:
    """The tangent of h is the scan of ȧ_t h_{t-1} + ḃ_t under the same coefficients."""
    a, h0, h, cu_seqlens = ctx.saved_tensors
    source = torch.zeros_like(h) if db is None else db
    if da is not None:
        source = source + da * _shift(h, h0, cu_seqlens, ctx.reverse)
    first = torch.zeros_like(h0) if dh0 is None else dh0
    made: tuple[Tensor, Tensor] = scan_op(a, source, first, cu_seqlens, ctx.reverse)
    return made


scan_bwd = register(
    "scan_bwd",
    "(Tensor a, Tensor h0, Tensor h, Tensor dh, Tensor dht, Tensor? cu_seqlens, bool reverse)"
    " -> (Tensor, Tensor, Tensor)",
    _scan_bwd,
    _scan_bwd_fake,
    setup=_scan_bwd_setup,
    backward=_scan_bwd_grad,
    vmap=_mapped("scan_bwd"),
)
scan_op = register(
    "scan",
    "(Tensor a, Tensor b, Tensor h0, Tensor? cu_seqlens, bool reverse) -> (Tensor, Tensor)",
    _scan,
    _scan_fake,
    setup=_scan_setup,
    backward=_scan_grad,
    vmap=_mapped("scan"),
    jvp=_scan_jvp,
)


def scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """First-order linear recurrence ``h_t = a_t h_{t-1} + b_t`` for every channel.

    Args:
        a: coefficients, (B, T, D) or what broadcasts to it: (D,) a channel, (B, T, 1) a token.
        b: (B, T, D) float32, float64, complex64 or complex128, the inputs; or bfloat16 or float16,
            computed in float32.
        h0: (N, D), the state before the first step; zero if None. N is B, or the number of packed
            sequences. In float32 where b is half precision.
        reverse: walk from the last step to the first: ``h_t = a_t h_{t+1} + b_t``.
        cu_seqlens: (N + 1,) int32 or int64, 0 = c_0 ≤ … ≤ c_N = T, with B = 1: sequence n is steps
            c_n to c_{n+1}, and no state or gradient passes from one to the next.
        check: also refuse NaN and infinity, which costs a pass over the inputs.

    Returns:
        h (B, T, D), all states, and the last of each sequence (N, D), the state to go on from.
        Both differentiable, any number of times, in reverse and forward mode and under vmap.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.

    Source: Blelloch, "Prefix Sums and Their Applications" (1990), section 1.4 defines the operator;
    on a CPU the sequential walk reads and writes each array once.
    """
    check_lead("b", b, "B, T, D", cu_seqlens, (*DTYPES, *HALF, *COMPLEX))
    shape, dtype = tuple(b.shape), b.dtype
    a = widen(expand("a", a, shape, "B, T, D", dtype))  # type: ignore[assignment]
    b = widen(b)  # type: ignore[assignment]
    h0 = start("h0", h0, b, (count(shape[0], cu_seqlens), shape[2]), "N, D")
    if check:
        check_values(a=a, b=b, h0=h0)
    h, last = scan_op(a, b, h0, cu_seqlens, reverse)
    return narrowed(h, dtype), last
