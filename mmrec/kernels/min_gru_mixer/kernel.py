"""Numba kernels of the minGRU mixer. Arrays in, arrays out, no checks.

Axes: B batch, T time, D channels, N sequences. A row of ``projected`` (B, T, 4 D) is [z, f, g, r]:
candidate, forget logits, input logits, output gate. All arrays but ``sequence_bounds`` are flat;
``p_sb`` and ``p_st`` are the strides of ``projected`` over batch row and time, ``dy_sb`` and
``dy_st`` those of dy. A row n of ``sequence_bounds``
(N, 3) holds the batch row, first step and end of sequence n.

    γ_t = σ(f_t + b),   h_t = (1 - γ_t) z_t σ(g_t) + γ_t h_{t-1},   y_t = n(h_t) silu(r_t)

with n(h) = h i, i = (mean h² + ε)^-1/2. Adjoint, with u_t the gradient of h_t:

    dr_t = dy_t n_t σ(r)(1 + r (1 - σ(r)))          e_t = dy_t silu(r_t)
    u_t  = i (e_t - n_t mean(e_t n_t)) + γ_{t+1} u_{t+1}
    dz_t = u_t (1 - γ_t) σ(g)                       dg_t = dz_t z_t (1 - σ(g))
    df_t = u_t (h_{t-1} - z_t σ(g)) γ_t (1 - γ_t),  db = Σ_t df_t

A task is one sequence. A row of ``projected`` is read from memory once; everything computed from it
happens in the first-level cache, where separate ops would pass over memory some twenty times. Each
short loop writes one array: LLVM does not vectorise one that writes several, because it cannot
prove that they do not overlap.
"""

import numpy as np

from mmrec.kernels._bf16 import DOT_SUMS, dot, read, write
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import sigmoid

EPSILON = 1e-6  # added to the mean square of the RMS norm


@inline_jit
def _gates(f, bias, g, gamma, gate, width):
    """gamma = σ(f + bias), gate = σ(g)."""
    for d in range(np.uint64(width)):
        gamma[d] = sigmoid(f[d] + bias[d])
    for d in range(np.uint64(width)):
        gate[d] = sigmoid(g[d])


@inline_jit
def _rms_scale(h, sums, width):
    """1 / root mean square of a row h."""
    one = h.dtype.type(1)
    mean = dot(h, 0, h, 0, sums, width) / h.dtype.type(width)
    return one / np.sqrt(mean + h.dtype.type(EPSILON))


@parallel_kernel
def min_gru_mixer_fwd(n, projected, p_sb, p_st, bias, initial, sequence_bounds, time, y, h, final):
    """Fill y (B, T, D), final (N, D) and, unless it is empty, h (B, T, D) for the backward pass.

    projected and y may hold bfloat16.
    """
    width = bias.size
    one = bias.dtype.type(1)
    z = np.empty(width, bias.dtype)
    f, g, r = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    gamma, gate, state = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    sums = np.empty(DOT_SUMS, bias.dtype)
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    read(initial, n * width, state, 0, width)
    for t in range(begin, end):
        at, out_at = row * p_sb + t * p_st, (row * time + t) * width
        read(projected, at, z, 0, width)
        read(projected, at + width, f, 0, width)
        read(projected, at + 2 * width, g, 0, width)
        read(projected, at + 3 * width, r, 0, width)
        _gates(f, bias, g, gamma, gate, width)
        for d in range(np.uint64(width)):
            state[d] = (one - gamma[d]) * z[d] * gate[d] + gamma[d] * state[d]
        scale = _rms_scale(state, sums, width)
        for d in range(np.uint64(width)):
            gate[d] = state[d] * scale * r[d] * sigmoid(r[d])
        write(gate, 0, y, out_at, width)
        if h.size > 0:
            write(state, 0, h, out_at, width)
    write(state, 0, final, n * width, width)


@parallel_kernel
def min_gru_mixer_bwd(
    n,
    projected,
    p_sb,
    p_st,
    dy,
    dy_sb,
    dy_st,
    bias,
    initial,
    h,
    dfinal,
    sequence_bounds,
    time,
    dprojected,
    dbias,
    dinitial,
):
    """Fill dprojected (B, T, 4 D), dinitial (N, D) and dbias (N, D), one row per sequence.

    projected, dy and dprojected may hold bfloat16.
    """
    width = bias.size
    one = bias.dtype.type(1)
    z = np.empty(width, bias.dtype)
    f, g, r = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    gamma, gate, carry = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    now, before, grad = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    bias_grad, sums = np.zeros_like(z), np.empty(DOT_SUMS, bias.dtype)
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    read(dfinal, n * width, carry, 0, width)
    for t in range(end - 1, begin - 1, -1):
        at, here = row * p_sb + t * p_st, (row * time + t) * width
        read(projected, at, z, 0, width)
        read(projected, at + width, f, 0, width)
        read(projected, at + 2 * width, g, 0, width)
        read(projected, at + 3 * width, r, 0, width)
        read(dy, row * dy_sb + t * dy_st, grad, 0, width)
        read(h, here, now, 0, width)
        if t > begin:
            read(h, here - width, before, 0, width)
        else:
            read(initial, n * width, before, 0, width)
        scale = _rms_scale(now, sums, width)
        for d in range(np.uint64(width)):
            now[d] *= scale  # n(h)
        for d in range(np.uint64(width)):
            gate[d] = sigmoid(r[d])
        for d in range(np.uint64(width)):
            gamma[d] = grad[d] * now[d] * gate[d] * (one + r[d] * (one - gate[d]))  # dr
        write(gamma, 0, dprojected, 4 * here + 3 * width, width)
        for d in range(np.uint64(width)):
            grad[d] *= r[d] * gate[d]  # e
        mean = dot(grad, 0, now, 0, sums, width) / bias.dtype.type(width)
        for d in range(np.uint64(width)):
            carry[d] += scale * (grad[d] - now[d] * mean)  # u
        _gates(f, bias, g, gamma, gate, width)
        for d in range(np.uint64(width)):
            now[d] = carry[d] * (one - gamma[d]) * gate[d]  # dz
        write(now, 0, dprojected, 4 * here, width)
        for d in range(np.uint64(width)):
            now[d] *= z[d] * (one - gate[d])  # dg
        write(now, 0, dprojected, 4 * here + 2 * width, width)
        for d in range(np.uint64(width)):
            now[d] = carry[d] * (before[d] - z[d] * gate[d]) * gamma[d] * (one - gamma[d])  # df
        write(now, 0, dprojected, 4 * here + width, width)
        for d in range(np.uint64(width)):
            bias_grad[d] += now[d]
        for d in range(np.uint64(width)):
            carry[d] *= gamma[d]
    write(bias_grad, 0, dbias, n * width, width)
    write(carry, 0, dinitial, n * width, width)
