"""Numba kernel of RMSprop with one mean square per row, for the rows of a sparse gradient.

For each row r that the indices name, with g the sum of its gradients (D,):

    s = mean(g²);    m_r = s at the row's first gradient, then decay m_r + (1 - decay) s
    w_r = (1 - lr weight_decay) w_r - lr g / sqrt(m_r)

A row whose gradient is zero is left as it is. Gradients of one row are added in the order in which
they come, so the result does not depend on the number of threads.

A task is a block of BLOCK rows.
"""

import numpy as np

from mmrec.kernels._bf16 import DOT_SUMS, dot
from mmrec.kernels._launch import parallel_kernel

BLOCK = 64  # rows in a task


@parallel_kernel
def rowwise_rmsprop(
    task, weight, mean_square, rows, begins, order, gradients, width, lr, decay, weight_decay
):
    """Update weight (rows × D, flat) and mean_square (rows,).

    rows (U,) are distinct. order[begins[u] : begins[u + 1]] are the places of the gradients of
    rows[u] in gradients (N × D, flat).
    """
    total, sums = np.empty(width, weight.dtype), np.empty(DOT_SUMS, weight.dtype)
    one, kept = weight.dtype.type(1), weight.dtype.type(1 - lr * weight_decay)
    columns = np.uint64(width)
    for u in range(task * BLOCK, min((task + 1) * BLOCK, rows.size)):
        begin, end, row = begins[u], begins[u + 1], rows[u]
        at = np.uint64(order[begin] * width)
        for d in range(columns):
            total[d] = gradients[at + d]
        for i in range(begin + 1, end):
            at = np.uint64(order[i] * width)
            for d in range(columns):
                total[d] += gradients[at + d]
        square = dot(total, 0, total, 0, sums, width) / width
        if square == 0:
            continue
        before = mean_square[row]
        if before > 0:
            square = weight.dtype.type(before * decay + square * (one - decay))
        mean_square[row] = square
        scale = weight.dtype.type(lr / np.sqrt(square))
        at = np.uint64(row * width)
        for d in range(columns):
            weight[at + d] = kept * weight[at + d] - scale * total[d]
