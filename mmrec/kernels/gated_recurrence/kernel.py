"""Numba kernels of the gated recurrence. Arrays in, arrays out, no checks.

Axes: B batch, T time, D channels, N sequences, G blocks of W, P = D / G channels a block. Inputs
are flat with strides (see ``arrays.flat``).

    γ_t = σ(f_t),  s_t = σ(h_{t-1} W + g_t),  c_t = 1 - γ_t (mixed) or 1
    h_t = c_t z_t s_t + γ_t h_{t-1}

Adjoint, with u_t the gradient of h_t and the sums running backwards in time:

    dz_t = u_t c_t s_t                    dg_t = u_t c_t z_t s_t (1 - s_t)
    df_t = u_t (h_{t-1} - [mixed] z_t s_t) γ_t (1 - γ_t)
    u_{t-1} = dh_{t-1} + γ_t u_t + dg_t Wᵀ      dW = Σ_t h_{t-1}ᵀ dg_t

A task is a tile of sequences that walk together, so that an element of W read from cache serves all
of them. Longer ones come first in a tile: those still running are always its first rows.
"""

import numpy as np

from mmrec.kernels._launch import helper, kernel
from mmrec.kernels._math import sigmoid
from mmrec.kernels.gated_recurrence.product import add_product

DEPTH = 128  # steps that dW sums at once: their rows of dg stay in cache meanwhile

# Indices are unsigned in the loops over channels: a signed one might count from the end, and the
# test for that keeps a loop from becoming vector instructions.


@helper
def _copy(source, at, target, to, width):
    at, to = np.uint64(at), np.uint64(to)
    for d in range(np.uint64(width)):
        target[to + d] = source[at + d]


@helper
def _add_recurrent(x, w, size, out, rows, width):
    """out += x @ block_diag(w) for rows of x and out (…, width)."""
    if w.size > 0:
        for at in range(0, width, size):
            add_product(x, at, width, 1, w, at * size, size, out, at, width, rows, size, size)


@helper
def _advance(z, z_at, f, f_at, state, gates, at, h, h_at, mix, width):
    """One step of one sequence; gates holds h_{t-1} W + g_t and then s_t."""
    z_at, f_at, at, h_at = np.uint64(z_at), np.uint64(f_at), np.uint64(at), np.uint64(h_at)
    one = h.dtype.type(1)
    for d in range(np.uint64(width)):
        gates[at + d] = sigmoid(gates[at + d])
    for d in range(np.uint64(width)):
        gamma = sigmoid(f[f_at + d])
        new = (one - mix * gamma) * z[z_at + d] * gates[at + d] + gamma * state[at + d]
        state[at + d] = new
        h[h_at + d] = new


@kernel
def recurrence_fwd(
    task,
    z,
    z_sb,
    z_st,
    g,
    g_sb,
    g_st,
    f,
    f_sb,
    f_st,
    w,
    size,
    h0,
    spans,
    tiles,
    time,
    h,
    h_last,
    s,
    mixed,
):
    """Fill h (B, T, D) and h_last (N, D), and, if it is not empty, s (B, T, D) for the backward.

    w (G, P, P) with size P, or empty; h0 (N, D); spans (N, 3) says where the sequences lie, tiles
    (M, R) who walks with whom, -1 for nobody. All but these two are flat.
    """
    width = h0.size // max(1, spans.shape[0])
    mix = h.dtype.type(mixed)
    tile = tiles[task]
    members = (tile >= 0).sum()
    state = np.empty(members * width, h.dtype)
    gates = np.empty_like(state)
    for r in range(members):
        _copy(h0, tile[r] * width, state, r * width, width)
    rows = members
    for t in range(spans[tile[0], 2] - spans[tile[0], 1]):
        while spans[tile[rows - 1], 1] + t >= spans[tile[rows - 1], 2]:
            rows -= 1
        for r in range(rows):
            b, at = spans[tile[r], 0], spans[tile[r], 1] + t
            _copy(g, b * g_sb + at * g_st, gates, r * width, width)
        _add_recurrent(state, w, size, gates, rows, width)
        for r in range(rows):
            b, at = spans[tile[r], 0], spans[tile[r], 1] + t
            z_at, f_at = b * z_sb + at * z_st, b * f_sb + at * f_st
            here = (b * time + at) * width
            _advance(z, z_at, f, f_at, state, gates, r * width, h, here, mix, width)
            if s.size > 0:
                _copy(gates, r * width, s, here, width)
    for r in range(members):
        _copy(state, r * width, h_last, tile[r] * width, width)


@helper
def _retreat(
    z,
    z_at,
    f,
    f_at,
    dh,
    dh_at,
    before,
    before_at,
    s,
    dz,
    dg,
    df,
    here,
    carry,
    gamma,
    dpre,
    at,
    mix,
    width,
):
    """One step back of one sequence; carry is u_t less dh_t, and then γ_t u_t."""
    z_at, f_at, dh_at, before_at, here, at = (
        np.uint64(z_at),
        np.uint64(f_at),
        np.uint64(dh_at),
        np.uint64(before_at),
        np.uint64(here),
        np.uint64(at),
    )
    one = s.dtype.type(1)
    width = np.uint64(width)
    # Several short loops: before one that writes more arrays, LLVM gives up telling them apart.
    for d in range(width):
        gamma[at + d] = sigmoid(f[f_at + d])
    for d in range(width):
        carry[at + d] += dh[dh_at + d]
        dz[here + d] = carry[at + d] * (one - mix * gamma[at + d]) * s[here + d]
    for d in range(width):
        dpre[at + d] = dz[here + d] * z[z_at + d] * (one - s[here + d])
        dg[here + d] = dpre[at + d]
    for d in range(width):
        slope = carry[at + d] * gamma[at + d] * (one - gamma[at + d])
        df[here + d] = slope * (before[before_at + d] - mix * z[z_at + d] * s[here + d])
    for d in range(width):
        carry[at + d] *= gamma[at + d]


@kernel
def recurrence_bwd(
    task,
    z,
    z_sb,
    z_st,
    f,
    f_sb,
    f_st,
    dh,
    dh_sb,
    dh_st,
    wt,
    size,
    h0,
    spans,
    tiles,
    time,
    h,
    s,
    dh_last,
    dz,
    dg,
    df,
    dh0,
    mixed,
):
    """Fill dz, dg, df (B, T, D) and dh0 (N, D), all flat; wt holds the transposed blocks of W."""
    width = h0.size // max(1, spans.shape[0])
    mix = h.dtype.type(mixed)
    tile = tiles[task]
    members = (tile >= 0).sum()
    carry = np.empty(members * width, h.dtype)
    gamma, dpre = np.empty_like(carry), np.empty_like(carry)
    for r in range(members):
        _copy(dh_last, tile[r] * width, carry, r * width, width)
    rows = 0
    for t in range(spans[tile[0], 2] - spans[tile[0], 1] - 1, -1, -1):
        while rows < members and spans[tile[rows], 1] + t < spans[tile[rows], 2]:
            rows += 1
        for r in range(rows):
            n = tile[r]
            b, at = spans[n, 0], spans[n, 1] + t
            here = (b * time + at) * width
            z_at, f_at = b * z_sb + at * z_st, b * f_sb + at * f_st
            dh_at = b * dh_sb + at * dh_st
            if t > 0:
                _retreat(
                    z,
                    z_at,
                    f,
                    f_at,
                    dh,
                    dh_at,
                    h,
                    here - width,
                    s,
                    dz,
                    dg,
                    df,
                    here,
                    carry,
                    gamma,
                    dpre,
                    r * width,
                    mix,
                    width,
                )
            else:
                _retreat(
                    z,
                    z_at,
                    f,
                    f_at,
                    dh,
                    dh_at,
                    h0,
                    n * width,
                    s,
                    dz,
                    dg,
                    df,
                    here,
                    carry,
                    gamma,
                    dpre,
                    r * width,
                    mix,
                    width,
                )
        _add_recurrent(dpre, wt, size, carry, rows, width)
    for r in range(members):
        _copy(carry, r * width, dh0, tile[r] * width, width)


@kernel
def weight_gradient(task, h, h0, dg, spans, time, size, stripe, dw):
    """Add Σ_t h_{t-1}ᵀ dg_t to dw (G, P, P) with size P, so many rows a task; flat but spans."""
    width = h0.size // max(1, spans.shape[0])
    stripes = (size + stripe - 1) // stripe
    left = task // stripes * size
    top = left + task % stripes * stripe
    rows = min(stripe, left + size - top)
    for n in range(spans.shape[0]):
        steps = spans[n, 2] - spans[n, 1]
        at = (spans[n, 0] * time + spans[n, 1]) * width
        if steps > 0:
            add_product(
                h0,
                n * width + top,
                1,
                width,
                dg,
                at + left,
                width,
                dw,
                top * size,
                size,
                rows,
                1,
                size,
            )
        for t in range(0, steps - 1, DEPTH):
            here, depth = at + t * width, min(DEPTH, steps - 1 - t)
            add_product(
                h,
                here + top,
                1,
                width,
                dg,
                here + width + left,
                width,
                dw,
                top * size,
                size,
                rows,
                depth,
                size,
            )
