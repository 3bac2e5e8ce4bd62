"""Public norm with convolution: checked once, then compiled kernels behind an op of torch's.

Axes: B batch, T time, D channels, K taps, N sequences.
"""

from typing import Any

import torch
from torch import Tensor

from mmrec.kernels._bf16 import flat_bits, line
from mmrec.kernels._launch import sequences
from mmrec.kernels._register import register
from mmrec.kernels._tensors import DTYPES, check, check_lead, count, empty, start
from mmrec.kernels.rmsnorm_conv1d import kernel


def _run(
    x: Tensor, taps: Tensor, before: Tensor, cu_seqlens: Tensor | None, half: bool
) -> tuple[Tensor, Tensor]:
    u, after = _run_fake(x, taps, before, cu_seqlens, half)
    spans = sequences(x.shape[0], x.shape[1], cu_seqlens)
    kernel.norm_conv_fwd(
        *flat_bits(x),
        line(taps),
        taps.shape[0],
        line(before),
        spans,
        x.shape[1],
        line(u),
        line(after),
        tasks=len(spans),
        work=0.3 * x.numel() * (1 + taps.shape[0] / 2),
    )
    return u, after


def _run_fake(
    x: Tensor, taps: Tensor, before: Tensor, cu_seqlens: Tensor | None, half: bool
) -> tuple[Tensor, Tensor]:
    u = x.new_empty(x.shape, dtype=torch.bfloat16) if half else empty(x)
    return u, before.new_empty(before.shape)


def _run_bwd(
    du: Tensor, dafter: Tensor, x: Tensor, taps: Tensor, before: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dbefore = empty(x), empty(before)
    dtaps = taps.new_empty((before.shape[0], *taps.shape))
    spans = sequences(x.shape[0], x.shape[1], cu_seqlens)
    kernel.norm_conv_bwd(
        *flat_bits(x),
        *flat_bits(du),
        line(taps),
        taps.shape[0],
        line(before),
        line(dafter),
        spans,
        x.shape[1],
        line(dx),
        line(dtaps),
        line(dbefore),
        tasks=len(spans),
        work=0.5 * x.numel() * (1 + taps.shape[0] / 2),
    )
    return dx, torch.from_numpy(dtaps.numpy().sum(0)), dbefore  # rows are added in their order


def _run_bwd_fake(
    du: Tensor, dafter: Tensor, x: Tensor, taps: Tensor, before: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(taps), before.new_empty(before.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, taps, before, cu_seqlens, _ = inputs
    ctx.save_for_backward(x, taps, before, cu_seqlens)


def _backward(ctx: Any, du: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
    x, taps, before, cu_seqlens = ctx.saved_tensors
    dx, dtaps, dbefore = _op_bwd(du, dafter, x, taps, before, cu_seqlens)
    return dx, dtaps, dbefore, None, None


_op_bwd = register(
    "norm_conv_bwd",
    "(Tensor du, Tensor dafter, Tensor x, Tensor taps, Tensor before, Tensor? cu_seqlens) "
    "-> (Tensor, Tensor, Tensor)",
    _run_bwd,
    _run_bwd_fake,
)
_op = register(
    "norm_conv",
    "(Tensor x, Tensor taps, Tensor before, Tensor? cu_seqlens, bool half) -> (Tensor, Tensor)",
    _run,
    _run_fake,
    setup=_setup,
    backward=_backward,
)


def norm_conv(
    x: Tensor,
    taps: Tensor,
    before: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    half: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMS norm, then a causal depthwise convolution over time, in one pass.

    ``u_t = Σ_k taps_k n_{t-K+1+k}`` with ``n = x / rms(x)``. With one tap it is ``rms_norm`` with a
    weight.

    Args:
        x: (B, T, D) float32 or float64.
        taps: (K, D), K ≥ 1, of x's dtype; the last one weighs the newest step.
        before: (B, K - 1, D), rows of n before the first step; zero if None.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1; states are then
            (N, K - 1, D).
        half: give u in bfloat16, for a matrix product that takes it so.

    Returns:
        u (B, T, D) and the last K - 1 rows of n. Both differentiable, once, in reverse mode.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: RMS norm of Zhang & Sennrich 2019 (arXiv:1910.07467, eq. 4), no weight of its own.
    """
    check_lead("x", x, "B, T, D", cu_seqlens, DTYPES)
    taken = taps.shape[0] if isinstance(taps, Tensor) and taps.ndim == 2 else 1
    check("taps", taps, (max(1, taken), x.shape[2]), "K, D", x.dtype)
    rows = count(x.shape[0], cu_seqlens)
    axes = "B, K - 1, D" if cu_seqlens is None else "N, K - 1, D"
    before = start("before", before, x, (rows, taken - 1, x.shape[2]), axes)
    out: tuple[Tensor, Tensor] = _op(x, taps, before, cu_seqlens, half)
    return out
