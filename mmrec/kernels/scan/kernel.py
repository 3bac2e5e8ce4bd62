"""Numba kernels of the first-order scan and the product scans. Arrays in, arrays out, no checks.

Axes: B batch, T time, D channels. Inputs are flat with strides (see ``arrays.flat``); outputs are
(B, T, D), contiguous. A task is one batch row and one block of channels: channels never meet, so
tasks share nothing they write, and no result depends on the number of threads.

Adjoint of ``h_t = a_t h_{t-1} + b_t``:  g_t = dh_t + a_{t+1} g_{t+1},
                                          da_t = g_t h_{t-1},  db_t = g_t,  dh0 = a_1 g_1.
"""

import math

import numpy as np
from numba import njit, prange

from mmrec.kernels.threads import COMPILE


@njit(**COMPILE)
def scan_fwd(a, a_sb, a_st, b, b_sb, b_st, h0, h, block):
    batch, time, width = h.shape
    blocks = (width + block - 1) // block
    for task in prange(batch * blocks):  # rows x channel blocks: independent
        row, lo = task // blocks, task % blocks * block
        n = min(block, width - lo)
        state = h0[row, lo : lo + n].copy()
        for t in range(time):
            at, bt = row * a_sb + t * a_st + lo, row * b_sb + t * b_st + lo
            a_t, b_t, h_t = a[at : at + n], b[bt : bt + n], h[row, t, lo : lo + n]
            for d in range(n):
                state[d] = a_t[d] * state[d] + b_t[d]
                h_t[d] = state[d]


@njit(**COMPILE)
def scan_bwd(a, a_sb, a_st, h0, h, dh, dh_sb, dh_st, dht, da, db, dh0, block):
    batch, time, width = h.shape
    blocks = (width + block - 1) // block
    for task in prange(batch * blocks):  # rows x channel blocks: independent
        row, lo = task // blocks, task % blocks * block
        n = min(block, width - lo)
        g = dht[row, lo : lo + n].copy()
        for t in range(time - 1, -1, -1):
            at, ut = row * a_sb + t * a_st + lo, row * dh_sb + t * dh_st + lo
            a_t, u_t = a[at : at + n], dh[ut : ut + n]
            before = h[row, t - 1, lo : lo + n] if t > 0 else h0[row, lo : lo + n]
            da_t, db_t = da[row, t, lo : lo + n], db[row, t, lo : lo + n]
            for d in range(n):
                x = g[d] + u_t[d]
                db_t[d] = x
                da_t[d] = x * before[d]
                g[d] = x * a_t[d]
        dh0[row, lo : lo + n] = g


_EXPONENT = 0x7FF << 52  # the bits of a float64 that hold its exponent


@njit(**COMPILE)
def cumprod_fwd(gamma, g_sb, g_st, y0, y, block):
    """Product scan with the exponent kept apart: y_t = m 2^e, 1 <= |m| < 2, e an integer.

    That is log space with base 2, without the rounding of a logarithm: a product that would fall
    below the smallest float on its way comes back if later factors raise it.
    """
    batch, time, width = y.shape
    blocks = (width + block - 1) // block
    for task in prange(batch * blocks):  # rows x channel blocks: independent
        row, lo = task // blocks, task % blocks * block
        n = min(block, width - lo)
        m = y0[row, lo : lo + n].astype(np.float64)
        e = np.zeros(n, np.int64)
        for t in range(time):
            at = row * g_sb + t * g_st + lo
            g_t, y_t = gamma[at : at + n], y[row, t, lo : lo + n]
            for d in range(n):
                bits = np.float64(m[d] * g_t[d]).view(np.int64)
                power = (bits & _EXPONENT) >> 52
                # zero, infinity and NaN have no exponent to take out: they stay as they are
                normal = (power > 0) & (power < 0x7FF)
                kept = (bits & ~_EXPONENT) | (1023 << 52) if normal else bits
                m[d] = np.int64(kept).view(np.float64)
                e[d] += power - 1023 if normal else 0
                # 2^e in two factors, so that a subnormal result is reached without a detour
                half = min(max(e[d], -2000), 2000) >> 1
                rest = min(max(e[d], -2000), 2000) - half
                low = np.int64((half + 1023) << 52).view(np.float64)
                high = np.int64((rest + 1023) << 52).view(np.float64)
                y_t[d] = m[d] * low * high


@njit(**COMPILE)
def cumprod_bwd(gamma, g_sb, g_st, y0, y, dy, dy_sb, dy_st, dyt, dgamma, dy0, block):
    """dgamma_t = y_{t-1} r_t with r_t = dy_t + gamma_{t+1} r_{t+1}: no division, exact at zeros."""
    batch, time, width = y.shape
    blocks = (width + block - 1) // block
    for task in prange(batch * blocks):  # rows x channel blocks: independent
        row, lo = task // blocks, task % blocks * block
        n = min(block, width - lo)
        r = dyt[row, lo : lo + n].copy()
        for t in range(time - 1, -1, -1):
            at, ut = row * g_sb + t * g_st + lo, row * dy_sb + t * dy_st + lo
            g_t, u_t = gamma[at : at + n], dy[ut : ut + n]
            before = y[row, t - 1, lo : lo + n] if t > 0 else y0[row, lo : lo + n]
            dg_t = dgamma[row, t, lo : lo + n]
            for d in range(n):
                x = r[d] + u_t[d]
                dg_t[d] = x * before[d]
                r[d] = x * g_t[d]
        dy0[row, lo : lo + n] = r


@njit(**COMPILE)
def log_cumprod_fwd(gamma, g_sb, g_st, l0, out, block):
    """l_t = l_{t-1} + log gamma_t, summed in float64; -inf from the first zero on."""
    batch, time, width = out.shape
    blocks = (width + block - 1) // block
    for task in prange(batch * blocks):  # rows x channel blocks: independent
        row, lo = task // blocks, task % blocks * block
        n = min(block, width - lo)
        total = l0[row, lo : lo + n].astype(np.float64)
        for t in range(time):
            at = row * g_sb + t * g_st + lo
            for d in range(n):
                x = gamma[at + d]
                total[d] += math.log(x) if x > 0 else -np.inf if x == 0 else np.nan
                out[row, t, lo + d] = total[d]


@njit(**COMPILE)
def log_cumprod_bwd(gamma, g_sb, g_st, out, dout, d_sb, d_st, dlt, dgamma, dl0, block):
    """dgamma_t = (sum of dl_s over s >= t) / gamma_t; an l_s of -inf is constant."""
    batch, time, width = out.shape
    blocks = (width + block - 1) // block
    for task in prange(batch * blocks):  # rows x channel blocks: independent
        row, lo = task // blocks, task % blocks * block
        n = min(block, width - lo)
        total = dlt[row, lo : lo + n].astype(np.float64)
        for d in range(n):
            if time > 0 and out[row, time - 1, lo + d] == -np.inf:
                total[d] = 0.0
        for t in range(time - 1, -1, -1):
            at, ut = row * g_sb + t * g_st + lo, row * d_sb + t * d_st + lo
            for d in range(n):
                if out[row, t, lo + d] == -np.inf:
                    dgamma[row, t, lo + d] = 0.0
                else:
                    total[d] += dout[ut + d]
                    dgamma[row, t, lo + d] = total[d] / gamma[at + d]
        for d in range(n):
            dl0[row, lo + d] = total[d]
