"""Public product scans: checked once, then compiled kernels behind ops of torch's library.

Axes: N sequences (B batch rows, or the packed pieces of one row), T time, D channels.
"""

from typing import Any

import torch
from torch import Tensor

from mmrec.kernels._launch import sequences
from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    check_lead,
    check_values,
    count,
    empty,
    flat,
    narrowed,
    start,
    widen,
)
from mmrec.kernels.cumprod import kernel as product_kernel
from mmrec.kernels.scan import kernel

# Every how many steps a product's exponent is looked at, how far from one the product may then be,
# and beyond which exponents y is 0 or infinity. A float32 lies within 2^-149 and 2^128, so four of
# them more do not take a product out of a float64's range.
_EXPONENTS = {torch.float32: (4, 2.0**100, 900), torch.float64: (1, 1.0, 2000)}


def _blocks(rows: int, width: int) -> tuple[int, int]:
    """Channels a task: whole rows where the sequences feed the threads, else a share of a row; and
    the number of tasks."""
    threads = torch.get_num_threads()
    whole = rows >= 4 * threads or rows % threads == 0
    block = max(width, 1) if whole else max(64, -(-width // threads) + 15 & ~15)
    return block, rows * -(-width // block)


def _cumprod(gamma: Tensor, y0: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, time, width = gamma.shape
    seqs = sequences(batch, time, cu_seqlens)
    y, y0, last = empty(gamma), y0.contiguous(), empty(y0)
    arrays = [x.numpy() for x in (y0, y, last)]
    inputs = (*flat(gamma), *arrays, seqs, *_EXPONENTS[y.dtype])
    if width <= product_kernel.NARROW:
        product_kernel.narrow_cumprod_fwd(*inputs, tasks=len(seqs), work=0.6 * y.numel())
    else:
        block, tasks = _blocks(len(seqs), width)
        product_kernel.cumprod_fwd(*inputs, block, tasks=tasks, work=0.6 * y.numel())
    return y, last


def _log_cumprod(gamma: Tensor, l0: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, time, width = gamma.shape
    seqs = sequences(batch, time, cu_seqlens)
    out, l0, last = empty(gamma), l0.contiguous(), empty(l0)
    arrays = [x.numpy() for x in (l0, out, last)]
    block, tasks = _blocks(len(seqs), width)
    work = 5.0 * out.numel()
    product_kernel.log_cumprod_fwd(*flat(gamma), *arrays, seqs, block, tasks=tasks, work=work)
    return out, last


def _product_fake(gamma: Tensor, s0: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return gamma.new_empty(gamma.shape), s0.new_empty(s0.shape)


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gamma, s0, cu_seqlens = inputs
    ctx.save_for_backward(gamma, s0, output[0], cu_seqlens)


def _cumprod_bwd(
    gamma: Tensor, y0: Tensor, y: Tensor, dy: Tensor, dyt: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, time, width = y.shape
    seqs = sequences(batch, time, cu_seqlens)
    dgamma, dy0 = empty(y), empty(y0)
    y0, dyt, y = y0.contiguous(), dyt.contiguous(), y.contiguous()
    inputs = (y0.numpy(), y.numpy(), *flat(dy), dyt.numpy())
    dg, dy0_ = dgamma.numpy(), dy0.numpy()
    if 4 <= width <= product_kernel.NARROW:  # the scan's adjoint, whose db, written first, is lost
        kernel.narrow_bwd(
            *flat(gamma),
            1,
            *inputs,
            dg,
            dg,
            dy0_,
            seqs,
            False,
            tasks=len(seqs),
            work=0.8 * y.numel(),
        )
    else:
        block, tasks = _blocks(len(seqs), width)
        product_kernel.cumprod_bwd(
            *flat(gamma), *inputs, dg, dy0_, seqs, block, tasks=tasks, work=y.numel()
        )
    return dgamma, dy0


def _log_cumprod_bwd(
    gamma: Tensor, l0: Tensor, out: Tensor, dout: Tensor, dlt: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, time, width = out.shape
    seqs = sequences(batch, time, cu_seqlens)
    dgamma, dl0 = empty(out), empty(l0)
    dlt, out = dlt.contiguous(), out.contiguous()
    arrays = [x.numpy() for x in (dlt, dgamma, dl0)]
    block, tasks = _blocks(len(seqs), width)
    product_kernel.log_cumprod_bwd(
        *flat(gamma),
        out.numpy(),
        *flat(dout),
        *arrays,
        seqs,
        block,
        tasks=tasks,
        work=2.0 * out.numel(),
    )
    return dgamma, dl0


def _product_bwd_fake(
    gamma: Tensor, s0: Tensor, out: Tensor, dout: Tensor, dlast: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), s0.new_empty(s0.shape)


def _register_product(name: str, forward: Any, backward: Any) -> Any:
    pulled = register(
        f"{name}_bwd",
        "(Tensor gamma, Tensor s0, Tensor out, Tensor dout, Tensor dlast, Tensor? cu_seqlens)"
        " -> (Tensor, Tensor)",
        backward,
        _product_bwd_fake,
    )

    def gradient(ctx: Any, dout: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        gamma, s0, out, cu_seqlens = ctx.saved_tensors
        return *pulled(gamma, s0, out, dout, dlast, cu_seqlens), None

    schema = "(Tensor gamma, Tensor s0, Tensor? cu_seqlens) -> (Tensor, Tensor)"
    return register(name, schema, forward, _product_fake, setup=_product_setup, backward=gradient)


_cumprod_op = _register_product("cumprod", _cumprod, _cumprod_bwd)
_log_cumprod_op = _register_product("log_cumprod", _log_cumprod, _log_cumprod_bwd)


def _product(
    op: Any,
    name: str,
    gamma: Tensor,
    s0: Tensor | None,
    cu_seqlens: Tensor | None,
    check: bool,
    fill: float,
    low: float,
) -> tuple[Tensor, Tensor]:
    check_lead("gamma", gamma, "B, T, D", cu_seqlens)
    dtype, shape = gamma.dtype, (count(gamma.shape[0], cu_seqlens), gamma.shape[2])
    wide: Tensor = widen(gamma)  # type: ignore[assignment]
    s0 = start(name, s0, wide, shape, "N, D", fill)
    if check:
        check_values(gamma=wide)
        if bool((wide < low).any()):
            raise ValueError(f"gamma must be >= {low:g}; got {float(wide.min()):g}")
    out, last = op(wide, s0, cu_seqlens)
    return narrowed(out, dtype), last


def cumprod(
    gamma: Tensor,
    y0: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Product scan ``y_t = y_0 ∏_{i≤t} gamma_i`` along time, for any sign of gamma.

    The running product keeps its exponent apart as an integer, so it neither underflows nor
    overflows on the way; only a returned y that is itself out of range becomes 0 or inf. The
    gradient needs no division and is exact where gamma is 0.

    Args:
        gamma: (B, T, D) float32 or float64; or bfloat16 or float16, computed in float32.
        y0: (N, D), the product so far; one if None.
        cu_seqlens: packed sequences, as in ``scan``.
        check: also refuse NaN and infinity.

    Returns:
        y (B, T, D) and the last of each sequence (N, D). Both differentiable once, in reverse mode.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.
    """
    return _product(_cumprod_op, "y0", gamma, y0, cu_seqlens, check, 1.0, float("-inf"))


def log_cumprod(
    gamma: Tensor,
    l0: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logarithm of the product scan, ``l_t = l_0 + Σ_{i≤t} log gamma_i``, for gamma ≥ 0.

    Never underflows: 65,536 factors of 0.5 give -45,426. Sums are kept in float64. From the first
    gamma = 0 on the result is -inf and, being constant there, passes no gradient; gradients
    through the finite part stay exact. A negative gamma gives NaN, or with ``check`` an error.

    Args:
        gamma: (B, T, D) float32 or float64, decays; or bfloat16 or float16, computed in float32.
        l0: (N, D), logarithm of the product so far; zero if None.
        cu_seqlens: packed sequences, as in ``scan``.
        check: also refuse NaN, infinity and negative values.

    Returns:
        l (B, T, D) and the last of each sequence (N, D). Both differentiable once, in reverse mode.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above, or a value with ``check``.
    """
    return _product(_log_cumprod_op, "l0", gamma, l0, cu_seqlens, check, 0.0, 0.0)
