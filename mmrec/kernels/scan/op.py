"""First-order scan as a torch op, differentiable any number of times.

No preset of the model uses the scan: a reader of the model may skip this folder.

Axes: B batch, T time, D channels, N sequences (B, or the packed sequences of one row).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    FULL_PRECISION,
    LOW_PRECISION,
    broadcast_to,
    cast,
    check_input,
    empty,
    flat_with_strides,
    make_sequence_bounds,
    promote,
    require_finite,
    resolve_initial_state,
    sequence_count,
    to_compute_dtype,
)
from mmrec.kernels.scan import kernel

COMPLEX = (torch.complex64, torch.complex128)


def _coefficients(a: Tensor) -> tuple[np.ndarray, int, int, int]:
    """``flat_with_strides(a)``, and the stride over D: 0 for one value per step."""
    if a.shape[2] > 1 and a.stride(2) == 0:
        return *flat_with_strides(a[:, :, :1]), 0
    return *flat_with_strides(a), 1


def _forward(
    a: Tensor, b: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    batch, time, width = b.shape
    sequence_bounds = make_sequence_bounds(batch, time, cu_seqlens)
    initial_state = initial_state.contiguous()
    h, final_state = empty(b), empty(initial_state)
    narrow = 4 <= width <= kernel.MAX_NARROW
    (kernel.scan_narrow_fwd if narrow else kernel.scan_fwd)(
        *_coefficients(a),
        *flat_with_strides(b),
        initial_state.numpy(),
        h.numpy(),
        final_state.numpy(),
        sequence_bounds,
        reverse,
        tasks=len(sequence_bounds),
        work=0.3 * h.numel() + 10 * batch * time,
    )
    return h, final_state


def _forward_fake(
    a: Tensor, b: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), initial_state.new_empty(initial_state.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, initial_state, cu_seqlens, ctx.reverse = inputs
    ctx.save_for_backward(a, initial_state, output[0], cu_seqlens)
    ctx.save_for_forward(a, initial_state, output[0], cu_seqlens)


def _gradient(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    a, initial_state, h, cu_seqlens = ctx.saved_tensors
    return *_backward_op(a, initial_state, h, dh, dfinal, cu_seqlens, ctx.reverse), None, None


def _backward(
    a: Tensor,
    initial_state: Tensor,
    h: Tensor,
    dh: Tensor,
    dfinal: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, width = h.shape
    sequence_bounds = make_sequence_bounds(batch, time, cu_seqlens)
    da, db, dinitial = empty(h), empty(h), empty(initial_state)
    initial_state, h, dfinal = (x.contiguous().resolve_conj() for x in (initial_state, h, dfinal))
    narrow = 4 <= width <= kernel.MAX_NARROW
    (kernel.scan_narrow_bwd if narrow else kernel.scan_bwd)(
        *_coefficients(a),
        initial_state.numpy(),
        h.numpy(),
        *flat_with_strides(dh),
        dfinal.numpy(),
        da.numpy(),
        db.numpy(),
        dinitial.numpy(),
        sequence_bounds,
        reverse,
        tasks=len(sequence_bounds),
        work=0.6 * h.numel() + 15 * batch * time,
    )
    return da, db, dinitial


def _backward_fake(
    a: Tensor,
    initial_state: Tensor,
    h: Tensor,
    dh: Tensor,
    dfinal: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), initial_state.new_empty(initial_state.shape)


def _shift(x: Tensor, edge: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """x (B, T, D) delayed by one step of the scan.

    The first step that is scanned of each sequence becomes ``edge`` (N, D).
    """
    if x.shape[1] == 0:
        return x
    if cu_seqlens is None:
        pair = (x[:, 1:], edge[:, None]) if reverse else (edge[:, None], x[:, :-1])
        return torch.cat(pair, 1)
    full = cu_seqlens[1:] > cu_seqlens[:-1]  # an empty sequence has no first step
    at = (cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1])[full].long()
    return x.roll(-1 if reverse else 1, 1).index_copy(1, at, edge[full][None])


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, initial_state, h, _, _, cu_seqlens, ctx.reverse = inputs
    ctx.save_for_backward(a, initial_state, h, output[1], cu_seqlens)


def _second_gradient(
    ctx: Any, dda: Tensor, ddb: Tensor, ddinitial: Tensor
) -> tuple[Tensor | None, ...]:
    """Adjoint of the adjoint. It is made of the scan itself, so derivatives of any order exist.

    With g_t the gradient of h_t (see kernel.py) and

        k_t = (ddb_t + dda_t h_{t-1}) + a_t k_{t-1},   k_0 = ddinitial

    the gradients are k for dh, k_T for dfinal, g_t k*_{t-1} for a_t, and g_t dda*_t for h_{t-1}.
    """
    a, initial_state, h, g, cu_seqlens = ctx.saved_tensors
    before = _shift(h, initial_state, cu_seqlens, ctx.reverse)
    k, k_final = _forward_op(a, ddb + dda * before, ddinitial, cu_seqlens, ctx.reverse)
    a_grad = g * _shift(k, ddinitial, cu_seqlens, ctx.reverse).conj()
    # h_{t-1} is h one step earlier or, at the first step of a sequence, its initial state
    before_grad = g * dda.conj()
    zero = torch.zeros_like(initial_state)
    h_grad = _shift(before_grad, zero, cu_seqlens, not ctx.reverse)
    initial_grad = _first_steps(before_grad, cu_seqlens, initial_state.shape[0], ctx.reverse)
    return a_grad, initial_grad, h_grad, k, k_final, None, None


def _first_steps(x: Tensor, cu_seqlens: Tensor | None, sequences: int, reverse: bool) -> Tensor:
    """x (B, T, D) at the first step that is scanned of each sequence: (N, D).

    Zero for a sequence without steps.
    """
    if x.shape[1] == 0:
        return x.new_zeros(sequences, x.shape[2])
    if cu_seqlens is None:
        return x[:, -1 if reverse else 0]
    at = (cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1]).long().clamp(0, x.shape[1] - 1)
    full = cu_seqlens[1:] > cu_seqlens[:-1]
    return x[0, at] * full[:, None]


def _fold(size: int, axis: int | None, x: Tensor) -> Tensor:
    """Fold the mapped axis, of that size, into the channels; None is an axis to broadcast."""
    x = x.unsqueeze(-2) if axis is None else x.movedim(axis, -2)
    return x.expand(*x.shape[:-2], size, x.shape[-1]).flatten(-2)


def _vmap_rule(name: str) -> Any:
    """The vmap rule of an op whose tensors have channels last: channels are independent."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        *tensors, cu_seqlens, reverse = args
        if in_dims[-2] is not None:
            raise RuntimeError(f"{name} cannot be mapped over cu_seqlens: pack the sequences")
        size = info.batch_size
        folded = [_fold(size, axis, x) for x, axis in zip(tensors, in_dims, strict=False)]
        op = _backward_op if name == "scan_bwd" else _forward_op
        results = op(*folded, cu_seqlens, reverse)
        unfolded = tuple(x.unflatten(-1, (size, -1)).movedim(-2, 0) for x in results)
        return unfolded, (0,) * len(unfolded)

    return rule


def _jvp(ctx: Any, da: Any, db: Any, dinitial: Any, *_: None) -> tuple[Tensor, Tensor]:
    """The tangent of h is the scan of ȧ_t h_{t-1} + ḃ_t under the same coefficients."""
    a, initial_state, h, cu_seqlens = ctx.saved_tensors
    source = torch.zeros_like(h) if db is None else db
    if da is not None:
        source = source + da * _shift(h, initial_state, cu_seqlens, ctx.reverse)
    tangent = torch.zeros_like(initial_state) if dinitial is None else dinitial
    results: tuple[Tensor, Tensor] = _forward_op(a, source, tangent, cu_seqlens, ctx.reverse)
    return results


_backward_op = register(
    "scan_bwd",
    "(Tensor a, Tensor initial_state, Tensor h, Tensor dh, Tensor dfinal, Tensor? cu_seqlens, "
    "bool reverse) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    setup_context=_setup_backward_context,
    backward=_second_gradient,
    vmap=_vmap_rule("scan_bwd"),
)
_forward_op = register(
    "scan",
    "(Tensor a, Tensor b, Tensor initial_state, Tensor? cu_seqlens, bool reverse) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
    vmap=_vmap_rule("scan"),
    jvp=_jvp,
)


def scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """First-order linear recurrence ``h_t = a_t h_{t-1} + b_t`` for every channel.

    Args:
        a: (B, T, D) or a shape that broadcasts to it, of the dtype of b, the coefficients. (D,)
            gives one per channel, (B, T, 1) one per step.
        b: (B, T, D) float32, float64, complex64 or complex128, the inputs; or bfloat16 or float16,
            which are computed in float32.
        initial_state: (N, D), the state before the first step; zero if None. N is B, or the number
            of packed sequences. float32 if b is bfloat16 or float16, else of the dtype of b.
        reverse: scan from the last step to the first: ``h_t = a_t h_{t+1} + b_t``.
        cu_seqlens: (N + 1,) int32 or int64, 0 = c_0 ≤ … ≤ c_N = T. Packs N sequences in one row,
            B = 1: sequence n has the steps from c_n up to c_{n+1}. No state and no gradient passes
            between sequences. None: each batch row is one sequence.
        check_finite: also raise ValueError for NaN and infinity; costs a pass over the inputs.

    Returns:
        output: h (B, T, D), all states, of the dtype of b.
        final_state: (N, D), the last state of each sequence.

        Both are differentiable any number of times, in reverse and forward mode and under vmap.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.

    Source: Blelloch 1990, "Prefix Sums and Their Applications", section 1.4 defines the operator.
    On a CPU the sequential scan reads and writes each array once.
    """
    a, b = promote(a, b)
    check_input("b", b, "B, T, D", cu_seqlens, (*FULL_PRECISION, *LOW_PRECISION, *COMPLEX))
    shape, dtype = tuple(b.shape), b.dtype
    a = to_compute_dtype(broadcast_to("a", a, shape, "B, T, D", dtype))
    b = to_compute_dtype(b)
    state_shape = (sequence_count(shape[0], cu_seqlens), shape[2])
    initial_state = resolve_initial_state(initial_state, b, state_shape, "N, D")
    if check_finite:
        require_finite(a=a, b=b, initial_state=initial_state)
    h, final_state = _forward_op(a, b, initial_state, cu_seqlens, reverse)
    return cast(h, dtype), final_state
