"""Numba kernels of the first-order scan. Arrays in, arrays out, no checks.

No preset of the model uses the scan: a reader of the model may skip this folder.

Axes: N sequences, T time, D channels. Inputs are flat; ``x_sb`` and ``x_st`` are the strides of an
input x over batch row and time. Outputs are (B, T, D), contiguous; states are (N, D). A row n of
``sequence_bounds`` (N, 3) holds the batch row, first step and end of sequence n.

    h_t = a_t h_{t-1} + b_t

Adjoint, with g_t the gradient of h_t (the conjugates matter to complex numbers only):

    g_t = dh_t + a*_{t+1} g_{t+1},  da_t = g_t h*_{t-1},  db_t = g_t,  dh_0 = a*_1 g_1

A task is one sequence. Tasks share nothing that they write, so no result depends on the number of
threads. (Splitting the channels of a sequence over threads gains nothing: memory is the limit.)
"""

import numpy as np

from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel

MAX_NARROW = 32
"""Channels up to which four at a time are scanned with their state in registers."""
TILE = 512
"""Steps that four channels are scanned over before the next four: the rows stay in cache."""


@parallel_kernel
def scan_fwd(s, a, a_sb, a_st, a_sd, b, b_sb, b_st, initial, h, final, sequence_bounds, reverse):
    """Fill h and final (N, D).

    ``a_sd`` is 1, or 0 if a step has one coefficient for all channels. ``reverse`` scans from the
    last step to the first.
    """
    n = h.shape[2]
    row, first, last = sequence_bounds[s, 0], sequence_bounds[s, 1], sequence_bounds[s, 2]
    a_row = np.empty(n if a_sd == 0 else 0, h.dtype)
    state = initial[s]
    t, step = (last - 1, -1) if reverse else (first, 1)
    at, bt = row * a_sb + t * a_st, row * b_sb + t * b_st
    for _ in range(last - first):
        if a_sd == 0:
            a_row[:] = a[at]
        a_t = a_row if a_sd == 0 else a[at : at + n]
        b_t, h_t = b[bt : bt + n], h[row, t]
        for d in range(n):
            h_t[d] = a_t[d] * state[d] + b_t[d]
        state = h_t  # a view: the state is not written a second time
        t, at, bt = t + step, at + step * a_st, bt + step * b_st
    final[s] = state


@parallel_kernel
def scan_bwd(
    s,
    a,
    a_sb,
    a_st,
    a_sd,
    initial,
    h,
    dh,
    dh_sb,
    dh_st,
    dfinal,
    da,
    db,
    dinitial,
    sequence_bounds,
    reverse,
):
    """Fill da, db (B, T, D) and dinitial (N, D); da has D channels also if ``a_sd`` is 0."""
    n = h.shape[2]
    row, first, last = sequence_bounds[s, 0], sequence_bounds[s, 1], sequence_bounds[s, 2]
    a_row = np.empty(n if a_sd == 0 else 0, h.dtype)
    g = dfinal[s].copy()
    t, step = (first, 1) if reverse else (last - 1, -1)  # the adjoint runs against the scan
    at, ut = row * a_sb + t * a_st, row * dh_sb + t * dh_st
    for i in range(last - first - 1, -1, -1):
        if a_sd == 0:
            a_row[:] = a[at]
        a_t = a_row if a_sd == 0 else a[at : at + n]
        u_t = dh[ut : ut + n]
        before = h[row, t + step] if i > 0 else initial[s]
        da_t, db_t = da[row, t], db[row, t]
        for d in range(n):
            x = g[d] + u_t[d]
            db_t[d] = x
            da_t[d] = x * np.conj(before[d])
            g[d] = x * np.conj(a_t[d])
        t, at, ut = t + step, at + step * a_st, ut + step * dh_st
    dinitial[s] = g


# For rows of few channels, the kernels above would spend their time on starting short loops. The
# kernels below keep the state of four channels in registers over many steps.


@inline_jit
def _wrapped(step):
    """A step that may be negative as uint64. Added to an index it wraps around to the right sum."""
    return np.int64(step).view(np.uint64)


@inline_jit
def _four_fwd(a, i, a_step, sd, b, j, b_step, h, k, h_step, state, steps):
    """Scan four channels over some steps; the indices i, j, k move by a_step, b_step, h_step."""
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    s0, s1, s2, s3 = state[0], state[1], state[2], state[3]
    for _ in range(steps):
        s0 = a[i] * s0 + b[j]
        s1 = a[i + sd] * s1 + b[j + one]
        s2 = a[i + two * sd] * s2 + b[j + two]
        s3 = a[i + three * sd] * s3 + b[j + three]
        h[k], h[k + one], h[k + two], h[k + three] = s0, s1, s2, s3
        i, j, k = i + a_step, j + b_step, k + h_step
    state[0], state[1], state[2], state[3] = s0, s1, s2, s3


@inline_jit
def _four_bwd(a, i, a_step, sd, u, j, u_step, before, m, da, db, k, h_step, g, steps):
    """Adjoint of _four_fwd. before[m] is the state before the step at k."""
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    g0, g1, g2, g3 = g[0], g[1], g[2], g[3]
    for _ in range(steps):
        g0, g1, g2, g3 = g0 + u[j], g1 + u[j + one], g2 + u[j + two], g3 + u[j + three]
        db[k], db[k + one], db[k + two], db[k + three] = g0, g1, g2, g3
        da[k], da[k + one] = g0 * np.conj(before[m]), g1 * np.conj(before[m + one])
        da[k + two] = g2 * np.conj(before[m + two])
        da[k + three] = g3 * np.conj(before[m + three])
        g0, g1 = g0 * np.conj(a[i]), g1 * np.conj(a[i + sd])
        g2, g3 = g2 * np.conj(a[i + two * sd]), g3 * np.conj(a[i + three * sd])
        i, j, k, m = i + a_step, j + u_step, k + h_step, m + h_step
    g[0], g[1], g[2], g[3] = g0, g1, g2, g3


@parallel_kernel
def scan_narrow_fwd(
    s, a, a_sb, a_st, a_sd, b, b_sb, b_st, initial, h, final, sequence_bounds, reverse
):
    """``scan_fwd`` for 4 to MAX_NARROW channels."""
    time, width = h.shape[1:]
    sign = -1 if reverse else 1
    row, first, last = sequence_bounds[s, 0], sequence_bounds[s, 1], sequence_bounds[s, 2]
    out, states = h.reshape(-1), initial[s].copy()
    for i in range(0, last - first, TILE):
        t, steps = last - 1 - i if reverse else first + i, min(TILE, last - first - i)
        begin = states.copy()
        for c in range(0, width, 4):
            d = min(c, width - 4)  # the last four may overlap those before, with equal results
            four = begin[d : d + 4].copy()
            _four_fwd(
                a,
                np.uint64(row * a_sb + t * a_st + d * a_sd),
                _wrapped(sign * a_st),
                np.uint64(a_sd),
                b,
                np.uint64(row * b_sb + t * b_st + d),
                _wrapped(sign * b_st),
                out,
                np.uint64((row * time + t) * width + d),
                _wrapped(sign * width),
                four,
                steps,
            )
            states[d : d + 4] = four
    final[s] = states


@parallel_kernel
def scan_narrow_bwd(
    s,
    a,
    a_sb,
    a_st,
    a_sd,
    initial,
    h,
    dh,
    dh_sb,
    dh_st,
    dfinal,
    da,
    db,
    dinitial,
    sequence_bounds,
    reverse,
):
    """``scan_bwd`` for 4 to MAX_NARROW channels."""
    time, width = h.shape[1:]
    sign = 1 if reverse else -1  # the adjoint runs against the scan
    row, first, last = sequence_bounds[s, 0], sequence_bounds[s, 1], sequence_bounds[s, 2]
    h_flat, da_flat, db_flat = h.reshape(-1), da.reshape(-1), db.reshape(-1)
    grads = dfinal[s].copy()
    for i in range(0, last - first, TILE):
        t, steps = first + i if reverse else last - 1 - i, min(TILE, last - first - i)
        at_edge = i + steps == last - first  # the last of these steps reads initial, not h
        begin = grads.copy()
        for c in range(0, width, 4):
            d = min(c, width - 4)  # the last four may overlap those before, with equal results
            four = begin[d : d + 4].copy()
            for phase in range(2 if at_edge else 1):  # phase 1 is the step at the edge
                count = 1 if phase == 1 else steps - at_edge
                at = t + sign * (steps - 1) if phase == 1 else t
                here = np.uint64((row * time + at) * width + d)
                if phase == 1:
                    before, m = initial[s], np.uint64(d)
                else:
                    before, m = h_flat, here + _wrapped(sign * width)
                _four_bwd(
                    a,
                    np.uint64(row * a_sb + at * a_st + d * a_sd),
                    _wrapped(sign * a_st),
                    np.uint64(a_sd),
                    dh,
                    np.uint64(row * dh_sb + at * dh_st + d),
                    _wrapped(sign * dh_st),
                    before,
                    m,
                    da_flat,
                    db_flat,
                    here,
                    _wrapped(sign * width),
                    four,
                    count,
                )
            grads[d : d + 4] = four
    dinitial[s] = grads
