"""What the kernels of recurrent cells share: products with a weight that every step uses.

A step multiplies the states of a few sequences by the recurrent weight. The weight is laid out once
per call in *panels* of as many output columns as a block of vector registers holds, in the order in
which the steps read it. The sums of a block stay in registers over the whole depth. Every output is
one sum in the order of depth, by fused multiply-adds where the processor has them, so neither the
width of the panels nor the number of rows in a block shows in the results.

Axes: B batch, T time, N sequences (B, or the packed sequences of one row), D channels.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch import Tensor

from mmrec.kernels._jit import inline_jit, overload
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import cdiv
from mmrec.kernels._simd import (
    REGISTER_BYTES,
    _intrinsic,
    _VectorBuilder,
)
from mmrec.kernels._tensors import (
    check_input,
    check_tensor,
    flat,
    flat_with_strides,
    make_sequence_bounds,
    sequence_count,
)

MAX_TILE_ROWS = 16
"""Sequences that advance together at most: each panel is read once for all of them."""
_BLOCK_ROWS, _REGISTERS = 4, 3
"""Rows and registers of a block of sums, for three rows or more."""
_FEW_ROWS, _FEW_ROWS_REGISTERS = 2, 6
"""The same for up to that many rows: without more columns a block would have too few sums."""


def panel_width(rows: int, itemsize: int) -> int:
    """Columns of a panel for products of that many rows."""
    registers = _FEW_ROWS_REGISTERS if rows <= _FEW_ROWS else _REGISTERS
    return registers * REGISTER_BYTES // itemsize


def to_panels(weight: Tensor, width: int) -> np.ndarray:
    """Lay out a matrix (columns, depth) in panels, ``panels[column // width, k, column % width]``.

    Returns:
        The panels as a flat array; missing columns of the last one are zero.
    """
    columns, depth = weight.shape
    count = cdiv(columns, width)
    panels = weight.new_empty(count, depth, width)
    full = columns // width
    panels[:full] = weight[: full * width].view(full, width, depth).transpose(1, 2)
    if full < count:
        rest = weight[full * width :]
        panels[full, :, : rest.shape[0]] = rest.t()
        panels[full, :, rest.shape[0] :] = 0
    return panels.view(-1).numpy()


def make_tiles(x: Tensor, cu_seqlens: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """``sequence_bounds`` (N, 3), and ``tiles`` (M, R): the sequences of each task, -1 for none.

    Tiles are as large as leaves one for every thread. Packed sequences are sorted by length,
    longest first, so that similar lengths share a tile, and tiles go to the threads in turn. No sum
    depends on which sequences share a tile.

    Args:
        x: (B, T, …), gives the sizes.
        cu_seqlens: (N + 1,), or None.
    """
    sequence_bounds = make_sequence_bounds(x.shape[0], x.shape[1], cu_seqlens)
    sequences, threads = len(sequence_bounds), torch.get_num_threads()
    tiles_per_thread = cdiv(sequences, MAX_TILE_ROWS * threads)
    rows = cdiv(sequences, max(1, tiles_per_thread * threads)) or 1
    tiles = np.full((cdiv(sequences, rows), rows), -1)
    order = tiles.reshape(-1)[:sequences]
    if cu_seqlens is None:
        order[:] = np.arange(sequences)
        return sequence_bounds, tiles
    order[:] = np.argsort(sequence_bounds[:, 1] - sequence_bounds[:, 2], kind="stable")
    return sequence_bounds, np.concatenate([tiles[first::threads] for first in range(threads)])


def states_before(
    h: Tensor, initial: Tensor, cu_seqlens: Tensor | None, batch_first: bool, reverse: bool
) -> Tensor:
    """The state before each step, of the shape of h (B, T, D) or (T, B, D); initial is (N, D)."""
    axis = 1 if batch_first else 0
    if h.shape[axis] == 0:
        return h
    if cu_seqlens is None:
        first, rest = initial.unsqueeze(axis), h.shape[axis] - 1
        if reverse:
            return torch.cat((h.narrow(axis, 1, rest), first), axis)
        return torch.cat((first, h.narrow(axis, 0, rest)), axis)
    full = cu_seqlens[1:] > cu_seqlens[:-1]  # an empty sequence has no first step
    at = (cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1])[full].long()
    return h.roll(-1 if reverse else 1, axis).index_copy(
        axis, at, initial[full].unsqueeze(1 - axis)
    )


def check_gates(
    gates: int,
    projected: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    batch_first: bool,
) -> tuple[int, int]:
    """Check the arguments that both ops have; returns the shape of the state, (N, D).

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as ``gru`` and ``lstm`` say.
    """
    columns = f"{gates}D"
    axes = f"B, T, {columns}" if batch_first else f"T, B, {columns}"
    check_input("projected", projected, axes, None)
    rows = projected if batch_first else projected.transpose(0, 1)
    check_input("projected", rows, axes, cu_seqlens)
    if projected.shape[2] % gates:
        raise ValueError(
            f"projected must have shape ({axes}), {gates} gates side by side; "
            f"got {tuple(projected.shape)}"
        )
    width = projected.shape[2] // gates
    check_tensor("weight", weight, (gates * width, width), f"{columns}, D", projected.dtype)
    if bias is not None:
        check_tensor("bias", bias, (gates * width,), columns, projected.dtype)
    return sequence_count(rows.shape[0], cu_seqlens), width


def work(gates: Tensor) -> float:
    """Estimate of the nanoseconds that a pass takes on one thread."""
    return gates.numel() * (1 + 0.01 * gates.shape[-1])


def add_panels(  # type: ignore[no-untyped-def]
    x, x_at, x_row, x_step, panels, at, width, out, out_at, out_row, rows, depth, columns
):
    """out[r, j] += Σ_k x[r, k] w[k, j] for the ``columns`` columns w of some panels.

    Args:
        x, x_at, x_row, x_step: flat array, where its rows begin, and the numbers from a row to the
            next and from a column to the next.
        panels, at, width: the result of ``to_panels``, where its panels begin, and their width.
        out, out_at, out_row: the same for the sums. A row has room for whole panels.
        rows, depth, columns: sizes of the product.
    """
    for r in range(rows):
        for p in range(cdiv(columns, width)):
            place = slice(out_at + r * out_row + p * width, out_at + r * out_row + (p + 1) * width)
            for k in range(depth):
                begin = at + (p * depth + k) * width
                value = x[x_at + r * x_row + k * x_step]
                out[place] += value * panels[begin : begin + width]


def _make_block(rows: int, registers: int) -> Any:
    """The product of that many rows with one panel, which is ``registers`` wide."""

    @_intrinsic
    def block(typing, x, x_at, x_row, x_step, panels, at, out, out_at, out_row, depth):  # type: ignore[no-untyped-def]
        integers = (types.intp,) * 3
        signature = types.void(x, *integers, panels, types.intp, out, *integers)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_at, x_row, x_step, panels, at, out, out_at, out_row, depth = args
            dtype = signature.args[0].dtype
            lanes = REGISTER_BYTES // (dtype.bitwidth // 8)
            vectors = _VectorBuilder(context, builder, dtype, lanes)
            x, panels, out = (vectors.data(signature.args[n], args[n]) for n in (0, 4, 6))

            def constant(n: int) -> Any:
                return ir.Constant(at.type, n)

            x_rows, targets, sums = [], [], []
            for r in range(rows):
                begin = builder.add(x_at, builder.mul(x_row, constant(r)))
                x_rows.append(builder.gep(x, [begin]))
                begin = builder.add(out_at, builder.mul(out_row, constant(r)))
                for n in range(registers):
                    place = builder.gep(out, [builder.add(begin, constant(n * lanes))])
                    targets.append(place)
                    sums.append(cgutils.alloca_once_value(builder, vectors.load(place)))
            origin = builder.gep(panels, [at])
            with cgutils.for_range(builder, depth) as loop:
                column = builder.mul(loop.index, constant(registers * lanes))
                shift = builder.mul(loop.index, x_step)
                values = [builder.gep(row, [shift]) for row in x_rows]
                pieces = [builder.add(column, constant(n * lanes)) for n in range(registers)]
                products = [(r, n) for r in range(rows) for n in range(registers)]
                # what there is less of stays in registers: the rows' values, or the pieces
                if rows < registers:
                    values = [vectors.splat(builder.load(value)) for value in values]
                    products.sort(key=lambda pair: pair[1])
                else:
                    pieces = [vectors.load(builder.gep(origin, [piece])) for piece in pieces]
                for r, n in products:
                    if rows < registers:
                        if r == 0:
                            piece = vectors.load(builder.gep(origin, [pieces[n]]))
                        value = values[r]
                    else:
                        if n == 0:
                            value = vectors.splat(builder.load(values[r]))
                        piece = pieces[n]
                    total = sums[r * registers + n]
                    builder.store(vectors.fma(value, piece, builder.load(total)), total)
            for total, place in zip(sums, targets, strict=True):
                vectors.store(builder.load(total), place)
            return context.get_dummy_value()

        return signature, generate

    return block


_one, _two, _three, _four = (_make_block(rows, _REGISTERS) for rows in (1, 2, 3, 4))
_one_wide, _two_wide = (_make_block(rows, _FEW_ROWS_REGISTERS) for rows in (1, 2))


@overload(add_panels)
def _add_panels(  # type: ignore[no-untyped-def]
    x, x_at, x_row, x_step, panels, at, width, out, out_at, out_row, rows, depth, columns
):
    def compiled(  # type: ignore[no-untyped-def]
        x, x_at, x_row, x_step, panels, at, width, out, out_at, out_row, rows, depth, columns
    ):
        few = width * x.itemsize > _REGISTERS * REGISTER_BYTES
        most = _FEW_ROWS if few else _BLOCK_ROWS
        blocks = (rows + most - 1) // most
        for p in range((columns + width - 1) // width):
            w, r = at + p * depth * width, np.int64(0)
            for block in range(blocks):
                n = (rows - r + blocks - block - 1) // (blocks - block)
                i, j = x_at + r * x_row, out_at + r * out_row + p * width
                if few and n == 1:
                    _one_wide(x, i, x_row, x_step, panels, w, out, j, out_row, depth)
                elif few:
                    _two_wide(x, i, x_row, x_step, panels, w, out, j, out_row, depth)
                elif n == 4:
                    _four(x, i, x_row, x_step, panels, w, out, j, out_row, depth)
                elif n == 3:
                    _three(x, i, x_row, x_step, panels, w, out, j, out_row, depth)
                elif n == 2:
                    _two(x, i, x_row, x_step, panels, w, out, j, out_row, depth)
                else:
                    _one(x, i, x_row, x_step, panels, w, out, j, out_row, depth)
                r += n

    return compiled


@inline_jit
def padded(columns, width):  # type: ignore[no-untyped-def]
    """Columns of whole panels that hold so many."""
    return (columns + width - 1) // width * width


@inline_jit
def copy(source, source_at, target, target_at, width):  # type: ignore[no-untyped-def]
    """target[target_at:][:width] = source[source_at:][:width]."""
    source_at, target_at = np.uint64(source_at), np.uint64(target_at)
    for d in range(np.uint64(width)):
        target[target_at + d] = source[source_at + d]


DEPTH = 128
"""Rows that a weight gradient sums at once, so that they stay in cache."""


@parallel_kernel
def add_weight_gradient(  # type: ignore[no-untyped-def]
    task, a, a_row, b, b_row, rows, blocks, m, n, width, stripe, dw
):
    """dw[g] = Σ_k a_gᵀ[:, k] b_g[k], for the parts a_g (rows, m) and b_g (rows, n) of a and b.

    The parts lie side by side in rows of ``a_row`` and ``b_row`` numbers. dw is (blocks, m, n). A
    task has ``stripe`` rows of a block; ``width`` is that of panels. Every sum is in the order of
    rows.
    """
    stripes = (m + stripe - 1) // stripe
    g, top = task // stripes, task % stripes * stripe
    high = min(stripe, m - top)
    count = (n + width - 1) // width
    sums = np.zeros(high * count * width, a.dtype)
    panels = np.zeros(DEPTH * count * width, a.dtype)
    left = np.empty(DEPTH * high, a.dtype)
    for k in range(0, rows, DEPTH):
        depth = min(DEPTH, rows - k)
        for i in range(depth):
            copy(a, (k + i) * a_row + g * m + top, left, i * high, high)
            for p in range(count):
                source, size = (k + i) * b_row + g * n + p * width, min(width, n - p * width)
                copy(b, source, panels, (p * depth + i) * width, size)
        add_panels(left, 0, 1, high, panels, 0, width, sums, 0, count * width, high, depth, n)
    for i in range(high):
        copy(sums, i * count * width, dw, (g * m + top + i) * n, n)


def weight_gradient(a: Tensor, b: Tensor, blocks: int = 1) -> Tensor:
    """The gradient of a weight (blocks, M, N) from a (R, blocks M) and b (R, blocks N).

    Only the last axis of a and b must be dense. torch's own product would depend on the number of
    threads at some sizes.
    """
    m, n, threads = a.shape[1] // blocks, b.shape[1] // blocks, torch.get_num_threads()
    dw = a.new_empty((blocks, m, n))
    stripe = cdiv(cdiv(m, max(1, threads // blocks)), _BLOCK_ROWS) * _BLOCK_ROWS
    add_weight_gradient(
        *flat_with_strides(a[None])[::2],
        *flat_with_strides(b[None])[::2],
        a.shape[0],
        blocks,
        m,
        n,
        panel_width(_BLOCK_ROWS, a.element_size()),
        stripe,
        flat(dw),
        tasks=blocks * cdiv(m, stripe),
        work=0.02 * dw.numel() * a.shape[0],
    )
    return dw
