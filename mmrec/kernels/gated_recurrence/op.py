"""The gated recurrence as a torch op.

The presets do not use it; layer types "s" and "b" of the model do. A reader of the presets may skip
this folder.

Axes: B batch, T time, D channels, N sequences (B, or the packed sequences of one row), G diagonal
blocks of W with P = D / G channels each.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._recurrent import (
    make_tiles,
    panel_width,
    states_before,
    to_panels,
    weight_gradient,
)
from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    broadcast_to,
    cast,
    check_input,
    check_tensor,
    empty,
    flat,
    flat_with_strides,
    promote,
    require_finite,
    resolve_initial_state,
    sequence_count,
    to_compute_dtype,
)
from mmrec.kernels.gated_recurrence import kernel


def _panels(weight: Tensor, width: int) -> np.ndarray:
    """The blocks of W (G, P, P) in panels of output columns, one block after the other."""
    if weight.numel() == 0:
        return flat(weight)
    return np.concatenate([to_panels(block.t(), width) for block in weight])


def _work(z: Tensor, weight: Tensor) -> float:
    """Estimate of the nanoseconds that one pass takes on one thread."""
    return z.numel() * (1.5 + 0.02 * weight.shape[-1] * bool(weight.shape[0]))


def _forward(
    z: Tensor,
    gate_logits: Tensor,
    decay_logits: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale_input: bool,
    save_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h, gates = empty(z), empty(z, None if save_gates else (0,))
    final_state = empty(initial_state)
    sequence_bounds, tiles = make_tiles(z, cu_seqlens)
    columns = panel_width(tiles.shape[1], z.element_size())
    kernel.gated_recurrence_fwd(
        *flat_with_strides(z),
        *flat_with_strides(gate_logits),
        *flat_with_strides(decay_logits),
        _panels(weight, columns),
        columns,
        max(1, weight.shape[-1]),
        flat(initial_state),
        sequence_bounds,
        tiles,
        z.shape[1],
        flat(h),
        flat(final_state),
        flat(gates),
        scale_input,
        tasks=len(tiles),
        work=_work(z, weight),
    )
    return h, final_state, gates


def _forward_fake(
    z: Tensor,
    gate_logits: Tensor,
    decay_logits: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale_input: bool,
    save_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gates = z.new_empty(z.shape if save_gates else (0,))
    return z.new_empty(z.shape), initial_state.new_empty(initial_state.shape), gates


def _backward(
    dh: Tensor,
    dfinal: Tensor,
    z: Tensor,
    decay_logits: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    h: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor | None,
    scale_input: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dz, dgate, ddecay = (empty(z) for _ in range(3))
    dweight = weight.new_zeros(weight.shape if weight_needs_grad else (0,))
    dinitial = empty(initial_state)
    sequence_bounds, tiles = make_tiles(z, cu_seqlens)
    columns = panel_width(tiles.shape[1], z.element_size())
    kernel.gated_recurrence_bwd(
        *flat_with_strides(z),
        *flat_with_strides(decay_logits),
        *flat_with_strides(dh),
        _panels(weight.transpose(1, 2), columns),
        columns,
        max(1, weight.shape[-1]),
        flat(initial_state),
        sequence_bounds,
        tiles,
        z.shape[1],
        flat(h),
        flat(gates),
        flat(dfinal),
        flat(dz),
        flat(dgate),
        flat(ddecay),
        flat(dinitial),
        scale_input,
        tasks=len(tiles),
        work=_work(z, weight),
    )
    if dweight.numel():
        before = states_before(h, initial_state, cu_seqlens, True, False)
        rows = (before.flatten(0, 1), dgate.flatten(0, 1))
        dweight = weight_gradient(*rows, weight.shape[0])
    return dz, dgate, ddecay, dweight, dinitial


def _backward_fake(
    dh: Tensor,
    dfinal: Tensor,
    z: Tensor,
    decay_logits: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    h: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor | None,
    scale_input: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dz, dgate, ddecay = (z.new_empty(z.shape) for _ in range(3))
    dweight = weight.new_empty(weight.shape if weight_needs_grad else (0,))
    return dz, dgate, ddecay, dweight, initial_state.new_empty(initial_state.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, _, decay_logits, weight, initial_state, cu_seqlens, scale_input, _ = inputs
    h, _, gates = output
    ctx.save_for_backward(z, decay_logits, weight, initial_state, h, gates, cu_seqlens)
    ctx.scale_input = scale_input
    # a gradient of zeros for ``gates`` would cost as much as a pass
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dh: Tensor | None, dfinal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    initial_state, h = saved[3:5]
    dh = h.new_zeros(()).expand(h.shape) if dh is None else dh
    dfinal = torch.zeros_like(initial_state) if dfinal is None else dfinal
    weight_needs_grad = ctx.needs_input_grad[3]
    dz, dgate, ddecay, dweight, dinitial = _backward_op(
        dh, dfinal, *saved, ctx.scale_input, weight_needs_grad
    )
    return dz, dgate, ddecay, dweight if weight_needs_grad else None, dinitial, None, None, None


_backward_op = register(
    "gated_recurrence_bwd",
    "(Tensor dh, Tensor dfinal, Tensor z, Tensor decay_logits, Tensor weight, "
    "Tensor initial_state, Tensor h, Tensor gates, Tensor? cu_seqlens, bool scale_input, "
    "bool weight_needs_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "gated_recurrence",
    "(Tensor z, Tensor gate_logits, Tensor decay_logits, Tensor weight, Tensor initial_state, "
    "Tensor? cu_seqlens, bool scale_input, bool save_gates) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def _diagonal_blocks(weight: Tensor | None, z: Tensor) -> Tensor:
    """The diagonal blocks of W, (G, P, P); G = 0 if there is no W."""
    width = z.shape[2]
    if weight is None:
        return z.new_empty((0, width, width))
    if isinstance(weight, Tensor) and weight.ndim == 3:
        size = width // max(1, weight.shape[0])
        if weight.shape[0] * size == width:
            check_tensor("weight", weight, (weight.shape[0], size, size), "G, D/G, D/G", z.dtype)
            return weight
    check_tensor("weight", weight, (width, width), "D, D", z.dtype)
    return weight[None]


def gated_recurrence(
    z: Tensor,
    gate_logits: Tensor,
    decay_logits: Tensor,
    weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale_input: bool = True,
    cu_seqlens: Tensor | None = None,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gated nonlinear recurrence.

    ``h_t = (1 - γ_t) ⊙ z_t ⊙ σ(h_{t-1} W + g_t) + γ_t ⊙ h_{t-1}`` with ``γ_t = σ(f_t)`` for the
    gate logits g and the decay logits f. The activations run inside the kernel. With
    ``scale_input=False`` and g = 0 this is MM-Rec's first published formula,
    ``h_t = z_t ⊙ σ(h_{t-1} W) + γ_t ⊙ h_{t-1}``.

    Args:
        z: (B, T, D) float32, float64, bfloat16 or float16, candidate values.
        gate_logits: g, (B, T, D) or a shape that broadcasts to it, of the dtype of z.
        decay_logits: f, like gate_logits; (D,) gives one per channel, (B, T, 1) one per step.
        weight: W, (D, D), or (G, D/G, D/G) for the blocks of a block-diagonal W, of the dtype of z;
            None for W = 0.
        initial_state: (N, D), h before the first step; zero if None. N is B, or the number of
            packed sequences. float32 if z is bfloat16 or float16, else of the dtype of z.
        scale_input: multiply the input term by 1 - γ_t.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1, as in ``scan``.
        check_finite: also raise ValueError for NaN and infinity; costs a pass over the inputs.

    Returns:
        output: h (B, T, D), all states, of the dtype of z.
        final_state: (N, D), the last state of each sequence.

        Both are differentiable once, in reverse mode. bfloat16 and float16 are computed in float32,
        and the final state is float32 then.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.
        RuntimeError: a second derivative, or one in forward mode, is asked for.

    Source: docs/concepts/model.md; the gate on the recurrent product follows the minimal gated unit
    (Zhou et al. 2016, arXiv:1603.09420, eq. 5).
    """
    z, gate_logits, decay_logits, weight = promote(z, gate_logits, decay_logits, weight)
    check_input("z", z, "B, T, D", cu_seqlens)
    shape, dtype = tuple(z.shape), z.dtype
    gate_logits = broadcast_to("gate_logits", gate_logits, shape, "B, T, D", dtype)
    decay_logits = broadcast_to("decay_logits", decay_logits, shape, "B, T, D", dtype)
    weight = _diagonal_blocks(weight, z)
    z, gate_logits, decay_logits, weight = map(
        to_compute_dtype, (z, gate_logits, decay_logits, weight)
    )
    state_shape = (sequence_count(shape[0], cu_seqlens), shape[2])
    axes = "B, D" if cu_seqlens is None else "N, D"
    initial_state = resolve_initial_state(initial_state, z, state_shape, axes)
    if check_finite:
        require_finite(
            z=z,
            gate_logits=gate_logits,
            decay_logits=decay_logits,
            weight=weight,
            initial_state=initial_state,
        )
    inputs = (z, gate_logits, decay_logits, weight, initial_state)
    save_gates = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    h, final_state, _ = _op(*inputs, cu_seqlens, scale_input, save_gates)
    return cast(h, dtype), final_state
