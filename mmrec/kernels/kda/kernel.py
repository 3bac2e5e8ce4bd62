"""Numba kernels of linear attention with decay, with or without delta rule. No checks.

Axes: B batch, T time, H key heads, J value heads, K and V head widths, N sequences, C = CHUNK
steps. Inputs are flat with strides (``q_sb``, ``q_st``, …) over batch row and time. At each step
q, k hold (H, K), v (J, V), the log decays g (J, K) or (J, 1), and β (J), or nothing. Value head j
reads key head j // (J / H). Outputs are contiguous. A row n of ``sequence_bounds`` (N, 3) holds the
batch row, first step and end of sequence n.

    S_t = diag(α_t) S_{t-1} + k_t e_tᵀ      o_t = scale S_tᵀ q_t      α_t = exp(g_t)

where e_t = v_t without delta rule (gla), and e_t = β_t (v_t - (α_t S_{t-1})ᵀ k_t) with it (kda).

Both passes go chunk by chunk, in small matrix products. S is the state before the chunk, R the
gradient of the state after it. With Γ_ts = α_{s+1} ⊙ … ⊙ α_t for s <= t, g_t = α_1 ⊙ Γ_t1 and
h_t = Γ_Ct, all of them vectors over K:

    A_ts = Σ q_t Γ_ts k_s (s <= t)      M_ts = Σ k_t Γ_ts k_s (s < t)
    e_t = β_t (v_t - Sᵀ(g_t k_t) - Σ_{s<t} M_ts e_s)      o_t = scale (Sᵀ(g_t q_t) + Σ_s A_ts e_s)
    S <- diag(g_C) S + Σ_s (h_s k_s) e_sᵀ

Decays are products of the α between two steps, made step by step and never divided, so that no
decay is too strong: it becomes zero. With do scaled, the adjoint is

    de_s = Rᵀ(h_s k_s) + Σ_{t>=s} A_ts do_t - Σ_{t>s} M_ts dv_t      dv = β de      dβ = de · e / β
    dq_t = g_t (S do_t) + Σ_{s<=t} (do_t·e_s) Γ_ts k_s
    a_s = h_s (R e_s) + Σ_{t>=s} (do_t·e_s) Γ_ts q_t - Σ_{t>s} (dv_t·e_s) Γ_ts k_t
    b_t = g_t (S dv_t) + Σ_{s<t} (dv_t·e_s) Γ_ts k_s      dk = a - b
    R <- diag(g_C) R + Σ_t (g_t q_t) do_tᵀ - (g_t k_t) dv_tᵀ

Without delta rule dv = de, and M and b are zero. Let x_t be the row sums of <gradient of S_t from
later steps, S_t>. Scaling the rows of S shows that x_{t-1} = x_t + q_t dq_t - k_t (a_t + b_t), and
that the gradient of g_t is x_{t-1}. Each chunk starts this sum anew from <R, S>, so that its
rounding does not grow with T.

For the backward pass the state before each block of BLOCK chunks is kept; the states inside of a
block are computed again.

States lie in panels of LANES values: (V / LANES, K, LANES). A panel fits the cache, and columns of
S are independent, so a chunk is computed one panel after the other. Widths are rounded up to whole
vectors: ``width`` for K and ``columns`` for V. Arrays "of rows" hold (C, width), arrays "of lanes"
hold (width, C). All scratch arrays are flat. A task is one value head of one sequence. Heads are
independent, so tasks share nothing that they write.

Sources of the chunked form: Yang, Wang, Shen, Panda, Kim 2023, "Gated Linear Attention Transformers
with Hardware-Efficient Training" (arXiv:2312.06635), section 4; Kimi Team 2025, "Kimi Linear"
(arXiv:2510.26692), section 3. The adjoint is our own.
"""

import numpy as np

from mmrec.kernels._bf16 import from_bf16, to_bf16
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import cdiv, exp_nonpositive
from mmrec.kernels._simd import LANES, fma, load, splat, store, transpose, zeros
from mmrec.kernels._tiles import add_product, scale_add_product, store_product

CHUNK = LANES
"""Steps in a chunk: one per lane of a vector."""
BLOCK = 4
"""Chunks between two states that are kept for the backward pass."""
EPSILON = 1e-6  # added to |k|² and |q|²
SQUARE = CHUNK * CHUNK


@inline_jit
def _load_rows(source, at, step, count, size, factor, rows, width):
    """rows (C, W) = factor times ``count`` rows of ``size`` numbers, zero beyond."""
    if count < CHUNK or size < width:
        rows[:] = 0
    for i in range(count):
        here, there = np.uint64(at + i * step), np.uint64(i * width)
        for j in range(np.uint64(size)):
            rows[there + j] = factor * from_bf16(source[here + j])


@inline_jit
def _write_rows(rows, width, factor, target, to, stride, count, size):
    """Write factor times the first ``count`` rows and ``size`` columns of rows (C, W)."""
    for i in range(count):
        here, there = np.uint64(i * width), np.uint64(to + i * stride)
        for j in range(np.uint64(size)):
            target[there + j] = to_bf16(factor * rows[here + j], target)


@inline_jit
def _load_decays(g, at, step, count, size, alpha, width):
    """alpha (C, W) = exp(g) for ``count`` rows of ``size`` numbers, one beyond."""
    if count < CHUNK or size < width:
        alpha[:] = 1
    for i in range(count):
        here, there = np.uint64(at + i * step), np.uint64(i * width)
        for j in range(np.uint64(size)):
            alpha[there + j] = exp_nonpositive(g[here + j])


@inline_jit
def _load_state(state, at, size, values, panels, width):
    """panels (…, W, LANES) = a matrix (size, values), padded with zeros."""
    panels[:] = 0
    for i in range(size):
        for j in range(0, values, LANES):
            here, there = np.uint64(at + i * values + j), np.uint64(j * width + i * LANES)
            for lane in range(np.uint64(min(LANES, values - j))):
                panels[there + lane] = state[here + lane]


@inline_jit
def _write_state(panels, width, state, at, size, values):
    """Adjoint of _load_state."""
    for i in range(size):
        for j in range(0, values, LANES):
            here, there = np.uint64(j * width + i * LANES), np.uint64(at + i * values + j)
            for lane in range(np.uint64(min(LANES, values - j))):
                state[there + lane] = panels[here + lane]


@inline_jit
def _copy(source, at, target, to, count):
    """Copy ``count`` numbers, a multiple of LANES."""
    for i in range(0, count, LANES):
        store(target, to + i, load(source, at + i))


@inline_jit
def _to_lanes(rows, lanes, width):
    """Transpose (C, W) to (W, C)."""
    for j in range(0, width, LANES):
        transpose(rows, j, width, lanes, j * CHUNK, CHUNK)


@inline_jit
def _to_rows(lanes, rows, width):
    """Transpose (W, C) to (C, W)."""
    for j in range(0, width, LANES):
        transpose(lanes, j * CHUNK, CHUNK, rows, j, width)


@inline_jit
def _add_lanes(partial, at, square, out, out_at):
    """out (LANES) = the sum of each of LANES rows of LANES numbers."""
    transpose(partial, at, LANES, square, 0, LANES)
    total = load(square, 0)
    for i in range(1, LANES):
        total = total + load(square, i * LANES)
    store(out, out_at, total)


@inline_jit
def _row_dots(x, y, width, partial, square, out):
    """out (C) = dot products of the rows of x and y, both (C, W)."""
    for t in range(CHUNK):
        total = zeros(x)
        for j in range(t * width, (t + 1) * width, LANES):
            total = fma(load(x, j), load(y, j), total)
        store(partial, t * LANES, total)
    _add_lanes(partial, 0, square, out, 0)


@inline_jit
def _scale_rows(x, factor, width):
    """Multiply row t of x (C, W) by factor[t]."""
    for t in range(CHUNK):
        by = splat(factor, t)
        for j in range(t * width, (t + 1) * width, LANES):
            store(x, j, load(x, j) * by)


@inline_jit
def _normalise(rows, width, factor, partial, square):
    """Divide each row by its norm; factor (C) receives 1 / norm."""
    _row_dots(rows, rows, width, partial, square, factor)
    one = factor.dtype.type(1)
    for t in range(CHUNK):
        factor[t] = one / np.sqrt(factor[t] + factor.dtype.type(EPSILON))
    _scale_rows(rows, factor, width)


@inline_jit
def _normalise_adjoint(unit, factor, width, dunit, dots, partial, square):
    """Adjoint of _normalise: dunit becomes factor (dunit - unit (unit · dunit))."""
    _row_dots(unit, dunit, width, partial, square, dots)
    for t in range(CHUNK):
        by, off = splat(factor, t), splat(dots, t)
        for j in range(t * width, (t + 1) * width, LANES):
            store(dunit, j, (load(dunit, j) - load(unit, j) * off) * by)


@inline_jit
def _weigh(q, k, alpha, width, steps, delta, identity, reads, writes, scores, recall, gamma):
    """The part of a chunk that does not depend on values, for a decay per key channel.

    Args:
        q, k, alpha: rows (C, W).
        reads: rows (2 C, W), g_t k_t, then g_t q_t.
        writes: lanes (W, C), h_s k_s.
        identity: (C, C).
        scores, recall: (C, C), A and -M.
        gamma: (W), g_C.
    """
    gamma[:] = 1
    writes[:] = 0
    if steps < CHUNK:
        reads[:] = 0
        scores[:] = 0
        recall[:] = 0
    for t in range(steps):
        row = t * width
        for j in range(0, width, LANES):
            decay = load(gamma, j) * load(alpha, row + j)
            store(gamma, j, decay)
            store(reads, CHUNK * width + row + j, load(q, row + j) * decay)
            if delta:
                store(reads, row + j, load(k, row + j) * decay)
        a0, a1, m0, m1, this = zeros(q), zeros(q), zeros(q), zeros(q), load(identity, t * CHUNK)
        for c in range(0, width, 2):
            at, lanes = row + c, c * CHUNK
            k0, k1 = splat(k, at), splat(k, at + 1)
            w0 = fma(k0, this, load(writes, lanes) * splat(alpha, at))
            w1 = fma(k1, this, load(writes, lanes + CHUNK) * splat(alpha, at + 1))
            store(writes, lanes, w0)
            store(writes, lanes + CHUNK, w1)
            a0 = fma(splat(q, at), w0, a0)
            a1 = fma(splat(q, at + 1), w1, a1)
            if delta:
                m0 = fma(k0, w0, m0)
                m1 = fma(k1, w1, m1)
        store(scores, t * CHUNK, a0 + a1)
        store(recall, t * CHUNK, zeros(q) - (m0 + m1))
        recall[t * CHUNK + t] = 0


@inline_jit
def _decays_between(alpha, decays):
    """decays (C, C) = Γ_ts at [t, s] for s <= t, else 0, for one decay per step."""
    decays[:] = 0
    decays[0] = 1
    for t in range(1, CHUNK):
        for s in range(t):
            decays[t * CHUNK + s] = alpha[t] * decays[(t - 1) * CHUNK + s]
        decays[t * CHUNK + t] = 1


@inline_jit
def _weigh_by_step(
    q, k, alpha, width, delta, decays, from_start, reads, writes, scores, recall, gamma
):
    """As _weigh, for one decay per step: alpha (C). decays and from_start (g) are filled too."""
    _decays_between(alpha, decays)
    for t in range(CHUNK):
        from_start[t] = alpha[0] * decays[t * CHUNK]
    gamma[:] = from_start[CHUNK - 1]
    _to_lanes(k, writes, width)
    store_product(q, 0, width, 1, writes, 0, CHUNK, scores, 0, CHUNK, CHUNK, width)
    for i in range(0, SQUARE, LANES):
        store(scores, i, load(scores, i) * load(decays, i))
    if delta:
        store_product(k, 0, width, 1, writes, 0, CHUNK, recall, 0, CHUNK, CHUNK, width)
        for i in range(0, SQUARE, LANES):
            store(recall, i, zeros(q) - load(recall, i) * load(decays, i))
    to_end = load(decays, SQUARE - CHUNK)
    for i in range(0, width * CHUNK, LANES):
        store(writes, i, load(writes, i) * to_end)
    for t in range(CHUNK):
        by = splat(from_start, t)
        for j in range(t * width, (t + 1) * width, LANES):
            store(reads, CHUNK * width + j, load(q, j) * by)
            if delta:
                store(reads, j, load(k, j) * by)


@inline_jit
def _solve(v, v_at, columns, beta, recall, r, r_at, e, e_at):
    """e_t = β_t r_t with r_t = v_t - (read from S) + Σ_{s<t} recall_ts e_s, four rows at a time.

    r (C, LANES) holds what is read from S, and receives r.
    """
    for t in range(0, CHUNK, 4):
        at, here = t * CHUNK, v_at + t * columns
        r0 = load(v, here) - load(r, r_at + t * LANES)
        r1 = load(v, here + columns) - load(r, r_at + (t + 1) * LANES)
        r2 = load(v, here + 2 * columns) - load(r, r_at + (t + 2) * LANES)
        r3 = load(v, here + 3 * columns) - load(r, r_at + (t + 3) * LANES)
        for s in range(t):
            e_s = load(e, e_at + s * LANES)
            r0 = fma(splat(recall, at + s), e_s, r0)
            r1 = fma(splat(recall, at + CHUNK + s), e_s, r1)
            r2 = fma(splat(recall, at + 2 * CHUNK + s), e_s, r2)
            r3 = fma(splat(recall, at + 3 * CHUNK + s), e_s, r3)
        e_s = splat(beta, t) * r0
        r1 = fma(splat(recall, at + CHUNK + t), e_s, r1)
        r2 = fma(splat(recall, at + 2 * CHUNK + t), e_s, r2)
        r3 = fma(splat(recall, at + 3 * CHUNK + t), e_s, r3)
        store(e, e_at + t * LANES, e_s)
        e_s = splat(beta, t + 1) * r1
        r2 = fma(splat(recall, at + 2 * CHUNK + t + 1), e_s, r2)
        r3 = fma(splat(recall, at + 3 * CHUNK + t + 1), e_s, r3)
        store(e, e_at + (t + 1) * LANES, e_s)
        e_s = splat(beta, t + 2) * r2
        r3 = fma(splat(recall, at + 3 * CHUNK + t + 2), e_s, r3)
        store(e, e_at + (t + 2) * LANES, e_s)
        store(e, e_at + (t + 3) * LANES, splat(beta, t + 3) * r3)
        store(r, r_at + t * LANES, r0)
        store(r, r_at + (t + 1) * LANES, r1)
        store(r, r_at + (t + 2) * LANES, r2)
        store(r, r_at + (t + 3) * LANES, r3)


@inline_jit
def _solve_adjoint(de, beta, recall, dv):
    """de_s += Σ_{t>s} recall_ts dv_t and dv = β de, four rows at a time; de, dv (C, LANES)."""
    for s in range(CHUNK - 4, -1, -4):
        d0, d1 = load(de, s * LANES), load(de, (s + 1) * LANES)
        d2, d3 = load(de, (s + 2) * LANES), load(de, (s + 3) * LANES)
        for t in range(CHUNK - 1, s + 3, -1):
            at, dv_t = t * CHUNK + s, load(dv, t * LANES)
            d0 = fma(splat(recall, at), dv_t, d0)
            d1 = fma(splat(recall, at + 1), dv_t, d1)
            d2 = fma(splat(recall, at + 2), dv_t, d2)
            d3 = fma(splat(recall, at + 3), dv_t, d3)
        at, dv_t = (s + 3) * CHUNK + s, splat(beta, s + 3) * d3
        d0 = fma(splat(recall, at), dv_t, d0)
        d1 = fma(splat(recall, at + 1), dv_t, d1)
        d2 = fma(splat(recall, at + 2), dv_t, d2)
        store(dv, (s + 3) * LANES, dv_t)
        at, dv_t = (s + 2) * CHUNK + s, splat(beta, s + 2) * d2
        d0 = fma(splat(recall, at), dv_t, d0)
        d1 = fma(splat(recall, at + 1), dv_t, d1)
        store(dv, (s + 2) * LANES, dv_t)
        dv_t = splat(beta, s + 1) * d1
        d0 = fma(splat(recall, (s + 1) * CHUNK + s), dv_t, d0)
        store(dv, (s + 1) * LANES, dv_t)
        store(dv, s * LANES, splat(beta, s) * d0)
        store(de, s * LANES, d0)
        store(de, (s + 1) * LANES, d1)
        store(de, (s + 2) * LANES, d2)
        store(de, (s + 3) * LANES, d3)


@inline_jit
def _errors(v, columns, j, s, width, delta, reads, recall, beta, r, r_at, e, e_at):
    """e and r (C, LANES) of the panel from column j on, from v (C, columns) and the state s."""
    if delta:
        store_product(reads, 0, width, 1, s, j * width, LANES, r, r_at, LANES, CHUNK, width)
        _solve(v, j, columns, beta, recall, r, r_at, e, e_at)
    else:
        for t in range(CHUNK):
            store(e, e_at + t * LANES, load(v, t * columns + j))


@inline_jit
def _load_beta(beta, at, step, steps, out):
    """out (C) = β of the steps, zero beyond."""
    out[:] = 0
    for t in range(steps):
        out[t] = beta[at + t * step]


@parallel_kernel
def linear_attention_fwd(
    task,
    sequence_bounds,
    first_blocks,
    q,
    q_sb,
    q_st,
    k,
    k_sb,
    k_st,
    v,
    v_sb,
    v_st,
    g,
    g_sb,
    g_st,
    b,
    b_sb,
    b_st,
    key_heads,
    by_step,
    delta,
    normalise,
    scale,
    state,
    out,
    block_states,
):
    """Fill out (B, T, J, V); state (N, J, K, V) goes from S_0 to S_T.

    Unless it is empty, block_states (blocks, J, …) receives the state before each block in panels;
    those of sequence n begin at first_blocks[n]. ``by_step``: g has one decay per step and head.
    """
    time, heads, values = out.shape[1:]
    size, dtype = state.shape[2], state.dtype
    width, columns = cdiv(size, LANES) * LANES, cdiv(values, LANES) * LANES
    states, outs, kept = state.reshape(-1), out.reshape(-1), block_states.reshape(-1)
    n, head = task // heads, task % heads
    key_head = head // (heads // key_heads)
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    g_size, a_width = (1, 1) if by_step else (size, width)
    unit, factor_out = dtype.type(1), dtype.type(scale)
    s = np.empty(width * columns, dtype)
    q_rows, k_rows = np.empty(CHUNK * width, dtype), np.empty(CHUNK * width, dtype)
    alpha, beta = np.empty(CHUNK * a_width, dtype), np.empty(CHUNK, dtype)
    v_rows, o = np.empty(CHUNK * columns, dtype), np.empty(CHUNK * columns, dtype)
    reads, writes = np.empty(2 * CHUNK * width, dtype), np.empty(width * CHUNK, dtype)
    scores, recall = np.empty(SQUARE, dtype), np.empty(SQUARE, dtype)
    gamma, identity = np.empty(width, dtype), np.zeros(SQUARE, dtype)
    for i in range(CHUNK):
        identity[i * CHUNK + i] = 1
    decays, from_start = np.empty(SQUARE, dtype), np.empty(CHUNK, dtype)
    e, r = np.empty(CHUNK * LANES, dtype), np.empty(CHUNK * LANES, dtype)
    partial, square, factor = (
        np.empty(SQUARE, dtype),
        np.empty(SQUARE, dtype),
        np.empty(CHUNK, dtype),
    )
    _load_state(states, task * size * values, size, values, s, width)
    for t in range(begin, end, CHUNK):
        steps = min(CHUNK, end - t)
        chunk = (t - begin) // CHUNK
        if kept.shape[0] > 0 and chunk % BLOCK == 0:
            at = ((first_blocks[n] + chunk // BLOCK) * heads + head) * width * columns
            _copy(s, 0, kept, at, width * columns)
        _load_rows(
            q, row * q_sb + t * q_st + key_head * size, q_st, steps, size, unit, q_rows, width
        )
        _load_rows(
            k, row * k_sb + t * k_st + key_head * size, k_st, steps, size, unit, k_rows, width
        )
        _load_rows(
            v, row * v_sb + t * v_st + head * values, v_st, steps, values, unit, v_rows, columns
        )
        _load_decays(g, row * g_sb + t * g_st + head * g_size, g_st, steps, g_size, alpha, a_width)
        if delta:
            _load_beta(b, row * b_sb + t * b_st + head, b_st, steps, beta)
        if normalise:
            _normalise(q_rows, width, factor, partial, square)
            _normalise(k_rows, width, factor, partial, square)
        if by_step:
            _weigh_by_step(
                q_rows,
                k_rows,
                alpha,
                width,
                delta,
                decays,
                from_start,
                reads,
                writes,
                scores,
                recall,
                gamma,
            )
        else:
            _weigh(
                q_rows,
                k_rows,
                alpha,
                width,
                steps,
                delta,
                identity,
                reads,
                writes,
                scores,
                recall,
                gamma,
            )
        for j in range(0, columns, LANES):
            at = j * width
            _errors(v_rows, columns, j, s, width, delta, reads, recall, beta, r, 0, e, 0)
            store_product(reads, CHUNK * width, width, 1, s, at, LANES, o, j, columns, CHUNK, width)
            add_product(scores, 0, CHUNK, 1, e, 0, LANES, o, j, columns, CHUNK, CHUNK)
            scale_add_product(gamma, writes, 0, CHUNK, 1, e, 0, LANES, s, at, LANES, width, CHUNK)
        at = ((row * time + t) * heads + head) * values
        _write_rows(o, columns, factor_out, outs, at, heads * values, steps, values)
    _write_state(s, width, states, task * size * values, size, values)


@inline_jit
def _pairs(q, k, alpha, width, steps, delta, one, out_pairs, value_pairs, dq, a, b):
    """Add the sums over pairs of steps to dq, a and b, rows (C, W), for a decay per key channel.

    out_pairs (C, C) holds do_t·e_s at [t, s], value_pairs dv_t·e_s.
    """
    for j in range(0, width, LANES):
        for s in range(steps):
            at, decay = s * width + j, load(one, 0)
            k_s, same = load(k, at), splat(out_pairs, s * CHUNK + s)
            a_s = fma(same, load(q, at), load(a, at))
            store(dq, at, fma(same, k_s, load(dq, at)))
            for t in range(s + 1, steps):
                here, pair = t * width + j, t * CHUNK + s
                decay = decay * load(alpha, here)
                k_ts, by = k_s * decay, splat(out_pairs, pair)
                store(dq, here, fma(by, k_ts, load(dq, here)))
                gradient = by * load(q, here)
                if delta:
                    by = splat(value_pairs, pair)
                    store(b, here, fma(by, k_ts, load(b, here)))
                    gradient = gradient - by * load(k, here)
                a_s = fma(gradient, decay, a_s)
            store(a, at, a_s)


@inline_jit
def _pairs_by_step(q, k, decays, width, delta, out_pairs, value_pairs, dq, a, b):
    """As _pairs, for one decay per step. The pairs are overwritten."""
    for i in range(0, SQUARE, LANES):
        store(out_pairs, i, load(out_pairs, i) * load(decays, i))
    if delta:
        for i in range(0, SQUARE, LANES):
            store(value_pairs, i, load(value_pairs, i) * load(decays, i))
        for t in range(CHUNK):
            value_pairs[t * CHUNK + t] = 0
    for j in range(0, width, LANES):
        add_product(out_pairs, 0, CHUNK, 1, k, j, width, dq, j, width, CHUNK, CHUNK)
        add_product(out_pairs, 0, 1, CHUNK, q, j, width, a, j, width, CHUNK, CHUNK)
        if delta:
            add_product(value_pairs, 0, CHUNK, 1, k, j, width, b, j, width, CHUNK, CHUNK)
    if delta:
        for i in range(0, SQUARE, LANES):
            store(value_pairs, i, zeros(q) - load(value_pairs, i))
        for j in range(0, width, LANES):
            add_product(value_pairs, 0, 1, CHUNK, k, j, width, a, j, width, CHUNK, CHUNK)


@inline_jit
def _decay_rows(alpha, width, delta, one, dq, a, b):
    """dq and b times g, a times h: all rows (C, W), for a decay per key channel."""
    for j in range(0, width, LANES):
        decay = load(one, 0)
        for t in range(CHUNK):
            at = t * width + j
            decay = decay * load(alpha, at)
            store(dq, at, load(dq, at) * decay)
            if delta:
                store(b, at, load(b, at) * decay)
        decay = load(one, 0)
        for t in range(CHUNK - 1, -1, -1):
            at = t * width + j
            store(a, at, load(a, at) * decay)
            decay = decay * load(alpha, at)


@parallel_kernel
def linear_attention_bwd(
    task,
    sequence_bounds,
    first_blocks,
    q,
    q_sb,
    q_st,
    k,
    k_sb,
    k_st,
    v,
    v_sb,
    v_st,
    g,
    g_sb,
    g_st,
    b,
    b_sb,
    b_st,
    key_heads,
    by_step,
    delta,
    normalise,
    scale,
    block_states,
    do,
    do_sb,
    do_st,
    dstate,
    dq,
    dk,
    dv,
    dg,
    db,
):
    """Fill dq, dk (B, T, J, K), dv (B, T, J, V), db (B, T, J), and dg, flat.

    dstate (N, J, K, V) goes from the gradient of S_T to that of S_0. block_states and first_blocks
    are those of the forward pass.
    """
    time, heads, values = dv.shape[1:]
    size, dtype = dstate.shape[2], dstate.dtype
    width, columns = cdiv(size, LANES) * LANES, cdiv(values, LANES) * LANES
    dstates, kept = dstate.reshape(-1), block_states.reshape(-1)
    dqs, dks, dvs = dq.reshape(-1), dk.reshape(-1), dv.reshape(-1)
    n, head = task // heads, task % heads
    key_head = head // (heads // key_heads)
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    g_size, a_width = (1, 1) if by_step else (size, width)
    unit, factor_out = dtype.type(1), dtype.type(scale)
    one, identity = np.ones(LANES, dtype), np.zeros(SQUARE, dtype)
    for i in range(CHUNK):
        identity[i * CHUNK + i] = 1
    grad = np.empty(width * columns, dtype)  # R
    # of each chunk in a block
    s_all = np.empty((BLOCK, width * columns), dtype)
    q_all, k_all = np.empty((BLOCK, CHUNK * width), dtype), np.empty((BLOCK, CHUNK * width), dtype)
    alpha_all, beta_all = np.empty((BLOCK, CHUNK * a_width), dtype), np.empty((BLOCK, CHUNK), dtype)
    q_factors, k_factors = np.empty((BLOCK, CHUNK), dtype), np.empty((BLOCK, CHUNK), dtype)
    reads_all = np.empty((BLOCK, 2 * CHUNK * width), dtype)
    writes_all = np.empty((BLOCK, width * CHUNK), dtype)
    scores_all, recall_all = np.empty((BLOCK, SQUARE), dtype), np.empty((BLOCK, SQUARE), dtype)
    gamma_all, decays_all = np.empty((BLOCK, width), dtype), np.empty((BLOCK, SQUARE), dtype)
    start_all = np.empty((BLOCK, CHUNK), dtype)
    e_all = np.empty((BLOCK, CHUNK * columns), dtype)  # panels (columns / LANES, C, LANES)
    r_all = np.empty((BLOCK, CHUNK * columns), dtype)
    # of one chunk
    v_rows, do_rows = np.empty(CHUNK * columns, dtype), np.empty(CHUNK * columns, dtype)
    dv_rows = np.empty(CHUNK * columns, dtype)
    dq_lanes, dq_rows = np.empty(width * CHUNK, dtype), np.empty(CHUNK * width, dtype)
    a_lanes, a_rows = np.empty(width * CHUNK, dtype), np.empty(CHUNK * width, dtype)
    b_lanes, b_rows = np.zeros(width * CHUNK, dtype), np.zeros(CHUNK * width, dtype)
    out_pairs, value_pairs = np.empty(SQUARE, dtype), np.empty(SQUARE, dtype)
    inner, x = np.empty(width * LANES, dtype), np.empty(width, dtype)  # <R, S> per channel
    # of one panel: (C, LANES), and their transposes
    de, dv_panel = np.empty(SQUARE, dtype), np.empty(SQUARE, dtype)
    both = np.empty(2 * SQUARE, dtype)  # -dv, then do
    e_t, dv_t, do_t = np.empty(SQUARE, dtype), np.empty(SQUARE, dtype), np.empty(SQUARE, dtype)
    partial, square = np.empty(SQUARE, dtype), np.empty(SQUARE, dtype)
    beta_dots, dots, changes = (
        np.empty(SQUARE, dtype),
        np.empty(CHUNK, dtype),
        np.empty(CHUNK, dtype),
    )
    _load_state(dstates, task * size * values, size, values, grad, width)
    chunks = cdiv(end - begin, CHUNK)
    for block in range(cdiv(chunks, BLOCK) - 1, -1, -1):
        first = block * BLOCK
        count = min(BLOCK, chunks - first)
        at = ((first_blocks[n] + block) * heads + head) * width * columns
        _copy(kept, at, s_all[0], 0, width * columns)
        for i in range(count):
            t = begin + (first + i) * CHUNK
            steps = min(CHUNK, end - t)
            q_rows, k_rows, s, alpha = q_all[i], k_all[i], s_all[i], alpha_all[i]
            at = row * q_sb + t * q_st + key_head * size
            _load_rows(q, at, q_st, steps, size, unit, q_rows, width)
            at = row * k_sb + t * k_st + key_head * size
            _load_rows(k, at, k_st, steps, size, unit, k_rows, width)
            at = row * v_sb + t * v_st + head * values
            _load_rows(v, at, v_st, steps, values, unit, v_rows, columns)
            at = row * g_sb + t * g_st + head * g_size
            _load_decays(g, at, g_st, steps, g_size, alpha, a_width)
            if delta:
                _load_beta(b, row * b_sb + t * b_st + head, b_st, steps, beta_all[i])
            if normalise:
                _normalise(q_rows, width, q_factors[i], partial, square)
                _normalise(k_rows, width, k_factors[i], partial, square)
            if by_step:
                _weigh_by_step(
                    q_rows,
                    k_rows,
                    alpha,
                    width,
                    delta,
                    decays_all[i],
                    start_all[i],
                    reads_all[i],
                    writes_all[i],
                    scores_all[i],
                    recall_all[i],
                    gamma_all[i],
                )
            else:
                _weigh(
                    q_rows,
                    k_rows,
                    alpha,
                    width,
                    steps,
                    delta,
                    identity,
                    reads_all[i],
                    writes_all[i],
                    scores_all[i],
                    recall_all[i],
                    gamma_all[i],
                )
            if i + 1 < count:
                _copy(s, 0, s_all[i + 1], 0, width * columns)
            for j in range(0, columns, LANES):
                _errors(
                    v_rows,
                    columns,
                    j,
                    s,
                    width,
                    delta,
                    reads_all[i],
                    recall_all[i],
                    beta_all[i],
                    r_all[i],
                    j * CHUNK,
                    e_all[i],
                    j * CHUNK,
                )
                if i + 1 < count:
                    scale_add_product(
                        gamma_all[i],
                        writes_all[i],
                        0,
                        CHUNK,
                        1,
                        e_all[i],
                        j * CHUNK,
                        LANES,
                        s_all[i + 1],
                        j * width,
                        LANES,
                        width,
                        CHUNK,
                    )
        for i in range(count - 1, -1, -1):
            t = begin + (first + i) * CHUNK
            steps = min(CHUNK, end - t)
            q_rows, k_rows, s, alpha, beta = q_all[i], k_all[i], s_all[i], alpha_all[i], beta_all[i]
            reads, writes, gamma = reads_all[i], writes_all[i], gamma_all[i]
            scores, recall, e, r = scores_all[i], recall_all[i], e_all[i], r_all[i]
            at = row * do_sb + t * do_st + head * values
            _load_rows(do, at, do_st, steps, values, factor_out, do_rows, columns)
            dq_lanes[:] = 0
            a_lanes[:] = 0
            inner[:] = 0
            out_pairs[:] = 0
            if delta:
                b_lanes[:] = 0
                value_pairs[:] = 0
                beta_dots[:] = 0
            for j in range(0, columns, LANES):
                at, e_at = j * width, j * CHUNK
                store_product(writes, 0, 1, CHUNK, grad, at, LANES, de, 0, LANES, CHUNK, width)
                add_product(scores, 0, 1, CHUNK, do_rows, j, columns, de, 0, LANES, CHUNK, CHUNK)
                if delta:
                    _solve_adjoint(de, beta, recall, dv_panel)
                    for c in range(0, SQUARE, LANES):
                        product = fma(load(de, c), load(r, e_at + c), load(beta_dots, c))
                        store(beta_dots, c, product)
                        store(both, c, zeros(de) - load(dv_panel, c))
                        store(dv_rows, c // LANES * columns + j, load(dv_panel, c))
                else:
                    for c in range(CHUNK):
                        store(dv_rows, c * columns + j, load(de, c * LANES))
                for c in range(CHUNK):
                    store(both, SQUARE + c * LANES, load(do_rows, c * columns + j))
                transpose(do_rows, j, columns, do_t, 0, CHUNK)
                transpose(e, e_at, LANES, e_t, 0, CHUNK)
                add_product(s, at, LANES, 1, do_t, 0, CHUNK, dq_lanes, 0, CHUNK, width, LANES)
                add_product(grad, at, LANES, 1, e_t, 0, CHUNK, a_lanes, 0, CHUNK, width, LANES)
                add_product(
                    do_rows, j, columns, 1, e_t, 0, CHUNK, out_pairs, 0, CHUNK, CHUNK, LANES
                )
                if delta:
                    transpose(dv_panel, 0, LANES, dv_t, 0, CHUNK)
                    add_product(s, at, LANES, 1, dv_t, 0, CHUNK, b_lanes, 0, CHUNK, width, LANES)
                    add_product(
                        dv_panel, 0, LANES, 1, e_t, 0, CHUNK, value_pairs, 0, CHUNK, CHUNK, LANES
                    )
                    scale_add_product(
                        gamma, reads, 0, 1, width, both, 0, LANES, grad, at, LANES, width, 2 * CHUNK
                    )
                else:
                    scale_add_product(
                        gamma,
                        reads,
                        CHUNK * width,
                        1,
                        width,
                        both,
                        SQUARE,
                        LANES,
                        grad,
                        at,
                        LANES,
                        width,
                        CHUNK,
                    )
                for c in range(0, width * LANES, LANES):
                    store(inner, c, fma(load(grad, at + c), load(s, at + c), load(inner, c)))
            _to_rows(dq_lanes, dq_rows, width)
            _to_rows(a_lanes, a_rows, width)
            if delta:
                _to_rows(b_lanes, b_rows, width)
            for c in range(0, width, LANES):
                _add_lanes(inner, c * LANES, square, x, c)
            step = (row * time + t) * heads + head
            if by_step:
                _scale_rows(dq_rows, start_all[i], width)
                if delta:
                    _scale_rows(b_rows, start_all[i], width)
                for c in range(CHUNK):
                    dots[c] = decays_all[i, SQUARE - CHUNK + c]
                _scale_rows(a_rows, dots, width)
                _pairs_by_step(
                    q_rows,
                    k_rows,
                    decays_all[i],
                    width,
                    delta,
                    out_pairs,
                    value_pairs,
                    dq_rows,
                    a_rows,
                    b_rows,
                )
            else:
                _decay_rows(alpha, width, delta, one, dq_rows, a_rows, b_rows)
                _pairs(
                    q_rows,
                    k_rows,
                    alpha,
                    width,
                    steps,
                    delta,
                    one,
                    out_pairs,
                    value_pairs,
                    dq_rows,
                    a_rows,
                    b_rows,
                )
            # b becomes a + b, and a becomes dk
            for c in range(0, CHUNK * width, LANES):
                a_c, b_c = load(a_rows, c), load(b_rows, c)
                store(b_lanes, c, a_c + b_c)
                store(a_rows, c, a_c - b_c)
            if by_step:
                _row_dots(q_rows, dq_rows, width, partial, square, changes)
                _row_dots(k_rows, b_lanes, width, partial, square, dots)
                total = x[0]
                for c in range(1, width):
                    total += x[c]
                for c in range(steps):
                    dg[step + c * heads] = total
                    total -= changes[c] - dots[c]
            else:
                for c in range(steps):
                    at, to = np.uint64(c * width), np.uint64((step + c * heads) * size)
                    for d in range(np.uint64(size)):
                        dg[to + d] = x[d]
                    for d in range(np.uint64(width)):
                        x[d] -= q_rows[at + d] * dq_rows[at + d] - k_rows[at + d] * b_lanes[at + d]
            if normalise:
                _normalise_adjoint(q_rows, q_factors[i], width, dq_rows, dots, partial, square)
                _normalise_adjoint(k_rows, k_factors[i], width, a_rows, dots, partial, square)
            _write_rows(dq_rows, width, unit, dqs, step * size, heads * size, steps, size)
            _write_rows(a_rows, width, unit, dks, step * size, heads * size, steps, size)
            _write_rows(dv_rows, columns, unit, dvs, step * values, heads * values, steps, values)
            if delta:
                _add_lanes(beta_dots, 0, square, dots, 0)
                for c in range(steps):
                    db[row, t + c, head] = dots[c]
    _write_state(grad, width, dstates, task * size * values, size, values)


@parallel_kernel
def linear_attention_step(
    task,
    sequence_bounds,
    q,
    q_sb,
    q_st,
    k,
    k_sb,
    k_st,
    v,
    v_sb,
    v_st,
    g,
    g_sb,
    g_st,
    b,
    b_sb,
    b_st,
    key_heads,
    by_step,
    delta,
    normalise,
    scale,
    initial,
    state,
    out,
):
    """Fill out (B, T, J, V) and state (N, J, K, V) from initial, step by step, for few steps.

    ``initial`` may be ``state`` itself. It is read, and the state written, once per step.
    """
    time, heads, values = out.shape[1:]
    size, dtype = state.shape[2], state.dtype
    outs, states = out.reshape(-1), state.reshape(-1)
    n, head = task // heads, task % heads
    key_head = head // (heads // key_heads)
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    g_size = 1 if by_step else size
    query, key, alpha = np.empty(size, dtype), np.empty(size, dtype), np.empty(size, dtype)
    e, o = np.empty(values, dtype), np.empty(values, dtype)
    first, width = task * size * values, np.uint64(values)
    before, factor_out = initial.reshape(-1), dtype.type(scale)
    if begin == end:
        for c in range(np.uint64(size * values)):
            states[np.uint64(first) + c] = before[np.uint64(first) + c]
    for t in range(begin, end):
        q_at, k_at = (
            row * q_sb + t * q_st + key_head * size,
            row * k_sb + t * k_st + key_head * size,
        )
        g_at = row * g_sb + t * g_st + head * g_size
        q_squares, k_squares = dtype.type(EPSILON), dtype.type(EPSILON)
        for c in range(size):
            query[c], key[c] = from_bf16(q[q_at + c]), from_bf16(k[k_at + c])
            alpha[c] = g[g_at if by_step else g_at + c]
        for c in range(np.uint64(size)):
            alpha[c] = exp_nonpositive(alpha[c])
        if normalise:
            for c in range(size):
                q_squares += query[c] * query[c]
                k_squares += key[c] * key[c]
            q_squares, k_squares = np.sqrt(q_squares), np.sqrt(k_squares)
            for c in range(np.uint64(size)):
                query[c] /= q_squares
            for c in range(np.uint64(size)):
                key[c] /= k_squares
        v_at = np.uint64(row * v_sb + t * v_st + head * values)
        for j in range(width):
            e[j] = from_bf16(v[v_at + j])
        if delta:
            for c in range(size):
                at, by = np.uint64(first + c * values), key[c] * alpha[c]
                for j in range(width):
                    e[j] -= by * before[at + j]
            by = b[row * b_sb + t * b_st + head]
            for j in range(width):
                e[j] *= by
        o[:] = 0
        for c in range(size):
            at, decay, by = np.uint64(first + c * values), alpha[c], key[c]
            for j in range(width):
                states[at + j] = decay * before[at + j] + by * e[j]
            by = query[c]
            for j in range(width):
                o[j] += by * states[at + j]
        at = np.uint64(((row * time + t) * heads + head) * values)
        for j in range(width):
            outs[at + j] = to_bf16(factor_out * o[j], outs)
        before = states
