"""Small steps on tiles, from which the kernels of the memory are put together.

Axes: C = CHUNK steps, W numbers a head, P rounded up to whole vectors. An array "of columns" holds
(W, C), one step in each lane; "rows" are (C, W). All arrays are flat.
"""

import numpy as np

from mmrec.kernels._launch import helper
from mmrec.kernels._math import sigmoid
from mmrec.kernels._simd import LANES, fma, load, spread, store, transpose, zeros

CHUNK = LANES  # one lane for each step of a chunk
EPSILON = 1e-6  # added to |k|² and |q|²
TILE = 8  # rows of a product whose sums are in registers at once


@helper
def copy(source, at, step, target, to, stride, count, size):
    """Copy ``count`` rows of ``size`` numbers, ``step`` and ``stride`` apart."""
    whole = size - size % LANES
    for i in range(count):
        here, there = at + i * step, to + i * stride
        for j in range(0, whole, LANES):
            store(target, there + j, load(source, here + j))
        for j in range(whole, size):
            target[there + j] = source[here + j]


@helper
def enter(source, at, step, count, size, rows, width):
    """rows (…, W) = ``count`` rows of ``size`` numbers, zero beyond both."""
    if count * width < rows.shape[0] or size < width:
        rows[:] = 0
    copy(source, at, step, rows, 0, width, count, size)


@helper
def to_columns(rows, columns, width):
    """Transpose (C, W) to (W, C)."""
    for j in range(0, width, LANES):
        transpose(rows, j, width, columns, j * CHUNK, CHUNK)


@helper
def to_rows(columns, rows, width):
    """Transpose (W, C) to (C, W)."""
    for j in range(0, width, LANES):
        transpose(columns, j * CHUNK, CHUNK, rows, j, width)


@helper
def dot(x, y, width, out):
    """out (C) = dot products of the columns of x and y."""
    total = zeros(x)
    for i in range(width):
        total = fma(load(x, i * LANES), load(y, i * LANES), total)
    store(out, 0, total)


@helper
def scale(x, factor, width, out):
    """out (W, C) = columns of x times factor (C); out may be x."""
    by = load(factor, 0)
    for i in range(0, width * LANES, LANES):
        store(out, i, load(x, i) * by)


@helper
def normalise(columns, width, factor):
    """Divide each column by its norm; factor (C) keeps what it was multiplied by."""
    dot(columns, columns, width, factor)
    one = factor.dtype.type(1)
    for t in range(CHUNK):
        factor[t] = one / np.sqrt(factor[t] + factor.dtype.type(EPSILON))
    scale(columns, factor, width, columns)


@helper
def pull_normalise(unit, factor, width, dunit, along):
    """dunit = factor (dunit - unit (unit · dunit)), the adjoint of normalise."""
    dot(unit, dunit, width, along)
    by, off = load(factor, 0), load(along, 0)
    for i in range(0, width * LANES, LANES):
        store(dunit, i, (load(dunit, i) - load(unit, i) * off) * by)


@helper
def gates(source, base, step, steps, blank, out):
    """out (C) = σ of one number for each of the steps, blank beyond."""
    for t in range(CHUNK):
        out[t] = source[base + t * step] if t < steps else out.dtype.type(0)
    for t in range(CHUNK):
        out[t] = sigmoid(out[t])
    for t in range(steps, CHUNK):
        out[t] = blank


@helper
def product(x, x_row, x_inner, y, y0, y_inner, rows, inner, out, o0, o_row):
    """out[row, lanes] += Σ_n x[row, n] y[n, lanes]; row and n by strides, rows in TILEs."""
    for i in range(0, rows, TILE):
        o = o0 + i * o_row
        c0, c1 = load(out, o), load(out, o + o_row)
        c2, c3 = load(out, o + 2 * o_row), load(out, o + 3 * o_row)
        c4, c5 = load(out, o + 4 * o_row), load(out, o + 5 * o_row)
        c6, c7 = load(out, o + 6 * o_row), load(out, o + 7 * o_row)
        for n in range(inner):
            at, line = i * x_row + n * x_inner, load(y, y0 + n * y_inner)
            c0 = fma(spread(x, at), line, c0)
            c1 = fma(spread(x, at + x_row), line, c1)
            c2 = fma(spread(x, at + 2 * x_row), line, c2)
            c3 = fma(spread(x, at + 3 * x_row), line, c3)
            c4 = fma(spread(x, at + 4 * x_row), line, c4)
            c5 = fma(spread(x, at + 5 * x_row), line, c5)
            c6 = fma(spread(x, at + 6 * x_row), line, c6)
            c7 = fma(spread(x, at + 7 * x_row), line, c7)
        store(out, o, c0)
        store(out, o + o_row, c1)
        store(out, o + 2 * o_row, c2)
        store(out, o + 3 * o_row, c3)
        store(out, o + 4 * o_row, c4)
        store(out, o + 5 * o_row, c5)
        store(out, o + 6 * o_row, c6)
        store(out, o + 7 * o_row, c7)


@helper
def gram(x, y, weight, width, out):
    """out[s, t] = weight[s, t] times the dot product of column s of x and column t of y."""
    out[:] = 0
    product(x, 1, CHUNK, y, 0, CHUNK, CHUNK, width, out, 0, CHUNK)
    for s in range(0, CHUNK * CHUNK, LANES):
        store(out, s, load(out, s) * load(weight, s))
