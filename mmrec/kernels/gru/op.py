"""The GRU's recurrence as a torch op.

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
from mmrec.kernels.gru import kernel


def _forward(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    batch_first: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = (*projected.shape[:2], weight.shape[1])
    h, final_state = empty(projected, size), empty(initial_state)
    saved = empty(projected, (*size[:2], 4 * size[2]) if save else (0,))
    p, rows = (x if batch_first else x.transpose(0, 1) for x in (projected, h))
    sequence_bounds, tiles = make_tiles(p, cu_seqlens)
    columns = panel_width(tiles.shape[1], p.element_size())
    kernel.gru_fwd(
        *flat_with_strides(p),
        to_panels(weight, columns),
        columns,
        flat(bias),
        flat(initial_state),
        sequence_bounds,
        tiles,
        *flat_with_strides(rows),
        flat(final_state),
        flat(saved),
        reverse,
        tasks=len(tiles),
        work=work(p),
    )
    return h, final_state, saved


def _forward_fake(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    batch_first: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time = projected.shape[:2]
    width = weight.shape[1]
    saved = projected.new_empty((batch, time, 4 * width) if save else (0,))
    final_state = initial_state.new_empty(initial_state.shape)
    return projected.new_empty((batch, time, width)), final_state, saved


def _backward(
    dh: Tensor,
    dfinal: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    h: Tensor,
    saved: Tensor,
    cu_seqlens: Tensor | None,
    batch_first: bool,
    reverse: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = weight.shape[1]
    dgates, dinitial = empty(saved), empty(initial_state)
    dh, rows = (x if batch_first else x.transpose(0, 1) for x in (dh, h))
    sequence_bounds, tiles = make_tiles(rows, cu_seqlens)
    columns = panel_width(tiles.shape[1], h.element_size())
    kernel.gru_bwd(
        *flat_with_strides(dh),
        to_panels(torch.cat((weight[2 * width :], weight[: 2 * width])).t(), columns),
        columns,
        flat(initial_state),
        sequence_bounds,
        tiles,
        *flat_with_strides(rows),
        flat(saved),
        flat(dfinal),
        flat(dgates),
        flat(dinitial),
        reverse,
        tasks=len(tiles),
        work=work(saved),
    )
    if not weight_needs_grad:
        return dgates, weight.new_empty(0), dinitial
    before = states_before(h, initial_state, cu_seqlens, batch_first, reverse)
    dproduct = dgates[..., : 3 * width].flatten(0, 1)  # of v, r, z
    (dweight,) = weight_gradient(dproduct, before.flatten(0, 1))
    return dgates, dweight.roll(-width, 0), dinitial


def _backward_fake(
    dh: Tensor,
    dfinal: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    h: Tensor,
    saved: Tensor,
    cu_seqlens: Tensor | None,
    batch_first: bool,
    reverse: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape if weight_needs_grad else (0,))
    return saved.new_empty(saved.shape), dweight, initial_state.new_empty(initial_state.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, weight, _, initial_state, cu_seqlens, ctx.batch_first, ctx.reverse, _ = inputs
    h, _, saved = output
    ctx.save_for_backward(weight, initial_state, h, saved, cu_seqlens)
    # a gradient of zeros for ``saved`` would cost as much as a pass
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dh: Tensor | None, dfinal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    weight, initial_state, h, saved, cu_seqlens = ctx.saved_tensors
    width = weight.shape[1]
    dh = h.new_zeros(()).expand(h.shape) if dh is None else dh
    dfinal = torch.zeros_like(initial_state) if dfinal is None else dfinal
    weight_needs_grad, bias_needs_grad = ctx.needs_input_grad[1:3]
    dgates, dweight, dinitial = _backward_op(
        dh,
        dfinal,
        weight,
        initial_state,
        h,
        saved,
        cu_seqlens,
        ctx.batch_first,
        ctx.reverse,
        weight_needs_grad,
    )
    dbias = None
    if bias_needs_grad:
        dbias = dgates[..., : 3 * width].flatten(0, 1).sum(0).roll(-width)
    dweight = dweight if weight_needs_grad else None
    return dgates[..., width:], dweight, dbias, dinitial, None, None, None, None


_backward_op = register(
    "gru_bwd",
    "(Tensor dh, Tensor dfinal, Tensor weight, Tensor initial_state, Tensor h, Tensor saved, "
    "Tensor? cu_seqlens, bool batch_first, bool reverse, bool weight_needs_grad) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "gru",
    "(Tensor projected, Tensor weight, Tensor bias, Tensor initial_state, Tensor? cu_seqlens, "
    "bool batch_first, bool reverse, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def gru(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    batch_first: bool = True,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence of ``torch.nn.GRU``, on inputs that are projected already.

    ``r = σ(p_r + W_r h + b_r)``, ``z = σ(p_z + W_z h + b_z)``, ``n = tanh(p_n + r (W_n h + b_n))``
    and ``h_t = (1 - z) n + z h`` with ``h = h_{t-1}``. ``mmrec.nn.GRU`` is the module.

    Args:
        projected: p, (B, T, 3D) float32, float64, bfloat16 or float16: ``W_ih x + b_ih``, with the
            gates in the order r, z, n. (T, B, 3D) without ``batch_first``.
        weight: (3D, D), of the dtype of projected, ``weight_hh``.
        bias: (3D,), of the same dtype, ``bias_hh``; zero if None.
        initial_state: (N, D), h before the first step; zero if None. N is B, or the number of
            packed sequences. float32 if projected is bfloat16 or float16, else of its dtype.
        batch_first: the axes of projected and output begin with B, T, not with T, B.
        reverse: run from the last step to the first.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1, as in ``scan``.
        check_finite: also raise ValueError for NaN and infinity; costs a pass over the inputs.

    Returns:
        output: h (B, T, D), or (T, B, D), all states, of the dtype of projected.
        final_state: (N, D), the last state of each sequence.

        Both are differentiable once, in reverse mode. bfloat16 and float16 are computed in float32,
        and the final state is float32 then.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.
        RuntimeError: a second derivative, or one in forward mode, is asked for.
    """
    projected, weight, bias = promote(projected, weight, bias)
    state_shape = check_gates(3, projected, weight, bias, cu_seqlens, batch_first)
    dtype = projected.dtype
    projected, weight, bias = map(to_compute_dtype, (projected, weight, bias))
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    initial_state = resolve_initial_state(initial_state, projected, state_shape, "N, D")
    if check_finite:
        require_finite(projected=projected, weight=weight, bias=bias, initial_state=initial_state)
    inputs = (projected, weight, bias, initial_state)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    h, final_state, _ = _op(*inputs, cu_seqlens, batch_first, reverse, save)
    return cast(h, dtype), final_state
