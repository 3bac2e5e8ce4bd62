"""Numba kernels of squared ReLU. Arrays in, arrays out, no checks.

    y = max(x, 0)²        adjoint: dx = 2 max(x, 0) dy

A task is a block of BLOCK elements. Arrays are flat and may hold bfloat16.
"""

from mmrec.kernels._bf16 import from_bf16, to_bf16
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import relu

BLOCK = 1 << 14  # elements in a task


@parallel_kernel
def relu_squared_fwd(task, x, y):
    """Fill y (n,) from x (n,)."""
    block = slice(task * BLOCK, (task + 1) * BLOCK)
    x_block, y_block = x[block], y[block]
    for i in range(x_block.size):
        positive = relu(from_bf16(x_block[i]))
        y_block[i] = to_bf16(positive * positive, y_block)


@parallel_kernel
def relu_squared_bwd(task, x, dy, dx):
    """Fill dx (n,) from x and dy (n,)."""
    block = slice(task * BLOCK, (task + 1) * BLOCK)
    x_block, dy_block, dx_block = x[block], dy[block], dx[block]
    for i in range(x_block.size):
        half = relu(from_bf16(x_block[i])) * from_bf16(dy_block[i])
        dx_block[i] = to_bf16(half + half, dx_block)
