"""Matrices in panels, for products with few vectors, and teams of threads that share one.

A product with one vector takes as long as reading the matrix, so the matrix is laid out in the
order in which it is read. A matrix (rows, depth) is cut into panels of PANEL rows, the last one
padded with zeros. A panel holds its column 0, then its column 1, and so on: flat,
``panels[row // PANEL, k, row % PANEL]``. One instruction multiplies an input by a piece of a
column, and the sums of a panel stay in registers.

Every output is one sum over k in order, by fused multiply-adds where the processor has them. How
many vectors are multiplied at once, and which thread has which panels, never shows in the results.
Neither does skipping inputs that are zero.

Weights are float32, bfloat16 (bits as uint16) or int8. A scale per row applies to the finished sum.
"""

import functools
import os
import sys
import threading
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mmrec.kernels._jit import inline_jit, overload

PANEL = 32
"""Rows of a panel."""
BLOCK = 128
"""Columns that are multiplied by many vectors before the next ones are read."""
_AVX512 = binding.get_host_cpu_features().get("avx512f", False)
_LANES = 16 if _AVX512 else 8
TILE = 6 if _AVX512 else 3
"""Vectors whose sums are in registers at once."""


def pad(rows: int) -> int:
    """Rows of a matrix with its padding."""
    return -(-rows // PANEL) * PANEL


def to_panels(matrix: np.ndarray) -> np.ndarray:
    """Lay out a matrix (rows, depth) in panels; returns a flat array of pad(rows) * depth."""
    rows, depth = matrix.shape
    padded = np.zeros((pad(rows), depth), matrix.dtype)
    padded[:rows] = matrix
    return np.ascontiguousarray(padded.reshape(-1, PANEL, depth).swapaxes(1, 2)).reshape(-1)


def _weight_piece(builder: Any, dtype: Any, pointer: Any) -> Any:
    """Load _LANES weights as a vector of float32."""
    integers = ir.VectorType(ir.IntType(32), _LANES)
    floats = ir.VectorType(ir.FloatType(), _LANES)
    size = dtype.bitwidth // 8
    stored = floats if dtype == types.float32 else ir.VectorType(ir.IntType(8 * size), _LANES)
    piece = builder.load(builder.bitcast(pointer, stored.as_pointer()), align=size)
    if dtype == types.uint16:
        shift = ir.Constant(integers, [16] * _LANES)
        return builder.bitcast(builder.shl(builder.zext(piece, integers), shift), floats)
    if dtype == types.int8:
        return builder.sitofp(builder.sext(piece, integers), floats)
    return piece


def _plain_tile(  # type: ignore[no-untyped-def]
    panels, count, sparse, weights, at, panel_size, x, x_at, x_row, index, depth, sums, sums_at
):
    """What ``_make_tile`` compiles, where nothing is compiled."""
    for k in index[:depth] if sparse else range(depth):
        begins = [at + panel * panel_size + k * PANEL for panel in range(panels)]
        column = np.concatenate([weights[begin : begin + PANEL] for begin in begins])
        for v in range(count):
            here = slice(sums_at + v * column.size, sums_at + (v + 1) * column.size)
            sums[here] += widened(column) * x[x_at + v * x_row + k]


def widened(weights: np.ndarray) -> np.ndarray:
    """float32 numbers of weights that may be bfloat16 bits or int8."""
    if weights.dtype == np.uint16:
        return (weights.astype(np.uint32) << 16).view(np.float32)
    return weights.astype(np.float32)


def _make_tile(panels: int, vectors: int, *, sparse: bool = False) -> Any:
    """The product of neighbouring panels with some vectors.

    Its sums are (vectors, panels * PANEL) from ``sums_at`` on. It begins from those that are
    there. ``x`` holds the vectors, ``x_row`` numbers apart. If ``sparse``, only the ``depth``
    columns are multiplied that ``index`` lists.
    """
    pieces = panels * PANEL // _LANES
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return functools.partial(_plain_tile, panels, vectors, sparse)

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typing, weights, at, panel_size, x, x_at, x_row, index, depth, sums, sums_at
    ):
        integer = types.intp
        signature = types.void(
            weights, integer, integer, x, integer, integer, index, integer, sums, integer
        )

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            dtype = signature.args[0].dtype
            data = [
                context.make_array(signature.args[n])(context, builder, args[n]).data
                for n in (0, 3, 6, 8)
            ]
            weights, x, index, sums = data
            _, at, panel_size, _, x_at, x_row, _, depth, _, sums_at = args
            floats = ir.VectorType(ir.FloatType(), _LANES)
            intp = at.type

            def constant(n: int) -> Any:
                return ir.Constant(intp, n)

            fma_type = ir.FunctionType(floats, [floats] * 3)
            name = f"llvm.fmuladd.v{_LANES}f32"
            fma = cgutils.get_or_insert_function(builder.module, fma_type, name)
            targets, totals = [], []
            for n in range(vectors * pieces):
                place = builder.add(sums_at, constant(n * _LANES))
                pointer = builder.bitcast(builder.gep(sums, [place]), floats.as_pointer())
                targets.append(pointer)
                totals.append(cgutils.alloca_once_value(builder, builder.load(pointer, align=4)))
            begins = [builder.add(x_at, builder.mul(x_row, constant(v))) for v in range(vectors)]
            per_panel = PANEL // _LANES
            origins = [builder.add(at, builder.mul(panel_size, constant(p))) for p in range(panels)]
            with cgutils.for_range(builder, depth) as loop:
                k = loop.index
                if sparse:
                    k = builder.sext(builder.load(builder.gep(index, [k])), intp)
                splats = []
                for begin in begins:
                    value = builder.load(builder.gep(x, [builder.add(begin, k)]))
                    undefined = ir.Constant(floats, ir.Undefined)
                    zero = ir.Constant(ir.IntType(32), 0)
                    first = builder.insert_element(undefined, value, zero)
                    lanes = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
                    splats.append(builder.shuffle_vector(first, undefined, lanes))
                column = builder.mul(k, constant(PANEL))
                for n in range(pieces):
                    origin = builder.add(origins[n // per_panel], column)
                    place = builder.add(origin, constant(n % per_panel * _LANES))
                    piece = _weight_piece(builder, dtype, builder.gep(weights, [place]))
                    for v in range(vectors):
                        total = totals[v * pieces + n]
                        result = builder.call(fma, [splats[v], piece, builder.load(total)])
                        builder.store(result, total)
            for pointer, total in zip(targets, totals, strict=True):
                builder.store(builder.load(total), pointer, align=4)
            return context.get_dummy_value()

        return signature, generate

    return tile


_pair_sparse, _one_sparse = _make_tile(2, 1, sparse=True), _make_tile(1, 1, sparse=True)
_pair, _one = _make_tile(2, 1), _make_tile(1, 1)
_two, _three = _make_tile(1, 2), _make_tile(1, 3)
_four, _five, _six = _make_tile(1, 4), _make_tile(1, 5), _make_tile(1, 6)


@inline_jit
def _tile_product(weights, at, x, x_at, x_row, index, count, depth, sums, sums_at):  # type: ignore[no-untyped-def]
    """The product of one panel with ``count`` <= TILE vectors."""
    if count == 1:
        _one(weights, at, 0, x, x_at, x_row, index, depth, sums, sums_at)
    elif count == 2:
        _two(weights, at, 0, x, x_at, x_row, index, depth, sums, sums_at)
    elif count == 3:
        _three(weights, at, 0, x, x_at, x_row, index, depth, sums, sums_at)
    elif TILE > 3:
        if count == 4:
            _four(weights, at, 0, x, x_at, x_row, index, depth, sums, sums_at)
        elif count == 5:
            _five(weights, at, 0, x, x_at, x_row, index, depth, sums, sums_at)
        else:
            _six(weights, at, 0, x, x_at, x_row, index, depth, sums, sums_at)


STORE, ADD, RELU_SQUARED = 0, 1, 2
"""What happens to a finished product: it replaces the output, is added to it, or is rectified."""


@inline_jit
def _finish(sums, sums_at, scales, scale_at, out, out_at, count, how):  # type: ignore[no-untyped-def]
    """Scale ``count`` sums and put them into the output."""
    sums_at, out_at, scale_at = np.uint64(sums_at), np.uint64(out_at), np.uint64(scale_at)
    if scales.size > 0:
        for j in range(np.uint64(count)):
            sums[sums_at + j] *= scales[scale_at + j]
    if how == STORE:
        for j in range(np.uint64(count)):
            out[out_at + j] = sums[sums_at + j]
    elif how == ADD:
        for j in range(np.uint64(count)):
            out[out_at + j] += sums[sums_at + j]
    else:
        for j in range(np.uint64(count)):
            positive = max(sums[sums_at + j], np.float32(0))
            out[out_at + j] = positive * positive


@inline_jit
def _widen(weights, at, count, out):  # type: ignore[no-untyped-def]
    """out[: count] = weights[at : at + count] as float32."""
    at = np.uint64(at)
    if weights.itemsize == 2:
        bits = out.view(np.uint32)
        for j in range(np.uint64(count)):
            bits[j] = np.uint32(weights[at + j]) << np.uint32(16)
    else:
        for j in range(np.uint64(count)):
            out[j] = np.float32(weights[at + j])


@inline_jit
def product(  # type: ignore[no-untyped-def]
    weights,
    at,
    scales,
    scale_at,
    first,
    end,
    depth,
    x,
    x_at,
    x_row,
    index,
    out,
    out_at,
    out_row,
    count,
    how,
    skip_zeros,
    sums,
    wide,
):
    """out[v, j] = Σ_k W[j, k] x[v, k] for the panels ``first`` up to ``end`` of a matrix.

    Args:
        weights, at: the flat array of matrices, and where this one begins.
        scales, scale_at: a scale per row, and where those of the matrix begin; empty for none.
        first, end: the panels to multiply.
        depth: columns of the matrix.
        x, x_at, x_row: the vectors; ``x_row`` numbers lie between them.
        index: (depth,) int32 scratch.
        out, out_at, out_row: the outputs, ``out_row`` numbers apart. They have room for padding.
        count: number of vectors.
        how: STORE, ADD or RELU_SQUARED.
        skip_zeros: not 0: look for zeros in x if count is 1, and leave out their columns.
        sums: float32 scratch of (count, PANEL) numbers, or (1, 2 PANEL) if count is 1.
        wide: float32 scratch of BLOCK * PANEL numbers.
    """
    size, zero = depth * PANEL, np.int64(0)
    if count == 1:
        used = depth
        if skip_zeros:
            used = 0
            for k in range(depth):
                index[used] = k
                used += x[x_at + k] != 0
        sparse = used < depth - depth // 8
        panel = first
        while panel < end:
            pair = panel + 1 < end
            width = np.int64(2 * PANEL if pair else PANEL)
            sums[:width] = 0
            here = at + panel * size
            if sparse and pair:
                _pair_sparse(weights, here, size, x, x_at, x_row, index, used, sums, zero)
            elif sparse:
                _one_sparse(weights, here, size, x, x_at, x_row, index, used, sums, zero)
            elif pair:
                _pair(weights, here, size, x, x_at, x_row, index, depth, sums, zero)
            else:
                _one(weights, here, size, x, x_at, x_row, index, depth, sums, zero)
            begin = panel * PANEL
            _finish(sums, zero, scales, scale_at + begin, out, out_at + begin, width, how)
            panel += 2 if pair else 1
        return
    tiles = (count + TILE - 1) // TILE
    for panel in range(first, end):
        sums[: count * PANEL] = 0
        for k in range(0, depth, BLOCK):
            columns = min(BLOCK, depth - k)
            here = at + panel * size + k * PANEL
            convert = weights.itemsize != 4 and tiles > 2
            if convert:
                _widen(weights, here, columns * PANEL, wide)
            v = np.int64(0)
            for tile in range(tiles):
                more = (count - v + tiles - tile - 1) // (tiles - tile)
                x_v, sums_v = x_at + v * x_row + k, v * PANEL
                if convert:
                    _tile_product(wide, zero, x, x_v, x_row, index, more, columns, sums, sums_v)
                else:
                    _tile_product(weights, here, x, x_v, x_row, index, more, columns, sums, sums_v)
                v += more
        begin = panel * PANEL
        for n in range(count):
            here, room = out_at + n * out_row + begin, np.int64(PANEL)
            _finish(sums, n * PANEL, scales, scale_at + begin, out, here, room, how)


# The barrier needs three things that Numba does not have. Where nothing is compiled, Python does
# them.
_lock = threading.Lock()


def _fetch_add(counter: np.ndarray, amount: int) -> Any:
    """Add to counter[0] at once for all threads; returns what was there."""
    with _lock:
        counter[0] += amount
        return counter[0] - amount


def _load_shared(counter: np.ndarray) -> Any:
    """counter[0], as other threads have left it."""
    return counter[0]


def _yield_processor() -> None:
    """Let another thread of the machine run."""
    os.sched_yield()


@intrinsic
def _fetch_add_compiled(typing, counter, amount):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, args[1], "seq_cst")

    return types.int64(counter, types.int64), generate


@intrinsic
def _load_shared_compiled(typing, counter):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(data, "seq_cst", 8)

    return types.int64(counter), generate


@intrinsic
def _yield_processor_compiled(typing):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if sys.platform != "win32":
            function_type = ir.FunctionType(ir.IntType(32), [])
            name = "sched_yield"
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [])
        return context.get_dummy_value()

    return types.void(), generate


_compiled: Any = (_fetch_add_compiled, _load_shared_compiled, _yield_processor_compiled)
_add_shared, _read_shared, _yield = _compiled
overload(_fetch_add)(lambda counter, amount: lambda counter, amount: _add_shared(counter, amount))
overload(_load_shared)(lambda counter: lambda counter: _read_shared(counter))
overload(_yield_processor)(lambda: lambda: _yield())


SPINS = 2000
"""Looks at the counter of a barrier before the processor is offered to others."""


@inline_jit
def barrier(arrived, members):  # type: ignore[no-untyped-def]
    """Wait until all members of a team have come here.

    Args:
        arrived: (1,) int64, how many have arrived at all barriers so far; shared by the team.
        members: threads in the team.
    """
    if members > 1:
        before = _fetch_add(arrived, 1)
        goal = (before // members + 1) * members
        spins = 0
        while _load_shared(arrived) < goal:
            spins += 1
            if spins > SPINS:
                _yield_processor()
