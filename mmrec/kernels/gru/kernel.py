"""Numba kernels of the GRU's recurrence. Arrays in, arrays out, no checks.

No preset of the model uses the GRU: a reader of the model may skip this folder.

Axes: B batch, T time, D channels, N sequences. All arrays but ``sequence_bounds`` and ``tiles`` are
flat; ``x_sb`` and ``x_st`` are the strides of an array x over batch row and time. A row n of
``sequence_bounds`` (N, 3) holds the batch row, first step and end of sequence n. p is the projected
input, with the gates r, z, n side by side; U_r, U_z, U_n are the parts of the recurrent weight.

    r_t = σ(p^r_t + U_r h_{t-1} + b_r)        z_t = σ(p^z_t + U_z h_{t-1} + b_z)
    v_t = U_n h_{t-1} + b_n                   n_t = tanh(p^n_t + r_t v_t)
    h_t = n_t + z_t (h_{t-1} - n_t)

Adjoint, with u_t the gradient of h_t and the sums running backwards in time:

    dn_t = u_t (1 - z_t) (1 - n_t²)           dv_t = dn_t r_t
    dr_t = dn_t v_t r_t (1 - r_t)             dz_t = u_t (h_{t-1} - n_t) z_t (1 - z_t)
    u_{t-1} = dh_{t-1} + z_t u_t + U_nᵀ dv_t + U_rᵀ dr_t + U_zᵀ dz_t

dr, dz, dn are the gradients of p, and dv, dr, dz those of the recurrent product. The backward pass
writes dv, dr, dz, dn side by side, so that both are slices.

A task is a tile: a row of ``tiles`` (M, R) with the numbers of up to R sequences, -1 for none. The
sequences of a tile advance together, so that an element of the weight in cache serves all of them.
The longest comes first: those that have not ended yet are always the first rows of a tile. Tasks
share nothing that they write.

Source: Cho et al. 2014, arXiv:1406.1078; the reset gate acts after the product, as in torch.
"""

import numpy as np

from mmrec.kernels._gates import load_part, one_minus, sigmoids, store_part, tanhs
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._recurrent import add_panels, copy, padded
from mmrec.kernels._simd import LANES, fma


@inline_jit
def _step(p, p_at, product, at, state, state_at, h, h_at, s, s_at, width):
    """One step of one sequence. product holds U h_{t-1} + b; s is written unless empty."""
    for d in range(0, width, LANES):
        n = min(LANES, width - d)
        r = sigmoids(load_part(p, p_at + d, n) + load_part(product, at + d, n))
        place = width + d
        z = sigmoids(load_part(p, p_at + place, n) + load_part(product, at + place, n))
        place = 2 * width + d
        v = load_part(product, at + place, n)
        new = tanhs(fma(r, v, load_part(p, p_at + place, n)))
        h_t = fma(z, load_part(state, state_at + d, n) - new, new)
        store_part(state, state_at + d, n, h_t)
        store_part(h, h_at + d, n, h_t)
        if s.size > 0:
            store_part(s, s_at + d, n, r)
            store_part(s, s_at + width + d, n, z)
            store_part(s, s_at + 2 * width + d, n, v)
            store_part(s, s_at + 3 * width + d, n, new)


@parallel_kernel
def gru_fwd(
    task,
    p,
    p_sb,
    p_st,
    panels,
    panel_width,
    bias,
    initial,
    sequence_bounds,
    tiles,
    h,
    h_sb,
    h_st,
    final,
    s,
    reverse,
):
    """Fill h, final (N, D) and, unless it is empty, s with r, z, v, n for the backward pass.

    s has the layout of h with 4D in place of D. ``reverse`` runs from the last step to the first.
    """
    width = bias.size // 3
    row = padded(bias.size, panel_width)
    tile = tiles[task]
    members = (tile >= 0).sum()
    state = np.empty(members * width, h.dtype)
    product = np.zeros(members * row, h.dtype)
    for r in range(members):
        copy(initial, tile[r] * width, state, r * width, width)
    rows = members
    for t in range(sequence_bounds[tile[0], 2] - sequence_bounds[tile[0], 1]):
        while sequence_bounds[tile[rows - 1], 1] + t >= sequence_bounds[tile[rows - 1], 2]:
            rows -= 1
        for r in range(rows):
            copy(bias, 0, product, r * row, 3 * width)
        add_panels(
            state, 0, width, 1, panels, 0, panel_width, product, 0, row, rows, width, 3 * width
        )
        for r in range(rows):
            b, first, end = sequence_bounds[tile[r]]
            at = end - 1 - t if reverse else first + t
            p_at, h_at = b * p_sb + at * p_st, b * h_sb + at * h_st
            _step(p, p_at, product, r * row, state, r * width, h, h_at, s, 4 * h_at, width)
    for r in range(members):
        copy(state, r * width, final, tile[r] * width, width)


@inline_jit
def _step_back(s, s_at, before, before_at, dh, dh_at, dg, carry, at, dproduct, dproduct_at, width):
    """One step back of one sequence.

    carry holds u_t - dh_t before, and z_t u_t after. dg has the places of s; dproduct is its part
    that is multiplied, for all sequences of the tile one after the other.
    """
    for d in range(0, width, LANES):
        n = min(LANES, width - d)
        r, z = load_part(s, s_at + d, n), load_part(s, s_at + width + d, n)
        v = load_part(s, s_at + 2 * width + d, n)
        new = load_part(s, s_at + 3 * width + d, n)
        u = load_part(dh, dh_at + d, n) + load_part(carry, at + d, n)
        dnew = u * one_minus(z) * one_minus(new * new)
        dv = dnew * r
        dr = dv * v * one_minus(r)
        zu = z * u
        dz = zu * (load_part(before, before_at + d, n) - new) * one_minus(z)
        store_part(carry, at + d, n, zu)
        store_part(dg, s_at + d, n, dv)
        store_part(dg, s_at + width + d, n, dr)
        store_part(dg, s_at + 2 * width + d, n, dz)
        store_part(dg, s_at + 3 * width + d, n, dnew)
        store_part(dproduct, dproduct_at + d, n, dv)
        store_part(dproduct, dproduct_at + width + d, n, dr)
        store_part(dproduct, dproduct_at + 2 * width + d, n, dz)


@parallel_kernel
def gru_bwd(
    task,
    dh,
    dh_sb,
    dh_st,
    panels,
    panel_width,
    initial,
    sequence_bounds,
    tiles,
    h,
    h_sb,
    h_st,
    s,
    dfinal,
    dg,
    dinitial,
    reverse,
):
    """Fill dg with dv, dr, dz, dn, in the layout of s, and dinitial (N, D)."""
    width = initial.size // max(1, sequence_bounds.shape[0])
    row = padded(width, panel_width)
    tile = tiles[task]
    members = (tile >= 0).sum()
    carry = np.zeros(members * row, h.dtype)
    dproduct = np.empty(members * 3 * width, h.dtype)
    for r in range(members):
        copy(dfinal, tile[r] * width, carry, r * row, width)
    rows = 0
    for t in range(sequence_bounds[tile[0], 2] - sequence_bounds[tile[0], 1] - 1, -1, -1):
        while (
            rows < members and sequence_bounds[tile[rows], 1] + t < sequence_bounds[tile[rows], 2]
        ):
            rows += 1
        for r in range(rows):
            b, first, end = sequence_bounds[tile[r]]
            at = end - 1 - t if reverse else first + t
            h_at, dh_at = b * h_sb + at * h_st, b * dh_sb + at * dh_st
            if t > 0:
                before, before_at = h, h_at + h_st if reverse else h_at - h_st
            else:
                before, before_at = initial, tile[r] * width
            _step_back(
                s,
                4 * h_at,
                before,
                before_at,
                dh,
                dh_at,
                dg,
                carry,
                r * row,
                dproduct,
                r * 3 * width,
                width,
            )
        depth = 3 * width
        add_panels(dproduct, 0, depth, 1, panels, 0, panel_width, carry, 0, row, rows, depth, width)
    for r in range(members):
        copy(carry, r * row, dinitial, tile[r] * width, width)
