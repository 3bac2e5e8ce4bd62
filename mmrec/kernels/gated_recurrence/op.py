"""Public gated recurrence: checked once, then compiled kernels behind an op of torch's.

Axes: B batch, T time, D channels, N sequences, G blocks of W, P = D / G.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._bf16 import line
from mmrec.kernels._launch import sequences
from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    HALF,
    check_lead,
    check_values,
    count,
    empty,
    expand,
    flat,
    narrowed,
    start,
)
from mmrec.kernels._tensors import check as check_shape
from mmrec.kernels.gated_recurrence import kernel

ROWS = 8  # sequences in a tile, at most: their sums still fit the registers
STRIPE = 128  # rows of dW in a task, at most; the more, the less often dg is read


def _walk(like: Tensor, cu_seqlens: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Where the sequences lie, and who walks with whom: (N, 3) and (tiles, R), -1 for nobody.

    Tiles are as wide as leaves one for every thread; that does not show in the results, because no
    sum depends on who shares a tile. Similar lengths share one, longest first, and the tiles are
    dealt out to the threads in turn.
    """
    spans = sequences(like.shape[0], like.shape[1], cu_seqlens)
    number, threads = len(spans), torch.get_num_threads()
    rounds = -(-number // (ROWS * threads))
    rows = -(-number // max(1, rounds * threads)) or 1
    tiles = np.full((-(-number // rows), rows), -1)
    order = tiles.reshape(-1)[:number]
    if cu_seqlens is None:
        order[:] = np.arange(number)
        return spans, tiles
    order[:] = np.argsort(spans[:, 1] - spans[:, 2], kind="stable")
    return spans, np.concatenate([tiles[first::threads] for first in range(threads)])


def _work(like: Tensor, weight: Tensor) -> float:
    """About how many nanoseconds one thread takes for one pass."""
    return like.numel() * (1.5 + 0.02 * weight.shape[-1] * bool(weight.shape[0]))


def _run(
    z: Tensor,
    gate: Tensor,
    decay: Tensor,
    weight: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    mixed: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h, s = empty(z), empty(z, None if keep else (0,))
    h_last = empty(h0)
    spans, tiles = _walk(z, cu_seqlens)
    kernel.recurrence_fwd(
        *flat(z),
        *flat(gate),
        *flat(decay),
        line(weight),
        weight.shape[-1],
        line(h0),
        spans,
        tiles,
        z.shape[1],
        line(h),
        line(h_last),
        line(s),
        mixed,
        tasks=len(tiles),
        work=_work(z, weight),
    )
    return h, h_last, s


def _run_fake(
    z: Tensor,
    gate: Tensor,
    decay: Tensor,
    weight: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    mixed: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), h0.new_empty(h0.shape), z.new_empty(z.shape if keep else (0,))


def _run_bwd(
    dh: Tensor,
    dh_last: Tensor,
    z: Tensor,
    decay: Tensor,
    weight: Tensor,
    h0: Tensor,
    h: Tensor,
    s: Tensor,
    cu_seqlens: Tensor | None,
    mixed: bool,
    learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dz, dg, df = (empty(z) for _ in range(3))
    dw, dh0 = weight.new_zeros(weight.shape if learn else (0,)), empty(h0)
    spans, tiles = _walk(z, cu_seqlens)
    kernel.recurrence_bwd(
        *flat(z),
        *flat(decay),
        *flat(dh),
        line(weight.transpose(1, 2)),
        weight.shape[-1],
        line(h0),
        spans,
        tiles,
        z.shape[1],
        line(h),
        line(s),
        line(dh_last),
        line(dz),
        line(dg),
        line(df),
        line(dh0),
        mixed,
        tasks=len(tiles),
        work=_work(z, weight),
    )
    if dw.numel():
        share = -(-z.shape[2] // torch.get_num_threads())
        stripe = min(STRIPE, -(-share // ROWS) * ROWS)
        kernel.weight_gradient(
            line(h),
            line(h0),
            line(dg),
            spans,
            z.shape[1],
            weight.shape[-1],
            stripe,
            line(dw),
            tasks=weight.shape[0] * -(-weight.shape[-1] // stripe),
            work=_work(z, weight),
        )
    return dz, dg, df, dw, dh0


def _run_bwd_fake(
    dh: Tensor,
    dh_last: Tensor,
    z: Tensor,
    decay: Tensor,
    weight: Tensor,
    h0: Tensor,
    h: Tensor,
    s: Tensor,
    cu_seqlens: Tensor | None,
    mixed: bool,
    learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dz, dg, df = (z.new_empty(z.shape) for _ in range(3))
    dw = weight.new_empty(weight.shape if learn else (0,))
    return dz, dg, df, dw, h0.new_empty(h0.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, _, decay, weight, h0, cu_seqlens, mixed, _ = inputs
    h, _, s = output
    ctx.save_for_backward(z, decay, weight, h0, h, s, cu_seqlens)
    ctx.mixed = mixed
    ctx.set_materialize_grads(False)  # zeros for s would cost as much as a pass


def _backward(
    ctx: Any, dh: Tensor | None, dh_last: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    h0, h = saved[3:5]
    dh = h.new_zeros(()).expand(h.shape) if dh is None else dh
    dh_last = torch.zeros_like(h0) if dh_last is None else dh_last
    learn = ctx.needs_input_grad[3]
    dz, dg, df, dw, dh0 = _op_bwd(dh, dh_last, *saved, ctx.mixed, learn)
    return dz, dg, df, dw if learn else None, dh0, None, None, None


_op_bwd = register(
    "gated_recurrence_bwd",
    "(Tensor dh, Tensor dh_last, Tensor z, Tensor decay, Tensor weight, Tensor h0, Tensor h, "
    "Tensor s, Tensor? cu_seqlens, bool mixed, bool learn) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_bwd,
    _run_bwd_fake,
)
_op = register(
    "gated_recurrence",
    "(Tensor z, Tensor gate, Tensor decay, Tensor weight, Tensor h0, Tensor? cu_seqlens, "
    "bool mixed, bool keep) -> (Tensor, Tensor, Tensor)",
    _run,
    _run_fake,
    setup=_setup,
    backward=_backward,
)


def _blocks(weight: Tensor | None, z: Tensor) -> Tensor:
    """The diagonal blocks of W, (G, P, P); G = 0 if there is no W."""
    width = z.shape[2]
    if weight is None:
        return z.new_empty((0, width, width))
    if isinstance(weight, Tensor) and weight.ndim == 3:
        size = width // max(1, weight.shape[0])
        if weight.shape[0] * size == width:
            check_shape("weight", weight, (weight.shape[0], size, size), "G, D/G, D/G", z.dtype)
            return weight
    check_shape("weight", weight, (width, width), "D, D", z.dtype)
    return weight[None]


def gated_recurrence(
    z: Tensor,
    gate: Tensor,
    decay: Tensor,
    weight: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    mixed: bool = True,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gated nonlinear recurrence, the short-term memory of MM-Rec.

    ``h_t = (1 - γ_t) ⊙ z_t ⊙ σ(h_{t-1} W + gate_t) + γ_t ⊙ h_{t-1}`` with ``γ_t = σ(decay_t)``;
    with ``mixed=False`` the factor ``1 - γ_t`` is left out; with ``gate = 0`` that is the published
    formula ``h_t = z_t ⊙ σ(W h_{t-1}) + γ ⊙ h_{t-1}``. The activations run inside the kernel.

    Args:
        z: (B, T, D) float32, float64, bfloat16 or float16, candidate values.
        gate: logits added to the recurrent product; broadcasts to (B, T, D), as decay does.
        decay: logits of γ, such as (D,) for a channel or (B, T, 1) for a token.
        weight: (D, D), or (G, D/G, D/G) for a block-diagonal W; None for W = 0.
        h0: (B, D), the state before the first step; zero if None.
        cu_seqlens: (N + 1,) int32 or int64. Packs N sequences in one row, B = 1: number n is
            steps cu_seqlens[n] to cu_seqlens[n + 1]. States are then (N, D).
        check: also refuse NaN and infinity, which costs a pass over the inputs.

    Returns:
        h (B, T, D), all states, of z's dtype, and h_T (B or N, D), the state to go on from.
        Both differentiable, once, in reverse mode. Half precision is computed in float32, and
        states are float32 then.

    Raises:
        ValueError: a shape, dtype or device is not as above, or cu_seqlens does not rise from
            0 to T, or ``check`` finds a value that is not finite.
        RuntimeError: a second derivative or one in forward mode is asked for.

    Source: design of MM-Rec, section 2; the gate on the recurrent product follows the minimal
    gated unit (Zhou et al. 2016, arXiv:1603.09420, eq. 5).
    """
    check_lead("z", z, "B, T, D", cu_seqlens)
    shape, kind = tuple(z.shape), z.dtype
    gate = expand("gate", gate, shape, "B, T, D", kind)
    decay = expand("decay", decay, shape, "B, T, D", kind)
    weight = _blocks(weight, z)
    z, gate, decay, weight = (x.float() if x.dtype in HALF else x for x in (z, gate, decay, weight))
    rows = count(shape[0], cu_seqlens)
    h0 = start("h0", h0, z, (rows, shape[2]), "B, D" if cu_seqlens is None else "N, D")
    if check:
        check_values(z=z, gate=gate, decay=decay, weight=weight, h0=h0)
    inputs = (z, gate, decay, weight, h0)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    h, h_last, _ = _op(*inputs, cu_seqlens, mixed, keep)
    return narrowed(h, kind), h_last
