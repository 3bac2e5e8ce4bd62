"""Numba kernels of the LSTM's recurrence. Arrays in, arrays out, no checks.

No preset of the model uses the LSTM: a reader of the model may skip this folder.

Axes and arrays are those of the GRU's kernels (``gru/kernel.py``), and so are tasks and tiles. p is
the projected input, with biases, and the gates i, f, g, o side by side; U is the recurrent weight.

    i_t, f_t, o_t = σ(p_t + U h_{t-1})        g_t = tanh(p_t + U h_{t-1}), each with its own part
    c_t = f_t c_{t-1} + i_t g_t               h_t = o_t tanh(c_t)

Adjoint, with u_t and w_t the gradients of h_t and c_t and the sums running backwards in time:

    w_t = dc_t + f_{t+1} w_{t+1} + u_t o_t (1 - tanh(c_t)²)
    do_t = u_t tanh(c_t) o_t (1 - o_t)        di_t = w_t g_t i_t (1 - i_t)
    dg_t = w_t i_t (1 - g_t²)                 df_t = w_t c_{t-1} f_t (1 - f_t)
    u_{t-1} = dh_{t-1} + Uᵀ [di_t, df_t, dg_t, do_t]

di, df, dg, do are the gradients of p, and those of the recurrent product too.

Source: Hochreiter and Schmidhuber 1997; the forget gate is from Gers et al. 2000.
"""

import numpy as np

from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import sigmoid
from mmrec.kernels._recurrent import add_panels, copy, tanh


@inline_jit
def _step(gates, at, state, cell, state_at, h, h_at, width):
    """One step of one sequence. gates holds logits before, and the gates after."""
    i, f = np.uint64(at), np.uint64(at + width)
    g, o = np.uint64(at + 2 * width), np.uint64(at + 3 * width)
    state_at, h_at, count = np.uint64(state_at), np.uint64(h_at), np.uint64(width)
    one = h.dtype.type(1)
    for d in range(np.uint64(2 * width)):
        gates[i + d] = sigmoid(gates[i + d])
    for d in range(count):
        gates[g + d] = tanh(gates[g + d], one)
    for d in range(count):
        gates[o + d] = sigmoid(gates[o + d])
    for d in range(count):
        cell[state_at + d] = gates[f + d] * cell[state_at + d] + gates[i + d] * gates[g + d]
    for d in range(count):
        state[state_at + d] = gates[o + d] * tanh(cell[state_at + d], one)
    for d in range(count):
        h[h_at + d] = state[state_at + d]


@parallel_kernel
def lstm_fwd(
    task,
    p,
    p_sb,
    p_st,
    panels,
    panel_width,
    initial,
    initial_cell,
    sequence_bounds,
    tiles,
    h,
    h_sb,
    h_st,
    final,
    final_cell,
    s,
    c,
    reverse,
):
    """Fill h, final and final_cell (N, D) and, unless empty, s and c for the backward pass.

    c has the layout of h and holds the cells. s has it with 4D in place of D and holds i, f, g, o.
    ``reverse`` runs from the last step to the first.
    """
    width = initial.size // max(1, sequence_bounds.shape[0])
    row = (4 * width + panel_width - 1) // panel_width * panel_width
    tile = tiles[task]
    members = (tile >= 0).sum()
    state, cell = np.empty(members * width, h.dtype), np.empty(members * width, h.dtype)
    gates = np.zeros(members * row, h.dtype)
    for r in range(members):
        copy(initial, tile[r] * width, state, r * width, width)
        copy(initial_cell, tile[r] * width, cell, r * width, width)
    rows = members
    for t in range(sequence_bounds[tile[0], 2] - sequence_bounds[tile[0], 1]):
        while sequence_bounds[tile[rows - 1], 1] + t >= sequence_bounds[tile[rows - 1], 2]:
            rows -= 1
        for r in range(rows):
            b, first, end = sequence_bounds[tile[r]]
            at = end - 1 - t if reverse else first + t
            copy(p, b * p_sb + at * p_st, gates, r * row, 4 * width)
        add_panels(state, width, panels, panel_width, gates, row, rows, width)
        for r in range(rows):
            b, first, end = sequence_bounds[tile[r]]
            at = end - 1 - t if reverse else first + t
            h_at = b * h_sb + at * h_st
            _step(gates, r * row, state, cell, r * width, h, h_at, width)
            if s.size > 0:
                copy(gates, r * row, s, 4 * h_at, 4 * width)
                copy(cell, r * width, c, h_at, width)
    for r in range(members):
        copy(state, r * width, final, tile[r] * width, width)
        copy(cell, r * width, final_cell, tile[r] * width, width)


@inline_jit
def _step_back(
    s, s_at, c, c_at, before, before_at, dh, dh_at, dp, carry, at, dcell, cell_at, width
):
    """One step back of one sequence. carry holds u_t - dh_t before, and 0 after.

    dcell holds f_{t+1} w_{t+1} + dc_t before, and f_t w_t after. s and dp have the same places.
    """
    c_at, before_at, dh_at, at, cell_at, count = (
        np.uint64(c_at),
        np.uint64(before_at),
        np.uint64(dh_at),
        np.uint64(at),
        np.uint64(cell_at),
        np.uint64(width),
    )
    i, f = np.uint64(s_at), np.uint64(s_at + width)
    g, o = np.uint64(s_at + 2 * width), np.uint64(s_at + 3 * width)
    one = s.dtype.type(1)
    for d in range(count):
        carry[at + d] = (carry[at + d] + dh[dh_at + d]) * s[o + d]  # u o
    for d in range(count):  # tanh(c), for now
        dp[o + d] = tanh(c[c_at + d], one)
    for d in range(count):
        dcell[cell_at + d] += carry[at + d] * (one - dp[o + d] * dp[o + d])
    for d in range(count):
        dp[o + d] *= carry[at + d] * (one - s[o + d])
    for d in range(count):
        dp[i + d] = dcell[cell_at + d] * s[g + d] * s[i + d] * (one - s[i + d])
    for d in range(count):
        dp[g + d] = dcell[cell_at + d] * s[i + d] * (one - s[g + d] * s[g + d])
    for d in range(count):
        dcell[cell_at + d] *= s[f + d]  # f w
    for d in range(count):
        dp[f + d] = dcell[cell_at + d] * before[before_at + d] * (one - s[f + d])
    for d in range(count):
        carry[at + d] = 0


@parallel_kernel
def lstm_bwd(
    task,
    dh,
    dh_sb,
    dh_st,
    panels,
    panel_width,
    initial_cell,
    sequence_bounds,
    tiles,
    c,
    c_sb,
    c_st,
    s,
    dfinal,
    dfinal_cell,
    dp,
    dinitial,
    dinitial_cell,
    reverse,
):
    """Fill dp, the gradient of p, in the layout of s, and dinitial and dinitial_cell (N, D)."""
    width = initial_cell.size // max(1, sequence_bounds.shape[0])
    row = (width + panel_width - 1) // panel_width * panel_width
    tile = tiles[task]
    members = (tile >= 0).sum()
    carry, dcell = np.zeros(members * row, c.dtype), np.empty(members * width, c.dtype)
    logits = np.empty(members * 4 * width, c.dtype)
    for r in range(members):
        copy(dfinal, tile[r] * width, carry, r * row, width)
        copy(dfinal_cell, tile[r] * width, dcell, r * width, width)
    rows = 0
    for t in range(sequence_bounds[tile[0], 2] - sequence_bounds[tile[0], 1] - 1, -1, -1):
        while (
            rows < members and sequence_bounds[tile[rows], 1] + t < sequence_bounds[tile[rows], 2]
        ):
            rows += 1
        for r in range(rows):
            b, first, end = sequence_bounds[tile[r]]
            at = end - 1 - t if reverse else first + t
            c_at, dh_at = b * c_sb + at * c_st, b * dh_sb + at * dh_st
            here, mine = r * row, r * width
            if t > 0:
                before_at = c_at + c_st if reverse else c_at - c_st
                _step_back(
                    s,
                    4 * c_at,
                    c,
                    c_at,
                    c,
                    before_at,
                    dh,
                    dh_at,
                    dp,
                    carry,
                    here,
                    dcell,
                    mine,
                    width,
                )
            else:
                before, before_at = initial_cell, tile[r] * width
                _step_back(
                    s,
                    4 * c_at,
                    c,
                    c_at,
                    before,
                    before_at,
                    dh,
                    dh_at,
                    dp,
                    carry,
                    here,
                    dcell,
                    mine,
                    width,
                )
            copy(dp, 4 * c_at, logits, r * 4 * width, 4 * width)
        add_panels(logits, 4 * width, panels, panel_width, carry, row, rows, 4 * width)
    for r in range(members):
        copy(carry, r * row, dinitial, tile[r] * width, width)
        copy(dcell, r * width, dinitial_cell, tile[r] * width, width)
