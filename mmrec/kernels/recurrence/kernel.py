"""Numba kernels of the gated recurrence. Arrays in, arrays out, no checks.

Axes: B batch, T time, D channels, G blocks of W_g, P = D / G channels a block. Inputs are flat with
strides (see ``arrays.flat``).

    γ_t = σ(f_t),  s_t = σ(h_{t-1} W + g_t),  c_t = 1 - γ_t (mixed) or 1
    h_t = c_t z_t s_t + γ_t h_{t-1}

Adjoint, with u_t the gradient of h_t and the sums running backwards in time:

    dz_t = u_t c_t s_t                    dg_t = u_t c_t z_t s_t (1 - s_t)
    df_t = u_t (h_{t-1} - [mixed] z_t s_t) γ_t (1 - γ_t)
    u_{t-1} = dh_{t-1} + γ_t u_t + dg_t Wᵀ      dW = Σ_t h_{t-1}ᵀ dg_t  (one product, outside)

Four batch rows walk together, so a row of W, read once from cache, serves all four; the rows and
the sums within them do not depend on the number of threads.
"""

from typing import Any

import numpy as np
from numba import njit, prange

from mmrec.kernels.activation import sigmoid
from mmrec.kernels.threads import COMPILE

ROWS = 4
_INLINE: dict[str, Any] = {"cache": True, "error_model": "numpy", "fastmath": {"contract"}}


@njit(**_INLINE)
def _multiply_four(h, w, out, lo, n):
    """out[r, lo:lo+n] += h[r, lo:lo+n] @ w for four rows; w (n, n)."""
    o0, o1 = out[0, lo : lo + n], out[1, lo : lo + n]
    o2, o3 = out[2, lo : lo + n], out[3, lo : lo + n]
    for i in range(0, n - n % 4, 4):
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        k = lo + i
        a0, a1, a2, a3 = h[0, k], h[0, k + 1], h[0, k + 2], h[0, k + 3]
        b0, b1, b2, b3 = h[1, k], h[1, k + 1], h[1, k + 2], h[1, k + 3]
        c0, c1, c2, c3 = h[2, k], h[2, k + 1], h[2, k + 2], h[2, k + 3]
        d0, d1, d2, d3 = h[3, k], h[3, k + 1], h[3, k + 2], h[3, k + 3]
        for j in range(n):
            x0, x1, x2, x3 = w0[j], w1[j], w2[j], w3[j]
            o0[j] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
            o1[j] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
            o2[j] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
            o3[j] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3
    for i in range(n - n % 4, n):
        for r in range(4):
            a = h[r, lo + i]
            for j in range(n):
                out[r, lo + j] += a * w[i, j]


@njit(**_INLINE)
def _multiply_one(h, w, out, lo, n):
    """out[lo:lo+n] += h[lo:lo+n] @ w for one row; w (n, n)."""
    o = out[lo : lo + n]
    for i in range(0, n - n % 4, 4):
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        k = lo + i
        a0, a1, a2, a3 = h[k], h[k + 1], h[k + 2], h[k + 3]
        for j in range(n):
            o[j] += a0 * w0[j] + a1 * w1[j] + a2 * w2[j] + a3 * w3[j]
    for i in range(n - n % 4, n):
        a = h[lo + i]
        for j in range(n):
            o[j] += a * w[i, j]


@njit(**_INLINE)
def _multiply(h, w, out):
    """out += h @ block_diag(w); h, out (rows, D) with one or four rows; w (G, P, P)."""
    n = w.shape[1]
    for block in range(w.shape[0]):
        if h.shape[0] == ROWS:
            _multiply_four(h, w[block], out, block * n, n)
        else:
            _multiply_one(h[0], w[block], out[0], block * n, n)


@njit(**COMPILE)
def recurrence_fwd(z, z_sb, z_st, g, g_sb, g_st, f, f_sb, f_st, w, h0, h, s, mixed):
    """Fill h (B, T, D) and, if s (B, T, D) is not empty, the gates s that the backward needs."""
    batch, time, width = h.shape
    tile = ROWS if batch >= 2 * ROWS else 1
    keep = s.shape[1] > 0
    one = h.dtype.type(1)
    mix = h.dtype.type(mixed)
    for task in prange((batch + tile - 1) // tile):  # batch rows: independent
        lo = task * tile
        rows = tile if lo + tile <= batch else 1
        for first in range(lo, min(lo + tile, batch), rows):
            state = h0[first : first + rows].copy()
            pre = np.empty_like(state)
            for t in range(time):
                for r in range(rows):
                    at = (first + r) * g_sb + t * g_st
                    pre[r] = g[at : at + width]
                if w.shape[0] > 0:
                    _multiply(state, w, pre)
                for r in range(rows):
                    row = first + r
                    zt, ft = row * z_sb + t * z_st, row * f_sb + t * f_st
                    z_t, f_t = z[zt : zt + width], f[ft : ft + width]
                    h_t, state_r, pre_r = h[row, t], state[r], pre[r]
                    for d in range(width):
                        gate = sigmoid(pre_r[d])
                        gamma = sigmoid(f_t[d])
                        pre_r[d] = gate
                        new = (one - mix * gamma) * z_t[d] * gate + gamma * state_r[d]
                        state_r[d] = new
                        h_t[d] = new
                    if keep:
                        s[row, t] = pre_r


@njit(**COMPILE)
def recurrence_bwd(
    z, z_sb, z_st, f, f_sb, f_st, wt, h0, h, s, dh, dh_sb, dh_st, dht, dz, dg, df, dh0, mixed
):
    """Fill dz, dg, df (B, T, D) and dh0 (B, D); wt holds the transposed blocks of W."""
    batch, time, width = h.shape
    tile = ROWS if batch >= 2 * ROWS else 1
    one = h.dtype.type(1)
    mix = h.dtype.type(mixed)
    for task in prange((batch + tile - 1) // tile):  # batch rows: independent
        lo = task * tile
        rows = tile if lo + tile <= batch else 1
        for first in range(lo, min(lo + tile, batch), rows):
            u = dht[first : first + rows].copy()
            dpre = np.empty_like(u)
            for t in range(time - 1, -1, -1):
                for r in range(rows):
                    row = first + r
                    zt, ft = row * z_sb + t * z_st, row * f_sb + t * f_st
                    ut = row * dh_sb + t * dh_st
                    z_t, f_t, dh_t = z[zt : zt + width], f[ft : ft + width], dh[ut : ut + width]
                    before = h[row, t - 1] if t > 0 else h0[row]
                    s_t, u_r, dpre_r = s[row, t], u[r], dpre[r]
                    dz_t, df_t = dz[row, t], df[row, t]
                    for d in range(width):
                        gamma = sigmoid(f_t[d])
                        x = u_r[d] + dh_t[d]
                        gate = s_t[d]
                        scaled = x * (one - mix * gamma)
                        dz_t[d] = scaled * gate
                        dpre_r[d] = scaled * z_t[d] * gate * (one - gate)
                        df_t[d] = x * (before[d] - mix * z_t[d] * gate) * gamma * (one - gamma)
                        u_r[d] = x * gamma
                    dg[row, t] = dpre_r
                if wt.shape[0] > 0:
                    _multiply(dpre, wt, u)
            dh0[first : first + rows] = u
