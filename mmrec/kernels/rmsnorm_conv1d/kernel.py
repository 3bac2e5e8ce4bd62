"""Numba kernels of the norm followed by a short convolution. Arrays in, arrays out, no checks.

Axes: B batch, T time, D channels, K taps, N sequences.

    n_t = x_t i_t,  i_t = (mean x_t² + ε)^-1/2,     u_t = Σ_k w_k n_{t-K+1+k}

where n before a sequence is its state (K - 1, D). Adjoint:

    dn_t = Σ_k w_k du_{t+K-1-k},   dx_t = i_t (dn_t - n_t mean(dn_t n_t))
    dw_k = Σ_t n_{t-K+1+k} du_t

A task is a sequence; its last K rows lie in a ring in the first-level cache, so x is read once.
"""

import numpy as np

from mmrec.kernels._bf16 import dot, read, write
from mmrec.kernels._launch import helper, kernel

EPSILON = 1e-6


@helper
def _add(weights, w_at, row, r_at, out, o_at, width):
    w_at, r_at, o_at = np.uint64(w_at), np.uint64(r_at), np.uint64(o_at)
    for d in range(np.uint64(width)):
        out[o_at + d] += weights[w_at + d] * row[r_at + d]


@helper
def _turn(at, count):
    """A place of a ring that may lie one round ahead."""
    return at - count if at >= count else at


@helper
def _normalise(rows, at, lanes, width):
    """Divide a row by its root mean square; returns the factor."""
    mean = dot(rows, at, rows, at, lanes, width) / rows.dtype.type(width)
    scale = rows.dtype.type(1) / np.sqrt(mean + rows.dtype.type(EPSILON))
    at = np.uint64(at)
    for d in range(np.uint64(width)):
        rows[at + d] *= scale
    return scale


@kernel
def norm_conv_fwd(n, x, x_sb, x_st, taps, count, before, spans, time, u, after):
    """Fill u (B, T, D) and after (N, K - 1, D); taps (K, D) with count K; all flat but spans."""
    width = taps.size // count
    ring, out = np.empty(count * width, taps.dtype), np.empty(width, taps.dtype)
    lanes = np.empty(16, taps.dtype)
    state = n * (count - 1) * width
    read(before, state, ring, 0, (count - 1) * width)
    steps = spans[n, 2] - spans[n, 1]
    for t in range(steps):
        oldest = t % count
        newest = _turn(oldest + count - 1, count) * width
        at = spans[n, 0] * x_sb + (spans[n, 1] + t) * x_st
        read(x, at, ring, newest, width)
        _normalise(ring, newest, lanes, width)
        out[:] = 0
        for k in range(count):
            _add(taps, k * width, ring, _turn(oldest + k, count) * width, out, 0, width)
        write(out, 0, u, (spans[n, 0] * time + spans[n, 1] + t) * width, width)
    for k in range(count - 1):
        write(ring, (steps + k) % count * width, after, state + k * width, width)


@helper
def _fetch(x, base, x_st, before, state, t, count, rows, scales, lanes, width):
    """Put n_t, t counted in the sequence, into its place of the ring of rows."""
    at = (t + count - 1) % count
    if t >= 0:
        read(x, base + t * x_st, rows, at * width, width)
        scales[at] = _normalise(rows, at * width, lanes, width)
    elif count > 1:
        read(before, state + (t + count - 1) * width, rows, at * width, width)


@kernel
def norm_conv_bwd(
    n, x, x_sb, x_st, du, du_sb, du_st, taps, count, before, dafter, spans, time, dx, dtaps, dbefore
):
    """Fill dx (B, T, D), dbefore (N, K - 1, D) and dtaps (N, K, D), a part a sequence; flat.

    Backwards in time, a ring holds the gradients of the last K rows of n, each still growing.
    """
    width = taps.size // count
    ring, rows = np.zeros(count * width, taps.dtype), np.empty(count * width, taps.dtype)
    total, grad = np.zeros(count * width, taps.dtype), np.empty(width, taps.dtype)
    scales, lanes = np.empty(count, taps.dtype), np.empty(16, taps.dtype)
    first, steps = spans[n, 1], spans[n, 2] - spans[n, 1]
    base, state = spans[n, 0] * x_sb + first * x_st, n * (count - 1) * width
    # n_t lies at (t + count - 1) % count, as in forward; rows of the state have t < 0
    for k in range(count - 1):
        read(dafter, state + k * width, ring, (steps + k) % count * width, width)
    for t in range(steps - 1, steps - count, -1):
        _fetch(x, base, x_st, before, state, t, count, rows, scales, lanes, width)
    for t in range(steps - 1, -1, -1):
        oldest = t % count
        newest = _turn(oldest + count - 1, count)
        ring[oldest * width : (oldest + 1) * width] = 0
        _fetch(x, base, x_st, before, state, t - count + 1, count, rows, scales, lanes, width)
        read(du, spans[n, 0] * du_sb + (first + t) * du_st, grad, 0, width)
        for k in range(count):
            at = _turn(oldest + k, count) * width
            _add(taps, k * width, grad, 0, ring, at, width)
            _add(rows, at, grad, 0, total, k * width, width)
        scale, newest = scales[newest], np.uint64(newest * width)
        mean = dot(ring, newest, rows, newest, lanes, width) / taps.dtype.type(width)
        for d in range(np.uint64(width)):
            grad[d] = scale * (ring[newest + d] - rows[newest + d] * mean)
        write(grad, 0, dx, (spans[n, 0] * time + first + t) * width, width)
    write(ring, 0, dbefore, state, (count - 1) * width)
    write(total, 0, dtaps, n * count * width, count * width)
