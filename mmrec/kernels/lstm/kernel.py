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

from mmrec.kernels._gates import load_part, one_minus, sigmoids, store_part, tanhs
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._recurrent import add_panels, copy, padded
from mmrec.kernels._simd import LANES, fma, zeros


@inline_jit
def _step(gates, at, state, cell, state_at, h, h_at, s, c, width):
    """One step of one sequence. gates holds p + U h_{t-1}; s and c are written unless empty."""
    for d in range(0, width, LANES):
        n = min(LANES, width - d)
        i = sigmoids(load_part(gates, at + d, n))
        f = sigmoids(load_part(gates, at + width + d, n))
        g = tanhs(load_part(gates, at + 2 * width + d, n))
        o = sigmoids(load_part(gates, at + 3 * width + d, n))
        c_t = fma(f, load_part(cell, state_at + d, n), i * g)
        h_t = o * tanhs(c_t)
        store_part(cell, state_at + d, n, c_t)
        store_part(state, state_at + d, n, h_t)
        store_part(h, h_at + d, n, h_t)
        if s.size > 0:
            store_part(c, h_at + d, n, c_t)
            store_part(s, 4 * h_at + d, n, i)
            store_part(s, 4 * h_at + width + d, n, f)
            store_part(s, 4 * h_at + 2 * width + d, n, g)
            store_part(s, 4 * h_at + 3 * width + d, n, o)


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
    row = padded(4 * width, panel_width)
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
        add_panels(
            state, 0, width, 1, panels, 0, panel_width, gates, 0, row, rows, width, 4 * width
        )
        for r in range(rows):
            b, first, end = sequence_bounds[tile[r]]
            at = end - 1 - t if reverse else first + t
            h_at = b * h_sb + at * h_st
            _step(gates, r * row, state, cell, r * width, h, h_at, s, c, width)
    for r in range(members):
        copy(state, r * width, final, tile[r] * width, width)
        copy(cell, r * width, final_cell, tile[r] * width, width)


@inline_jit
def _step_back(
    s, c, c_at, before, before_at, dh, dh_at, dp, carry, at, dcell, mine, dproduct, width
):
    """One step back of one sequence.

    carry holds u_t - dh_t before and 0 after, and dcell f_{t+1} w_{t+1} + dc_t before and
    f_t w_t after. dp has the places of s; dproduct is the same for all sequences side by side.
    """
    s_at, out_at = 4 * c_at, 4 * mine
    for d in range(0, width, LANES):
        n = min(LANES, width - d)
        i, f = load_part(s, s_at + d, n), load_part(s, s_at + width + d, n)
        g, o = load_part(s, s_at + 2 * width + d, n), load_part(s, s_at + 3 * width + d, n)
        uo = (load_part(dh, dh_at + d, n) + load_part(carry, at + d, n)) * o
        tanh_c = tanhs(load_part(c, c_at + d, n))
        w = load_part(dcell, mine + d, n) + uo * one_minus(tanh_c * tanh_c)
        do = uo * tanh_c * one_minus(o)
        wi, wf = w * i, w * f
        di = wi * g * one_minus(i)
        df = wf * load_part(before, before_at + d, n) * one_minus(f)
        dg = wi * one_minus(g * g)
        store_part(carry, at + d, n, zeros(c))
        store_part(dcell, mine + d, n, wf)
        store_part(dp, s_at + d, n, di)
        store_part(dp, s_at + width + d, n, df)
        store_part(dp, s_at + 2 * width + d, n, dg)
        store_part(dp, s_at + 3 * width + d, n, do)
        store_part(dproduct, out_at + d, n, di)
        store_part(dproduct, out_at + width + d, n, df)
        store_part(dproduct, out_at + 2 * width + d, n, dg)
        store_part(dproduct, out_at + 3 * width + d, n, do)


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
    row = padded(width, panel_width)
    tile = tiles[task]
    members = (tile >= 0).sum()
    carry = np.zeros(members * row, c.dtype)
    dcell = np.empty(members * width, c.dtype)
    dproduct = np.empty(members * 4 * width, c.dtype)
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
                before, before_at = c, c_at + c_st if reverse else c_at - c_st
            else:
                before, before_at = initial_cell, tile[r] * width
            _step_back(
                s,
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
                dproduct,
                width,
            )
        depth = 4 * width
        add_panels(dproduct, 0, depth, 1, panels, 0, panel_width, carry, 0, row, rows, depth, width)
    for r in range(members):
        copy(carry, r * row, dinitial, tile[r] * width, width)
        copy(dcell, r * width, dinitial_cell, tile[r] * width, width)
