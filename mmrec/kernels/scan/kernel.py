"""Numba kernels of the first-order scan. Arrays in, arrays out, no checks.

Axes: N sequences, T time, D channels. Inputs are flat with strides over batch row and time (see
``arrays.flat``); outputs are (B, T, D), contiguous; states (N, D). ``seqs`` (N, 3) holds the batch
row, first step and end of each sequence, so packed sequences and plain batches are one case. A task
is one sequence: tasks share nothing they write, and no result depends on the number of threads. (A
second thread on the other half of each row only makes both wait longer for memory.)

Adjoint of ``h_t = a_t h_{t-1} + b_t`` (conjugates matter to complex numbers only):

    g_t = dh_t + a*_{t+1} g_{t+1},  da_t = g_t h*_{t-1},  db_t = g_t,  dh0 = a*_1 g_1
"""

import numpy as np

from mmrec.kernels._launch import helper, kernel

NARROW = 32  # channels up to which four at a time are walked with their state in registers
TILE = 512  # steps that four channels are walked before the next four: the rows stay in cache


@kernel
def scan_fwd(s, a, a_sb, a_st, a_sd, b, b_sb, b_st, h0, h, ht, seqs, reverse):
    """Fill h and ht. ``a_sd`` is 1, or 0 for one coefficient a step. ``reverse`` walks from T."""
    n = h.shape[2]
    row, first, last = seqs[s, 0], seqs[s, 1], seqs[s, 2]
    same = np.empty(n if a_sd == 0 else 0, h.dtype)
    state = h0[s]
    t, step = (last - 1, -1) if reverse else (first, 1)
    at, bt = row * a_sb + t * a_st, row * b_sb + t * b_st
    for _ in range(last - first):
        if a_sd == 0:
            same[:] = a[at]
        a_t = same if a_sd == 0 else a[at : at + n]
        b_t, h_t = b[bt : bt + n], h[row, t]
        for d in range(n):
            h_t[d] = a_t[d] * state[d] + b_t[d]
        state = h_t  # the newest row is the state: nothing is written twice
        t, at, bt = t + step, at + step * a_st, bt + step * b_st
    ht[s] = state


@kernel
def scan_bwd(s, a, a_sb, a_st, a_sd, h0, h, dh, dh_sb, dh_st, dht, da, db, dh0, seqs, reverse):
    """Fill da, db and dh0; da is (B, T, D) also where the step has one coefficient."""
    n = h.shape[2]
    row, first, last = seqs[s, 0], seqs[s, 1], seqs[s, 2]
    same = np.empty(n if a_sd == 0 else 0, h.dtype)
    g = dht[s].copy()
    t, step = (first, 1) if reverse else (last - 1, -1)  # the way in which the adjoint walks
    at, ut = row * a_sb + t * a_st, row * dh_sb + t * dh_st
    for i in range(last - first - 1, -1, -1):
        if a_sd == 0:
            same[:] = a[at]
        a_t = same if a_sd == 0 else a[at : at + n]
        u_t = dh[ut : ut + n]
        before = h[row, t + step] if i > 0 else h0[s]
        da_t, db_t = da[row, t], db[row, t]
        for d in range(n):
            x = g[d] + u_t[d]
            db_t[d] = x
            da_t[d] = x * np.conj(before[d])
            g[d] = x * np.conj(a_t[d])
        t, at, ut = t + step, at + step * a_st, ut + step * dh_st
    dh0[s] = g


# Rows of few channels: four channels at a time keep their state in registers over many steps, where
# the row kernels above would spend their time on starting loops of a few elements.


@helper
def _wrapped(step):
    """A step that may be negative as an unsigned number: added to an index, it wraps round."""
    return np.int64(step).view(np.uint64)


@helper
def _four_fwd(a, i, a_step, sd, b, j, b_step, h, k, h_step, state, steps):
    """Walk four channels."""
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


@helper
def _four_bwd(a, i, a_step, sd, u, j, u_step, before, m, da, db, k, h_step, g, steps):
    """Adjoint of _four_fwd, with ``before`` at m the state ahead of the step at k."""
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


@kernel
def narrow_fwd(s, a, a_sb, a_st, a_sd, b, b_sb, b_st, h0, h, ht, seqs, reverse):
    """``scan_fwd`` for 4 to NARROW channels."""
    time, width = h.shape[1:]
    sign = -1 if reverse else 1
    row, first, last = seqs[s, 0], seqs[s, 1], seqs[s, 2]
    out, ends = h.reshape(-1), h0[s].copy()
    for i in range(0, last - first, TILE):
        t, steps = last - 1 - i if reverse else first + i, min(TILE, last - first - i)
        starts = ends.copy()
        for c in range(0, width, 4):
            d = min(c, width - 4)  # the last four may do some again, to the same numbers
            state = starts[d : d + 4].copy()
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
                state,
                steps,
            )
            ends[d : d + 4] = state
    ht[s] = ends


@kernel
def narrow_bwd(s, a, a_sb, a_st, a_sd, h0, h, dh, dh_sb, dh_st, dht, da, db, dh0, seqs, reverse):
    """``scan_bwd`` for 4 to NARROW channels."""
    time, width = h.shape[1:]
    sign = 1 if reverse else -1  # the way in which the adjoint walks
    row, first, last = seqs[s, 0], seqs[s, 1], seqs[s, 2]
    flat, da_flat, db_flat = h.reshape(-1), da.reshape(-1), db.reshape(-1)
    ends = dht[s].copy()
    for i in range(0, last - first, TILE):
        t, steps = first + i if reverse else last - 1 - i, min(TILE, last - first - i)
        rest = i + steps == last - first  # its last step looks at h0, not at h
        starts = ends.copy()
        for c in range(0, width, 4):
            d = min(c, width - 4)  # the last four may do some again, to the same numbers
            g = starts[d : d + 4].copy()
            for part in range(2 if rest else 1):
                many = 1 if part == 1 else steps - rest
                at = t + sign * (steps - 1) if part == 1 else t
                here = np.uint64((row * time + at) * width + d)
                if part == 1:
                    before, m = h0[s], np.uint64(d)
                else:
                    before, m = flat, here + _wrapped(sign * width)
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
                    g,
                    many,
                )
            ends[d : d + 4] = g
    dh0[s] = ends
