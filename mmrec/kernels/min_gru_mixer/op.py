"""Public gated scan: checked once, then compiled kernels behind an op of torch's.

Axes: B batch, T time, D channels, N sequences.
"""

from typing import Any

import torch
from torch import Tensor

from mmrec.kernels._bf16 import TYPES, flat_bits, line
from mmrec.kernels._launch import sequences
from mmrec.kernels._register import register
from mmrec.kernels._tensors import check, check_lead, count, empty, start
from mmrec.kernels.min_gru_mixer import kernel


def _run(
    p: Tensor, bias: Tensor, h0: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, h_last = _run_fake(p, bias, h0, cu_seqlens, keep)
    spans = sequences(p.shape[0], p.shape[1], cu_seqlens)
    kernel.gated_scan_fwd(
        *flat_bits(p),
        line(bias),
        line(h0),
        spans,
        p.shape[1],
        line(y),
        line(h),
        line(h_last),
        tasks=len(spans),
        work=2.0 * y.numel(),
    )
    return y, h, h_last


def _run_fake(
    p: Tensor, bias: Tensor, h0: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*p.shape[:2], bias.shape[0])
    h = empty(bias, shape if keep else (0,))
    return empty(p, shape), h, empty(h0)


def _run_bwd(
    dy: Tensor,
    dh_last: Tensor,
    p: Tensor,
    bias: Tensor,
    h0: Tensor,
    h: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dp, dbias, dh0 = empty(p), empty(h0), empty(h0)
    spans = sequences(p.shape[0], p.shape[1], cu_seqlens)
    kernel.gated_scan_bwd(
        *flat_bits(p),
        *flat_bits(dy),
        line(bias),
        line(h0),
        line(h),
        line(dh_last),
        spans,
        p.shape[1],
        line(dp),
        line(dbias),
        line(dh0),
        tasks=len(spans),
        work=3.0 * dy.numel(),
    )
    return dp, torch.from_numpy(dbias.numpy().sum(0)), dh0  # rows are added in their order


def _run_bwd_fake(
    dy: Tensor,
    dh_last: Tensor,
    p: Tensor,
    bias: Tensor,
    h0: Tensor,
    h: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return p.new_empty(p.shape), torch.empty_like(bias), h0.new_empty(h0.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    p, bias, h0, cu_seqlens, _ = inputs
    ctx.save_for_backward(p, bias, h0, output[1], cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, _: Tensor | None, dh_last: Tensor | None
) -> tuple[Tensor | None, ...]:
    p, bias, h0, h, cu_seqlens = ctx.saved_tensors
    dy = p.new_zeros(()).expand(h.shape).contiguous() if dy is None else dy
    dh_last = torch.zeros_like(h0) if dh_last is None else dh_last
    dp, dbias, dh0 = _op_bwd(dy, dh_last, p, bias, h0, h, cu_seqlens)
    return dp, dbias, dh0, None, None


_op_bwd = register(
    "gated_scan_bwd",
    "(Tensor dy, Tensor dh_last, Tensor p, Tensor bias, Tensor h0, Tensor h, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    _run_bwd,
    _run_bwd_fake,
)
_op = register(
    "gated_scan",
    "(Tensor p, Tensor bias, Tensor h0, Tensor? cu_seqlens, bool keep) -> (Tensor, Tensor, Tensor)",
    _run,
    _run_fake,
    setup=_setup,
    backward=_backward,
)


def gated_scan(
    p: Tensor, bias: Tensor, h0: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Linear scan with its gates, norm and output gate in one pass: a whole mixer without weights.

    ``h_t = (1 - γ_t) z_t σ(g_t) + γ_t h_{t-1}`` with ``γ_t = σ(f_t + bias)``, and
    ``y_t = rms_norm(h_t) silu(r_t)``: what ``gated_recurrence`` without a weight computes, then a
    norm and a gate, for a quarter of the memory traffic and less.

    Args:
        p: (B, T, 4 D) float32, float64 or bfloat16, one projection whose rows are [z, f, g, r].
        bias: (D,) float32 (float64 with p), added to f.
        h0: (B, D) of bias's dtype, the state before the first step; zero if None.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1; states are (N, D).

    Returns:
        y (B, T, D) of p's dtype and h_T (B or N, D). Both differentiable, once, in reverse mode.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: design of MM-Rec, section 2, with W_g = 0; minGRU (Feng et al. 2024, arXiv:2410.01201).
    """
    check_lead("p", p, "B, T, 4 D", cu_seqlens, TYPES)
    if p.shape[2] % 4:
        raise ValueError(f"p must have axes (B, T, 4 D); got shape {tuple(p.shape)}")
    width = p.shape[2] // 4
    inner = torch.float32 if p.dtype == torch.bfloat16 else p.dtype
    check("bias", bias, (width,), "D", inner)
    rows = count(p.shape[0], cu_seqlens)
    h0 = start("h0", h0, bias, (rows, width), "B, D" if cu_seqlens is None else "N, D")
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (p, bias, h0))
    y, _, h_last = _op(p, bias, h0, cu_seqlens, keep)
    return y, h_last
