"""Plain matrix-vector products: what the weights alone cost a token, the bound of a decoder."""

import numba
import numpy as np


@numba.njit(fastmath=True)
def products(weights: np.ndarray, sizes: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Multiply one matrix after another by the same numbers, on one core.

    Args:
        weights: float32, the matrices one after another, each row by row.
        sizes: (matrices, 2) int64, rows and columns of each.
        x: (most columns,) float32.
        y: (most rows,) float32, is overwritten by each.
    """
    begin = 0
    for matrix in range(len(sizes)):
        rows, columns = sizes[matrix]
        end = begin + rows * columns
        w = weights[begin:end].reshape(rows, columns)
        for row in range(rows):
            total = np.float32(0)
            for column in range(columns):
                total += w[row, column] * x[column]
            y[row] = total
        begin = end
