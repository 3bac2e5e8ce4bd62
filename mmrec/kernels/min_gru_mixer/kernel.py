"""Numba kernels of the gated scan. Arrays in, arrays out, no checks.

Axes: B batch, T time, D channels, N sequences. A row of p (B, T, 4 D) is [z, f, g, r].

    γ_t = σ(f_t + b),   h_t = (1 - γ_t) z_t σ(g_t) + γ_t h_{t-1},   y_t = n(h_t) silu(r_t)

with n(h) = h i, i = (mean h² + ε)^-1/2. Adjoint, with u_t the gradient of h_t:

    dr_t = dy_t n_t σ(r)(1 + r (1 - σ(r)))          e_t = dy_t silu(r_t)
    u_t  = i (e_t - n_t mean(e_t n_t)) + γ_{t+1} u_{t+1}
    dz_t = u_t (1 - γ_t) σ(g)                       dg_t = dz_t z_t (1 - σ(g))
    df_t = u_t (h_{t-1} - z_t σ(g)) γ_t (1 - γ_t),  db = Σ_t df_t

A task is a sequence. A row of p is read once, and all that follows from it happens in the
first-level cache, where the unfused form makes some twenty passes over memory. Rows are short loops
over local arrays: before a loop that writes more arrays, LLVM gives up telling them apart.
"""

import numpy as np

from mmrec.kernels._bf16 import dot, read, write
from mmrec.kernels._launch import helper, kernel
from mmrec.kernels._math import sigmoid

EPSILON = 1e-6


@helper
def _gates(f, bias, g, gamma, gate, width):
    for d in range(np.uint64(width)):
        gamma[d] = sigmoid(f[d] + bias[d])
    for d in range(np.uint64(width)):
        gate[d] = sigmoid(g[d])


@helper
def _scale(h, lanes, width):
    """1 / root mean square of a row."""
    one = h.dtype.type(1)
    mean = dot(h, 0, h, 0, lanes, width) / h.dtype.type(width)
    return one / np.sqrt(mean + h.dtype.type(EPSILON))


@kernel
def gated_scan_fwd(n, p, p_sb, p_st, bias, h0, spans, time, y, h, h_last):
    """Fill y (B, T, D) of p's kind, h_last (N, D), and h (B, T, D) if it is not empty; all flat."""
    width = bias.size
    one = bias.dtype.type(1)
    z = np.empty(width, bias.dtype)
    f, g, r = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    gamma, gate, state = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    lanes = np.empty(16, bias.dtype)
    read(h0, n * width, state, 0, width)
    for t in range(spans[n, 1], spans[n, 2]):
        at, to = spans[n, 0] * p_sb + t * p_st, (spans[n, 0] * time + t) * width
        read(p, at, z, 0, width)
        read(p, at + width, f, 0, width)
        read(p, at + 2 * width, g, 0, width)
        read(p, at + 3 * width, r, 0, width)
        _gates(f, bias, g, gamma, gate, width)
        for d in range(np.uint64(width)):
            state[d] = (one - gamma[d]) * z[d] * gate[d] + gamma[d] * state[d]
        scale = _scale(state, lanes, width)
        for d in range(np.uint64(width)):
            gate[d] = state[d] * scale * r[d] * sigmoid(r[d])
        write(gate, 0, y, to, width)
        if h.size > 0:
            write(state, 0, h, to, width)
    write(state, 0, h_last, n * width, width)


@kernel
def gated_scan_bwd(
    n, p, p_sb, p_st, dy, dy_sb, dy_st, bias, h0, h, dh_last, spans, time, dp, dbias, dh0
):
    """Fill dp (B, T, 4 D) of p's kind, dh0 (N, D), and dbias (N, D), a row a sequence; all flat."""
    width = bias.size
    one = bias.dtype.type(1)
    z = np.empty(width, bias.dtype)
    f, g, r = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    gamma, gate, carry = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    now, before, grad = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    total, lanes = np.zeros_like(z), np.empty(16, bias.dtype)
    read(dh_last, n * width, carry, 0, width)
    for t in range(spans[n, 2] - 1, spans[n, 1] - 1, -1):
        at, here = spans[n, 0] * p_sb + t * p_st, (spans[n, 0] * time + t) * width
        read(p, at, z, 0, width)
        read(p, at + width, f, 0, width)
        read(p, at + 2 * width, g, 0, width)
        read(p, at + 3 * width, r, 0, width)
        read(dy, spans[n, 0] * dy_sb + t * dy_st, grad, 0, width)
        read(h, here, now, 0, width)
        if t > spans[n, 1]:
            read(h, here - width, before, 0, width)
        else:
            read(h0, n * width, before, 0, width)
        scale = _scale(now, lanes, width)
        for d in range(np.uint64(width)):
            now[d] *= scale  # n(h)
        for d in range(np.uint64(width)):
            gate[d] = sigmoid(r[d])
        for d in range(np.uint64(width)):
            gamma[d] = grad[d] * now[d] * gate[d] * (one + r[d] * (one - gate[d]))
        write(gamma, 0, dp, 4 * here + 3 * width, width)
        for d in range(np.uint64(width)):
            grad[d] *= r[d] * gate[d]
        along = dot(grad, 0, now, 0, lanes, width) / bias.dtype.type(width)
        for d in range(np.uint64(width)):
            carry[d] += scale * (grad[d] - now[d] * along)
        _gates(f, bias, g, gamma, gate, width)
        for d in range(np.uint64(width)):
            now[d] = carry[d] * (one - gamma[d]) * gate[d]  # dz
        write(now, 0, dp, 4 * here, width)
        for d in range(np.uint64(width)):
            now[d] *= z[d] * (one - gate[d])  # dg
        write(now, 0, dp, 4 * here + 2 * width, width)
        for d in range(np.uint64(width)):
            now[d] = carry[d] * (before[d] - z[d] * gate[d]) * gamma[d] * (one - gamma[d])
        write(now, 0, dp, 4 * here + width, width)
        for d in range(np.uint64(width)):
            total[d] += now[d]
        for d in range(np.uint64(width)):
            carry[d] *= gamma[d]
    write(total, 0, dbias, n * width, width)
    write(carry, 0, dh0, n * width, width)
