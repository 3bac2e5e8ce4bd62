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

from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import sigmoid
from mmrec.kernels._recurrent import add_panels, copy, tanh


@inline_jit
def _begin(p, p_at, bias, gates, at, width):
    """gates: the inputs and biases of r and z, and the bias of v."""
    p_at, at, d2, d3 = np.uint64(p_at), np.uint64(at), np.uint64(2 * width), np.uint64(3 * width)
    for d in range(d2):
        gates[at + d] = p[p_at + d] + bias[d]
    for d in range(d2, d3):
        gates[at + d] = bias[d]


@inline_jit
def _step(p, p_at, gates, at, state, state_at, h, h_at, s, s_at, width):
    """One step of one sequence. gates holds the logits of r and z, and v."""
    p_n, r, v, h_at = np.uint64(p_at + 2 * width), np.uint64(at), np.uint64(at + 2 * width), h_at
    z, state_at, h_at = np.uint64(at + width), np.uint64(state_at), np.uint64(h_at)
    one = h.dtype.type(1)
    for d in range(np.uint64(2 * width)):
        gates[r + d] = sigmoid(gates[r + d])
    if s.size > 0:
        copy(gates, at, s, s_at, 3 * width)
    for d in range(np.uint64(width)):
        gates[v + d] = tanh(p[p_n + d] + gates[r + d] * gates[v + d], one)
    if s.size > 0:
        copy(gates, at + 2 * width, s, s_at + 3 * width, width)
    for d in range(np.uint64(width)):
        n = gates[v + d]
        state[state_at + d] = n + gates[z + d] * (state[state_at + d] - n)
    for d in range(np.uint64(width)):
        h[h_at + d] = state[state_at + d]


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
    row = (bias.size + panel_width - 1) // panel_width * panel_width
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
            b, first, end = sequence_bounds[tile[r]]
            at = end - 1 - t if reverse else first + t
            _begin(p, b * p_sb + at * p_st, bias, gates, r * row, width)
        add_panels(state, width, panels, panel_width, gates, row, rows, width)
        for r in range(rows):
            b, first, end = sequence_bounds[tile[r]]
            at = end - 1 - t if reverse else first + t
            p_at, h_at = b * p_sb + at * p_st, b * h_sb + at * h_st
            _step(p, p_at, gates, r * row, state, r * width, h, h_at, s, 4 * h_at, width)
    for r in range(members):
        copy(state, r * width, final, tile[r] * width, width)


@inline_jit
def _step_back(s, s_at, before, before_at, dh, dh_at, dg, carry, at, width):
    """One step back of one sequence. carry holds u_t - dh_t before, and z_t u_t after.

    s and dg have the same places.
    """
    before_at, dh_at, at, count = (
        np.uint64(before_at),
        np.uint64(dh_at),
        np.uint64(at),
        np.uint64(width),
    )
    i0, i1 = np.uint64(s_at), np.uint64(s_at + width)
    i2, i3 = np.uint64(s_at + 2 * width), np.uint64(s_at + 3 * width)
    one = s.dtype.type(1)
    for d in range(count):
        carry[at + d] += dh[dh_at + d]
    for d in range(count):  # dn
        z, n = s[i1 + d], s[i3 + d]
        dg[i3 + d] = carry[at + d] * (one - z) * (one - n * n)
    for d in range(count):  # dv
        dg[i0 + d] = dg[i3 + d] * s[i0 + d]
    for d in range(count):  # dr
        dg[i1 + d] = dg[i0 + d] * s[i2 + d] * (one - s[i0 + d])
    for d in range(count):  # dz
        z, n = s[i1 + d], s[i3 + d]
        dg[i2 + d] = carry[at + d] * (before[before_at + d] - n) * z * (one - z)
    for d in range(count):
        carry[at + d] *= s[i1 + d]


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
    row = (width + panel_width - 1) // panel_width * panel_width
    tile = tiles[task]
    members = (tile >= 0).sum()
    carry = np.zeros(members * row, h.dtype)
    logits = np.empty(members * 3 * width, h.dtype)
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
                before_at = h_at + h_st if reverse else h_at - h_st
                _step_back(s, 4 * h_at, h, before_at, dh, dh_at, dg, carry, r * row, width)
            else:
                before_at = tile[r] * width
                _step_back(s, 4 * h_at, initial, before_at, dh, dh_at, dg, carry, r * row, width)
            copy(dg, 4 * h_at, logits, r * 3 * width, 3 * width)
        add_panels(logits, 3 * width, panels, panel_width, carry, row, rows, 3 * width)
    for r in range(members):
        copy(carry, r * row, dinitial, tile[r] * width, width)
