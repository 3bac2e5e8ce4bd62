"""Product scans as torch ops.

No preset of the model uses the product scans: a reader of the model may skip this folder.

Axes: B batch, T time, D channels, N sequences (B, or the packed sequences of one row).
"""

from typing import Any

import torch
from torch import Tensor

from mmrec.kernels._math import cdiv
from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    cast,
    check_input,
    empty,
    flat_with_strides,
    make_sequence_bounds,
    require_finite,
    resolve_initial_state,
    sequence_count,
    to_compute_dtype,
)
from mmrec.kernels.cumprod import kernel
from mmrec.kernels.scan import kernel as scan_kernel

_EXPONENT_RULES = {torch.float32: (4, 2.0**100, 900), torch.float64: (1, 1.0, 2000)}
"""``every``, ``limit`` and ``top`` of the kernel by dtype. ``top`` is the exponent beyond which a
product is 0 or infinity in that dtype. A float32 factor lies within 2^-149 and 2^128, so four of
them do not take a product within ``limit`` of one out of the range of a float64."""


def _split_channels(sequences: int, width: int) -> tuple[int, int]:
    """Channels per task, and the number of tasks.

    A task takes all channels if the sequences suffice for the threads, else a share of them.
    """
    threads = torch.get_num_threads()
    unsplit = sequences >= 4 * threads or sequences % threads == 0
    block = max(width, 1) if unsplit else max(64, cdiv(width, threads) + 15 & ~15)
    return block, sequences * cdiv(width, block)


def _cumprod_forward(
    gamma: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, time, width = gamma.shape
    sequence_bounds = make_sequence_bounds(batch, time, cu_seqlens)
    initial_state = initial_state.contiguous()
    y, final_state = empty(gamma), empty(initial_state)
    arrays = [x.numpy() for x in (initial_state, y, final_state)]
    args = (*flat_with_strides(gamma), *arrays, sequence_bounds, *_EXPONENT_RULES[y.dtype])
    work = 0.6 * y.numel()
    if width <= kernel.MAX_NARROW:
        kernel.cumprod_narrow_fwd(*args, tasks=len(sequence_bounds), work=work)
    else:
        block, tasks = _split_channels(len(sequence_bounds), width)
        kernel.cumprod_fwd(*args, block, tasks=tasks, work=work)
    return y, final_state


def _log_cumprod_forward(
    gamma: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, time, width = gamma.shape
    sequence_bounds = make_sequence_bounds(batch, time, cu_seqlens)
    initial_state = initial_state.contiguous()
    out, final_state = empty(gamma), empty(initial_state)
    arrays = [x.numpy() for x in (initial_state, out, final_state)]
    block, tasks = _split_channels(len(sequence_bounds), width)
    args = (*flat_with_strides(gamma), *arrays, sequence_bounds, block)
    kernel.log_cumprod_fwd(*args, tasks=tasks, work=5.0 * out.numel())
    return out, final_state


def _forward_fake(
    gamma: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return gamma.new_empty(gamma.shape), initial_state.new_empty(initial_state.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gamma, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(gamma, initial_state, output[0], cu_seqlens)


def _cumprod_backward(
    gamma: Tensor,
    initial_state: Tensor,
    y: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, time, width = y.shape
    sequence_bounds = make_sequence_bounds(batch, time, cu_seqlens)
    dgamma, dinitial = empty(y), empty(initial_state)
    initial_state, dfinal, y = (x.contiguous() for x in (initial_state, dfinal, y))
    args = (initial_state.numpy(), y.numpy(), *flat_with_strides(dy), dfinal.numpy())
    if 4 <= width <= kernel.MAX_NARROW:
        # the adjoint of the scan, which writes db before da: dgamma in place of db is overwritten
        scan_kernel.scan_narrow_bwd(
            *flat_with_strides(gamma),
            1,
            *args,
            dgamma.numpy(),
            dgamma.numpy(),
            dinitial.numpy(),
            sequence_bounds,
            False,
            tasks=len(sequence_bounds),
            work=0.8 * y.numel(),
        )
    else:
        block, tasks = _split_channels(len(sequence_bounds), width)
        kernel.cumprod_bwd(
            *flat_with_strides(gamma),
            *args,
            dgamma.numpy(),
            dinitial.numpy(),
            sequence_bounds,
            block,
            tasks=tasks,
            work=y.numel(),
        )
    return dgamma, dinitial


def _log_cumprod_backward(
    gamma: Tensor,
    initial_state: Tensor,
    out: Tensor,
    dout: Tensor,
    dfinal: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, time, width = out.shape
    sequence_bounds = make_sequence_bounds(batch, time, cu_seqlens)
    dgamma, dinitial = empty(out), empty(initial_state)
    dfinal, out = dfinal.contiguous(), out.contiguous()
    block, tasks = _split_channels(len(sequence_bounds), width)
    kernel.log_cumprod_bwd(
        *flat_with_strides(gamma),
        out.numpy(),
        *flat_with_strides(dout),
        dfinal.numpy(),
        dgamma.numpy(),
        dinitial.numpy(),
        sequence_bounds,
        block,
        tasks=tasks,
        work=2.0 * out.numel(),
    )
    return dgamma, dinitial


def _backward_fake(
    gamma: Tensor,
    initial_state: Tensor,
    out: Tensor,
    dout: Tensor,
    dfinal: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), initial_state.new_empty(initial_state.shape)


def _register_product_scan(name: str, forward: Any, backward: Any) -> Any:
    backward_op = register(
        f"{name}_bwd",
        "(Tensor gamma, Tensor initial_state, Tensor out, Tensor dout, Tensor dfinal, "
        "Tensor? cu_seqlens) -> (Tensor, Tensor)",
        backward,
        _backward_fake,
    )

    def gradient(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        gamma, initial_state, out, cu_seqlens = ctx.saved_tensors
        return *backward_op(gamma, initial_state, out, dout, dfinal, cu_seqlens), None

    return register(
        name,
        "(Tensor gamma, Tensor initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
        forward,
        _forward_fake,
        setup_context=_setup_context,
        backward=gradient,
    )


_cumprod_op = _register_product_scan("cumprod", _cumprod_forward, _cumprod_backward)
_log_cumprod_op = _register_product_scan("log_cumprod", _log_cumprod_forward, _log_cumprod_backward)


def _product_scan(
    op: Any,
    gamma: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    check_finite: bool,
    fill: float,
    least: float,
) -> tuple[Tensor, Tensor]:
    """Check the arguments and call the op; ``least`` is the smallest gamma that it takes."""
    check_input("gamma", gamma, "B, T, D", cu_seqlens)
    dtype, shape = gamma.dtype, (sequence_count(gamma.shape[0], cu_seqlens), gamma.shape[2])
    gamma = to_compute_dtype(gamma)
    initial_state = resolve_initial_state(initial_state, gamma, shape, "N, D", fill)
    if check_finite:
        require_finite(gamma=gamma)
        if bool((gamma < least).any()):
            raise ValueError(f"gamma must be >= {least:g}; got {float(gamma.min()):g}")
    out, final_state = op(gamma, initial_state, cu_seqlens)
    return cast(out, dtype), final_state


def cumprod(
    gamma: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Product scan ``y_t = y_0 ∏_{i≤t} gamma_i`` along time, for gamma of any sign.

    The running product has its exponent in a separate integer, so it neither underflows nor
    overflows on its way. Only an output y_t that is itself out of range becomes 0 or infinity. The
    gradient does not divide, so it is exact where gamma is 0.

    Args:
        gamma: (B, T, D) float32 or float64; or bfloat16 or float16, which are computed in float32.
        initial_state: (N, D), y_0; one if None. N is B, or the number of packed sequences. float32
            if gamma is bfloat16 or float16, else of the dtype of gamma.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, as in ``scan``.
        check_finite: also raise ValueError for NaN and infinity, which costs a pass over gamma.

    Returns:
        output: y (B, T, D), of the dtype of gamma.
        final_state: (N, D), the last product of each sequence.

        Both are differentiable once, in reverse mode.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.

    Source: the definition; torch.cumprod is the same without the separate exponent.
    """
    return _product_scan(
        _cumprod_op, gamma, initial_state, cu_seqlens, check_finite, 1.0, float("-inf")
    )


def log_cumprod(
    gamma: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logarithm of the product scan, ``l_t = l_0 + Σ_{i≤t} log gamma_i``, for gamma >= 0.

    It does not underflow: 65,536 factors of 0.5 give -45,426. The sum runs in float64. From the
    first gamma = 0 on the output is -inf and constant, so no gradient passes there; gradients of
    the finite outputs stay exact. A negative gamma gives NaN.

    Args:
        gamma: (B, T, D) float32 or float64; or bfloat16 or float16, which are computed in float32.
        initial_state: (N, D), l_0; zero if None. N is B, or the number of packed sequences. float32
            if gamma is bfloat16 or float16, else of the dtype of gamma.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, as in ``scan``.
        check_finite: also raise ValueError for NaN, infinity and negative values, which costs a
            pass over gamma.

    Returns:
        output: l (B, T, D), of the dtype of gamma.
        final_state: (N, D), the last sum of each sequence.

        Both are differentiable once, in reverse mode.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.

    Source: the definition.
    """
    return _product_scan(_log_cumprod_op, gamma, initial_state, cu_seqlens, check_finite, 0.0, 0.0)
