"""``torch.nn.GRU`` and ``torch.nn.LSTM`` on the kernels of ``mmrec.kernels``.

The modules are torch's: their constructor, parameters, ``state_dict`` and everything else but
``forward``. What the kernels do not take is left to torch's own forward pass, and so are mistakes,
whose errors are therefore torch's.

Axes: T time, B batch, I input size, D hidden size, N sequences.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mmrec.kernels import gru, lstm
from mmrec.kernels._register import transform_active
from mmrec.kernels._tensors import FULL_PRECISION, LOW_PRECISION

States = tuple[Tensor, ...]
Layer = Callable[..., tuple[Tensor, States]]
"""One direction of one layer: (input, weights, states, options of the op) to (output, states)."""


MIN_STEPS = 8
"""Steps below which laying out the weights costs more than it saves."""
MIN_LSTM_WORK = 2**21
"""Multiplications per gate below which torch's LSTM is faster."""


def _is_worthwhile(module: nn.RNNBase, sequences: int, steps: int) -> bool:
    """Whether the kernels are faster than torch at this size.

    torch's GRU is slow at every size. Its LSTM is slow at fewer: it has less to do per call, and
    several threads share the product of one step.
    """
    if isinstance(module, nn.GRU):
        return steps >= MIN_STEPS
    work = sequences * steps * module.hidden_size**2
    return steps >= MIN_STEPS and sequences >= torch.get_num_threads() and work >= MIN_LSTM_WORK


def _takes(module: nn.RNNBase, input: Any, states: Any) -> bool:
    """Whether the kernels take this call: without mistakes, on the CPU, and not too small.

    Args:
        module: its sizes and weights.
        input: what ``forward`` got.
        states: the initial states as a tuple, or None.
    """
    packed = isinstance(input, PackedSequence)
    x = input.data if packed else input
    if not isinstance(x, Tensor) or x.device.type != "cpu" or module.proj_size or not x.numel():
        return False
    if not torch.compiler.is_compiling() and transform_active():
        return False
    if x.shape[-1] != module.input_size or x.ndim not in ((2,) if packed else (2, 3)):
        return False
    unbatched = x.ndim == 2 and not packed
    if packed:
        sequences, steps = int(input.batch_sizes[0]), len(input.batch_sizes)
    else:
        sequences, steps = x.shape[:2] if module.batch_first else (x.shape[1], x.shape[0])
        if unbatched:
            sequences, steps = 1, x.shape[0]
    if not _is_worthwhile(module, sequences, steps):
        return False
    tensors = [getattr(module, name) for name in module._flat_weights_names]
    if states is not None:
        layers = module.num_layers * (2 if module.bidirectional else 1)
        shape = (layers, *([] if unbatched else [sequences]), module.hidden_size)
        if not all(isinstance(state, Tensor) and state.shape == shape for state in states):
            return False
        tensors += states
    if any(y.device.type != "cpu" for y in tensors):
        return False
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtypes = {torch.float32, *LOW_PRECISION}
        return x.dtype in dtypes and all(y.dtype in dtypes for y in tensors)
    dtypes = {*FULL_PRECISION, *LOW_PRECISION}
    return x.dtype in dtypes and all(y.dtype == x.dtype for y in tensors)


def _rows_of_sequences(batch_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order that brings the steps of a sequence together.

    Args:
        batch_sizes: (T,), of a PackedSequence, whose rows are sorted by time.

    Returns:
        The rows of the PackedSequence in the order of sequences; the inverse of that order; and
        cu_seqlens (N + 1,).
    """
    sequences = int(batch_sizes[0])
    present = batch_sizes[:, None] > torch.arange(sequences)  # (T, N)
    total = int(batch_sizes.sum())
    rows = torch.empty(present.shape, dtype=torch.long)
    rows[present] = torch.arange(total)
    order = rows.t()[present.t()]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(total)
    return order, inverse, F.pad(present.sum(0).cumsum(0), (1, 0))


def _run(
    module: nn.RNNBase, input: Tensor | PackedSequence, states: States | None, layer: Layer
) -> tuple[Tensor | PackedSequence, States]:
    """Run all layers and directions.

    Args:
        module: gives sizes and weights.
        input: what ``forward`` got.
        states: the initial states, (layers, N, D) each, or (layers, D) without a batch axis.
        layer: one direction of one layer.

    Returns:
        The output, and the final states as a tuple.
    """
    cu_seqlens = inverse = None
    batch_first, unbatched = module.batch_first, False
    if isinstance(input, PackedSequence):
        order, inverse, cu_seqlens = _rows_of_sequences(input.batch_sizes)
        x, batch_first = input.data[order][None], True
        if states is not None and input.sorted_indices is not None:
            states = tuple(state.index_select(1, input.sorted_indices) for state in states)
    else:
        unbatched = input.ndim == 2
        x = input.unsqueeze(0 if batch_first else 1) if unbatched else input
        if states is not None and unbatched:
            states = tuple(state.unsqueeze(1) for state in states)
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = dtype if states is None else states[0].dtype
        dtype = torch.promote_types(dtype, torch.get_autocast_dtype("cpu"))
    final: list[States] = []
    directions = 2 if module.bidirectional else 1
    for n in range(module.num_layers):
        if n and module.dropout:
            x = F.dropout(x, module.dropout, module.training)
        outputs = []
        for direction in range(directions):
            k = n * directions + direction
            weights = [getattr(module, name) for name in module._all_weights[k]]
            initial = None if states is None else tuple(state[k] for state in states)
            output, last = layer(
                x,
                weights,
                initial,
                batch_first=batch_first,
                reverse=direction == 1,
                cu_seqlens=cu_seqlens,
            )
            outputs.append(output)
            final.append(last)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    x = x.to(dtype)
    last = tuple(torch.stack(state).to(dtype) for state in zip(*final, strict=True))
    if isinstance(input, PackedSequence):
        if input.unsorted_indices is not None:
            last = tuple(state.index_select(1, input.unsorted_indices) for state in last)
        packed = (input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        return PackedSequence(x[0][inverse], *packed), last
    if unbatched:
        return x.squeeze(0 if batch_first else 1), tuple(state.squeeze(1) for state in last)
    return x, last


def _gru_layer(
    x: Tensor, weights: list[Tensor], states: States | None, **options: Any
) -> tuple[Tensor, States]:
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    output, final = gru(F.linear(x, w_ih, b_ih), w_hh, b_hh, *(states or (None,)), **options)
    return output, (final,)


def _lstm_layer(
    x: Tensor, weights: list[Tensor], states: States | None, **options: Any
) -> tuple[Tensor, States]:
    w_ih, w_hh, *biases = weights
    bias = biases[0] + biases[1] if biases else None
    return lstm(F.linear(x, w_ih, bias), w_hh, *(states or (None, None)), **options)


class GRU(nn.GRU):
    """``torch.nn.GRU`` with the kernel ``mmrec.kernels.gru``.

    Constructor, parameters, ``state_dict``, inputs, outputs and errors are those of
    ``torch.nn.GRU``, and this class is a subclass of it. Where ``torch.nn.GRU`` computes in
    bfloat16 or float16, the recurrence here is float32 inside.

    Tensors on other devices, transforms of ``torch.func`` and calls of few steps take torch's own
    forward pass. Gradients of the kernel are those of the first order.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """
        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, (T, I), or a PackedSequence.
            hx: (layers, N, D), or (layers, D) without a batch axis, the initial state; zero if
                None. ``layers`` is num_layers, or twice that if ``bidirectional``.

        Returns:
            output: like the input, with D, or 2D if ``bidirectional``, in place of I.
            hx: the final state, of the shape of the initial one.

        Raises:
            ValueError, RuntimeError: as ``torch.nn.GRU`` does.
        """
        states = None if hx is None else (hx,)
        if not _takes(self, input, states):
            return super().forward(input, hx)
        output, (state,) = _run(self, input, states, _gru_layer)
        return output, state


class LSTM(nn.LSTM):
    """``torch.nn.LSTM`` with the kernel ``mmrec.kernels.lstm``.

    What ``GRU`` says of ``torch.nn.GRU`` holds here of ``torch.nn.LSTM``. torch's own forward pass
    also runs with ``proj_size``, for fewer sequences than threads, and for little work, where it is
    as fast.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """
        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, (T, I), or a PackedSequence.
            hx: the initial state and cell, (layers, N, D) each, or (layers, D) without a batch
                axis; zero if None. ``layers`` is num_layers, or twice that if ``bidirectional``.

        Returns:
            output: like the input, with D, or 2D if ``bidirectional``, in place of I.
            hx: the final state and cell, of the shapes of the initial ones.

        Raises:
            ValueError, RuntimeError: as ``torch.nn.LSTM`` does.
        """
        states = tuple(hx) if isinstance(hx, tuple | list) else None
        mistaken = hx is not None and (states is None or len(states) != 2)
        if mistaken or not _takes(self, input, states):
            return super().forward(input, hx)
        output, (state, cell) = _run(self, input, states, _lstm_layer)
        return output, (state, cell)
