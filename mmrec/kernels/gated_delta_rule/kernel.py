"""Numba kernels of the gated delta rule. Arrays in, arrays out, no checks.

Axes: B batch, T time, H key heads, HV value heads, K key width, V value width, N sequences,
STEPS steps in a block of the forward pass, C steps in a chunk of the backward pass. q and k are
flat with strides (``q_sb``, ``q_st``, …) over batch row and time, and hold (H, K) at each step; v
holds (HV, V), the gates g and b (HV). Outputs are contiguous. Value head h reads key head
h // (HV / H). A row n of ``sequence_bounds`` (N, 3) holds the batch row, first step and end of
sequence n.

    k̂ = k, or k (|k|² + ε)^-½ if ``normalise``; q̂ likewise, times ``scale``
    α = exp(g), or σ(g) if ``g_is_logit``; β = b, or σ(b) if ``b_is_logit``
    u_t = v_t - α_t S_{t-1}ᵀ k̂_t      S_t = α_t S_{t-1} + β_t k̂_t u_tᵀ      o_t = S_tᵀ q̂_t

The forward pass goes two steps at a time. One pass over the state per pair writes the updates of
the pair before, and reads for both steps of this one, because with e_t = β_t u_t

    u_t = v_t - α_t Sᵀ k̂_t          u_{t+1} = v_{t+1} - α_{t+1} (α_t Sᵀ k̂_{t+1} + (k̂_{t+1}·k̂_t) e_t)
    o_t = α_t Sᵀ q̂_t + (q̂_t·k̂_t) e_t
    o_{t+1} = α_{t+1} (α_t Sᵀ q̂_{t+1} + (q̂_{t+1}·k̂_t) e_t) + (q̂_{t+1}·k̂_{t+1}) e_{t+1}

where S is the state before the pair. Columns of S are independent. The state is stored in panels of
LANES columns, and a panel stays in the first-level cache for all steps of a block. Cutting a
sequence between blocks changes no bit.

The backward pass goes chunk by chunk, in matrix products. It reads S, the state before the chunk,
and the errors u from the forward pass. A is the gradient of the state after the chunk. With
Γ_ts = α_{s+1} … α_t for s <= t, γ_t = α_1 Γ_t1, η_t = Γ_Ct, arrays of rows t, and tril (strict: <)
for a triangle:

    P = Γ ∘ K̂ K̂ᵀ, strict      G = (I + P diag β)⁻¹ P      M = tril(Γ ∘ Q̂ K̂ᵀ)
    dE = η ∘ K̂ A + Mᵀ dO      de = dE - Gᵀ (β ∘ dE)      dV = β ∘ de      dβ = de · u
    Y = tril(Γ ∘ dO Eᵀ)       Z = Γ ∘ dV Eᵀ, strict
    dQ̂ = γ ∘ dO Sᵀ + Y K̂      dK̂ = η ∘ E Aᵀ - γ ∘ dV Sᵀ + Yᵀ Q̂ - (Z + Zᵀ) K̂
    A <- γ_C A + Q̂ᵀ (γ ∘ dO) - K̂ᵀ (γ ∘ dV)

(The errors of a chunk solve (I + P diag β) u = v - γ Sᵀ k̂. Its adjoint is (I + Pᵀ diag β) de = dE.
G writes both inverses without a division by β.)

α_i is a factor of Γ_ts for s < i <= t, of γ_t for t >= i, of η_s for s < i, and of γ_C. So the
gradient of log α_i is the sum of these times their gradients:

    Σ_{s<i<=t} M_ts (do_t·e_s) - P_ts (dv_t·e_s)  +  Σ_{t>=i} γ_t (q̂_t·(S do_t) - k̂_t·(S dv_t))
    + Σ_{s<i} η_s k̂_s·(A e_s)  +  γ_C <A, S>

Every term has the factor α_i, so the sum is exact for strong decay too. (A running sum of
q̂_t·dq̂_t - v_t·dv_t is shorter, but its terms lack that factor: they cancel, and rounding remains.)

All scratch arrays are flat. Both passes pad K and V with zeros to whole vectors. A task is one
value head of one sequence. Heads are independent, so tasks share nothing that they write.

Source of the chunked form: Yang, Wang, Zhang, Shen, Kim 2024, "Parallelizing Linear Transformers
with the Delta Rule over Sequence Length" (arXiv:2406.06484), section 3. The adjoint is our own.
"""

import numpy as np

from mmrec.kernels._bf16 import prefetch_row, read, write
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import cdiv, exp_nonpositive, sigmoid
from mmrec.kernels._products import FULL, LOWER, UPPER, add_tiled_product
from mmrec.kernels._simd import (
    LANES,
    add_lanes,
    fma,
    load,
    splat,
    store,
    transpose,
    zeros,
)

STEPS = LANES
"""Steps in a block of the forward pass: one per lane of a vector."""
ALPHA, BETA, K_K, Q_K, Q_K_NEXT, DECAY, FACTOR, SHARE = (STEPS * n for n in range(8))
"""Where each row of ``gates`` begins, see ``_fill_gates``."""
SMALLEST_DECAY = 2.0**-30
"""Below it a state is multiplied by its decay, see ``_fill_gates``."""
EPSILON = 1e-6  # added to |k|² and |q|², so that a zero key has a gradient


def choose_chunk_size(keys: int, values: int) -> int:
    """C: small for narrow heads, whose states are small beside the arrays of a chunk."""
    return STEPS if max(keys, values) <= 2 * LANES else 2 * STEPS


@inline_jit
def _pad(size):
    """``size`` rounded up to whole vectors."""
    return cdiv(size, LANES) * LANES


@inline_jit
def _row_stride(width):
    """Distance of the rows of a scratch array: an odd number of vectors.

    Rows a power of two apart would share few lines of the first-level cache.
    """
    return width if width // LANES % 2 else width + LANES


@inline_jit
def _load_rows(source, at, step, count, size, rows, rows_at, stride):
    """rows (count, stride) = ``count`` rows of ``size`` numbers, padded with zeros."""
    for i in range(count):
        to = rows_at + i * stride
        read(source, at + i * step, rows, to, size)
        rows[to + size : to + stride] = 0


@inline_jit
def _prefetch_rows(source, at, step, count, size):
    """Ask for ``count`` rows of ``size`` numbers, so far apart that no processor foresees them."""
    for i in range(count):
        prefetch_row(source, at + i * step, size)


@inline_jit
def _store_rows(rows, rows_at, stride, count, size, target, at, step):
    """``count`` rows of ``size`` numbers of a target, ``step`` apart, from rows (count, stride)."""
    for i in range(count):
        write(rows, rows_at + i * stride, target, at + i * step, size)


@inline_jit
def _load_gates(source, at, step, steps, is_logit, padding, out):
    """out[t] = the gate of each of the steps, σ of it if it is a logit; ``padding`` beyond."""
    for t in range(steps):
        out[t] = source[at + t * step]
    if is_logit:
        for t in range(steps):
            out[t] = sigmoid(out[t])
    out[steps:] = padding


@inline_jit
def _load_decays(source, at, step, steps, is_logit, out):
    """out[t] = α of each of the steps, 1 beyond."""
    _load_gates(source, at, step, steps, is_logit, 1, out)
    if not is_logit:
        for t in range(steps):
            out[t] = exp_nonpositive(out[t])


@inline_jit
def _dot(x, x_at, y, y_at, width):
    """Dot product of two rows."""
    total = zeros(x)
    for j in range(0, width, LANES):
        total = fma(load(x, x_at + j), load(y, y_at + j), total)
    return add_lanes(total)


@inline_jit
def _scale_rows(x, at, stride, count, width, factor, out, out_at):
    """Rows of out = rows of x times factor[t]. out may be x."""
    for t in range(count):
        by, here, there = splat(factor, t), at + t * stride, out_at + t * stride
        for j in range(0, width, LANES):
            store(out, there + j, load(x, here + j) * by)


@inline_jit
def _normalise_rows(x, at, stride, count, width, scale, normalise, factor):
    """Multiply rows by factor[t] = scale, divided by the norm of the row if ``normalise``."""
    for t in range(count):
        factor[t] = scale
        if normalise:
            square = _dot(x, at + t * stride, x, at + t * stride, width)
            factor[t] = scale / np.sqrt(square + factor.dtype.type(EPSILON))
    _scale_rows(x, at, stride, count, width, factor, x, at)


@inline_jit
def _scan_panel(s, s_at, width, k, q, gates, v, v_at, v_stride, pairs, o, u):
    """The steps of one block for one panel of the state, (width, LANES) from s_at on.

    k and q (STEPS, width) hold k̂ and q̂. v, o and u are rows, and this panel's columns of them begin
    at v_at. ``gates`` has rows of STEPS numbers, see ``_fill_gates``.
    """
    e0, e1, factor = zeros(s), zeros(s), zeros(s)
    for pair in range(pairs):
        t = 2 * pair
        now = t * width
        before = max(now - 2 * width, 0)
        r0, r1, p0, p1 = zeros(s), zeros(s), zeros(s), zeros(s)
        if pair == 0:
            for i in range(width):
                x, at = load(s, s_at + i * LANES), now + i
                r0, r1 = fma(splat(k, at), x, r0), fma(splat(k, at + width), x, r1)
                p0, p1 = fma(splat(q, at), x, p0), fma(splat(q, at + width), x, p1)
        elif gates[FACTOR + t - 2] == 1:
            for i in range(width):
                at = s_at + i * LANES
                x = fma(splat(k, before + i), e0, load(s, at))
                x = fma(splat(k, before + width + i), e1, x)
                store(s, at, x)
                at = now + i
                r0, r1 = fma(splat(k, at), x, r0), fma(splat(k, at + width), x, r1)
                p0, p1 = fma(splat(q, at), x, p0), fma(splat(q, at + width), x, p1)
        else:
            for i in range(width):
                at = s_at + i * LANES
                x = fma(splat(k, before + i), e0, load(s, at) * factor)
                x = fma(splat(k, before + width + i), e1, x)
                store(s, at, x)
                at = now + i
                r0, r1 = fma(splat(k, at), x, r0), fma(splat(k, at + width), x, r1)
                p0, p1 = fma(splat(q, at), x, p0), fma(splat(q, at + width), x, p1)
        first, second = v_at + t * v_stride, v_at + (t + 1) * v_stride
        decay0, decay1 = splat(gates, DECAY + t), splat(gates, DECAY + t + 1)
        u0 = load(v, first) - decay0 * r0
        e0 = splat(gates, BETA + t) * u0
        carried = splat(gates, ALPHA + t + 1) * e0
        u1 = load(v, second) - decay1 * r1 - splat(gates, K_K + t) * carried
        e1 = splat(gates, BETA + t + 1) * u1
        store(u, first, u0)
        store(u, second, u1)
        store(o, first, fma(splat(gates, Q_K + t), e0, decay0 * p0))
        p1 = fma(splat(gates, Q_K_NEXT + t), carried, decay1 * p1)
        store(o, second, fma(splat(gates, Q_K + t + 1), e1, p1))
        factor, share = splat(gates, FACTOR + t), splat(gates, SHARE + t)
        e0, e1 = carried * share, e1 * share
    before = (2 * pairs - 2) * width
    for i in range(width):
        at = s_at + i * LANES
        x = fma(splat(k, before + i), e0, load(s, at) * factor)
        store(s, at, fma(splat(k, before + width + i), e1, x))


@inline_jit
def _fill_gates(k, q, width, pairs, gates):
    """Fill the rows of ``gates`` from the third on; the first two hold α and β.

    Rows K_K, Q_K and Q_K_NEXT hold k̂_{t+1}·k̂_t, q̂_t·k̂_t and q̂_{t+1}·k̂_t for even t, and Q_K for
    odd t too.

    To save a multiplication per number of the state, a block decays its state only where it must:
    the true state is c times the stored one. DECAY holds c α_t, and c α_t α_{t+1} for the second
    step of a pair. That is the new c: SHARE divides what the pair writes by it. At the end of the
    block, and before c becomes too small, FACTOR is the new c instead of 1, the state is multiplied
    by it, and c is 1 again.
    """
    one = gates.dtype.type(1)
    c = one
    for t in range(0, 2 * pairs, 2):
        at, after = t * width, (t + 1) * width
        gates[K_K + t] = _dot(k, after, k, at, width)
        gates[Q_K + t] = _dot(q, at, k, at, width)
        gates[Q_K + t + 1] = _dot(q, after, k, after, width)
        gates[Q_K_NEXT + t] = _dot(q, after, k, at, width)
        gates[DECAY + t] = c * gates[ALPHA + t]
        c = gates[DECAY + t] * gates[ALPHA + t + 1]
        gates[DECAY + t + 1] = c
        gates[FACTOR + t], gates[SHARE + t] = one, one
        if t + 2 < 2 * pairs and c > SMALLEST_DECAY:
            gates[SHARE + t] = one / c
        else:
            gates[FACTOR + t] = c
            c = one


@inline_jit
def _copy_state(state, at, keys, values, width, s, to_state):
    """Copy a matrix (K, V) of the array ``state`` to panels (V / LANES, width, LANES), or back."""
    for j in range(0, values, LANES):
        columns = min(LANES, values - j)
        for i in range(keys):
            here, there = at + i * values + j, j * width + i * LANES
            if to_state:
                read(s, there, state, here, columns)
            else:
                read(state, here, s, there, columns)


@inline_jit
def _copy(source, at, target, to, count):
    """target[to:][:count] = source[at:][:count] for whole vectors."""
    for i in range(0, count, LANES):
        store(target, to + i, load(source, at + i))


@parallel_kernel
def gated_delta_rule_fwd(
    task,
    sequence_bounds,
    first_chunks,
    chunk_size,
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
    scale,
    normalise,
    g_is_logit,
    b_is_logit,
    heads,
    state,
    out,
    errors,
    chunk_states,
):
    """Fill out (B, T, HV, V); state (N, HV, K, V) goes from S_0 to S_T.

    ``heads`` is H. Unless they are empty, errors (B, T, HV, V) receives u, and chunk_states
    (chunks, HV, padded V / LANES, padded K, LANES) the state in panels before each chunk of
    ``chunk_size`` steps, a multiple of STEPS; those of sequence n begin at first_chunks[n].
    """
    time, value_heads, values = out.shape[1:]
    keys, dtype = state.shape[2], state.dtype
    width, value_width = _pad(keys), _pad(values)
    states, chunk_states_flat = state.reshape(-1), chunk_states.reshape(-1)
    outs, errors_flat = out.reshape(-1), errors.reshape(-1)
    n, head = task // value_heads, task % value_heads
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    k_at, v_at, stride = head // (value_heads // heads) * keys, head * values, value_heads * values
    block, one, q_scale = keys * values, dtype.type(1), dtype.type(scale)
    s = np.zeros(value_width * width, dtype)
    krows, qrows = np.empty(STEPS * width, dtype), np.empty(STEPS * width, dtype)
    vrows, factor = np.zeros(STEPS * value_width, dtype), np.empty(STEPS, dtype)
    o, u = np.empty(STEPS * value_width, dtype), np.empty(STEPS * value_width, dtype)
    gates = np.empty(8 * STEPS, dtype)
    _copy_state(states, task * block, keys, values, width, s, False)
    for t in range(begin, end, STEPS):
        steps = min(STEPS, end - t)
        pairs = cdiv(steps, 2)
        if chunk_states_flat.shape[0] > 0 and (t - begin) % chunk_size == 0:
            chunk = first_chunks[n] + (t - begin) // chunk_size
            _copy(s, 0, chunk_states_flat, (chunk * value_heads + head) * s.size, s.size)
        later = min(STEPS, end - t - STEPS)
        at = t + STEPS
        _prefetch_rows(k, row * k_sb + at * k_st + k_at, k_st, later, keys)
        _prefetch_rows(q, row * q_sb + at * q_st + k_at, q_st, later, keys)
        _prefetch_rows(v, row * v_sb + at * v_st + v_at, v_st, later, values)
        _load_rows(k, row * k_sb + t * k_st + k_at, k_st, steps, keys, krows, 0, width)
        _normalise_rows(krows, 0, width, steps, width, one, normalise, factor)
        _load_rows(q, row * q_sb + t * q_st + k_at, q_st, steps, keys, qrows, 0, width)
        _normalise_rows(qrows, 0, width, steps, width, q_scale, normalise, factor)
        if steps % 2:  # the step that completes the last pair changes nothing
            krows[steps * width : (steps + 1) * width] = 0
            qrows[steps * width : (steps + 1) * width] = 0
        _load_decays(g, row * g_sb + t * g_st + head, g_st, steps, g_is_logit, gates[:BETA])
        at = row * b_sb + t * b_st + head
        _load_gates(b, at, b_st, steps, b_is_logit, 0, gates[BETA:K_K])
        _fill_gates(krows, qrows, width, pairs, gates)
        at = row * v_sb + t * v_st + v_at
        _load_rows(v, at, v_st, steps, values, vrows, 0, value_width)
        for j in range(0, value_width, LANES):
            at = j * width
            _scan_panel(s, at, width, krows, qrows, gates, vrows, j, value_width, pairs, o, u)
        at = (row * time + t) * stride + v_at
        _store_rows(o, 0, value_width, steps, values, outs, at, stride)
        if errors_flat.shape[0] > 0:
            _store_rows(u, 0, value_width, steps, values, errors_flat, at, stride)
    _copy_state(states, task * block, keys, values, width, s, True)


@inline_jit
def _read_state(s, at, keys, values, k, q, r, p):
    """r (V) = Sᵀ k and p (V) = Sᵀ q for a dense matrix S (K, V). k and q are padded with zeros."""
    r[:] = 0
    p[:] = 0
    whole, last = values - values % LANES, keys - 1
    for i in range(0, keys, 4):  # so that r and p are loaded and stored once for four rows
        s0, s1 = at + i * values, at + min(i + 1, last) * values
        s2, s3 = at + min(i + 2, last) * values, at + min(i + 3, last) * values
        k0, k1, k2, k3 = splat(k, i), splat(k, i + 1), splat(k, i + 2), splat(k, i + 3)
        q0, q1, q2, q3 = splat(q, i), splat(q, i + 1), splat(q, i + 2), splat(q, i + 3)
        for j in range(0, whole, LANES):
            x0, x1, x2, x3 = load(s, s0 + j), load(s, s1 + j), load(s, s2 + j), load(s, s3 + j)
            store(r, j, fma(k3, x3, fma(k2, x2, fma(k1, x1, fma(k0, x0, load(r, j))))))
            store(p, j, fma(q3, x3, fma(q2, x2, fma(q1, x1, fma(q0, x0, load(p, j))))))
        for j in range(whole, values):
            x0, x1, x2, x3 = s[s0 + j], s[s1 + j], s[s2 + j], s[s3 + j]
            r[j] += k[i] * x0 + k[i + 1] * x1 + k[i + 2] * x2 + k[i + 3] * x3
            p[j] += q[i] * x0 + q[i + 1] * x1 + q[i + 2] * x2 + q[i + 3] * x3


@inline_jit
def _write_state(s, s_at, keys, values, alpha, k, e, out, at):
    """A dense matrix (K, V) of ``out`` = α S + k eᵀ. alpha is (1,); ``out`` may be ``s``."""
    whole, decay = values - values % LANES, splat(alpha, 0)
    for i in range(keys):
        here, there, by = s_at + i * values, at + i * values, splat(k, i)
        for j in range(0, whole, LANES):
            store(out, there + j, fma(by, load(e, j), load(s, here + j) * decay))
        for j in range(whole, values):
            out[there + j] = alpha[0] * s[here + j] + k[i] * e[j]


@parallel_kernel
def gated_delta_rule_step(
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
    scale,
    normalise,
    g_is_logit,
    b_is_logit,
    heads,
    initial,
    state,
    out,
):
    """Fill out (B, T, HV, V) and state (N, HV, K, V) from initial, step by step, for few steps.

    ``initial`` may be ``state`` itself. Each step reads the state in place and writes it once, so
    there are no panels to fill.
    """
    time, value_heads, values = out.shape[1:]
    keys, dtype = state.shape[2], state.dtype
    width, value_width = _pad(keys), _pad(values)
    states, outs, before = state.reshape(-1), out.reshape(-1), initial.reshape(-1)
    n, head = task // value_heads, task % value_heads
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    k_at, v_at, at = head // (value_heads // heads) * keys, head * values, task * keys * values
    one, q_scale = dtype.type(1), dtype.type(scale)
    krow, qrow, factor = np.empty(width, dtype), np.empty(width, dtype), np.empty(1, dtype)
    alpha, beta = np.empty(1, dtype), np.empty(1, dtype)
    e, r, p = (
        np.empty(value_width, dtype),
        np.empty(value_width, dtype),
        np.empty(value_width, dtype),
    )
    if begin == end:
        states[at : at + keys * values] = before[at : at + keys * values]
    for t in range(begin, end):
        _load_rows(k, row * k_sb + t * k_st + k_at, k_st, 1, keys, krow, 0, width)
        _normalise_rows(krow, 0, width, 1, width, one, normalise, factor)
        _load_rows(q, row * q_sb + t * q_st + k_at, q_st, 1, keys, qrow, 0, width)
        _normalise_rows(qrow, 0, width, 1, width, q_scale, normalise, factor)
        _load_rows(v, row * v_sb + t * v_st + v_at, v_st, 1, values, e, 0, value_width)
        _load_decays(g, row * g_sb + t * g_st + head, g_st, 1, g_is_logit, alpha)
        _load_gates(b, row * b_sb + t * b_st + head, b_st, 1, b_is_logit, 0, beta)
        q_k = _dot(qrow, 0, krow, 0, width)
        _read_state(before, at, keys, values, krow, qrow, r, p)
        for j in range(value_width):
            e[j] = beta[0] * (e[j] - alpha[0] * r[j])
            p[j] = alpha[0] * p[j] + q_k * e[j]
        _write_state(before, at, keys, values, alpha, krow, e, states, at)
        write(p, 0, outs, (row * time + t) * value_heads * values + v_at, values)
        before = states


@inline_jit
def _transpose_rows(x, at, stride, rows, columns, out, out_stride):
    """out (columns, out_stride) = x (rows, stride) transposed; both sizes are whole vectors."""
    for i in range(0, rows, LANES):
        for j in range(0, columns, LANES):
            transpose(x, at + i * stride + j, stride, out, j * out_stride + i, out_stride)


@inline_jit
def _load_transposed(source, at, rows, columns, out, stride):
    """out (columns, stride) = a dense matrix (rows, columns) transposed, padded with zeros."""
    if rows % LANES or columns % LANES:
        out[:] = 0
    whole_rows, whole = rows - rows % LANES, columns - columns % LANES
    for i in range(0, whole_rows, LANES):
        for j in range(0, whole, LANES):
            transpose(source, at + i * columns + j, columns, out, j * stride + i, stride)
    for i in range(rows):
        for j in range(whole if i < whole_rows else 0, columns):
            out[j * stride + i] = source[at + i * columns + j]


@inline_jit
def _transpose_panels(panels, at, width, value_width, out, stride):
    """out (value_width, stride) = a state in panels (value_width / LANES, width, LANES)."""
    for j in range(0, value_width, LANES):
        for i in range(0, width, LANES):
            transpose(panels, at + j * width + i * LANES, LANES, out, j * stride + i, stride)


@inline_jit
def _store_transposed(x, stride, rows, columns, target, at):
    """A dense matrix (columns, rows) of the target = x (rows, stride) transposed."""
    whole_rows, whole = rows - rows % LANES, columns - columns % LANES
    for i in range(0, whole_rows, LANES):
        for j in range(0, whole, LANES):
            transpose(x, i * stride + j, stride, target, at + j * rows + i, rows)
    for i in range(rows):
        for j in range(whole if i < whole_rows else 0, columns):
            target[at + j * rows + i] = x[i * stride + j]


@inline_jit
def _fill_decays(alpha, count, width, decay, stride):
    """decay[t, s] = Γ_ts for t >= s, else 0; rows of ``width`` numbers, ``stride`` apart."""
    for t in range(count):
        here = t * stride
        if t == 0:
            decay[:width] = 0
        else:
            by = splat(alpha, t)
            for j in range(0, width, LANES):
                store(decay, here + j, load(decay, here - stride + j) * by)
        decay[here + t] = 1


@inline_jit
def _gram(x, x_at, x_stride, yt, y_stride, steps, depth, out, stride):
    """out[t, s] = (row t of x) · (column s of yt) for s <= t, and anything for s > t."""
    for j in range(0, steps, LANES):
        rows = steps - j
        for t in range(steps):
            out[t * stride + j : t * stride + j + LANES] = 0
        add_tiled_product(
            x,
            x_at + j * x_stride,
            x_stride,
            1,
            yt,
            j,
            y_stride,
            out,
            j * stride + j,
            stride,
            rows,
            depth,
            LANES,
            FULL,
        )


@inline_jit
def _multiply(x, y, count):
    """x *= y for whole vectors."""
    for i in range(0, count, LANES):
        store(x, i, load(x, i) * load(y, i))


@inline_jit
def _log_decay_gradient(change, to_end_change, from_start_change, steps, pad, stride, x, out):
    """out[i] = the gradient of log α_i, from the changes by each decay.

    Args:
        change: one number per pair of steps, Γ times its gradient, zero for s > t.
        to_end_change: (C) η times its gradient, zero from ``steps`` on; overwritten.
        from_start_change: (C) γ times its gradient.
        x: γ_C times its gradient.
    """
    for i in range(steps - 1, -1, -1):
        total = zeros(change)
        for j in range(0, pad, LANES):
            store(to_end_change, j, load(to_end_change, j) + load(change, i * stride + j))
        to_end_change[i] = 0  # the decays from step i on do not have the factors α_i, α_{i-1}, …
        for j in range(0, pad, LANES):
            total = total + load(to_end_change, j)
        x += from_start_change[i]
        out[i] = x + add_lanes(total)


@inline_jit
def _solve(p, beta, steps, width, minus, out, stride):
    """out = G = (I + P diag β)⁻¹ P for the strict lower triangle P. minus is (1,) scratch."""
    for t in range(steps):
        here = t * stride
        for j in range(0, width, LANES):
            total = load(p, here + j)
            for s in range(j, t):
                minus[0] = -p[here + s] * beta[s]
                total = fma(splat(minus, 0), load(out, s * stride + j), total)
            store(out, here + j, total)


@inline_jit
def _normalise_adjoint(unit, unit_at, grad, at, stride, count, width, factor, scale, pair):
    """Adjoint of ``_normalise_rows``: grad becomes factor (grad - unit (unit · grad) / scale²).

    pair is scratch of two numbers.
    """
    for t in range(count):
        here, there = unit_at + t * stride, at + t * stride
        pair[0] = -_dot(unit, here, grad, there, width) / (scale * scale)
        pair[1] = factor[t]
        off, by = splat(pair, 0), splat(pair, 1)
        for j in range(0, width, LANES):
            store(grad, there + j, fma(load(unit, here + j), off, load(grad, there + j)) * by)


@parallel_kernel
def gated_delta_rule_bwd(
    task,
    sequence_bounds,
    first_chunks,
    chunk_size,
    q,
    q_sb,
    q_st,
    k,
    k_sb,
    k_st,
    g,
    g_sb,
    g_st,
    b,
    b_sb,
    b_st,
    scale,
    normalise,
    g_is_logit,
    b_is_logit,
    heads,
    errors,
    chunk_states,
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
    """Fill dq, dk (B, T, HV, K), dv (B, T, HV, V), dg, db (B, T, HV).

    dstate (N, HV, K, V) goes from dS_T to dS_0. The arguments up to chunk_states are those of the
    forward pass, without v. Each value head has its own rows of dq and dk.
    """
    time, value_heads, values = dv.shape[1:]
    keys, dtype = dstate.shape[2], dstate.dtype
    width, value_width = _pad(keys), _pad(values)
    ks, vs, cs = _row_stride(width), _row_stride(value_width), _row_stride(chunk_size)
    block, one = keys * values, dtype.type(1)
    q_scale = dtype.type(scale)
    dstates, chunk_states_flat, errors_flat = (
        dstate.reshape(-1),
        chunk_states.reshape(-1),
        errors.reshape(-1),
    )
    dqs, dks, dvs = dq.reshape(-1), dk.reshape(-1), dv.reshape(-1)
    n, head = task // value_heads, task % value_heads
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    k_at, v_at = head // (value_heads // heads) * keys, head * values
    # (V, K): S and A transposed
    st, at = np.empty(value_width * ks, dtype), np.empty(value_width * ks, dtype)
    # rows of q̂, then of k̂; dq̂, then dk̂; γ do, then -γ dv. What is transposed has room for padding
    qk = np.zeros((2 * chunk_size + LANES) * ks, dtype)
    dqk = np.empty(2 * chunk_size * ks, dtype)
    dod = np.empty(2 * chunk_size * vs, dtype)
    # rows: do; e; dE, then de, then dv, then η e
    dor, er = np.empty(chunk_size * vs, dtype), np.zeros((chunk_size + LANES) * vs, dtype)
    der = np.empty((chunk_size + LANES) * vs, dtype)
    # columns, one step per lane: k̂; e, and before (K̂ A)ᵀ
    kt, et = np.empty(width * cs, dtype), np.empty(value_width * cs, dtype)
    # one number per pair of steps
    decay, pairs = np.empty(chunk_size * cs, dtype), np.empty(chunk_size * cs, dtype)
    solved, scores = np.empty(chunk_size * cs, dtype), np.empty(chunk_size * cs, dtype)
    change = np.empty(chunk_size * cs, dtype)
    # one number per step
    alpha, beta = np.empty(chunk_size, dtype), np.empty(chunk_size, dtype)
    from_start, minus_from_start = np.empty(chunk_size, dtype), np.empty(chunk_size, dtype)
    to_end, minus_beta = np.empty(chunk_size, dtype), np.empty(chunk_size, dtype)
    q_factor, k_factor = np.empty(chunk_size, dtype), np.empty(chunk_size, dtype)
    to_end_change, from_start_change = np.empty(chunk_size, dtype), np.empty(chunk_size, dtype)
    dlog_alpha, pair = np.empty(chunk_size, dtype), np.empty(2, dtype)
    _load_transposed(dstates, task * block, keys, values, at, ks)
    for chunk in range(cdiv(end - begin, chunk_size) - 1, -1, -1):
        t = begin + chunk * chunk_size
        steps = min(chunk_size, end - t)
        pad = _pad(steps)
        q_begin, k_begin, v_begin = 0, steps * ks, steps * vs
        # inputs
        here = row * q_sb + t * q_st + k_at
        _load_rows(q, here, q_st, steps, keys, qk, q_begin, ks)
        _normalise_rows(qk, q_begin, ks, steps, width, q_scale, normalise, q_factor)
        here = row * k_sb + t * k_st + k_at
        _load_rows(k, here, k_st, steps, keys, qk, k_begin, ks)
        _normalise_rows(qk, k_begin, ks, steps, width, one, normalise, k_factor)
        qk[2 * steps * ks : (steps + pad) * ks] = 0
        _transpose_rows(qk, k_begin, ks, pad, width, kt, cs)
        here = row * do_sb + t * do_st + v_at
        _load_rows(do, here, do_st, steps, values, dor, 0, vs)
        _load_decays(g, row * g_sb + t * g_st + head, g_st, steps, g_is_logit, alpha)
        _load_gates(b, row * b_sb + t * b_st + head, b_st, steps, b_is_logit, 0, beta)
        here = ((first_chunks[n] + chunk) * value_heads + head) * width * value_width
        _transpose_panels(chunk_states_flat, here, width, value_width, st, ks)
        _fill_decays(alpha, steps, pad, decay, cs)
        for i in range(steps):
            from_start[i] = alpha[0] * decay[i * cs]
            minus_from_start[i] = -from_start[i]
            to_end[i] = decay[(steps - 1) * cs + i]
            minus_beta[i] = -beta[i]

        # dE, then de, then dV and dβ
        _gram(qk, k_begin, ks, kt, cs, steps, width, pairs, cs)
        _multiply(pairs, decay, steps * cs)
        for i in range(steps):
            pairs[i * cs + i] = 0
        _solve(pairs, beta, steps, pad, pair, solved, cs)
        _gram(qk, q_begin, ks, kt, cs, steps, width, scores, cs)
        _multiply(scores, decay, steps * cs)
        et[:] = 0
        add_tiled_product(at, 0, ks, 1, kt, 0, cs, et, 0, cs, value_width, width, pad, FULL)
        _transpose_rows(et, 0, cs, value_width, pad, der, vs)
        here = (row * time + t) * value_heads * values + v_at
        _load_rows(errors_flat, here, value_heads * values, steps, values, er, 0, vs)
        er[steps * vs : pad * vs] = 0
        _scale_rows(der, 0, vs, steps, value_width, to_end, der, 0)
        to_end_change[:] = 0
        for i in range(steps):
            to_end_change[i] = beta[i] * _dot(der, i * vs, er, i * vs, value_width)
        add_tiled_product(
            scores, 0, 1, cs, dor, 0, vs, der, 0, vs, steps, steps, value_width, UPPER
        )
        _scale_rows(der, 0, vs, steps, value_width, minus_beta, dod, 0)
        add_tiled_product(
            solved, 0, 1, cs, dod, 0, vs, der, 0, vs, steps, steps, value_width, UPPER
        )
        for i in range(steps):
            slope = beta[i] * (one - beta[i]) if b_is_logit else one
            db[row, t + i, head] = slope * _dot(der, i * vs, er, i * vs, value_width)
        _scale_rows(er, 0, vs, steps, value_width, beta, er, 0)
        _scale_rows(der, 0, vs, steps, value_width, beta, der, 0)
        _store_rows(der, 0, vs, steps, values, dvs, here, value_heads * values)

        # dQ̂ and dK̂
        _scale_rows(dor, 0, vs, steps, value_width, from_start, dod, 0)
        _scale_rows(der, 0, vs, steps, value_width, minus_from_start, dod, v_begin)
        dqk[: 2 * steps * ks] = 0
        add_tiled_product(dod, 0, vs, 1, st, 0, ks, dqk, 0, ks, 2 * steps, value_width, width, FULL)
        for i in range(steps):
            at_q, at_k = i * ks, k_begin + i * ks
            by_q, by_k = _dot(qk, at_q, dqk, at_q, width), _dot(qk, at_k, dqk, at_k, width)
            from_start_change[i] = by_q + by_k
        _transpose_rows(er, 0, vs, pad, value_width, et, cs)
        _gram(dor, 0, vs, et, cs, steps, value_width, solved, cs)
        for i in range(0, steps * cs, LANES):
            raw = load(solved, i)
            store(change, i, raw * load(scores, i))
            store(scores, i, raw * load(decay, i))
        add_tiled_product(scores, 0, cs, 1, qk, k_begin, ks, dqk, 0, ks, steps, steps, width, LOWER)
        add_tiled_product(
            scores, 0, 1, cs, qk, q_begin, ks, dqk, k_begin, ks, steps, steps, width, UPPER
        )
        _gram(der, 0, vs, et, cs, steps, value_width, solved, cs)
        for i in range(0, steps * cs, LANES):
            raw = load(solved, i)
            store(change, i, load(change, i) - raw * load(pairs, i))
            store(pairs, i, raw * load(decay, i))
        _scale_rows(er, 0, vs, steps, value_width, to_end, der, 0)
        add_tiled_product(
            der, 0, vs, 1, at, 0, ks, dqk, k_begin, ks, steps, value_width, width, FULL
        )
        for i in range(steps):
            pairs[i * cs + i] = 0
            for j in range(i):
                pairs[i * cs + j] = -pairs[i * cs + j]
                pairs[j * cs + i] = pairs[i * cs + j]
        add_tiled_product(
            pairs, 0, cs, 1, qk, k_begin, ks, dqk, k_begin, ks, steps, steps, width, FULL
        )

        # what the next chunk reads first; it lies before this one
        at_next = max(t - chunk_size, begin)
        next_steps = t - at_next
        _prefetch_rows(k, row * k_sb + at_next * k_st + k_at, k_st, next_steps, keys)
        _prefetch_rows(q, row * q_sb + at_next * q_st + k_at, q_st, next_steps, keys)
        _prefetch_rows(do, row * do_sb + at_next * do_st + v_at, do_st, next_steps, values)
        here = (row * time + at_next) * value_heads * values + v_at
        _prefetch_rows(errors_flat, here, value_heads * values, next_steps, values)
        if chunk > 0:
            here = ((first_chunks[n] + chunk - 1) * value_heads + head) * width * value_width
            _prefetch_rows(chunk_states_flat, here, 0, 1, width * value_width)

        # γ_C A, γ_C <A, S> and dα, then A
        chunk_decay, total = splat(from_start, steps - 1), zeros(at)
        for i in range(value_width):
            row_total = zeros(at)
            for j in range(i * ks, i * ks + width, LANES):
                decayed = load(at, j) * chunk_decay
                store(at, j, decayed)
                row_total = fma(decayed, load(st, j), row_total)
            total = total + row_total
        x = add_lanes(total)
        _log_decay_gradient(change, to_end_change, from_start_change, steps, pad, cs, x, dlog_alpha)
        for i in range(steps):
            dg[row, t + i, head] = dlog_alpha[i] * (one - alpha[i] if g_is_logit else one)
        add_tiled_product(dod, 0, 1, vs, qk, 0, ks, at, 0, ks, value_width, 2 * steps, width, FULL)

        if normalise:
            _normalise_adjoint(qk, q_begin, dqk, q_begin, ks, steps, width, q_factor, q_scale, pair)
            _normalise_adjoint(qk, k_begin, dqk, k_begin, ks, steps, width, k_factor, one, pair)
        else:
            _scale_rows(dqk, q_begin, ks, steps, width, q_factor, dqk, q_begin)
        here = ((row * time + t) * value_heads + head) * keys
        _store_rows(dqk, q_begin, ks, steps, keys, dqs, here, value_heads * keys)
        _store_rows(dqk, k_begin, ks, steps, keys, dks, here, value_heads * keys)
    _store_transposed(at, ks, values, keys, dstates, task * block)
