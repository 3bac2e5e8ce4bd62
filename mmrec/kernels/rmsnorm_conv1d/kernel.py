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
from mmrec.kernels._jit import always_inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._simd import LANES, fma, load, splat, store

EPSILON = 1e-6  # added to the mean square of the RMS norm


@always_inline_jit
def _add_product(x, x_at, y, y_at, out, out_at, width):
    """out += x y, elementwise, for rows of that width."""
    x_at, y_at, out_at = np.uint64(x_at), np.uint64(y_at), np.uint64(out_at)
    for d in range(np.uint64(width)):
        out[out_at + d] += x[x_at + d] * y[y_at + d]


@always_inline_jit
def _wrap(at, count):
    """at modulo count, for at < 2 count."""
    return at - count if at >= count else at


@always_inline_jit
def _normalise(rows, at, scales, scale_at, sums, width):
    """Divide the row at ``at`` by its root mean square, and put the factor i into ``scales``."""
    mean = dot(rows, at, rows, at, sums, width) / rows.dtype.type(width)
    scales[scale_at] = rows.dtype.type(1) / np.sqrt(mean + rows.dtype.type(EPSILON))
    aligned, scale = width // LANES * LANES, splat(scales, scale_at)
    for d in range(0, aligned, LANES):
        store(rows, at + d, load(rows, at + d) * scale)
    for d in range(aligned, width):
        rows[at + d] *= scales[scale_at]


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
    sums, scale = np.empty(DOT_SUMS, weight.dtype), np.empty(1, weight.dtype)
    state_at = n * (kernel_size - 1) * width
    read(initial, state_at, ring, 0, (kernel_size - 1) * width)
    steps = end - begin
    for t in range(steps):
        oldest = t % kernel_size
        newest = _wrap(oldest + kernel_size - 1, kernel_size) * width
        at = row * x_sb + (begin + t) * x_st
        read(x, at, ring, newest, width)
        _normalise(ring, newest, scale, 0, sums, width)
        out[:] = 0
        for k in range(kernel_size):
            _add_product(
                weight, k * width, ring, _wrap(oldest + k, kernel_size) * width, out, 0, width
            )
        write(out, 0, u, (row * time + begin + t) * width, width)
    for k in range(kernel_size - 1):
        write(ring, (steps + k) % kernel_size * width, final, state_at + k * width, width)


@always_inline_jit
def _add_gradients(weight, kernel_size, rows, grad, oldest, ring, weight_grad, width):
    """Add what du_t = ``grad`` contributes to the gradients of the rows of n and of the weight.

    The newest row gets its first contribution, so its gradient begins here.
    """
    aligned = width // LANES * LANES
    for k in range(kernel_size):
        at, weight_at = _wrap(oldest + k, kernel_size) * width, k * width
        for d in range(0, aligned, LANES):
            du = load(grad, d)
            dn = load(weight, weight_at + d) * du
            store(ring, at + d, dn if k == kernel_size - 1 else load(ring, at + d) + dn)
            total = load(weight_grad, weight_at + d)
            store(weight_grad, weight_at + d, fma(load(rows, at + d), du, total))
        for d in range(aligned, width):
            dn = weight[weight_at + d] * grad[d]
            ring[at + d] = dn if k == kernel_size - 1 else ring[at + d] + dn
            weight_grad[weight_at + d] += rows[at + d] * grad[d]


@always_inline_jit
def _norm_gradient(ring, rows, slot, scales, sums, dx, dx_at, width):
    """Write dx of the step whose dn and n are in ``slot``."""
    at = slot * width
    sums[0] = dot(ring, at, rows, at, sums, width) / rows.dtype.type(width)
    aligned, scale, mean = width // LANES * LANES, splat(scales, slot), splat(sums, 0)
    for d in range(0, aligned, LANES):
        store(dx, dx_at + d, scale * (load(ring, at + d) - load(rows, at + d) * mean))
    for d in range(aligned, width):
        dx[dx_at + d] = scales[slot] * (ring[at + d] - rows[at + d] * sums[0])


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

    ``rows`` holds the last K rows of n, and ``ring`` their gradients, to which later steps still
    add. The loop runs forwards in time, as processors fetch memory ahead.
    """
    width = weight.size // kernel_size
    size, dtype = weight.size, weight.dtype
    ring, rows, weight_grad = np.zeros(size, dtype), np.empty(size, dtype), np.zeros(size, dtype)
    grad, scales, sums = (
        np.empty(width, dtype),
        np.empty(kernel_size, dtype),
        np.empty(DOT_SUMS, dtype),
    )
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    steps = end - begin
    state_at = n * (kernel_size - 1) * width
    read(initial, state_at, rows, 0, (kernel_size - 1) * width)
    for t in range(steps + kernel_size - 1):
        # n_t lies at (t + kernel_size - 1) % kernel_size, as in the forward pass
        oldest = t % kernel_size
        newest = _wrap(oldest + kernel_size - 1, kernel_size)
        if t < steps:
            read(x, row * x_sb + (begin + t) * x_st, rows, newest * width, width)
            _normalise(rows, newest * width, scales, newest, sums, width)
            read(du, row * du_sb + (begin + t) * du_st, grad, 0, width)
            _add_gradients(weight, kernel_size, rows, grad, oldest, ring, weight_grad, width)
        else:
            read(dfinal, state_at + (t - steps) * width, grad, 0, width)
            for d in range(width):
                ring[oldest * width + d] += grad[d]
        done = t - kernel_size + 1  # all that follows from that row of n has been added
        if done < 0:
            write(ring, oldest * width, dinitial, state_at + t * width, width)
        else:
            dx_at = (row * time + begin + done) * width
            _norm_gradient(ring, rows, oldest, scales, sums, dx, dx_at, width)
    write(weight_grad, 0, dweight, n * kernel_size * width, kernel_size * width)
