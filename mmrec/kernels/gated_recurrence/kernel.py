"""Numba kernels of the gated recurrence. Arrays in, arrays out, no checks.

The presets do not use the gated recurrence; layer types "s" and "b" of the model do. A reader of
the presets may skip this folder.

Axes: B batch, T time, D channels, N sequences, G diagonal blocks of W with P = D / G channels each.
All arrays but ``sequence_bounds`` and ``tiles`` are flat; ``x_sb`` and ``x_st`` are the strides of
an input x over batch row and time. A row n of ``sequence_bounds`` (N, 3) holds the batch row, first
step and end of sequence n.

    γ_t = σ(f_t),  s_t = σ(h_{t-1} W + g_t),  c_t = 1 - γ_t (if scale_input) or 1
    h_t = c_t z_t s_t + γ_t h_{t-1}

Adjoint, with u_t the gradient of h_t and the sums running backwards in time:

    dz_t = u_t c_t s_t                    dg_t = u_t c_t z_t s_t (1 - s_t)
    df_t = u_t (h_{t-1} - [scale_input] z_t s_t) γ_t (1 - γ_t)
    u_{t-1} = dh_{t-1} + γ_t u_t + dg_t Wᵀ      dW = Σ_t h_{t-1}ᵀ dg_t

A task is a tile: a row of ``tiles`` (M, R) with the numbers of up to R sequences, -1 for none. The
sequences of a tile advance together, so that an element of W in cache serves all of them. The
longest comes first: the sequences that have not ended yet are always the first rows of a tile.
"""

import numpy as np

from mmrec.kernels._bf16 import read
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import cdiv, sigmoid
from mmrec.kernels._simd import add_product

DEPTH = 128
"""Steps that dW sums at once, so that their rows of dg stay in cache."""


@inline_jit
def _add_recurrent(x, w, size, out, rows, width):
    """out += x @ block_diag(w) for x and out (rows, width); w (G, size, size), or empty."""
    if w.size > 0:
        for at in range(0, width, size):
            add_product(x, at, width, 1, w, at * size, size, out, at, width, rows, size, size)


@inline_jit
def _step(z, z_at, f, f_at, state, gates, at, h, h_at, input_decay, width):
    """One step of one sequence. gates holds h_{t-1} W + g_t before, and s_t after."""
    z_at, f_at, at, h_at = np.uint64(z_at), np.uint64(f_at), np.uint64(at), np.uint64(h_at)
    one = h.dtype.type(1)
    for d in range(np.uint64(width)):
        gates[at + d] = sigmoid(gates[at + d])
    for d in range(np.uint64(width)):
        gamma = sigmoid(f[f_at + d])
        new = (one - input_decay * gamma) * z[z_at + d] * gates[at + d] + gamma * state[at + d]
        state[at + d] = new
        h[h_at + d] = new


@parallel_kernel
def gated_recurrence_fwd(
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
    initial,
    sequence_bounds,
    tiles,
    time,
    h,
    final,
    s,
    scale_input,
):
    """Fill h (B, T, D), final (N, D) and, unless it is empty, s (B, T, D) for the backward pass.

    w (G, P, P) or empty; size is P; initial (N, D).
    """
    width = initial.size // max(1, sequence_bounds.shape[0])
    input_decay = h.dtype.type(scale_input)
    tile = tiles[task]
    members = (tile >= 0).sum()
    state = np.empty(members * width, h.dtype)
    gates = np.empty_like(state)
    for r in range(members):
        read(initial, tile[r] * width, state, r * width, width)
    rows = members
    for t in range(sequence_bounds[tile[0], 2] - sequence_bounds[tile[0], 1]):
        while sequence_bounds[tile[rows - 1], 1] + t >= sequence_bounds[tile[rows - 1], 2]:
            rows -= 1
        for r in range(rows):
            b, at = sequence_bounds[tile[r], 0], sequence_bounds[tile[r], 1] + t
            read(g, b * g_sb + at * g_st, gates, r * width, width)
        _add_recurrent(state, w, size, gates, rows, width)
        for r in range(rows):
            b, at = sequence_bounds[tile[r], 0], sequence_bounds[tile[r], 1] + t
            z_at, f_at = b * z_sb + at * z_st, b * f_sb + at * f_st
            here = (b * time + at) * width
            _step(z, z_at, f, f_at, state, gates, r * width, h, here, input_decay, width)
            if s.size > 0:
                read(gates, r * width, s, here, width)
    for r in range(members):
        read(state, r * width, final, tile[r] * width, width)


@inline_jit
def _step_back(
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
    dlogits,
    at,
    input_decay,
    width,
):
    """One step back of one sequence. carry holds u_t - dh_t before, and γ_t u_t after."""
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
    # Short loops, because LLVM does not vectorise one that writes many arrays: it cannot prove
    # that they do not overlap.
    for d in range(width):
        gamma[at + d] = sigmoid(f[f_at + d])
    for d in range(width):
        carry[at + d] += dh[dh_at + d]
        dz[here + d] = carry[at + d] * (one - input_decay * gamma[at + d]) * s[here + d]
    for d in range(width):
        dlogits[at + d] = dz[here + d] * z[z_at + d] * (one - s[here + d])
        dg[here + d] = dlogits[at + d]
    for d in range(width):
        slope = carry[at + d] * gamma[at + d] * (one - gamma[at + d])
        df[here + d] = slope * (before[before_at + d] - input_decay * z[z_at + d] * s[here + d])
    for d in range(width):
        carry[at + d] *= gamma[at + d]


@parallel_kernel
def gated_recurrence_bwd(
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
    initial,
    sequence_bounds,
    tiles,
    time,
    h,
    s,
    dfinal,
    dz,
    dg,
    df,
    dinitial,
    scale_input,
):
    """Fill dz, dg, df (B, T, D) and dinitial (N, D); wt holds the transposed blocks of W."""
    width = initial.size // max(1, sequence_bounds.shape[0])
    input_decay = h.dtype.type(scale_input)
    tile = tiles[task]
    members = (tile >= 0).sum()
    carry = np.empty(members * width, h.dtype)
    gamma, dlogits = np.empty_like(carry), np.empty_like(carry)
    for r in range(members):
        read(dfinal, tile[r] * width, carry, r * width, width)
    rows = 0
    for t in range(sequence_bounds[tile[0], 2] - sequence_bounds[tile[0], 1] - 1, -1, -1):
        while (
            rows < members and sequence_bounds[tile[rows], 1] + t < sequence_bounds[tile[rows], 2]
        ):
            rows += 1
        for r in range(rows):
            n = tile[r]
            b, at = sequence_bounds[n, 0], sequence_bounds[n, 1] + t
            here = (b * time + at) * width
            z_at, f_at = b * z_sb + at * z_st, b * f_sb + at * f_st
            dh_at = b * dh_sb + at * dh_st
            if t > 0:
                _step_back(
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
                    dlogits,
                    r * width,
                    input_decay,
                    width,
                )
            else:
                _step_back(
                    z,
                    z_at,
                    f,
                    f_at,
                    dh,
                    dh_at,
                    initial,
                    n * width,
                    s,
                    dz,
                    dg,
                    df,
                    here,
                    carry,
                    gamma,
                    dlogits,
                    r * width,
                    input_decay,
                    width,
                )
        _add_recurrent(dlogits, wt, size, carry, rows, width)
    for r in range(members):
        read(carry, r * width, dinitial, tile[r] * width, width)


@parallel_kernel
def gated_recurrence_weight_gradient(task, h, initial, dg, sequence_bounds, time, size, stripe, dw):
    """dw (G, P, P) += Σ_t h_{t-1}ᵀ dg_t; size is P; a task has ``stripe`` rows of a block."""
    width = initial.size // max(1, sequence_bounds.shape[0])
    stripes = cdiv(size, stripe)
    left = task // stripes * size
    top = left + task % stripes * stripe
    rows = min(stripe, left + size - top)
    for n in range(sequence_bounds.shape[0]):
        steps = sequence_bounds[n, 2] - sequence_bounds[n, 1]
        at = (sequence_bounds[n, 0] * time + sequence_bounds[n, 1]) * width
        if steps > 0:
            add_product(
                initial,
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
