"""Numba kernels of RMS norm followed by a causal depthwise convolution. No checks.

Axes: B batch, T time, D channels, K kernel size of the convolution, N sequences. All arrays but
``sequence_bounds`` are flat; ``x_sb`` and ``x_st`` are the strides of x over batch row and time. A
row n of ``sequence_bounds`` (N, 3) holds the batch row, first step and end of sequence n.

    n_t = x_t i_t,  i_t = (mean x_t² + ε)^-1/2,     u_t = Σ_k w_k n_{t-K+1+k}

where n before a sequence is its initial state (K - 1, D). Adjoint:

    dn_t = Σ_k w_k du_{t+K-1-k},   dx_t = i_t (dn_t - n_t mean(dn_t n_t))
    dw_k = Σ_t n_{t-K+1+k} du_t

A task is one sequence. The last K rows of n stay in a ring buffer in the first-level cache, so x is
read from memory once.
"""

import numpy as np

from mmrec.kernels._bf16 import DOT_SUMS, dot, read, write
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel

EPSILON = 1e-6  # added to the mean square of the RMS norm


@inline_jit
def _add_product(x, x_at, y, y_at, out, out_at, width):
    """out += x y, elementwise, for rows of that width."""
    x_at, y_at, out_at = np.uint64(x_at), np.uint64(y_at), np.uint64(out_at)
    for d in range(np.uint64(width)):
        out[out_at + d] += x[x_at + d] * y[y_at + d]


@inline_jit
def _wrap(at, count):
    """at modulo count, for at < 2 count."""
    return at - count if at >= count else at


@inline_jit
def _normalise(rows, at, sums, width):
    """Divide the row at ``at`` by its root mean square; returns the factor i."""
    mean = dot(rows, at, rows, at, sums, width) / rows.dtype.type(width)
    scale = rows.dtype.type(1) / np.sqrt(mean + rows.dtype.type(EPSILON))
    at = np.uint64(at)
    for d in range(np.uint64(width)):
        rows[at + d] *= scale
    return scale


@parallel_kernel
def rmsnorm_conv1d_fwd(
    n, x, x_sb, x_st, weight, kernel_size, initial, sequence_bounds, time, u, final
):
    """Fill u (B, T, D) and final (N, K - 1, D) from x, weight (K, D), initial (N, K - 1, D).

    u may hold bfloat16.
    """
    width = weight.size // kernel_size
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    ring, out = np.empty(kernel_size * width, weight.dtype), np.empty(width, weight.dtype)
    sums = np.empty(DOT_SUMS, weight.dtype)
    state_at = n * (kernel_size - 1) * width
    read(initial, state_at, ring, 0, (kernel_size - 1) * width)
    steps = end - begin
    for t in range(steps):
        oldest = t % kernel_size
        newest = _wrap(oldest + kernel_size - 1, kernel_size) * width
        at = row * x_sb + (begin + t) * x_st
        read(x, at, ring, newest, width)
        _normalise(ring, newest, sums, width)
        out[:] = 0
        for k in range(kernel_size):
            _add_product(
                weight, k * width, ring, _wrap(oldest + k, kernel_size) * width, out, 0, width
            )
        write(out, 0, u, (row * time + begin + t) * width, width)
    for k in range(kernel_size - 1):
        write(ring, (steps + k) % kernel_size * width, final, state_at + k * width, width)


@inline_jit
def _load_row(x, x_at, x_st, initial, state_at, t, kernel_size, rows, scales, sums, width):
    """Put n_t into its place of the ring buffer ``rows``, and i_t into that of ``scales``.

    t counts from the sequence's first step; rows of the initial state have t < 0.
    """
    at = (t + kernel_size - 1) % kernel_size
    if t >= 0:
        read(x, x_at + t * x_st, rows, at * width, width)
        scales[at] = _normalise(rows, at * width, sums, width)
    elif kernel_size > 1:
        read(initial, state_at + (t + kernel_size - 1) * width, rows, at * width, width)


@parallel_kernel
def rmsnorm_conv1d_bwd(
    n,
    x,
    x_sb,
    x_st,
    du,
    du_sb,
    du_st,
    weight,
    kernel_size,
    initial,
    dfinal,
    sequence_bounds,
    time,
    dx,
    dweight,
    dinitial,
):
    """Fill dx (B, T, D), dinitial (N, K - 1, D) and dweight (N, K, D), one matrix per sequence.

    Backwards in time, ``rows`` holds K rows of n, and ``ring`` holds their gradients, to which
    earlier steps still add.
    """
    width = weight.size // kernel_size
    ring, rows = (
        np.zeros(kernel_size * width, weight.dtype),
        np.empty(kernel_size * width, weight.dtype),
    )
    weight_grad, grad = np.zeros(kernel_size * width, weight.dtype), np.empty(width, weight.dtype)
    scales, sums = np.empty(kernel_size, weight.dtype), np.empty(DOT_SUMS, weight.dtype)
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    steps = end - begin
    x_at, state_at = row * x_sb + begin * x_st, n * (kernel_size - 1) * width
    # n_t lies at (t + kernel_size - 1) % kernel_size, as in the forward pass
    for k in range(kernel_size - 1):
        read(dfinal, state_at + k * width, ring, (steps + k) % kernel_size * width, width)
    for t in range(steps - 1, steps - kernel_size, -1):
        _load_row(x, x_at, x_st, initial, state_at, t, kernel_size, rows, scales, sums, width)
    for t in range(steps - 1, -1, -1):
        oldest = t % kernel_size
        newest = _wrap(oldest + kernel_size - 1, kernel_size)
        ring[oldest * width : (oldest + 1) * width] = 0
        _load_row(
            x,
            x_at,
            x_st,
            initial,
            state_at,
            t - kernel_size + 1,
            kernel_size,
            rows,
            scales,
            sums,
            width,
        )
        read(du, row * du_sb + (begin + t) * du_st, grad, 0, width)
        for k in range(kernel_size):
            at = _wrap(oldest + k, kernel_size) * width
            _add_product(weight, k * width, grad, 0, ring, at, width)
            _add_product(rows, at, grad, 0, weight_grad, k * width, width)
        scale, newest = scales[newest], np.uint64(newest * width)
        mean = dot(ring, newest, rows, newest, sums, width) / weight.dtype.type(width)
        for d in range(np.uint64(width)):
            grad[d] = scale * (ring[newest + d] - rows[newest + d] * mean)
        write(grad, 0, dx, (row * time + begin + t) * width, width)
    write(ring, 0, dinitial, state_at, (kernel_size - 1) * width)
    write(weight_grad, 0, dweight, n * kernel_size * width, kernel_size * width)
