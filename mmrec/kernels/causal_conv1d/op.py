"""Causal depthwise convolution as torch ops, with the names and shapes of causal-conv1d.

Axes: B batch, D channels, L time, W width of the convolution.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._channel_tiles import (
    check_seq_idx,
    empty_like,
    sequence_runs,
    with_strides,
)
from mmrec.kernels._in_place import (
    array_of,
    check_places,
    needs_gradient,
    places_of,
    register_in_place,
)
from mmrec.kernels._math import cdiv
from mmrec.kernels._register import register
from mmrec.kernels._simd import LANES
from mmrec.kernels._tensors import cast, check_input, check_tensor, flat, require_finite
from mmrec.kernels.causal_conv1d import kernel, reference


def _slices(x: Tensor) -> int:
    return cdiv(cdiv(x.shape[1], LANES), kernel.SLICE)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial: Tensor,
    seq_idx: Tensor | None,
    silu: bool,
) -> Tensor:
    out = empty_like(x)
    runs = sequence_runs(seq_idx, x.shape[0], x.shape[2])
    kernel.causal_conv1d_fwd(
        runs,
        x.shape[1],
        silu,
        *with_strides(x),
        flat(weight),
        flat(bias),
        flat(initial),
        *with_strides(out),
        tasks=len(runs) * _slices(x),
        work=1.0 * x.numel(),
    )
    return out


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial: Tensor,
    seq_idx: Tensor | None,
    silu: bool,
) -> Tensor:
    return empty_like(x)


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial: Tensor,
    seq_idx: Tensor | None,
    dout: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    runs = sequence_runs(seq_idx, x.shape[0], x.shape[2])
    dx, dinitial = empty_like(x), initial.new_empty(initial.shape)
    dweight, dbias = (
        weight.new_empty(len(runs), *weight.shape),
        bias.new_empty(len(runs), len(bias)),
    )
    kernel.causal_conv1d_bwd(
        runs,
        x.shape[1],
        silu,
        *with_strides(x),
        flat(weight),
        flat(bias),
        flat(initial),
        *with_strides(dout),
        *with_strides(dx),
        flat(dweight),
        flat(dbias),
        flat(dinitial),
        tasks=len(runs) * _slices(x),
        work=2.5 * x.numel(),
    )
    # NumPy adds the parts in their order
    dweight, dbias = (torch.from_numpy(part.numpy().sum(0)) for part in (dweight, dbias))
    return dx, dweight, dbias, dinitial


def _backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial: Tensor,
    seq_idx: Tensor | None,
    dout: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    return empty_like(x), *weights, initial.new_empty(initial.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(*ctx.saved_tensors, dout, ctx.silu), None, None


_backward_op = register(
    "causal_conv1d_bwd",
    "(Tensor x, Tensor weight, Tensor bias, Tensor initial, Tensor? seq_idx, Tensor dout, "
    "bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_op = register(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor bias, Tensor initial, Tensor? seq_idx, bool silu) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)


def _step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, places: Tensor | None, silu: bool
) -> Tensor:
    batch, channels = x.shape
    numbers = places_of("conv_state_indices", places, batch, state.shape[0])
    out = x.new_empty(x.shape) if places is None else x.new_zeros(x.shape)
    kernel.causal_conv1d_step(
        channels,
        silu,
        array_of(x.contiguous()),
        array_of(weight.contiguous()),
        array_of(bias.contiguous()),
        array_of(state).reshape(-1, state.shape[2]),
        numbers,
        array_of(out),
        tasks=batch,
        work=5.0 * x.numel(),
    )
    return out


def _step_fake(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, places: Tensor | None, silu: bool
) -> Tensor:
    return x.new_empty(x.shape)


_step_op = register_in_place(
    "causal_conv1d_step",
    "(Tensor x, Tensor(a!) state, Tensor weight, Tensor bias, Tensor? places, bool silu) -> Tensor",
    _step,
    _step_fake,
)


def _check_activation(activation: str | None) -> bool:
    """Whether it is silu."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish'; got {activation!r}")
    return activation is not None


def _check_weight(weight: Tensor, bias: Tensor | None, channels: int) -> int:
    """W."""
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] == 0:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must have axes (D, W), W >= 1; got {got}")
    width = weight.shape[1]
    check_tensor("weight", weight, (channels, width), "D, W")
    if bias is not None:
        check_tensor("bias", bias, (channels,), "D")
    return width


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    check: bool = False,
) -> Any:
    """Causal depthwise convolution over time, with the names, shapes and results of causal-conv1d.

    ``out_t = activation(bias + Σ_k weight_k x_{t-W+1+k})`` per channel.

    Args:
        x: (B, D, L) float32, float64, bfloat16 or float16, in any memory order; a transposed
            (B, L, D) tensor is read in place.
        weight: (D, W), W >= 1; its last column weighs the newest step.
        bias: (D,) or None.
        seq_idx: (B, L) int32 or int64: packs sequences in a row. Equal neighbours belong to one
            sequence, and nothing passes from one to the next. Not with initial or final states.
        initial_states: (B, D, W - 1), the inputs before the first step; zero if None.
        return_final_states: also return the last W - 1 inputs.
        final_states_out: (B, D, W - 1), written to and returned as the final states, or None.
        activation: None, "silu" or "swish" (the same).
        check: also raise ValueError for NaN and infinity; costs a pass over the inputs.

    Returns:
        out (B, D, L) of the dtype and in the memory order of x; with return_final_states the pair
        (out, final_states (B, D, W - 1) of the dtype of x). Both are differentiable once, in
        reverse mode.

    Raises:
        ValueError: an argument is not as above.
    """
    check_input("x", x, "B, D, L", None)
    batch, channels, time = x.shape
    width = _check_weight(weight, bias, channels)
    silu = _check_activation(activation)
    states_shape = (batch, channels, width - 1)
    if seq_idx is not None:
        check_seq_idx(seq_idx, batch, time)
        if initial_states is not None or return_final_states:
            raise ValueError("seq_idx must be None with initial_states or return_final_states")
    if initial_states is not None:
        check_tensor("initial_states", initial_states, states_shape, "B, D, W - 1")
    if final_states_out is not None:
        if not return_final_states:
            raise ValueError("final_states_out needs return_final_states=True; got False")
        check_tensor("final_states_out", final_states_out, states_shape, "B, D, W - 1")
    if check:
        require_finite(x=x, weight=weight, bias=bias, initial_states=initial_states)
    dtype = _compute_dtype(x)
    past = x.new_zeros(states_shape) if initial_states is None else initial_states
    shift = weight.new_zeros(channels) if bias is None else bias
    computed = [cast(t, dtype) for t in (x, weight, shift, past)]
    out = cast(_op(*computed, seq_idx, silu), x.dtype)
    if not return_final_states:
        return out
    kept = x[..., max(time - width + 1, 0) :]
    final = torch.cat((cast(past, x.dtype)[..., kept.shape[2] :], kept), -1)
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return out, final


def _circular_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor,
) -> Tensor:
    """``causal_conv1d_update`` on a circular buffer: step t of a row lies at t modulo its size."""
    size, keep = conv_state.shape[2], weight.shape[1] - 1
    counts = cache_seqlens.long()[:, None]
    channels = conv_state.shape[1]
    read = (counts + torch.arange(-keep, 0)).remainder(size)[:, None].expand(-1, channels, -1)
    past = conv_state.gather(2, read)
    out = reference.causal_conv1d(x, weight, bias, cast(past, x.dtype), activation)
    # where more steps come than there is room for, the last ones stay
    late = torch.arange(max(x.shape[2] - size, 0), x.shape[2])
    place = (counts + late).remainder(size)[:, None].expand(-1, channels, -1)
    conv_state.scatter_(2, place, cast(x[..., late], conv_state.dtype))
    return out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """``causal_conv1d_fn`` for the next steps of a sequence; conv_state moves on in place.

    Args:
        x: (B, D) or (B, D, S), the next steps, with dtypes as in ``causal_conv1d_fn``.
        conv_state: (B, D, K), K >= W - 1, the last inputs; written to.
        weight: (D, W).
        bias: (D,) or None.
        activation: None, "silu" or "swish".
        cache_seqlens: (B,) int32 or int64, steps so far: conv_state is a circular buffer, where
            step t lies at t modulo K. None: the newest input is the last.
        conv_state_indices: (B,) int32 or int64: conv_state has more rows than x, and this says
            which row of it belongs to each row of x. A negative number marks a row that is padding:
            its output is 0.

    Returns:
        out, of the shape and dtype of x. If a gradient is asked for, plain torch computes it.

    Raises:
        ValueError: an argument is not as above.
    """
    single = isinstance(x, Tensor) and x.ndim == 2
    inputs = x[..., None] if single else x
    check_input("x", inputs, "B, D, S", None)
    batch, channels, steps = inputs.shape
    width = _check_weight(weight, bias, channels)
    silu = _check_activation(activation)
    if (
        not isinstance(conv_state, Tensor)
        or conv_state.ndim != 3
        or conv_state.shape[2] < width - 1
    ):
        got = (
            tuple(conv_state.shape) if isinstance(conv_state, Tensor) else type(conv_state).__name__
        )
        raise ValueError(
            f"conv_state must have axes (B, D, K), K >= W - 1 = {width - 1}; got {got}"
        )
    rows = batch if conv_state_indices is None else conv_state.shape[0]
    check_tensor("conv_state", conv_state, (rows, channels, conv_state.shape[2]), "B, D, K")
    if conv_state_indices is not None:
        check_places("conv_state_indices", conv_state_indices, batch)
    if cache_seqlens is not None:
        check_places("cache_seqlens", cache_seqlens, batch)
    dtype = _compute_dtype(inputs)
    weight, inputs = cast(weight, dtype), cast(inputs, dtype)
    bias = None if bias is None else cast(bias, dtype)
    plain = needs_gradient(x, weight, bias, conv_state)
    if cache_seqlens is None and steps == 1 and not plain:
        shift = weight.new_zeros(channels) if bias is None else bias
        direct = conv_state.dtype == dtype and conv_state.is_contiguous()
        state = conv_state if direct else conv_state.to(dtype).contiguous()
        out = _step_op(inputs[..., 0], state, weight, shift, conv_state_indices, silu)[..., None]
        if not direct:
            conv_state.copy_(state)
    else:
        numbers = places_of("conv_state_indices", conv_state_indices, batch, rows)
        used = torch.from_numpy(np.flatnonzero(numbers >= 0))
        places = torch.from_numpy(numbers)[used]
        whole = conv_state_indices is None
        state, now = (conv_state, inputs) if whole else (conv_state[places], inputs[used])
        if cache_seqlens is None:
            result, moved = reference.causal_conv1d_update(now, state, weight, bias, activation)
            moved = cast(moved, conv_state.dtype)
            conv_state.copy_(moved) if whole else conv_state.index_copy_(0, places, moved)
        else:
            result = _circular_update(now, state, weight, bias, activation, cache_seqlens[used])
            if not whole:
                conv_state.index_copy_(0, places, state)
        out = result if whole else torch.zeros_like(inputs).index_copy(0, used, result)
    out = cast(out, x.dtype)
    return out[..., 0] if single else out
