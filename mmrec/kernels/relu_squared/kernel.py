"""Numba kernels of relu(x)². Arrays in, arrays out, no checks. A task is a stretch of elements."""

from mmrec.kernels._bf16 import narrow, wide
from mmrec.kernels._launch import kernel
from mmrec.kernels._math import relu

STRETCH = 1 << 14


def tasks(elements: int) -> int:
    """Number of stretches."""
    return -(-elements // STRETCH)


@kernel
def squared_relu_fwd(task, x, y):
    """Fill y (n,) for x (n,)."""
    xs, ys = x[task * STRETCH : (task + 1) * STRETCH], y[task * STRETCH : (task + 1) * STRETCH]
    for i in range(xs.size):
        v = relu(wide(xs[i]))
        ys[i] = narrow(v * v, ys)


@kernel
def squared_relu_bwd(task, x, dy, dx):
    """Fill dx (n,): 2 relu(x) dy."""
    part = slice(task * STRETCH, (task + 1) * STRETCH)
    xs, dys, dxs = x[part], dy[part], dx[part]
    for i in range(xs.size):
        v = relu(wide(xs[i])) * wide(dys[i])
        dxs[i] = narrow(v + v, dxs)
