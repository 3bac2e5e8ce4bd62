"""Numba kernels of the product scans: arrays in, arrays out as in ``scan.kernel``, no checks.

A task is one sequence and a block of its channels: channels never meet, so no result depends on the
number of threads.

A product scan keeps y_t = m 2^e, e an integer. That is log space with base 2, without the rounding
of a logarithm: a product that would fall below the smallest float on its way comes back if later
factors raise it. Every ``every`` steps, a power of two, m is looked at, and its exponent taken out
if it is not within ``limit`` of one: when that happens changes no bit, as m stays in range.
"""

import math

import numpy as np

from mmrec.kernels._launch import helper, kernel

NARROW = 16  # channels up to which four at a time are walked with their products in registers
TILE = 512  # steps that four channels are walked before the next four: the rows stay in cache
_EXPONENT = 0x7FF << 52  # the bits of a float64 that hold its exponent


@helper
def _far(m, limit):
    """Whether m is not within a factor of ``limit`` of one; NaN is not far from anything."""
    return (abs(m) > limit) | (abs(m) * limit < 1.0)


@helper
def _apart(m, e, top):
    """m 2^e with 1 <= |m| < 2, and 2^e as two factors, e limited to ±top where y shows no more.

    Two factors, so that a subnormal product is reached without a detour.
    """
    bits = np.float64(m).view(np.int64)
    power = (bits & _EXPONENT) >> 52
    # zero, infinity and NaN have no exponent to take out: they stay as they are
    normal = (power > 0) & (power < 0x7FF)
    kept = (bits & ~_EXPONENT) | (1023 << 52) if normal else bits
    e += power - 1023 if normal else 0
    half = min(max(e, -top), top) >> 1
    rest = min(max(e, -top), top) - half
    low = np.int64((half + 1023) << 52).view(np.float64)
    high = np.int64((rest + 1023) << 52).view(np.float64)
    return np.int64(kept).view(np.float64), e, low, high


@kernel
def cumprod_fwd(task, gamma, g_sb, g_st, y0, y, yt, seqs, every, limit, top, block):
    """Fill y and yt. Steps that look at m multiply first; the others do all in one pass."""
    width = y.shape[2]
    blocks = (width + block - 1) // block
    s, lo = task // blocks, task % blocks * block
    n = min(block, width - lo)
    row, first, last = seqs[s, 0], seqs[s, 1], seqs[s, 2]
    m, e = y0[s, lo : lo + n].astype(np.float64), np.zeros(n, np.int64)
    low, high, ones = np.empty(n), np.empty(n), np.ones(n, y.dtype)
    apart = False  # as long as no product goes far, m is y
    yt[s, lo : lo + n] = y0[s, lo : lo + n]
    for t in range(first, last):
        at = row * g_sb + t * g_st + lo
        g_t, y_t = gamma[at : at + n], y[row, t, lo : lo + n]
        if (t - first) & (every - 1) == 0:
            far = 0
            for d in range(n):
                m[d] *= g_t[d]
                far += _far(m[d], limit)
            if far > 0:
                apart = True
                for d in range(n):
                    m[d], e[d], low[d], high[d] = _apart(m[d], e[d], top)
            g_t = ones  # m has its factor
        if apart:
            for d in range(n):
                m[d] *= g_t[d]
                y_t[d] = m[d] * low[d] * high[d]
        else:
            for d in range(n):
                m[d] *= g_t[d]
                y_t[d] = m[d]
        if t == last - 1:
            yt[s, lo : lo + n] = y_t


@helper
def _four_products(g, i, g_step, y, k, y_step, c, m, e, steps, every, limit, top):
    """Walk four channels from the c-th on, whose products so far are m 2^e."""
    left = np.uint64(m.size - 1) - c
    o1, o2, o3 = min(np.uint64(1), left), min(np.uint64(2), left), min(np.uint64(3), left)
    m0, m1, m2, m3 = m[c], m[c + o1], m[c + o2], m[c + o3]
    e0, e1, e2, e3 = e[c], e[c + o1], e[c + o2], e[c + o3]
    low0 = low1 = low2 = low3 = high0 = high1 = high2 = high3 = 1.0
    apart = again = (e0 != 0) | (e1 != 0) | (e2 != 0) | (e3 != 0)
    for t in range(steps):
        m0, m1, m2, m3 = m0 * g[i], m1 * g[i + o1], m2 * g[i + o2], m3 * g[i + o3]
        if t & (every - 1) == 0:
            far = _far(m0, limit) | _far(m1, limit) | _far(m2, limit) | _far(m3, limit)
            if far or again:
                m0, e0, low0, high0 = _apart(m0, e0, top)
                m1, e1, low1, high1 = _apart(m1, e1, top)
                m2, e2, low2, high2 = _apart(m2, e2, top)
                m3, e3, low3, high3 = _apart(m3, e3, top)
                apart, again = True, False
        if apart:
            y[k], y[k + o1] = m0 * low0 * high0, m1 * low1 * high1
            y[k + o2], y[k + o3] = m2 * low2 * high2, m3 * low3 * high3
        else:
            y[k], y[k + o1], y[k + o2], y[k + o3] = m0, m1, m2, m3
        i, k = i + g_step, k + y_step
    m[c], m[c + o1], m[c + o2], m[c + o3] = m0, m1, m2, m3
    e[c], e[c + o1], e[c + o2], e[c + o3] = e0, e1, e2, e3


@kernel
def narrow_cumprod_fwd(s, gamma, g_sb, g_st, y0, y, yt, seqs, every, limit, top):
    """``cumprod_fwd`` for few channels: four at a time, the last of which may be the same one."""
    time, width = y.shape[1:]
    row, first, last = seqs[s, 0], seqs[s, 1], seqs[s, 2]
    out, m, e = y.reshape(-1), y0[s].astype(np.float64), np.zeros(width, np.int64)
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
    yt[s] = y[row, last - 1] if last > first else y0[s]


@kernel
def cumprod_bwd(task, gamma, g_sb, g_st, y0, y, dy, dy_sb, dy_st, dyt, dgamma, dy0, seqs, block):
    """dgamma_t = y_{t-1} r_t with r_t = dy_t + gamma_{t+1} r_{t+1}: no division, exact at zeros."""
    width = y.shape[2]
    blocks = (width + block - 1) // block
    s, lo = task // blocks, task % blocks * block
    n = min(block, width - lo)
    row, first, last = seqs[s, 0], seqs[s, 1], seqs[s, 2]
    r = dyt[s, lo : lo + n].copy()
    for t in range(last - 1, first - 1, -1):
        at, ut = row * g_sb + t * g_st + lo, row * dy_sb + t * dy_st + lo
        g_t, u_t = gamma[at : at + n], dy[ut : ut + n]
        before = y[row, t - 1, lo : lo + n] if t > first else y0[s, lo : lo + n]
        dg_t = dgamma[row, t, lo : lo + n]
        for d in range(n):
            x = r[d] + u_t[d]
            dg_t[d] = x * before[d]
            r[d] = x * g_t[d]
    dy0[s, lo : lo + n] = r


@kernel
def log_cumprod_fwd(task, gamma, g_sb, g_st, l0, out, lt, seqs, block):
    """l_t = l_{t-1} + log gamma_t, summed in float64; -inf from the first zero on."""
    width = out.shape[2]
    blocks = (width + block - 1) // block
    s, lo = task // blocks, task % blocks * block
    n = min(block, width - lo)
    row, first, last = seqs[s, 0], seqs[s, 1], seqs[s, 2]
    total = l0[s, lo : lo + n].astype(np.float64)
    for t in range(first, last):
        at = row * g_sb + t * g_st + lo
        for d in range(n):
            x = gamma[at + d]
            total[d] += math.log(x) if x > 0 else -np.inf if x == 0 else np.nan
            out[row, t, lo + d] = total[d]
    for d in range(n):
        lt[s, lo + d] = total[d]


@kernel
def log_cumprod_bwd(task, gamma, g_sb, g_st, out, dout, d_sb, d_st, dlt, dgamma, dl0, seqs, block):
    """dgamma_t = (sum of dl_s over s >= t) / gamma_t; an l_s of -inf is constant."""
    width = out.shape[2]
    blocks = (width + block - 1) // block
    s, lo = task // blocks, task % blocks * block
    n = min(block, width - lo)
    row, first, last = seqs[s, 0], seqs[s, 1], seqs[s, 2]
    total = dlt[s, lo : lo + n].astype(np.float64)
    for d in range(n):
        if last > first and out[row, last - 1, lo + d] == -np.inf:
            total[d] = 0.0
    for t in range(last - 1, first - 1, -1):
        at, ut = row * g_sb + t * g_st + lo, row * d_sb + t * d_st + lo
        for d in range(n):
            if out[row, t, lo + d] == -np.inf:
                dgamma[row, t, lo + d] = 0.0
            else:
                total[d] += dout[ut + d]
                dgamma[row, t, lo + d] = total[d] / gamma[at + d]
    for d in range(n):
        dl0[s, lo + d] = total[d]
