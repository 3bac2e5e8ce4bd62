"""Tiles (steps, LANES) of arrays over time and channels, for kernels with one channel per lane.

An array may have its channels side by side ("channels last") or its steps ("time last", the layout
of mamba-ssm and causal-conv1d). A tile has channels side by side, so a time-last array is
transposed in blocks of LANES. Rows of a tile beyond ``steps`` and lanes beyond ``channels`` are 0.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._jit import inline_jit
from mmrec.kernels._simd import LANES, load, store, transpose, zeros
from mmrec.kernels._tensors import check_tensor, flat

TILE_STEPS = 32
"""Steps of a tile; a multiple of LANES."""


def channels_last(x: Tensor) -> bool:
    """Whether a tensor (B, D, L) has its channels side by side in memory."""
    return x.stride(1) == 1 and x.stride(2) != 1


def sequence_runs(seq_idx: Tensor | None, batch: int, time: int) -> np.ndarray:
    """(S, 4) int64: the batch row, first step and end of each run of equal numbers in a row.

    The last column is 1 for the first run of a row, which begins from the initial state. Without
    seq_idx (B, L) each row is one run.
    """
    change = np.zeros((batch, time), bool)
    if seq_idx is not None and time > 1:
        numbers = seq_idx.numpy()
        change[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    if time == 0:
        return np.array([(row, 0, 0, 1) for row in range(batch)], np.int64).reshape(-1, 4)
    change[:, 0] = True
    rows, begins = np.nonzero(change)
    first = begins == 0
    ends = np.where(np.append(first[1:], True), time, np.append(begins[1:], time))
    return np.stack((rows, begins, ends, first), 1).astype(np.int64)


def check_seq_idx(seq_idx: Tensor, batch: int, time: int) -> None:
    """Raise ValueError unless seq_idx is an integer tensor (B, L) on the CPU."""
    check_tensor("seq_idx", seq_idx, (batch, time), "B, L")
    if seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seq_idx must have dtype int32 or int64; got {seq_idx.dtype}")


def empty_like(x: Tensor, shape: tuple[int, int, int] | None = None) -> Tensor:
    """An uninitialised dense tensor (B, D, L) with the order of axes in memory that x has."""
    batch, channels, time = shape or x.shape
    if channels_last(x):
        return x.new_empty(batch, time, channels).transpose(1, 2)
    return x.new_empty(batch, channels, time)


def span(x: Tensor) -> np.ndarray:
    """The memory from the first to the last element of a tensor, as a 1-D array."""
    if x.is_contiguous() or x.numel() == 0:
        return flat(x)
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return flat(x.as_strided((length,), (1,)))


def with_strides(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A tensor (B, D, L) as a 1-D array, and its strides over batch, time and channels.

    It is copied only if neither its channels nor its steps are side by side.
    """
    if 1 not in (x.stride(1), x.stride(2)):
        x = x.contiguous()
    batch, channels, time = x.stride()
    return span(x), np.array((batch, time, channels), np.int64)


@inline_jit
def load_tile(
    x: Any, at: Any, time: Any, channel: Any, steps: Any, channels: Any, tile: Any, tile_at: Any
) -> None:
    """Read a tile that begins at x[at] and at tile[tile_at].

    tile[t, d] = x[at + t time + d channel] for t < steps and d < channels, else 0.
    """
    nothing = zeros(tile)
    begin = 0
    if channels == LANES and channel == 1:
        for t in range(steps):
            store(tile, tile_at + t * LANES, load(x, at + t * time))
        begin = steps
    elif channels == LANES and time == 1:
        begin = steps - steps % LANES
        for t in range(0, begin, LANES):
            transpose(x, at + t, channel, tile, tile_at + t * LANES, LANES)
    for t in range(begin, TILE_STEPS):
        store(tile, tile_at + t * LANES, nothing)
    for t in range(begin, steps):
        for d in range(channels):
            tile[tile_at + t * LANES + d] = x[at + t * time + d * channel]


@inline_jit
def store_tile(
    tile: Any, tile_at: Any, x: Any, at: Any, time: Any, channel: Any, steps: Any, channels: Any
) -> None:
    """x[at + t time + d channel] = tile[t, d] for t < steps and d < channels."""
    begin = 0
    if channels == LANES and channel == 1:
        for t in range(steps):
            store(x, at + t * time, load(tile, tile_at + t * LANES))
        begin = steps
    elif channels == LANES and time == 1:
        begin = steps - steps % LANES
        for t in range(0, begin, LANES):
            transpose(tile, tile_at + t * LANES, LANES, x, at + t, channel)
    for t in range(begin, steps):
        for d in range(channels):
            x[at + t * time + d * channel] = tile[tile_at + t * LANES + d]


@inline_jit
def load_columns(
    source: Any, at: Any, columns: Any, channels: Any, scale: Any, target: Any, target_at: Any
) -> None:
    """target[n, d] = scale source[d, n], a matrix (LANES, columns); 0 for d >= channels."""
    for n in range(columns):
        for d in range(LANES):
            value = source[at + d * columns + n] if d < channels else target.dtype.type(0)
            target[target_at + n * LANES + d] = value * scale


@inline_jit
def store_columns(
    source: Any, source_at: Any, columns: Any, channels: Any, target: Any, at: Any
) -> None:
    """target[d, n] = source[n, d] for d < channels."""
    for d in range(channels):
        for n in range(columns):
            target[at + d * columns + n] = source[source_at + n * LANES + d]
