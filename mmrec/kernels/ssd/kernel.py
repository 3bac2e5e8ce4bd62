"""Numba kernels of Mamba 2's recurrence (structured state space duality). No checks.

Axes: B batch, L time, H heads, P head width, G groups of heads that share b and c, N state size, S
sequences, Q = CHUNK steps. x, b, c and dy are flat with strides over batch row and time, and hold
(H, P) or (G, N) at each step; dt and g (the log decay) hold (H) and are contiguous, as are all
outputs. A row of ``runs`` (S, 5) holds the batch row, first step and end of a sequence, the number
of its initial state (-1: zero) and the number of its final state (-1: not wanted). Per head:

    S_t = e^{g_t} S_{t-1} + δ_t b_t x_tᵀ      y_t = S_tᵀ c_t + D x_t        (S is (N, P))

Chunk by chunk, with S the state before the chunk and ℓ_t = g_1 + … + g_t inside it:

    w_ts = e^{ℓ_t - ℓ_s} for s <= t, else 0
    y_t = Σ_s w_ts (c_t·b_s) δ_s x_s + e^{ℓ_t} Sᵀ c_t + D x_t
    S <- e^{ℓ_Q} S + Σ_s e^{ℓ_Q - ℓ_s} δ_s b_s x_sᵀ

The products c_t·b_s are the same for all heads of a group. Adjoint, with A the gradient of the
state after the chunk, K_ts = dy_t·x_s, and sums over the heads of a group for b and c:

    v_s = Σ_t w_ts (c_t·b_s) dy_t + e^{ℓ_Q - ℓ_s} Aᵀ b_s
    dx_s = δ_s v_s + D dy_s       dδ_s = x_s·v_s
    dc_t = Σ_s w_ts δ_s K_ts b_s + e^{ℓ_t} S dy_t
    db_s = Σ_t w_ts δ_s K_ts c_t + e^{ℓ_Q - ℓ_s} δ_s A x_s
    A <- e^{ℓ_Q} A + Σ_t e^{ℓ_t} c_t dy_tᵀ

Let X_t = <gradient of S_t, S_t>. Scaling S shows that dg_t = X_t - δ_t dδ_t and
X_t = dg_{t+1} + (y_t - D x_t)·dy_t. Each chunk starts this sum anew from <A, S after it>, so that
its rounding does not grow with L.

Chunks end at multiples of Q of the batch row, whatever its sequences are, so that their number is
known from shapes alone; a sequence's first and last chunk may be shorter. Matrices in scratch
memory are padded with zeros to multiples of LANES on both axes. ℓ is kept as the sum of two
numbers, so that differences of neighbours are exact however strong the decay.

A task is a slice of at most SLICE heads of one group of one sequence; tasks share nothing that they
write. db and dc are sums per slice, which op.py adds in order.

Source: Dao, Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), section 6. The adjoint is our own.
"""

import numpy as np

from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import cdiv
from mmrec.kernels._products import FULL, LOWER, UPPER, add_tiled_product
from mmrec.kernels._simd import LANES, add_lanes, fma, load, splat, store, transpose, zeros
from mmrec.kernels._vector_math import LOG2E, exp2

CHUNK = 64
"""Steps in a chunk; a multiple of LANES."""
SLICE = 4
"""Heads in a task."""


@inline_jit
def _load_rows(source, at, step, count, size, rows, width, padded):
    """rows (padded, width) = ``count`` rows of ``size`` numbers, padded with zeros on both axes."""
    aligned = size - size % LANES
    for i in range(count):
        here, there = at + i * step, i * width
        for j in range(0, aligned, LANES):
            store(rows, there + j, load(source, here + j))
        if aligned < size:
            store(rows, there + aligned, zeros(rows))
            for j in range(aligned, size):
                rows[there + j] = source[here + j]
    for i in range(count * width, padded * width, LANES):
        store(rows, i, zeros(rows))


@inline_jit
def _store_rows(rows, width, count, size, target, at, step):
    """Store ``count`` rows of ``size`` numbers."""
    aligned = size - size % LANES
    for i in range(count):
        here, there = i * width, at + i * step
        for j in range(0, aligned, LANES):
            store(target, there + j, load(rows, here + j))
        for j in range(aligned, size):
            target[there + j] = rows[here + j]


@inline_jit
def _transpose(source, rows, columns, target):
    """target (columns, rows) = the transpose of source (rows, columns); multiples of LANES."""
    for i in range(0, rows, LANES):
        for j in range(0, columns, LANES):
            transpose(source, i * columns + j, columns, target, j * rows + i, rows)


@inline_jit
def _clear(x, size):
    for i in range(0, size, LANES):
        store(x, i, zeros(x))


@inline_jit
def _scale_rows(x, factors, rows, width, out):
    """out (rows, width) = rows of x times their factors. out may be x."""
    for i in range(rows):
        by = splat(factors, i)
        for j in range(i * width, (i + 1) * width, LANES):
            store(out, j, load(x, j) * by)


@inline_jit
def _scale(x, factor, size):
    """x *= factor (LANES equal numbers)."""
    by = load(factor, 0)
    for i in range(0, size, LANES):
        store(x, i, load(x, i) * by)


@inline_jit
def _dot_rows(x, y, rows, width, out):
    """out[i] = dot product of row i of x and of y."""
    for i in range(rows):
        total = zeros(x)
        for j in range(i * width, (i + 1) * width, LANES):
            total = fma(load(x, j), load(y, j), total)
        out[i] = add_lanes(total)


@inline_jit
def _load_decays(g, dt, at, heads, steps, rows, high, low, step_sizes, from_start, to_end):
    """The decays of a chunk of one head.

    high + low (rows) are ℓ log2 e, from_start e^ℓ, to_end e^{ℓ_Q - ℓ}, step_sizes δ (0 beyond
    ``steps``). Returns nothing: e^{ℓ_Q} is the last of from_start.
    """
    total = 0.0
    for t in range(steps):
        total += np.float64(g[at + t * heads]) * LOG2E
        high[t] = total
        low[t] = total - np.float64(high[t])
        step_sizes[t] = dt[at + t * heads]
    for t in range(steps, rows):
        high[t], low[t], step_sizes[t] = high[steps - 1], low[steps - 1], 0
    end_high, end_low = splat(high, rows - 1), splat(low, rows - 1)
    for t in range(0, rows, LANES):
        store(from_start, t, exp2(load(high, t) + load(low, t)))
        store(to_end, t, exp2((end_high - load(high, t)) + (end_low - load(low, t))))


@inline_jit
def _decays_between(high, low, lower, rows, out):
    """out[t, s] (rows, CHUNK) = e^{ℓ_t - ℓ_s} for s <= t.

    Above the diagonal it is 0 as far as products with triangles look: less than LANES columns.
    """
    for t in range(rows):
        t_high, t_low, diagonal = splat(high, t), splat(low, t), t - t % LANES
        for s in range(0, diagonal, LANES):
            power = (t_high - load(high, s)) + (t_low - load(low, s))
            store(out, t * CHUNK + s, exp2(power))
        power = (t_high - load(high, diagonal)) + (t_low - load(low, diagonal))
        store(out, t * CHUNK + diagonal, exp2(power) * load(lower, t % LANES * LANES))
        if diagonal + LANES < rows:
            store(out, t * CHUNK + diagonal + LANES, zeros(out))


@inline_jit
def _product(x, x_row, x_step, w, out, rows, depth, columns, shape):
    """out (rows, columns) += x (rows, depth) times w (depth, columns); w and out are dense."""
    add_tiled_product(
        x, 0, x_row, x_step, w, 0, columns, out, 0, columns, rows, depth, columns, shape
    )


@inline_jit
def _lower_product(x, w, depth, rows, out):
    """out[t, s] (rows, CHUNK) = Σ_k x[t, k] w[k, s] in the blocks on and below the diagonal.

    x is (rows, depth), w (depth, rows).
    """
    for s in range(0, rows, LANES):
        at = s * CHUNK + s
        for t in range(rows - s):
            store(out, at + t * CHUNK, zeros(out))
        add_tiled_product(
            x, s * depth, depth, 1, w, s, rows, out, at, CHUNK, rows - s, depth, LANES, FULL
        )


@inline_jit
def _load_state(source, at, size, states, target, target_at, width, depth):
    """target (depth, width) [n, p] = source (size, states) [p, n], padded with zeros."""
    for n in range(depth):
        for p in range(width):
            inside = n < states and p < size
            value = source[at + p * states + n] if inside else target.dtype.type(0)
            target[target_at + n * width + p] = value


@inline_jit
def _store_state(source, source_at, width, size, states, target, at):
    """target (size, states) [p, n] = source [n, p]."""
    for p in range(size):
        for n in range(states):
            target[at + p * states + n] = source[source_at + n * width + p]


@inline_jit
def _fill_lower(lower):
    """lower (LANES, LANES) = 1 on and below the diagonal, 0 above."""
    for i in range(LANES):
        for j in range(LANES):
            lower[i * LANES + j] = 1 if j <= i else 0


@parallel_kernel
def ssd_fwd(
    task,
    runs,
    groups,
    x,
    x_sb,
    x_st,
    dt,
    g,
    b,
    b_sb,
    b_st,
    c,
    c_sb,
    c_st,
    skip,
    initial,
    out,
    final,
    chunk_states,
):
    """Fill out (B, L, H, P), final (N, H, P, N) and, unless it is empty, chunk_states.

    chunk_states (B, chunks, H, N', P') receives S at each multiple of Q, in scratch padding.
    """
    time, heads, size = out.shape[1:]
    states = initial.shape[3]
    width, depth = cdiv(size, LANES) * LANES, cdiv(states, LANES) * LANES
    outs, saved, dtype = out.reshape(-1), chunk_states.reshape(-1), out.dtype
    initials, finals = initial.reshape(-1), final.reshape(-1)
    chunks, block = cdiv(time, CHUNK), width * depth
    group_heads = heads // groups
    slices = cdiv(group_heads, SLICE)
    run, group = task // (groups * slices), task // slices % groups
    first = task % slices * SLICE
    count = min(SLICE, group_heads - first)
    head = group * group_heads + first
    row, first_step, end = runs[run, 0], runs[run, 1], runs[run, 2]
    s = np.zeros(SLICE * block, dtype)
    bs, cs, bt = (
        np.empty(CHUNK * depth, dtype),
        np.empty(CHUNK * depth, dtype),
        np.empty(CHUNK * depth, dtype),
    )
    xs, ys = np.empty(CHUNK * width, dtype), np.empty(CHUNK * width, dtype)
    scores, mix = np.empty(CHUNK * CHUNK, dtype), np.empty(CHUNK * CHUNK, dtype)
    high, low, step_sizes = np.empty(CHUNK, dtype), np.empty(CHUNK, dtype), np.empty(CHUNK, dtype)
    from_start, to_end = np.empty(CHUNK, dtype), np.empty(CHUNK, dtype)
    lower, skips = np.empty(LANES * LANES, dtype), np.zeros(width, dtype)
    factor = np.empty(LANES, dtype)
    _fill_lower(lower)
    if runs[run, 3] >= 0:
        for i in range(count):
            at = (runs[run, 3] * heads + head + i) * size * states
            _load_state(initials, at, size, states, s, i * block, width, depth)
    begin = first_step
    while begin < end:
        steps = min(CHUNK - begin % CHUNK, end - begin)
        rows = cdiv(steps, LANES) * LANES
        at = row * b_sb + begin * b_st + group * states
        _load_rows(b, at, b_st, steps, states, bs, depth, rows)
        at = row * c_sb + begin * c_st + group * states
        _load_rows(c, at, c_st, steps, states, cs, depth, rows)
        _transpose(bs, rows, depth, bt)
        _lower_product(cs, bt, depth, rows, scores)
        for i in range(count):
            h = head + i
            state = s[i * block : (i + 1) * block]
            if begin % CHUNK == 0 and saved.shape[0] > 0:
                at = ((row * chunks + begin // CHUNK) * heads + h) * block
                for j in range(0, block, LANES):
                    store(saved, at + j, load(state, j))
            at = (row * time + begin) * heads + h
            _load_decays(g, dt, at, heads, steps, rows, high, low, step_sizes, from_start, to_end)
            at = row * x_sb + begin * x_st + h * size
            _load_rows(x, at, x_st, steps, size, xs, width, rows)
            _decays_between(high, low, lower, rows, mix)
            for t in range(rows):
                for j in range(0, t + 1, LANES):
                    at = t * CHUNK + j
                    store(mix, at, load(mix, at) * load(scores, at) * load(step_sizes, j))
            _clear(ys, rows * width)
            _product(cs, depth, 1, state, ys, rows, depth, width, FULL)
            for p in range(size):
                skips[p] = skip[h * size + p]
            for t in range(rows):
                by = splat(from_start, t)
                for j in range(0, width, LANES):
                    at = t * width + j
                    store(ys, at, fma(load(ys, at), by, load(skips, j) * load(xs, at)))
            _product(mix, CHUNK, 1, xs, ys, rows, rows, width, LOWER)
            at = (row * time + begin) * heads * size + h * size
            _store_rows(ys, width, steps, size, outs, at, heads * size)
            for t in range(0, rows, LANES):
                store(to_end, t, load(to_end, t) * load(step_sizes, t))
            _scale_rows(xs, to_end, rows, width, xs)
            factor[:] = from_start[rows - 1]
            _scale(state, factor, block)
            _product(bs, 1, depth, xs, state, depth, rows, width, FULL)
        begin += steps
    if runs[run, 4] >= 0:
        for i in range(count):
            at = (runs[run, 4] * heads + head + i) * size * states
            _store_state(s, i * block, width, size, states, finals, at)


@parallel_kernel
def ssd_bwd(
    task,
    runs,
    groups,
    x,
    x_sb,
    x_st,
    dt,
    g,
    b,
    b_sb,
    b_st,
    c,
    c_sb,
    c_st,
    skip,
    initial,
    chunk_states,
    dy,
    dy_sb,
    dy_st,
    dfinal,
    dx,
    ddt,
    dg,
    db,
    dc,
    dskip,
    dinitial,
):
    """Fill dx (B, L, H, P), ddt and dg (B, L, H), dskip (S, H, P) per sequence, dinitial.

    db and dc (slices, B, L, G, N) hold a sum per slice.
    """
    time, heads, size = dx.shape[1:]
    states = initial.shape[3]
    width, depth = cdiv(size, LANES) * LANES, cdiv(states, LANES) * LANES
    dxs, saved, dtype = dx.reshape(-1), chunk_states.reshape(-1), dx.dtype
    initials, dfinals, dinitials = initial.reshape(-1), dfinal.reshape(-1), dinitial.reshape(-1)
    ddts, dgs, dskips = ddt.reshape(-1), dg.reshape(-1), dskip.reshape(-1)
    dbs_all, dcs_all = db.reshape(-1), dc.reshape(-1)
    chunks, block, batch = cdiv(time, CHUNK), width * depth, dx.shape[0]
    group_heads = heads // groups
    slices = cdiv(group_heads, SLICE)
    run, group = task // (groups * slices), task // slices % groups
    part = task % slices
    first = part * SLICE
    count = min(SLICE, group_heads - first)
    head = group * group_heads + first
    row, first_step, end = runs[run, 0], runs[run, 1], runs[run, 2]
    ds, state = np.zeros(SLICE * block, dtype), np.zeros(block, dtype)
    flipped = np.empty(block, dtype)
    bs, cs, bt = (
        np.empty(CHUNK * depth, dtype),
        np.empty(CHUNK * depth, dtype),
        np.empty(CHUNK * depth, dtype),
    )
    dbs, dcs, us = (
        np.empty(CHUNK * depth, dtype),
        np.empty(CHUNK * depth, dtype),
        np.empty(CHUNK * depth, dtype),
    )
    xs, xt, dys = (
        np.empty(CHUNK * width, dtype),
        np.empty(CHUNK * width, dtype),
        np.empty(CHUNK * width, dtype),
    )
    vs, scaled = np.empty(CHUNK * width, dtype), np.empty(CHUNK * width, dtype)
    scores, mix = np.empty(CHUNK * CHUNK, dtype), np.empty(CHUNK * CHUNK, dtype)
    products, dscores = np.empty(CHUNK * CHUNK, dtype), np.empty(CHUNK * CHUNK, dtype)
    high, low, step_sizes = np.empty(CHUNK, dtype), np.empty(CHUNK, dtype), np.empty(CHUNK, dtype)
    from_start, to_end = np.empty(CHUNK, dtype), np.empty(CHUNK, dtype)
    y_dots, state_dots, x_dots = (
        np.empty(CHUNK, dtype),
        np.empty(CHUNK, dtype),
        np.empty(CHUNK, dtype),
    )
    lower, factor = np.empty(LANES * LANES, dtype), np.empty(LANES, dtype)
    skips, skip_grads = np.zeros(width, dtype), np.zeros(SLICE * width, dtype)
    _fill_lower(lower)
    if runs[run, 4] >= 0:
        for i in range(count):
            at = (runs[run, 4] * heads + head + i) * size * states
            _load_state(dfinals, at, size, states, ds, i * block, width, depth)
    stop = end
    while stop > first_step:
        begin = max(first_step, (stop - 1) // CHUNK * CHUNK)
        steps = stop - begin
        stop = begin
        rows = cdiv(steps, LANES) * LANES
        at = row * b_sb + begin * b_st + group * states
        _load_rows(b, at, b_st, steps, states, bs, depth, rows)
        at = row * c_sb + begin * c_st + group * states
        _load_rows(c, at, c_st, steps, states, cs, depth, rows)
        _transpose(bs, rows, depth, bt)
        _lower_product(cs, bt, depth, rows, scores)
        _clear(dbs, rows * depth)
        _clear(dcs, rows * depth)
        _clear(dscores, rows * CHUNK)
        for i in range(count):
            h = head + i
            grad = ds[i * block : (i + 1) * block]
            if begin % CHUNK == 0:
                at = ((row * chunks + begin // CHUNK) * heads + h) * block
                for j in range(0, block, LANES):
                    store(state, j, load(saved, at + j))
            elif runs[run, 3] >= 0:
                at = (runs[run, 3] * heads + h) * size * states
                _load_state(initials, at, size, states, state, 0, width, depth)
            else:
                _clear(state, block)
            here = (row * time + begin) * heads + h
            _load_decays(g, dt, here, heads, steps, rows, high, low, step_sizes, from_start, to_end)
            at = row * x_sb + begin * x_st + h * size
            _load_rows(x, at, x_st, steps, size, xs, width, rows)
            at = row * dy_sb + begin * dy_st + h * size
            _load_rows(dy, at, dy_st, steps, size, dys, width, rows)
            _decays_between(high, low, lower, rows, mix)
            _transpose(xs, rows, width, xt)
            _lower_product(dys, xt, width, rows, products)
            # mix becomes w (c·b); products become w δ K, and their sums with c·b are y·dy
            for t in range(rows):
                total = zeros(mix)
                for j in range(0, t + 1, LANES):
                    at = t * CHUNK + j
                    decay, score = load(mix, at), load(scores, at)
                    product = decay * load(step_sizes, j) * load(products, at)
                    store(dscores, at, load(dscores, at) + product)
                    total = fma(product, score, total)
                    store(mix, at, decay * score)
                y_dots[t] = add_lanes(total)
            # v, first from the state
            _clear(vs, rows * width)
            _product(bs, depth, 1, grad, vs, rows, depth, width, FULL)
            _scale_rows(vs, to_end, rows, width, vs)
            _dot_rows(vs, xs, rows, width, x_dots)
            total = zeros(grad)
            for j in range(0, block, LANES):
                total = fma(load(grad, j), load(state, j), total)
            after = add_lanes(total) * from_start[rows - 1]  # becomes <A, S after the chunk>
            for t in range(rows):
                after += step_sizes[t] * x_dots[t]
            _product(mix, 1, CHUNK, dys, vs, rows, rows, width, UPPER)
            _dot_rows(vs, xs, rows, width, x_dots)
            # the parts of dc and db that go through the states
            _scale_rows(dys, from_start, rows, width, scaled)
            _transpose(state, depth, width, flipped)
            _clear(us, rows * depth)
            _product(scaled, width, 1, flipped, us, rows, width, depth, FULL)
            _dot_rows(us, cs, rows, depth, state_dots)
            for j in range(0, rows * depth, LANES):
                store(dcs, j, load(dcs, j) + load(us, j))
            _transpose(grad, depth, width, flipped)
            for t in range(0, rows, LANES):
                store(to_end, t, load(to_end, t) * load(step_sizes, t))
            _scale_rows(xs, to_end, rows, width, xt)
            _product(xt, width, 1, flipped, dbs, rows, width, depth, FULL)
            factor[:] = from_start[rows - 1]
            _scale(grad, factor, block)
            _product(cs, 1, depth, scaled, grad, depth, rows, width, FULL)
            for t in range(steps - 1, -1, -1):
                after += y_dots[t] + state_dots[t] - step_sizes[t] * x_dots[t]
                dgs[here + t * heads] = after
                ddts[here + t * heads] = x_dots[t]
            for p in range(size):
                skips[p] = skip[h * size + p]
            for t in range(rows):
                by = splat(step_sizes, t)
                for j in range(0, width, LANES):
                    at = t * width + j
                    dy_t = load(dys, at)
                    store(vs, at, fma(by, load(vs, at), load(skips, j) * dy_t))
            for t in range(0, rows * width, width):
                for j in range(0, width, LANES):
                    at = i * width + j
                    store(
                        skip_grads, at, fma(load(dys, t + j), load(xs, t + j), load(skip_grads, at))
                    )
            at = (row * time + begin) * heads * size + h * size
            _store_rows(vs, width, steps, size, dxs, at, heads * size)
        _product(dscores, CHUNK, 1, bs, dcs, rows, rows, depth, LOWER)
        _product(dscores, 1, CHUNK, cs, dbs, rows, rows, depth, UPPER)
        at = (((part * batch + row) * time + begin) * groups + group) * states
        _store_rows(dbs, depth, steps, states, dbs_all, at, groups * states)
        _store_rows(dcs, depth, steps, states, dcs_all, at, groups * states)
    for i in range(count):
        at = run * heads + head + i
        for p in range(size):
            dskips[at * size + p] = skip_grads[i * width + p]
        if runs[run, 3] >= 0:
            at = (runs[run, 3] * heads + head + i) * size * states
            _store_state(ds, i * block, width, size, states, dinitials, at)
