"""Public scans: checked once, then compiled kernels under autograd.

Axes: B batch, T time, D channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec.kernels.arrays import check, check_lead, flat
from mmrec.kernels.scan import kernel
from mmrec.kernels.threads import follow_torch


def _block(batch: int, width: int) -> int:
    """Channels a task: whole rows when the batch feeds every thread, else an even share of a row.

    Rows are split no finer than 64 channels: a narrow block touches a new page at every step.
    """
    threads = follow_torch()
    if batch % threads == 0 or batch >= 4 * threads:
        return max(width, 1)
    return max(64, -(-width // threads) + 15 & ~15)


def _state(name: str, state: Tensor | None, x: Tensor, fill: float) -> Tensor:
    shape = (x.shape[0], x.shape[2])
    if state is None:
        return x.new_full(shape, fill)
    check(name, state, shape, "B, D", x)
    return state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.empty(b.shape, dtype=b.dtype)
        start = h0.detach().contiguous()
        kernel.scan_fwd(*flat(a), *flat(b), start.numpy(), h.numpy(), _block(*b.shape[::2]))
        ctx.save_for_backward(a, start, h)
        return h, (h[:, -1].clone() if h.shape[1] else h0.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dht: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h0, h = ctx.saved_tensors
        da, db, dh0 = torch.empty_like(h), torch.empty_like(h), torch.empty_like(h0)
        arrays = [x.numpy() for x in (dht.contiguous(), da, db, dh0)]
        kernel.scan_bwd(*flat(a), h0.numpy(), h.numpy(), *flat(dh), *arrays, _block(*h.shape[::2]))
        return da, db, dh0


def scan(a: Tensor, b: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """First-order linear recurrence ``h_t = a_t h_{t-1} + b_t`` for every channel.

    Args:
        a: (B, T, D) float32 or float64, the coefficients; broadcast views cost no copy.
        b: (B, T, D), the inputs.
        h0: (B, D), the state before the first step; zero if None.

    Returns:
        h (B, T, D), all states, and h_T (B, D), the state to go on from. Both differentiable.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: Blelloch, "Prefix Sums and Their Applications" (1990), section 1.4 defines the operator;
    on a CPU the sequential walk below reads and writes each array once.
    """
    check_lead("b", b, "B, T, D")
    check("a", a, tuple(b.shape), "B, T, D", b)
    return _Scan.apply(a, b, _state("h0", h0, b, 0.0))


class _Cumprod(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gamma: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.empty(gamma.shape, dtype=gamma.dtype)
        start = y0.detach().contiguous()
        kernel.cumprod_fwd(*flat(gamma), start.numpy(), y.numpy(), _block(*y.shape[::2]))
        ctx.save_for_backward(gamma, start, y)
        return y, (y[:, -1].clone() if y.shape[1] else y0.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dyt: Tensor) -> tuple[Tensor, Tensor]:
        gamma, y0, y = ctx.saved_tensors
        dgamma, dy0 = torch.empty_like(y), torch.empty_like(y0)
        arrays = [x.numpy() for x in (dyt.contiguous(), dgamma, dy0)]
        block = _block(*y.shape[::2])
        kernel.cumprod_bwd(*flat(gamma), y0.numpy(), y.numpy(), *flat(dy), *arrays, block)
        return dgamma, dy0


def cumprod(gamma: Tensor, y0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Product scan ``y_t = y_0 ∏_{i≤t} gamma_i`` along time, for any sign of gamma.

    The running product keeps its exponent apart as an integer, so it neither underflows nor
    overflows on the way; only a returned y that is itself out of range becomes 0 or inf. The
    gradient needs no division and is exact where gamma is 0.

    Args:
        gamma: (B, T, D) float32 or float64.
        y0: (B, D), the product so far; one if None.

    Returns:
        y (B, T, D) and y_T (B, D). Both differentiable.

    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    check_lead("gamma", gamma, "B, T, D")
    return _Cumprod.apply(gamma, _state("y0", y0, gamma, 1.0))


class _LogCumprod(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gamma: Tensor, l0: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(gamma.shape, dtype=gamma.dtype)
        start = l0.detach().contiguous()
        kernel.log_cumprod_fwd(*flat(gamma), start.numpy(), out.numpy(), _block(*out.shape[::2]))
        ctx.save_for_backward(gamma, out)
        return out, (out[:, -1].clone() if out.shape[1] else l0.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlt: Tensor) -> tuple[Tensor, Tensor]:
        gamma, out = ctx.saved_tensors
        dgamma, dl0 = (
            torch.empty_like(out),
            torch.empty_like(dlt, memory_format=torch.contiguous_format),
        )
        arrays = [x.numpy() for x in (dlt.contiguous(), dgamma, dl0)]
        kernel.log_cumprod_bwd(
            *flat(gamma), out.numpy(), *flat(dout), *arrays, _block(*out.shape[::2])
        )
        return dgamma, dl0


def log_cumprod(gamma: Tensor, l0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logarithm of the product scan, ``l_t = l_0 + Σ_{i≤t} log gamma_i``, for gamma ≥ 0.

    Never underflows: 65,536 factors of 0.5 give -45,426. Sums are kept in float64. From the first
    gamma = 0 on the result is -inf and, being constant there, passes no gradient; gradients
    through the finite part stay exact. A negative gamma gives NaN.

    Args:
        gamma: (B, T, D) float32 or float64, decays.
        l0: (B, D), logarithm of the product so far; zero if None.

    Returns:
        l (B, T, D) and l_T (B, D). Both differentiable.

    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    check_lead("gamma", gamma, "B, T, D")
    return _LogCumprod.apply(gamma, _state("l0", l0, gamma, 0.0))
