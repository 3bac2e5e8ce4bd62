"""Numba kernels of the product scans. Arrays in, arrays out, no checks.

No preset of the model uses the product scans: a reader of the model may skip this folder.

Axes: N sequences, T time, D channels. Inputs are flat; ``x_sb`` and ``x_st`` are the strides of an
input x over batch row and time. Outputs are (B, T, D), contiguous; states are (N, D). A row n of
``sequence_bounds`` (N, 3) holds the batch row, first step and end of sequence n.

    cumprod:      y_t = γ_t y_{t-1}             dγ_t = y_{t-1} r_t,  r_t = dy_t + γ_{t+1} r_{t+1}
    log_cumprod:  l_t = l_{t-1} + log γ_t       dγ_t = (Σ_{s>=t} dl_s) / γ_t

A task is a block of channels of one sequence. Channels are independent, so no result depends on the
number of threads.

``cumprod`` holds a running product as y_t = m 2^e with an integer e: a logarithm in base 2 without
its rounding. A product that falls below the smallest float on its way comes back if later factors
raise it. Every ``every`` steps (a power of two) the kernel looks at m, and moves its exponent to e
if m is not within a factor of ``limit`` of one. m stays in the range of a float64 in between, so
the moment of that move changes no bit.
"""

import math

import numpy as np

from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import cdiv

MAX_NARROW = 16
"""Channels up to which four at a time are processed with their products in registers."""
TILE = 512
"""Steps that four channels go through before the next four, so that the rows stay in cache."""
_EXPONENT = 0x7FF << 52  # the exponent bits of a float64


@inline_jit
def _far(m, limit):
    """Whether m is outside [1 / limit, limit]; False for NaN."""
    return (abs(m) > limit) | (abs(m) * limit < 1.0)


@inline_jit
def _split_exponent(m, e, top):
    """m and e changed so that 1 <= |m| < 2 and m 2^e is the same; and 2^e as two factors.

    The factors take e limited to ±top, beyond which y is 0 or infinity. They are two because 2^e
    itself may be out of range where m 2^e is a subnormal number.
    """
    bits = np.float64(m).view(np.int64)
    power = (bits & _EXPONENT) >> 52
    # zero, subnormal numbers, infinity and NaN stay as they are
    normal = (power > 0) & (power < 0x7FF)
    mantissa = (bits & ~_EXPONENT) | (1023 << 52) if normal else bits
    e += power - 1023 if normal else 0
    half = min(max(e, -top), top) >> 1
    other = min(max(e, -top), top) - half
    low = np.int64((half + 1023) << 52).view(np.float64)
    high = np.int64((other + 1023) << 52).view(np.float64)
    return np.int64(mantissa).view(np.float64), e, low, high


@parallel_kernel
def cumprod_fwd(
    task, gamma, g_sb, g_st, initial, y, final, sequence_bounds, every, limit, top, block
):
    """Fill y (B, T, D) and final (N, D); a task has ``block`` channels of one sequence."""
    width = y.shape[2]
    blocks = cdiv(width, block)
    s, left = task // blocks, task % blocks * block
    n = min(block, width - left)
    row, first, last = sequence_bounds[s, 0], sequence_bounds[s, 1], sequence_bounds[s, 2]
    m, e = initial[s, left : left + n].astype(np.float64), np.zeros(n, np.int64)
    low, high, ones = np.empty(n), np.empty(n), np.ones(n, y.dtype)
    split = False  # while no product has gone far, y is m
    final[s, left : left + n] = initial[s, left : left + n]
    for t in range(first, last):
        at = row * g_sb + t * g_st + left
        g_t, y_t = gamma[at : at + n], y[row, t, left : left + n]
        if (t - first) & (every - 1) == 0:
            far = 0
            for d in range(n):
                m[d] *= g_t[d]
                far += _far(m[d], limit)
            if far > 0:
                split = True
                for d in range(n):
                    m[d], e[d], low[d], high[d] = _split_exponent(m[d], e[d], top)
            g_t = ones  # m is multiplied already
        if split:
            for d in range(n):
                m[d] *= g_t[d]
                y_t[d] = m[d] * low[d] * high[d]
        else:
            for d in range(n):
                m[d] *= g_t[d]
                y_t[d] = m[d]
        if t == last - 1:
            final[s, left : left + n] = y_t


@inline_jit
def _four_products(g, i, g_step, y, k, y_step, c, m, e, steps, every, limit, top):
    """Running products of four channels from the c-th on; those so far are m 2^e."""
    left = np.uint64(m.size - 1) - c
    o1, o2, o3 = min(np.uint64(1), left), min(np.uint64(2), left), min(np.uint64(3), left)
    m0, m1, m2, m3 = m[c], m[c + o1], m[c + o2], m[c + o3]
    e0, e1, e2, e3 = e[c], e[c + o1], e[c + o2], e[c + o3]
    low0 = low1 = low2 = low3 = high0 = high1 = high2 = high3 = 1.0
    split = restore = (e0 != 0) | (e1 != 0) | (e2 != 0) | (e3 != 0)
    for t in range(steps):
        m0, m1, m2, m3 = m0 * g[i], m1 * g[i + o1], m2 * g[i + o2], m3 * g[i + o3]
        if t & (every - 1) == 0:
            far = _far(m0, limit) | _far(m1, limit) | _far(m2, limit) | _far(m3, limit)
            if far or restore:
                m0, e0, low0, high0 = _split_exponent(m0, e0, top)
                m1, e1, low1, high1 = _split_exponent(m1, e1, top)
                m2, e2, low2, high2 = _split_exponent(m2, e2, top)
                m3, e3, low3, high3 = _split_exponent(m3, e3, top)
                split, restore = True, False
        if split:
            y[k], y[k + o1] = m0 * low0 * high0, m1 * low1 * high1
            y[k + o2], y[k + o3] = m2 * low2 * high2, m3 * low3 * high3
        else:
            y[k], y[k + o1], y[k + o2], y[k + o3] = m0, m1, m2, m3
        i, k = i + g_step, k + y_step
    m[c], m[c + o1], m[c + o2], m[c + o3] = m0, m1, m2, m3
    e[c], e[c + o1], e[c + o2], e[c + o3] = e0, e1, e2, e3


@parallel_kernel
def cumprod_narrow_fwd(s, gamma, g_sb, g_st, initial, y, final, sequence_bounds, every, limit, top):
    """``cumprod_fwd`` for few channels, four at a time. The last channel may be repeated."""
    time, width = y.shape[1:]
    row, first, last = sequence_bounds[s, 0], sequence_bounds[s, 1], sequence_bounds[s, 2]
    out, m, e = y.reshape(-1), initial[s].astype(np.float64), np.zeros(width, np.int64)
    for t in range(first, last, TILE):
        for c in range(0, width, 4):
            _four_products(
                gamma,
                np.uint64(row * g_sb + t * g_st + c),
                np.uint64(g_st),
                out,
                np.uint64((row * time + t) * width + c),
                np.uint64(width),
                np.uint64(c),
                m,
                e,
                min(TILE, last - t),
                every,
                limit,
                top,
            )
    final[s] = y[row, last - 1] if last > first else initial[s]


@parallel_kernel
def cumprod_bwd(
    task,
    gamma,
    g_sb,
    g_st,
    initial,
    y,
    dy,
    dy_sb,
    dy_st,
    dfinal,
    dgamma,
    dinitial,
    sequence_bounds,
    block,
):
    """Fill dgamma (B, T, D) and dinitial (N, D), without a division: exact at gamma = 0."""
    width = y.shape[2]
    blocks = cdiv(width, block)
    s, left = task // blocks, task % blocks * block
    n = min(block, width - left)
    row, first, last = sequence_bounds[s, 0], sequence_bounds[s, 1], sequence_bounds[s, 2]
    r = dfinal[s, left : left + n].copy()
    for t in range(last - 1, first - 1, -1):
        at, ut = row * g_sb + t * g_st + left, row * dy_sb + t * dy_st + left
        g_t, u_t = gamma[at : at + n], dy[ut : ut + n]
        before = y[row, t - 1, left : left + n] if t > first else initial[s, left : left + n]
        dg_t = dgamma[row, t, left : left + n]
        for d in range(n):
            x = r[d] + u_t[d]
            dg_t[d] = x * before[d]
            r[d] = x * g_t[d]
    dinitial[s, left : left + n] = r


@parallel_kernel
def log_cumprod_fwd(task, gamma, g_sb, g_st, initial, out, final, sequence_bounds, block):
    """Fill out (B, T, D) and final (N, D), summed in float64; -inf from the first zero on."""
    width = out.shape[2]
    blocks = cdiv(width, block)
    s, left = task // blocks, task % blocks * block
    n = min(block, width - left)
    row, first, last = sequence_bounds[s, 0], sequence_bounds[s, 1], sequence_bounds[s, 2]
    total = initial[s, left : left + n].astype(np.float64)
    for t in range(first, last):
        at = row * g_sb + t * g_st + left
        for d in range(n):
            x = gamma[at + d]
            total[d] += math.log(x) if x > 0 else -np.inf if x == 0 else np.nan
            out[row, t, left + d] = total[d]
    for d in range(n):
        final[s, left + d] = total[d]


@parallel_kernel
def log_cumprod_bwd(
    task, gamma, g_sb, g_st, out, dout, d_sb, d_st, dfinal, dgamma, dinitial, sequence_bounds, block
):
    """Fill dgamma (B, T, D) and dinitial (N, D). Where out is -inf it is constant: no gradient."""
    width = out.shape[2]
    blocks = cdiv(width, block)
    s, left = task // blocks, task % blocks * block
    n = min(block, width - left)
    row, first, last = sequence_bounds[s, 0], sequence_bounds[s, 1], sequence_bounds[s, 2]
    total = dfinal[s, left : left + n].astype(np.float64)
    for d in range(n):
        if last > first and out[row, last - 1, left + d] == -np.inf:
            total[d] = 0.0
    for t in range(last - 1, first - 1, -1):
        at, ut = row * g_sb + t * g_st + left, row * d_sb + t * d_st + left
        for d in range(n):
            if out[row, t, left + d] == -np.inf:
                dgamma[row, t, left + d] = 0.0
            else:
                total[d] += dout[ut + d]
                dgamma[row, t, left + d] = total[d] / gamma[at + d]
    for d in range(n):
        dinitial[s, left + d] = total[d]
