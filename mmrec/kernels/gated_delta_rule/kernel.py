"""Numba kernels of the gated delta rule. Arrays in, arrays out, no checks.

Axes: B batch, T time, H heads, P head width, N sequences, W = P rounded up to whole vectors,
C = CHUNK steps. q, k, v are flat with strides (``q_sb``, ``q_st``, …) over batch row and time, and
hold (H, P) at each step; the gate logits a (of α) and b (of β) hold (H). Outputs are contiguous. A
row n of ``sequence_bounds`` (N, 3) holds the batch row, first step and end of sequence n.

    k̂ = k (|k|² + ε)^-½, q̂ likewise, α = σ(a), β = σ(b)
    e_t = β_t (v_t - α_t S_{t-1}ᵀ k̂_t)      S_t = α_t S_{t-1} + k̂_t e_tᵀ      o_t = S_tᵀ q̂_t

The forward pass goes step by step, so cutting a sequence anywhere changes no bit. One pass over the
state per step is enough: it writes the update of the step before and reads for this step, because
o_t = α_t S_{t-1}ᵀ q̂_t + e_t (k̂_t · q̂_t). Columns of S are independent; the pass takes LANES of
them at a time.

The backward pass goes chunk by chunk, in small matrix products. S is the state before the chunk and
A the gradient of the state after it. With Γ_ts = α_{s+1} … α_t for s <= t, g_t = α_1 Γ_t1,
h_t = Γ_Ct, and s < t throughout:

    L_ts = β_t Γ_ts k̂_t·k̂_s, L_tt = 1     e = L⁻¹ (β_t (v_t - g_t Sᵀ k̂_t))
    de = L⁻ᵀ (h_t Aᵀ k̂_t + Σ_{i>=t} Γ_it (q̂_i·k̂_t) do_i)     dv = β de     dβ = de · e / β
    dq̂_t = g_t S do_t + Σ_{s<=t} Γ_ts (e_s·do_t) k̂_s
    dk̂_t = h_t A e_t - g_t S dv_t + Σ_{i>=t} Γ_it (do_i·e_t) q̂_i
           - Σ_{s<t} Γ_ts (e_s·dv_t) k̂_s - Σ_{i>t} Γ_it (dv_i·e_t) k̂_i
    A <- g_C A + Σ_t g_t (q̂_t do_tᵀ - k̂_t dv_tᵀ)

Let x_t = <gradient of S_t from later steps, S_t>. Scaling S shows that
x_{t-1} = x_t + q̂_t·dq̂_t - v_t·dv_t, and that the gradient of log α_t is x_{t-1}. Each chunk starts
this sum anew from <A, S>, so that its rounding does not grow with T.

Arrays "of columns" hold (W, C), one step per lane, so that products, norms and gates of all steps
of a chunk run side by side; arrays "of rows" hold (C, W). All scratch arrays are flat. In the code
P is ``size`` and W is ``width``. A task is one head of one sequence. Heads are independent, so
tasks share nothing that they write.

Source of the chunked form: Yang, Wang, Zhang, Shen, Kim 2024, "Parallelizing Linear Transformers
with the Delta Rule over Sequence Length" (arXiv:2406.06484), section 3. The adjoint is our own.
"""

import numpy as np

from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import cdiv, sigmoid
from mmrec.kernels._simd import LANES, fma, load, splat, store, transpose, zeros

CHUNK = LANES
"""Steps in a chunk: one per lane of a vector."""
EPSILON = 1e-6  # added to |k|² and |q|²
TILE = 8
"""Rows of a matrix product whose sums are in registers at once."""


@inline_jit
def _copy_rows(source, at, step, target, to, stride, count, size):
    """Copy ``count`` rows of ``size`` numbers; rows are ``step`` and ``stride`` numbers apart."""
    aligned = size - size % LANES
    for i in range(count):
        here, there = at + i * step, to + i * stride
        for j in range(0, aligned, LANES):
            store(target, there + j, load(source, here + j))
        for j in range(aligned, size):
            target[there + j] = source[here + j]


@inline_jit
def _load_rows(source, at, step, count, size, rows, width):
    """rows (…, W) = ``count`` rows of ``size`` numbers, padded with zeros on both axes."""
    if count * width < rows.shape[0] or size < width:
        rows[:] = 0
    _copy_rows(source, at, step, rows, 0, width, count, size)


@inline_jit
def _to_columns(rows, columns, width):
    """Transpose (C, W) to (W, C)."""
    for j in range(0, width, LANES):
        transpose(rows, j, width, columns, j * CHUNK, CHUNK)


@inline_jit
def _to_rows(columns, rows, width):
    """Transpose (W, C) to (C, W)."""
    for j in range(0, width, LANES):
        transpose(columns, j * CHUNK, CHUNK, rows, j, width)


@inline_jit
def _dot_columns(x, y, width, out):
    """out (C) = dot products of the columns of x and y, both (W, C)."""
    total = zeros(x)
    for i in range(width):
        total = fma(load(x, i * LANES), load(y, i * LANES), total)
    store(out, 0, total)


@inline_jit
def _scale_columns(x, factor, width, out):
    """out (W, C) = columns of x times factor (C). out may be x."""
    by = load(factor, 0)
    for i in range(0, width * LANES, LANES):
        store(out, i, load(x, i) * by)


@inline_jit
def _normalise(columns, width, factor):
    """Divide each column by its norm; factor (C) receives 1 / norm."""
    _dot_columns(columns, columns, width, factor)
    one = factor.dtype.type(1)
    for t in range(CHUNK):
        factor[t] = one / np.sqrt(factor[t] + factor.dtype.type(EPSILON))
    _scale_columns(columns, factor, width, columns)


@inline_jit
def _normalise_adjoint(unit, factor, width, dunit, dots):
    """Adjoint of _normalise: dunit becomes factor (dunit - unit (unit · dunit))."""
    _dot_columns(unit, dunit, width, dots)
    by, off = load(factor, 0), load(dots, 0)
    for i in range(0, width * LANES, LANES):
        store(dunit, i, (load(dunit, i) - load(unit, i) * off) * by)


@inline_jit
def _load_gates(source, base, step, steps, padding, out):
    """out (C) = σ(logit) for each of the steps, ``padding`` beyond."""
    for t in range(CHUNK):
        out[t] = source[base + t * step] if t < steps else out.dtype.type(0)
    for t in range(CHUNK):
        out[t] = sigmoid(out[t])
    for t in range(steps, CHUNK):
        out[t] = padding


@inline_jit
def _add_product(x, x_row, x_inner, y, y_at, y_inner, rows, inner, out, out_at, out_row):
    """out[r, :] += Σ_n x[r, n] y[n, :] for r < rows, n < inner, and LANES columns.

    Rows are ``…_row`` apart, numbers along n ``…_inner`` apart; y and out begin at y_at, out_at.
    ``rows`` is a multiple of TILE.
    """
    for i in range(0, rows, TILE):
        o = out_at + i * out_row
        c0, c1 = load(out, o), load(out, o + out_row)
        c2, c3 = load(out, o + 2 * out_row), load(out, o + 3 * out_row)
        c4, c5 = load(out, o + 4 * out_row), load(out, o + 5 * out_row)
        c6, c7 = load(out, o + 6 * out_row), load(out, o + 7 * out_row)
        for n in range(inner):
            at, y_n = i * x_row + n * x_inner, load(y, y_at + n * y_inner)
            c0 = fma(splat(x, at), y_n, c0)
            c1 = fma(splat(x, at + x_row), y_n, c1)
            c2 = fma(splat(x, at + 2 * x_row), y_n, c2)
            c3 = fma(splat(x, at + 3 * x_row), y_n, c3)
            c4 = fma(splat(x, at + 4 * x_row), y_n, c4)
            c5 = fma(splat(x, at + 5 * x_row), y_n, c5)
            c6 = fma(splat(x, at + 6 * x_row), y_n, c6)
            c7 = fma(splat(x, at + 7 * x_row), y_n, c7)
        store(out, o, c0)
        store(out, o + out_row, c1)
        store(out, o + 2 * out_row, c2)
        store(out, o + 3 * out_row, c3)
        store(out, o + 4 * out_row, c4)
        store(out, o + 5 * out_row, c5)
        store(out, o + 6 * out_row, c6)
        store(out, o + 7 * out_row, c7)


@inline_jit
def _gram(x, y, weight, width, out):
    """out[s, t] = weight[s, t] (column s of x) · (column t of y); x, y (W, C), others (C, C)."""
    out[:] = 0
    _add_product(x, 1, CHUNK, y, 0, CHUNK, CHUNK, width, out, 0, CHUNK)
    for s in range(0, CHUNK * CHUNK, LANES):
        store(out, s, load(out, s) * load(weight, s))


@inline_jit
def _scan_chunk(state, width, keys, queries, alpha, beta, match, v, steps, one, o):
    """The steps of one chunk: update the state (W, W) and fill o (C, W) from v (C, W).

    keys and queries (W, C) are normalised, match (C) holds their dot products, one (C) ones.
    """
    for j in range(0, width, LANES):
        # the update that the step before has left to write: nothing before the first step
        scale, error = load(one, 0), zeros(state)
        for t in range(steps + 1):  # the last iteration only writes
            before, now = max(t - 1, 0), min(t, CHUNK - 1)
            r0, r1, p0, p1 = zeros(state), zeros(state), zeros(state), zeros(state)
            for i in range(0, width, 2):
                at, lane = i * width + j, i * LANES
                s0 = fma(splat(keys, lane + before), error, load(state, at) * scale)
                s1 = fma(splat(keys, lane + LANES + before), error, load(state, at + width) * scale)
                store(state, at, s0)
                store(state, at + width, s1)
                r0 = fma(splat(keys, lane + now), s0, r0)
                r1 = fma(splat(keys, lane + LANES + now), s1, r1)
                p0 = fma(splat(queries, lane + now), s0, p0)
                p1 = fma(splat(queries, lane + LANES + now), s1, p1)
            scale = splat(alpha, now)
            error = (load(v, now * width + j) - scale * (r0 + r1)) * splat(beta, now)
            if t < steps:
                store(o, t * width + j, fma(scale, p0 + p1, error * splat(match, now)))


@parallel_kernel
def gated_delta_rule_fwd(
    task,
    sequence_bounds,
    first_chunks,
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
    chunk_states,
):
    """Fill out (B, T, H, P); state (N, H, P, P) goes from S_0 to S_T.

    Unless it is empty, chunk_states (chunks, H, P, P) receives the state before each chunk; those
    of sequence n begin at first_chunks[n].
    """
    time, heads, size = out.shape[1:]
    width = cdiv(size, LANES) * LANES
    block = size * size
    states, chunk_states_flat, outs = state.reshape(-1), chunk_states.reshape(-1), out.reshape(-1)
    n, head = task // heads, task % heads
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    head_at, stride = head * size, heads * size
    s = np.empty(width * width, out.dtype)
    rows, o = np.empty(CHUNK * width, out.dtype), np.empty(CHUNK * width, out.dtype)
    kt, qt = np.empty(width * CHUNK, out.dtype), np.empty(width * CHUNK, out.dtype)
    alpha, beta = np.empty(CHUNK, out.dtype), np.empty(CHUNK, out.dtype)
    match, factor = np.empty(CHUNK, out.dtype), np.empty(CHUNK, out.dtype)
    one = np.ones(CHUNK, out.dtype)
    _load_rows(states, task * block, size, size, size, s, width)
    for t in range(begin, end, CHUNK):
        steps = min(CHUNK, end - t)
        if chunk_states_flat.shape[0] > 0:
            chunk = first_chunks[n] + (t - begin) // CHUNK
            _copy_rows(
                s, 0, width, chunk_states_flat, (chunk * heads + head) * block, size, size, size
            )
        _load_rows(k, row * k_sb + t * k_st + head_at, k_st, steps, size, rows, width)
        _to_columns(rows, kt, width)
        _normalise(kt, width, factor)
        _load_rows(q, row * q_sb + t * q_st + head_at, q_st, steps, size, rows, width)
        _to_columns(rows, qt, width)
        _normalise(qt, width, factor)
        _dot_columns(kt, qt, width, match)
        _load_gates(a, row * a_sb + t * a_st + head, a_st, steps, 1, alpha)
        _load_gates(b, row * b_sb + t * b_st + head, b_st, steps, 0, beta)
        _load_rows(v, row * v_sb + t * v_st + head_at, v_st, steps, size, rows, width)
        _scan_chunk(s, width, kt, qt, alpha, beta, match, rows, steps, one, o)
        _copy_rows(o, 0, width, outs, (row * time + t) * stride + head_at, stride, steps, size)
    _copy_rows(s, 0, width, states, task * block, size, size, size)


@inline_jit
def _decays_between(alpha, identity, later, earlier):
    """Fill later (C, C) with Γ_ts at [s, t] for t >= s, else 0, and earlier with its transpose."""
    last = CHUNK - 1
    later_row, earlier_row = load(identity, last * CHUNK), load(identity, 0)
    store(later, last * CHUNK, later_row)
    store(earlier, 0, earlier_row)
    for t in range(1, CHUNK):
        earlier_row = fma(splat(alpha, t), earlier_row, load(identity, t * CHUNK))
        store(earlier, t * CHUNK, earlier_row)
        s = last - t
        later_row = fma(splat(alpha, s + 1), later_row, load(identity, s * CHUNK))
        store(later, s * CHUNK, later_row)


@inline_jit
def _invert(products, beta, identity, inverse):
    """inverse = L⁻¹ for L with unit diagonal and L_ts = β_t products[s, t] below it."""
    for t in range(CHUNK):
        row, by = load(identity, t * CHUNK), splat(beta, t)
        for s in range(t):
            row = row - by * splat(products, s * CHUNK + t) * load(inverse, s * CHUNK)
        store(inverse, t * CHUNK, row)


@parallel_kernel
def gated_delta_rule_bwd(
    task,
    sequence_bounds,
    first_chunks,
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
    chunk_states,
    do,
    do_sb,
    do_st,
    dstate,
    dq,
    dk,
    dv,
    da,
    db,
):
    """Fill dq, dk, dv (B, T, H, P), da, db (B, T, H); dstate (N, H, P, P) goes from dS_T to dS_0.

    chunk_states and first_chunks are those of the forward pass.
    """
    time, heads, size = dq.shape[1:]
    width = cdiv(size, LANES) * LANES
    block, dtype, square = size * size, dq.dtype, CHUNK * CHUNK
    dstates, chunk_states_flat = dstate.reshape(-1), chunk_states.reshape(-1)
    dqs, dks, dvs = dq.reshape(-1), dk.reshape(-1), dv.reshape(-1)
    identity, minus_upper = np.zeros(square, dtype), np.zeros(square, dtype)  # the latter -1: s < t
    for i in range(CHUNK):
        identity[i * CHUNK + i] = 1
        for j in range(i + 1, CHUNK):
            minus_upper[i * CHUNK + j] = -1
    n, head = task // heads, task % heads
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    head_at, stride = head * size, heads * size
    s, grad = np.empty(width * width, dtype), np.empty(width * width, dtype)
    # arrays of columns: k̂, q̂, v, do, e, dv, a sum of products, the right side of a product
    kt, qt = np.empty(width * CHUNK, dtype), np.empty(width * CHUNK, dtype)
    vt, ot = np.empty(width * CHUNK, dtype), np.empty(width * CHUNK, dtype)
    et, dvt = np.empty(width * CHUNK, dtype), np.empty(width * CHUNK, dtype)
    acc, scaled = np.empty(width * CHUNK, dtype), np.empty(width * CHUNK, dtype)
    # arrays of rows: any, do
    rows, dorows = np.empty(CHUNK * width, dtype), np.empty(CHUNK * width, dtype)
    # (C): one number per step; (C, C): one per pair of steps
    alpha, beta = np.empty(CHUNK, dtype), np.empty(CHUNK, dtype)
    from_start, to_end = np.empty(CHUNK, dtype), np.empty(CHUNK, dtype)  # g and h of the docstring
    minus_from_start, dots = np.empty(CHUNK, dtype), np.empty(CHUNK, dtype)
    k_factor, q_factor = np.empty(CHUNK, dtype), np.empty(CHUNK, dtype)
    x_change = np.empty(CHUNK, dtype)  # x_{t-1} - x_t
    later, earlier = np.empty(square, dtype), np.empty(square, dtype)
    pairs, pairs_t = np.empty(square, dtype), np.empty(square, dtype)
    inverse = np.empty(square, dtype)
    _load_rows(dstates, task * block, size, size, size, grad, width)
    for chunk in range(cdiv(end - begin, CHUNK) - 1, -1, -1):
        t = begin + chunk * CHUNK
        steps = min(CHUNK, end - t)
        _load_rows(k, row * k_sb + t * k_st + head_at, k_st, steps, size, rows, width)
        _to_columns(rows, kt, width)
        _normalise(kt, width, k_factor)
        _load_rows(q, row * q_sb + t * q_st + head_at, q_st, steps, size, rows, width)
        _to_columns(rows, qt, width)
        _normalise(qt, width, q_factor)
        _load_rows(v, row * v_sb + t * v_st + head_at, v_st, steps, size, rows, width)
        _to_columns(rows, vt, width)
        _load_rows(do, row * do_sb + t * do_st + head_at, do_st, steps, size, dorows, width)
        _to_columns(dorows, ot, width)
        _load_gates(a, row * a_sb + t * a_st + head, a_st, steps, 1, alpha)
        _load_gates(b, row * b_sb + t * b_st + head, b_st, steps, 0, beta)
        at = ((first_chunks[n] + chunk) * heads + head) * block
        _load_rows(chunk_states_flat, at, size, size, size, s, width)
        at = (row * time + t) * stride + head_at
        _decays_between(alpha, identity, later, earlier)
        for i in range(CHUNK):
            from_start[i] = alpha[0] * later[i]
            minus_from_start[i] = -from_start[i]
            to_end[i] = earlier[square - CHUNK + i]

        # errors e
        _gram(kt, kt, later, width, pairs)
        _invert(pairs, beta, identity, inverse)
        acc[:] = 0
        _add_product(s, 1, width, kt, 0, CHUNK, width, width, acc, 0, CHUNK)
        off, scale = load(from_start, 0), load(beta, 0)
        for i in range(0, width * CHUNK, LANES):
            store(acc, i, (load(vt, i) - off * load(acc, i)) * scale)
        transpose(inverse, 0, CHUNK, pairs_t, 0, CHUNK)
        et[:] = 0
        _add_product(acc, CHUNK, 1, pairs_t, 0, CHUNK, width, CHUNK, et, 0, CHUNK)

        # de, then dv and dβ
        _scale_columns(kt, to_end, width, scaled)
        acc[:] = 0
        _add_product(grad, 1, width, scaled, 0, CHUNK, width, width, acc, 0, CHUNK)
        _gram(qt, kt, earlier, width, pairs)
        _add_product(ot, CHUNK, 1, pairs, 0, CHUNK, width, CHUNK, acc, 0, CHUNK)
        dvt[:] = 0
        _add_product(acc, CHUNK, 1, inverse, 0, CHUNK, width, CHUNK, dvt, 0, CHUNK)
        _dot_columns(et, dvt, width, dots)
        for i in range(steps):
            db[row, t + i, head] = dots[i] * (1 - beta[i])
        _scale_columns(dvt, beta, width, dvt)
        _dot_columns(vt, dvt, width, x_change)

        # dq̂
        acc[:] = 0
        _scale_columns(ot, from_start, width, scaled)
        _add_product(s, width, 1, scaled, 0, CHUNK, width, width, acc, 0, CHUNK)
        _gram(et, ot, later, width, pairs)
        _add_product(kt, CHUNK, 1, pairs, 0, CHUNK, width, CHUNK, acc, 0, CHUNK)
        _dot_columns(qt, acc, width, dots)
        store(x_change, 0, load(dots, 0) - load(x_change, 0))
        _normalise_adjoint(qt, q_factor, width, acc, dots)
        _to_rows(acc, rows, width)
        _copy_rows(rows, 0, width, dqs, at, stride, steps, size)

        # dk̂; pairs still holds Γ_ts e_s·do_t
        transpose(pairs, 0, CHUNK, pairs_t, 0, CHUNK)
        acc[:] = 0
        _add_product(qt, CHUNK, 1, pairs_t, 0, CHUNK, width, CHUNK, acc, 0, CHUNK)
        _gram(et, dvt, later, width, pairs)
        for i in range(0, square, LANES):
            store(pairs, i, load(pairs, i) * load(minus_upper, i))
        transpose(pairs, 0, CHUNK, pairs_t, 0, CHUNK)
        for i in range(0, square, LANES):
            store(pairs_t, i, load(pairs_t, i) + load(pairs, i))
        _add_product(kt, CHUNK, 1, pairs_t, 0, CHUNK, width, CHUNK, acc, 0, CHUNK)
        _scale_columns(et, to_end, width, scaled)
        _add_product(grad, width, 1, scaled, 0, CHUNK, width, width, acc, 0, CHUNK)
        _scale_columns(dvt, minus_from_start, width, scaled)
        _add_product(s, width, 1, scaled, 0, CHUNK, width, width, acc, 0, CHUNK)
        _normalise_adjoint(kt, k_factor, width, acc, dots)
        _to_rows(acc, rows, width)
        _copy_rows(rows, 0, width, dks, at, stride, steps, size)

        # A, and <A, S> for dα
        _to_rows(dvt, rows, width)
        _copy_rows(rows, 0, width, dvs, at, stride, steps, size)
        _scale_columns(qt, from_start, width, qt)
        _scale_columns(kt, minus_from_start, width, kt)
        chunk_decay, total = splat(from_start, CHUNK - 1), zeros(s)
        for j in range(0, width, LANES):
            for i in range(width):
                store(grad, i * width + j, load(grad, i * width + j) * chunk_decay)
            _add_product(qt, CHUNK, 1, dorows, j, width, width, CHUNK, grad, j, width)
            _add_product(kt, CHUNK, 1, rows, j, width, width, CHUNK, grad, j, width)
            for i in range(width):
                total = fma(load(grad, i * width + j), load(s, i * width + j), total)
        store(dots, 0, total)
        x = dots[0]
        for i in range(1, CHUNK):
            x += dots[i]
        for i in range(steps):
            da[row, t + i, head] = x * (1 - alpha[i])
            x -= x_change[i]
    _copy_rows(grad, 0, width, dstates, task * block, size, size, size)
