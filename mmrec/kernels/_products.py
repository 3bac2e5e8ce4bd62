"""Matrix products inside kernels whose sums stay in registers: the tiles of the gated delta rule.

Rows are many, and columns are a multiple of LANES: a block of columns of the right matrix stays in
the first-level cache while all rows pass. The left matrix may be triangular; most zeros of a
triangle are then left out. Every output is one sum in the order of depth, so the tiles never show
in the results.
"""

from typing import Any

import numpy as np

from mmrec.kernels._jit import inline_jit, overload
from mmrec.kernels._simd import REGISTER_BYTES, REGISTERS, make_block_product

FULL, LOWER, UPPER = 0, 1, 2
"""Shape of the left matrix. A triangle has the diagonal, and zeros outside."""
_ROWS = 3 * REGISTERS // 8
"""Rows of a tile: with two registers per row, three quarters of all registers hold sums."""


def add_tiled_product(  # type: ignore[no-untyped-def]
    x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth, columns, shape
):
    """out[r, j] += Σ_k x[r, k] w[k, j].

    Args:
        x, x_at, x_row, x_step: the left matrix begins at x_at; its rows are x_row, its columns
            x_step numbers apart.
        w, w_at, w_row: the right matrix; numbers in a row are neighbours.
        out, out_at, out_row: likewise.
        rows, depth, columns: sizes; columns is a multiple of LANES.
        shape: FULL, LOWER or UPPER, that of the left matrix.
    """
    for r in range(rows):
        row = slice(out_at + r * out_row, out_at + r * out_row + columns)
        begin, end = (r if shape == UPPER else 0), (min(r + 1, depth) if shape == LOWER else depth)
        for k in range(begin, end):
            w_k = w[w_at + k * w_row : w_at + k * w_row + columns]
            out[row] += x[x_at + r * x_row + k * x_step] * w_k


def _make_column_product(registers: int) -> Any:
    """The product for all rows, and the columns that so many registers hold."""
    most, four, two, one = (make_block_product(rows, registers) for rows in (_ROWS, 4, 2, 1))

    def column_product(  # type: ignore[no-untyped-def]
        x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth, shape
    ):
        r = np.int64(0)
        while r < rows:
            count = rows - r
            for size in (1, 2, 4, _ROWS):
                if rows - r >= size:
                    count = np.int64(size)
            begin, end = np.int64(0), np.int64(depth)
            if shape == LOWER:
                end = min(end, r + count)
            elif shape == UPPER:
                begin = r
            x_r, w_r = x_at + r * x_row + begin * x_step, w_at + begin * w_row
            out_r, length = out_at + r * out_row, end - begin
            if count == _ROWS:
                most(x, x_r, x_row, x_step, w, w_r, w_row, out, out_r, out_row, length)
            elif count == 4:
                four(x, x_r, x_row, x_step, w, w_r, w_row, out, out_r, out_row, length)
            elif count == 2:
                two(x, x_r, x_row, x_step, w, w_r, w_row, out, out_r, out_row, length)
            else:
                one(x, x_r, x_row, x_step, w, w_r, w_row, out, out_r, out_row, length)
            r += count

    return inline_jit(column_product, f"{registers} registers")


_wide, _narrow = _make_column_product(2), _make_column_product(1)


@overload(add_tiled_product)
def _add_tiled_product(  # type: ignore[no-untyped-def]
    x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth, columns, shape
):
    def compiled(  # type: ignore[no-untyped-def]
        x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth, columns, shape
    ):
        lanes, j = REGISTER_BYTES // x.itemsize, np.int64(0)
        while columns - j >= 2 * lanes:
            _wide(
                x,
                x_at,
                x_row,
                x_step,
                w,
                w_at + j,
                w_row,
                out,
                out_at + j,
                out_row,
                rows,
                depth,
                shape,
            )
            j += 2 * lanes
        if j < columns:
            _narrow(
                x,
                x_at,
                x_row,
                x_step,
                w,
                w_at + j,
                w_row,
                out,
                out_at + j,
                out_row,
                rows,
                depth,
                shape,
            )

    return compiled
