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

from mmrec.kernels._gates import load_part, one_minus, sigmoids, store_part
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._recurrent import add_panels, copy, padded
from mmrec.kernels._simd import LANES, fma


@inline_jit
def _add_recurrent(x, x_row, panels, panel_width, size, out, out_row, rows, width):
    """out += x @ block_diag(w) for x and out (rows, D); ``panels`` holds the blocks, or nothing."""
    if panels.size > 0:
        length = panels.size // (width // size)
        for block in range(width // size):
            at = block * size
            add_panels(
                x,
                at,
                x_row,
                1,
                panels,
                block * length,
                panel_width,
                out,
                block * padded(size, panel_width),
                out_row,
                rows,
                size,
                size,
            )


@inline_jit
def _copy_blocks(source, source_at, target, target_at, size, room, width):
    """Copy D numbers whose blocks of ``size`` lie ``room`` apart in the target."""
    for block in range(width // size):
        copy(source, source_at + block * size, target, target_at + block * room, size)


@inline_jit
def _step(z, z_at, f, f_at, state, state_at, gates, at, room, h, s, h_at, scale, size, width):
    """One step of one sequence. gates holds h_{t-1} W + g_t; s is written unless empty."""
    for block in range(0, width, size):
        for d in range(0, size, LANES):
            n, j = min(LANES, size - d), block + d
            gate = sigmoids(load_part(gates, at + block // size * room + d, n))
            gamma = sigmoids(load_part(f, f_at + j, n))
            source = load_part(z, z_at + j, n)
            if scale:
                source = one_minus(gamma) * source
            new = fma(gamma, load_part(state, state_at + j, n), source * gate)
            store_part(state, state_at + j, n, new)
            store_part(h, h_at + j, n, new)
            if s.size > 0:
                store_part(s, h_at + j, n, gate)


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
    panels,
    panel_width,
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

    ``panels`` holds the blocks of W, one after the other, or nothing; size is P; initial (N, D).
    """
    width = initial.size // max(1, sequence_bounds.shape[0])
    room = padded(size, panel_width)
    row = width // size * room
    tile = tiles[task]
    members = (tile >= 0).sum()
    state = np.empty(members * width, h.dtype)
    gates = np.zeros(members * row, h.dtype)
    for r in range(members):
        copy(initial, tile[r] * width, state, r * width, width)
    rows = members
    for t in range(sequence_bounds[tile[0], 2] - sequence_bounds[tile[0], 1]):
        while sequence_bounds[tile[rows - 1], 1] + t >= sequence_bounds[tile[rows - 1], 2]:
            rows -= 1
        for r in range(rows):
            b, at = sequence_bounds[tile[r], 0], sequence_bounds[tile[r], 1] + t
            _copy_blocks(g, b * g_sb + at * g_st, gates, r * row, size, room, width)
        _add_recurrent(state, width, panels, panel_width, size, gates, row, rows, width)
        for r in range(rows):
            b, at = sequence_bounds[tile[r], 0], sequence_bounds[tile[r], 1] + t
            _step(
                z,
                b * z_sb + at * z_st,
                f,
                b * f_sb + at * f_st,
                state,
                r * width,
                gates,
                r * row,
                room,
                h,
                s,
                (b * time + at) * width,
                scale_input,
                size,
                width,
            )
    for r in range(members):
        copy(state, r * width, final, tile[r] * width, width)


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
    at,
    room,
    dlogits,
    dlogits_at,
    scale,
    size,
    width,
):
    """One step back of one sequence. carry holds u_t - dh_t before, and γ_t u_t after."""
    for block in range(0, width, size):
        for d in range(0, size, LANES):
            n, j, k = min(LANES, size - d), block + d, at + block // size * room + d
            gamma, gate = sigmoids(load_part(f, f_at + j, n)), load_part(s, here + j, n)
            u = load_part(carry, k, n) + load_part(dh, dh_at + j, n)
            source = load_part(z, z_at + j, n)
            dsource = u * one_minus(gamma) * gate if scale else u * gate
            dlogit = dsource * source * one_minus(gate)
            value = load_part(before, before_at + j, n)
            if scale:
                value = value - source * gate
            store_part(dz, here + j, n, dsource)
            store_part(dg, here + j, n, dlogit)
            store_part(dlogits, dlogits_at + j, n, dlogit)
            store_part(df, here + j, n, u * gamma * one_minus(gamma) * value)
            store_part(carry, k, n, u * gamma)


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
    panels,
    panel_width,
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
    """Fill dz, dg, df (B, T, D) and dinitial (N, D); ``panels`` holds the transposed blocks of W.

    Without W, ``panels`` is empty, and size is D; it is never 0.
    """
    width = initial.size // max(1, sequence_bounds.shape[0])
    room = padded(size, panel_width)
    row = width // size * room
    tile = tiles[task]
    members = (tile >= 0).sum()
    carry = np.zeros(members * row, h.dtype)
    dlogits = np.empty(members * width, h.dtype)
    for r in range(members):
        _copy_blocks(dfinal, tile[r] * width, carry, r * row, size, room, width)
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
            before, before_at = (h, here - width) if t > 0 else (initial, n * width)
            _step_back(
                z,
                b * z_sb + at * z_st,
                f,
                b * f_sb + at * f_st,
                dh,
                b * dh_sb + at * dh_st,
                before,
                before_at,
                s,
                dz,
                dg,
                df,
                here,
                carry,
                r * row,
                room,
                dlogits,
                r * width,
                scale_input,
                size,
                width,
            )
        _add_recurrent(dlogits, width, panels, panel_width, size, carry, row, rows, width)
    for r in range(members):
        for block in range(width // size):
            at = block * size
            copy(carry, r * row + block * room, dinitial, tile[r] * width + at, size)
