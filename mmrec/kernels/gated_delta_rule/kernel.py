"""Numba kernels of the associative memory. Arrays in, arrays out, no checks.

Axes: B batch, T time, H heads, P head width, W = P rounded up to whole vectors, C = CHUNK steps.
q, k, v are flat with strides over (B, T) and hold (H, P) at each step; decay and write hold (H).
Outputs are contiguous.

    k̂ = k (|k|² + ε)^-½, q̂ likewise, α = σ(decay), β = σ(write)
    e_t = β_t (v_t - α_t S_{t-1}ᵀ k̂_t)      S_t = α_t S_{t-1} + k̂_t e_tᵀ      o_t = S_tᵀ q̂_t

Forward goes step by step, so that cutting a sequence anywhere changes no bit. One pass over the
state writes the step before and reads for this one; o_t = α_t S_{t-1}ᵀ q̂_t + e_t (k̂_t · q̂_t)
needs no other. Columns of S never meet, so the pass takes LANES of them at a time.

Backward goes a chunk at a time, in small products. With S the state before the chunk, A the
gradient of the state after it, Γ_ts = α_{s+1} … α_t for s <= t, g_t = α_1 Γ_t1, h_t = Γ_Ct and
s < t throughout:

    L_ts = β_t Γ_ts k̂_t·k̂_s, L_tt = 1     e = L⁻¹ (β_t (v_t - g_t Sᵀ k̂_t))
    de = L⁻ᵀ (h_t Aᵀ k̂_t + Σ_{i>=t} Γ_it (q̂_i·k̂_t) do_i)     dv = β de     dβ = de · e / β
    dq̂_t = g_t S do_t + Σ_{s<=t} Γ_ts (e_s·do_t) k̂_s
    dk̂_t = h_t A e_t - g_t S dv_t + Σ_{i>=t} Γ_it (do_i·e_t) q̂_i
           - Σ_{s<t} Γ_ts (e_s·dv_t) k̂_s - Σ_{i>t} Γ_it (dv_i·e_t) k̂_i
    A <- g_C A + Σ_t g_t (q̂_t do_tᵀ - k̂_t dv_tᵀ)

and with x_t = <gradient of S_t from later steps, S_t>, a sum that scaling shows to be
x_{t-1} = x_t + q̂_t·dq̂_t - v_t·dv_t, the gradient of log α_t is x_{t-1}. Each chunk starts that
sum anew from <A, S>, so that its rounding does not grow with T.

Most arrays hold (W, C), one step in each lane, so that products, norms and gates of all steps of a
chunk go side by side (see tile.py); those named rows hold (C, W).
A task is one head of one sequence; heads never meet, so tasks share nothing they write.

Source of the chunk form: Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the
Delta Rule over Sequence Length" (2024, arXiv:2406.06484), section 3; the adjoint is our own.
"""

import numpy as np

from mmrec.kernels._launch import helper, kernel
from mmrec.kernels._simd import LANES, fma, load, spread, store, transpose, zeros
from mmrec.kernels.gated_delta_rule import tile
from mmrec.kernels.gated_delta_rule.tile import CHUNK


@helper
def _steps(state, width, keys, queries, alpha, beta, match, v, steps, one, o):
    """Walk the steps of one chunk over the state (W, W); o (C, W) from v (C, W).

    keys, queries (W, C) normalised, match (C) their dot products, one (C) ones.
    """
    for j in range(0, width, LANES):
        # what the step before has left to write; nothing in the first turn
        scale, error = load(one, 0), zeros(state)
        for t in range(steps + 1):  # the last turn only writes
            before, now = max(t - 1, 0), min(t, CHUNK - 1)
            r0, r1, p0, p1 = zeros(state), zeros(state), zeros(state), zeros(state)
            for i in range(0, width, 2):
                at, lane = i * width + j, i * LANES
                s0 = fma(spread(keys, lane + before), error, load(state, at) * scale)
                s1 = fma(
                    spread(keys, lane + LANES + before), error, load(state, at + width) * scale
                )
                store(state, at, s0)
                store(state, at + width, s1)
                r0 = fma(spread(keys, lane + now), s0, r0)
                r1 = fma(spread(keys, lane + LANES + now), s1, r1)
                p0 = fma(spread(queries, lane + now), s0, p0)
                p1 = fma(spread(queries, lane + LANES + now), s1, p1)
            scale = spread(alpha, now)
            error = (load(v, now * width + j) - scale * (r0 + r1)) * spread(beta, now)
            if t < steps:
                store(o, t * width + j, fma(scale, p0 + p1, error * spread(match, now)))


@kernel
def memory_fwd(
    task,
    pieces,
    first,
    q,
    q_sb,
    q_st,
    k,
    k_sb,
    k_st,
    v,
    v_sb,
    v_st,
    a,
    a_sb,
    a_st,
    b,
    b_sb,
    b_st,
    state,
    out,
    kept,
):
    """Fill out (B, T, H, P); state (N, H, P, P) goes from S_0 to S_T.

    pieces (N, 3) are the sequences; kept (chunks, H, P, P) receives the state before each chunk,
    those of sequence n from first[n] on, unless it is empty.
    """
    time, heads, size = out.shape[1:]
    width = (size + LANES - 1) // LANES * LANES
    block = size * size
    states, keeps, outs = state.reshape(-1), kept.reshape(-1), out.reshape(-1)
    n, head = task // heads, task % heads
    row, begin, end = pieces[n, 0], pieces[n, 1], pieces[n, 2]
    lo, step = head * size, heads * size
    s = np.empty(width * width, out.dtype)
    rows, o = np.empty(CHUNK * width, out.dtype), np.empty(CHUNK * width, out.dtype)
    kt, qt = np.empty(width * CHUNK, out.dtype), np.empty(width * CHUNK, out.dtype)
    alpha, beta = np.empty(CHUNK, out.dtype), np.empty(CHUNK, out.dtype)
    match, factor = np.empty(CHUNK, out.dtype), np.empty(CHUNK, out.dtype)
    one = np.ones(CHUNK, out.dtype)
    tile.enter(states, task * block, size, size, size, s, width)
    for t in range(begin, end, CHUNK):
        steps = min(CHUNK, end - t)
        if keeps.shape[0] > 0:
            chunk = first[n] + (t - begin) // CHUNK
            tile.copy(s, 0, width, keeps, (chunk * heads + head) * block, size, size, size)
        tile.enter(k, row * k_sb + t * k_st + lo, k_st, steps, size, rows, width)
        tile.to_columns(rows, kt, width)
        tile.normalise(kt, width, factor)
        tile.enter(q, row * q_sb + t * q_st + lo, q_st, steps, size, rows, width)
        tile.to_columns(rows, qt, width)
        tile.normalise(qt, width, factor)
        tile.dot(kt, qt, width, match)
        tile.gates(a, row * a_sb + t * a_st + head, a_st, steps, 1, alpha)
        tile.gates(b, row * b_sb + t * b_st + head, b_st, steps, 0, beta)
        tile.enter(v, row * v_sb + t * v_st + lo, v_st, steps, size, rows, width)
        _steps(s, width, kt, qt, alpha, beta, match, rows, steps, one, o)
        tile.copy(o, 0, width, outs, (row * time + t) * step + lo, step, steps, size)
    tile.copy(s, 0, width, states, task * block, size, size, size)


@helper
def _spans(alpha, unit, later, earlier):
    """later[s, t] = Γ_ts for t >= s, else 0; earlier is its transpose; unit the identity (C, C)."""
    last = CHUNK - 1
    line, down = load(unit, last * CHUNK), load(unit, 0)
    store(later, last * CHUNK, line)
    store(earlier, 0, down)
    for t in range(1, CHUNK):
        down = fma(spread(alpha, t), down, load(unit, t * CHUNK))
        store(earlier, t * CHUNK, down)
        s = last - t
        line = fma(spread(alpha, s + 1), line, load(unit, s * CHUNK))
        store(later, s * CHUNK, line)


@helper
def _solver(spans, beta, unit, inverse):
    """inverse[t, s] of L, whose entries below the diagonal are β_t spans[s, t]."""
    for t in range(CHUNK):
        line, by = load(unit, t * CHUNK), spread(beta, t)
        for s in range(t):
            line = line - by * spread(spans, s * CHUNK + t) * load(inverse, s * CHUNK)
        store(inverse, t * CHUNK, line)


@kernel
def memory_bwd(
    task,
    pieces,
    first,
    q,
    q_sb,
    q_st,
    k,
    k_sb,
    k_st,
    v,
    v_sb,
    v_st,
    a,
    a_sb,
    a_st,
    b,
    b_sb,
    b_st,
    kept,
    do,
    do_sb,
    do_st,
    adjoint,
    dq,
    dk,
    dv,
    da,
    db,
):
    """Fill dq, dk, dv (B, T, H, P), da, db (B, T, H); adjoint (N, H, P, P): from dS_T to dS_0."""
    time, heads, size = dq.shape[1:]
    width = (size + LANES - 1) // LANES * LANES
    block, kind, square = size * size, dq.dtype, CHUNK * CHUNK
    adjoints, keeps = adjoint.reshape(-1), kept.reshape(-1)
    dqs, dks, dvs = dq.reshape(-1), dk.reshape(-1), dv.reshape(-1)
    unit, past = np.zeros(square, kind), np.zeros(square, kind)  # identity; -1 where s < t
    for i in range(CHUNK):
        unit[i * CHUNK + i] = 1
        for j in range(i + 1, CHUNK):
            past[i * CHUNK + j] = -1
    n, head = task // heads, task % heads
    row, begin, end = pieces[n, 0], pieces[n, 1], pieces[n, 2]
    lo, step = head * size, heads * size
    s, grad = np.empty(width * width, kind), np.empty(width * width, kind)
    # columns (W, C), and rows (C, W)
    kt, qt = np.empty(width * CHUNK, kind), np.empty(width * CHUNK, kind)
    vt, ot = np.empty(width * CHUNK, kind), np.empty(width * CHUNK, kind)
    et, dvt = np.empty(width * CHUNK, kind), np.empty(width * CHUNK, kind)
    sum_t, by = np.empty(width * CHUNK, kind), np.empty(width * CHUNK, kind)
    rows, dorows = np.empty(CHUNK * width, kind), np.empty(CHUNK * width, kind)
    # a number for each step, and one for each pair of steps
    alpha, beta = np.empty(CHUNK, kind), np.empty(CHUNK, kind)
    decayed, remain = np.empty(CHUNK, kind), np.empty(CHUNK, kind)  # g, h
    minus, dots = np.empty(CHUNK, kind), np.empty(CHUNK, kind)
    k_factor, q_factor = np.empty(CHUNK, kind), np.empty(CHUNK, kind)
    moved = np.empty(CHUNK, kind)  # what x moves by in each step
    later, earlier = np.empty(square, kind), np.empty(square, kind)
    pairs, turned = np.empty(square, kind), np.empty(square, kind)
    inverse = np.empty(square, kind)
    tile.enter(adjoints, task * block, size, size, size, grad, width)
    for chunk in range((end - begin + CHUNK - 1) // CHUNK - 1, -1, -1):
        t = begin + chunk * CHUNK
        steps = min(CHUNK, end - t)
        tile.enter(k, row * k_sb + t * k_st + lo, k_st, steps, size, rows, width)
        tile.to_columns(rows, kt, width)
        tile.normalise(kt, width, k_factor)
        tile.enter(q, row * q_sb + t * q_st + lo, q_st, steps, size, rows, width)
        tile.to_columns(rows, qt, width)
        tile.normalise(qt, width, q_factor)
        tile.enter(v, row * v_sb + t * v_st + lo, v_st, steps, size, rows, width)
        tile.to_columns(rows, vt, width)
        tile.enter(do, row * do_sb + t * do_st + lo, do_st, steps, size, dorows, width)
        tile.to_columns(dorows, ot, width)
        tile.gates(a, row * a_sb + t * a_st + head, a_st, steps, 1, alpha)
        tile.gates(b, row * b_sb + t * b_st + head, b_st, steps, 0, beta)
        place = ((first[n] + chunk) * heads + head) * block
        tile.enter(keeps, place, size, size, size, s, width)
        place = (row * time + t) * step + lo
        _spans(alpha, unit, later, earlier)
        for i in range(CHUNK):
            decayed[i] = alpha[0] * later[i]
            minus[i] = -decayed[i]
            remain[i] = earlier[square - CHUNK + i]

        # errors e
        tile.gram(kt, kt, later, width, pairs)
        _solver(pairs, beta, unit, inverse)
        sum_t[:] = 0
        tile.product(s, 1, width, kt, 0, CHUNK, width, width, sum_t, 0, CHUNK)
        off, scale = load(decayed, 0), load(beta, 0)
        for i in range(0, width * CHUNK, LANES):
            store(sum_t, i, (load(vt, i) - off * load(sum_t, i)) * scale)
        transpose(inverse, 0, CHUNK, turned, 0, CHUNK)
        et[:] = 0
        tile.product(sum_t, CHUNK, 1, turned, 0, CHUNK, width, CHUNK, et, 0, CHUNK)

        # de, then dv and dβ
        tile.scale(kt, remain, width, by)
        sum_t[:] = 0
        tile.product(grad, 1, width, by, 0, CHUNK, width, width, sum_t, 0, CHUNK)
        tile.gram(qt, kt, earlier, width, pairs)
        tile.product(ot, CHUNK, 1, pairs, 0, CHUNK, width, CHUNK, sum_t, 0, CHUNK)
        dvt[:] = 0
        tile.product(sum_t, CHUNK, 1, inverse, 0, CHUNK, width, CHUNK, dvt, 0, CHUNK)
        tile.dot(et, dvt, width, dots)
        for i in range(steps):
            db[row, t + i, head] = dots[i] * (1 - beta[i])
        tile.scale(dvt, beta, width, dvt)
        tile.dot(vt, dvt, width, moved)

        # dq̂
        sum_t[:] = 0
        tile.scale(ot, decayed, width, by)
        tile.product(s, width, 1, by, 0, CHUNK, width, width, sum_t, 0, CHUNK)
        tile.gram(et, ot, later, width, pairs)
        tile.product(kt, CHUNK, 1, pairs, 0, CHUNK, width, CHUNK, sum_t, 0, CHUNK)
        tile.dot(qt, sum_t, width, dots)
        store(moved, 0, load(dots, 0) - load(moved, 0))
        tile.pull_normalise(qt, q_factor, width, sum_t, dots)
        tile.to_rows(sum_t, rows, width)
        tile.copy(rows, 0, width, dqs, place, step, steps, size)

        # dk̂; pairs still hold Γ_ts e_s·do_t
        transpose(pairs, 0, CHUNK, turned, 0, CHUNK)
        sum_t[:] = 0
        tile.product(qt, CHUNK, 1, turned, 0, CHUNK, width, CHUNK, sum_t, 0, CHUNK)
        tile.gram(et, dvt, later, width, pairs)
        for i in range(0, square, LANES):
            store(pairs, i, load(pairs, i) * load(past, i))
        transpose(pairs, 0, CHUNK, turned, 0, CHUNK)
        for i in range(0, square, LANES):
            store(turned, i, load(turned, i) + load(pairs, i))
        tile.product(kt, CHUNK, 1, turned, 0, CHUNK, width, CHUNK, sum_t, 0, CHUNK)
        tile.scale(et, remain, width, by)
        tile.product(grad, width, 1, by, 0, CHUNK, width, width, sum_t, 0, CHUNK)
        tile.scale(dvt, minus, width, by)
        tile.product(s, width, 1, by, 0, CHUNK, width, width, sum_t, 0, CHUNK)
        tile.pull_normalise(kt, k_factor, width, sum_t, dots)
        tile.to_rows(sum_t, rows, width)
        tile.copy(rows, 0, width, dks, place, step, steps, size)

        # A, and <A, S> for dα
        tile.to_rows(dvt, rows, width)
        tile.copy(rows, 0, width, dvs, place, step, steps, size)
        tile.scale(qt, decayed, width, qt)
        tile.scale(kt, minus, width, kt)
        keep, total = spread(decayed, CHUNK - 1), zeros(s)
        for j in range(0, width, LANES):
            for i in range(width):
                store(grad, i * width + j, load(grad, i * width + j) * keep)
            tile.product(qt, CHUNK, 1, dorows, j, width, width, CHUNK, grad, j, width)
            tile.product(kt, CHUNK, 1, rows, j, width, width, CHUNK, grad, j, width)
            for i in range(width):
                total = fma(load(grad, i * width + j), load(s, i * width + j), total)
        store(dots, 0, total)
        x = dots[0]
        for i in range(1, CHUNK):
            x += dots[i]
        for i in range(steps):
            da[row, t + i, head] = x * (1 - alpha[i])
            x -= moved[i]
    tile.copy(grad, 0, width, adjoints, task * block, size, size, size)
