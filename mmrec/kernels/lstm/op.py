"""The LSTM's recurrence as a torch op.

No preset of the model uses it: a reader of the model may skip this folder.

Axes: B batch, T time, D channels, N sequences (B, or the packed sequences of one row).
"""

from typing import Any

import torch
from torch import Tensor

from mmrec.kernels._recurrent import (
    check_gates,
    make_tiles,
    panel_width,
    states_before,
    to_panels,
    weight_gradient,
    work,
)
from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    cast,
    empty,
    flat,
    flat_with_strides,
    promote,
    require_finite,
    resolve_initial_state,
    to_compute_dtype,
)
from mmrec.kernels.lstm import kernel


def _forward(
    projected: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    initial_cell: Tensor,
    cu_seqlens: Tensor | None,
    batch_first: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = (*projected.shape[:2], weight.shape[1])
    h, final_state, final_cell = empty(projected, size), empty(initial_state), empty(initial_cell)
    gates = empty(projected, (*size[:2], 4 * size[2]) if save else (0,))
    cells = empty(projected, size if save else (0,))
    p, rows = (x if batch_first else x.transpose(0, 1) for x in (projected, h))
    sequence_bounds, tiles = make_tiles(p, cu_seqlens)
    columns = panel_width(tiles.shape[1], p.element_size())
    kernel.lstm_fwd(
        *flat_with_strides(p),
        to_panels(weight, columns),
        columns,
        flat(initial_state),
        flat(initial_cell),
        sequence_bounds,
        tiles,
        *flat_with_strides(rows),
        flat(final_state),
        flat(final_cell),
        flat(gates),
        flat(cells),
        reverse,
        tasks=len(tiles),
        work=work(p),
    )
    return h, final_state, final_cell, gates, cells


def _forward_fake(
    projected: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    initial_cell: Tensor,
    cu_seqlens: Tensor | None,
    batch_first: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = (*projected.shape[:2], weight.shape[1])
    final_state, final_cell = (x.new_empty(x.shape) for x in (initial_state, initial_cell))
    gates = projected.new_empty((*size[:2], 4 * size[2]) if save else (0,))
    cells = projected.new_empty(size if save else (0,))
    return projected.new_empty(size), final_state, final_cell, gates, cells


def _backward(
    dh: Tensor,
    dfinal: Tensor,
    dfinal_cell: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    initial_cell: Tensor,
    h: Tensor,
    gates: Tensor,
    cells: Tensor,
    cu_seqlens: Tensor | None,
    batch_first: bool,
    reverse: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dprojected, dinitial, dinitial_cell = empty(gates), empty(initial_cell), empty(initial_cell)
    dh, rows = (x if batch_first else x.transpose(0, 1) for x in (dh, cells))
    sequence_bounds, tiles = make_tiles(rows, cu_seqlens)
    columns = panel_width(tiles.shape[1], cells.element_size())
    kernel.lstm_bwd(
        *flat_with_strides(dh),
        to_panels(weight.t(), columns),
        columns,
        flat(initial_cell),
        sequence_bounds,
        tiles,
        *flat_with_strides(rows),
        flat(gates),
        flat(dfinal),
        flat(dfinal_cell),
        flat(dprojected),
        flat(dinitial),
        flat(dinitial_cell),
        reverse,
        tasks=len(tiles),
        work=work(gates),
    )
    if not weight_needs_grad:
        return dprojected, weight.new_empty(0), dinitial, dinitial_cell
    before = states_before(h, initial_state, cu_seqlens, batch_first, reverse)
    (dweight,) = weight_gradient(dprojected.flatten(0, 1), before.flatten(0, 1))
    return dprojected, dweight, dinitial, dinitial_cell


def _backward_fake(
    dh: Tensor,
    dfinal: Tensor,
    dfinal_cell: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    initial_cell: Tensor,
    h: Tensor,
    gates: Tensor,
    cells: Tensor,
    cu_seqlens: Tensor | None,
    batch_first: bool,
    reverse: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = initial_cell.shape
    dweight = weight.new_empty(weight.shape if weight_needs_grad else (0,))
    return gates.new_empty(gates.shape), dweight, gates.new_empty(shape), gates.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, initial_state, initial_cell, cu_seqlens, ctx.batch_first, ctx.reverse, _ = inputs
    h, _, _, gates, cells = output
    ctx.save_for_backward(weight, initial_state, initial_cell, h, gates, cells, cu_seqlens)
    # gradients of zeros for what is saved would cost as much as a pass
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dh: Tensor | None, dfinal: Tensor | None, dfinal_cell: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    initial_cell, h = saved[2:4]
    dh = h.new_zeros(()).expand(h.shape) if dh is None else dh
    dfinal, dfinal_cell = (
        torch.zeros_like(initial_cell) if x is None else x for x in (dfinal, dfinal_cell)
    )
    weight_needs_grad = ctx.needs_input_grad[1]
    dprojected, dweight, dinitial, dinitial_cell = _backward_op(
        dh,
        dfinal,
        dfinal_cell,
        *saved,
        ctx.batch_first,
        ctx.reverse,
        weight_needs_grad,
    )
    dweight = dweight if weight_needs_grad else None
    return dprojected, dweight, dinitial, dinitial_cell, None, None, None, None


_backward_op = register(
    "lstm_bwd",
    "(Tensor dh, Tensor dfinal, Tensor dfinal_cell, Tensor weight, Tensor initial_state, "
    "Tensor initial_cell, Tensor h, Tensor gates, Tensor cells, Tensor? cu_seqlens, "
    "bool batch_first, bool reverse, bool weight_needs_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "lstm",
    "(Tensor projected, Tensor weight, Tensor initial_state, Tensor initial_cell, "
    "Tensor? cu_seqlens, bool batch_first, bool reverse, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def lstm(
    projected: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    initial_cell: Tensor | None = None,
    *,
    batch_first: bool = True,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    check_finite: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The recurrence of ``torch.nn.LSTM``, on inputs that are projected already.

    ``i, f, o = σ(p + W h_{t-1})``, ``g = tanh(p + W h_{t-1})``, each with its own part of p and W,
    ``c_t = f c_{t-1} + i g`` and ``h_t = o tanh(c_t)``. ``mmrec.nn.LSTM`` is the module.

    Args:
        projected: p, (B, T, 4D) float32, float64, bfloat16 or float16: ``W_ih x + b_ih + b_hh``,
            with the gates in the order i, f, g, o. (T, B, 4D) without ``batch_first``.
        weight: W, (4D, D), of the dtype of projected, ``weight_hh``.
        initial_state: (N, D), h before the first step; zero if None. N is B, or the number of
            packed sequences. float32 if projected is bfloat16 or float16, else of its dtype.
        initial_cell: c before the first step, like initial_state.
        batch_first: the axes of projected and output begin with B, T, not with T, B.
        reverse: run from the last step to the first.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1, as in ``scan``.
        check_finite: also raise ValueError for NaN and infinity; costs a pass over the inputs.

    Returns:
        output: h (B, T, D), or (T, B, D), all states, of the dtype of projected.
        final_state: h and c (N, D) of the last step of each sequence.

        All are differentiable once, in reverse mode. bfloat16 and float16 are computed in float32,
        and the final states are float32 then.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.
        RuntimeError: a second derivative, or one in forward mode, is asked for.
    """
    projected, weight = promote(projected, weight)
    state_shape = check_gates(4, projected, weight, None, cu_seqlens, batch_first)
    dtype = projected.dtype
    projected, weight = to_compute_dtype(projected), to_compute_dtype(weight)
    initial_state, initial_cell = (
        resolve_initial_state(state, projected, state_shape, "N, D", name=name)
        for name, state in (("initial_state", initial_state), ("initial_cell", initial_cell))
    )
    inputs = (projected, weight, initial_state, initial_cell)
    if check_finite:
        names = ("projected", "weight", "initial_state", "initial_cell")
        require_finite(**dict(zip(names, inputs, strict=True)))
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    h, final_state, final_cell, _, _ = _op(*inputs, cu_seqlens, batch_first, reverse, save)
    return cast(h, dtype), (final_state, final_cell)
