"""Numba kernels of the associative memory. Arrays in, arrays out, no checks.

Axes: B batch, T time, H heads, P head width. q, k, v are flat with strides over (B, T) and hold
(H, P) at each step; decay and write hold (H). Outputs are contiguous.

    k̂ = k (|k|² + ε)^-½, q̂ likewise, α = σ(decay), β = σ(write)
    r_t = S_{t-1}ᵀ k̂_t      e_t = β_t (v_t - α_t r_t)
    S_t = α_t S_{t-1} + k̂_t e_tᵀ      o_t = S_tᵀ q̂_t

Adjoint, with A the gradient of S_t and the walk backwards in time:

    dq̂ = S_t do,  A += q̂ doᵀ,  de = Aᵀ k̂,  dβ = de · (v - α r),  dv = β de,  dr = -α dv
    dk̂ = A e + S_{t-1} dr,  dα = <A, S_{t-1}> - dv · r,  A <- α A + k̂ drᵀ

Matrix states are not stored for every step: the forward keeps one every CHUNK steps and the
backward computes the others again, a chunk at a time, into a buffer that stays in cache.

A task is one head of one batch row; heads never meet, so tasks share nothing they write.
"""

import math

import numpy as np
from numba import njit, prange

from mmrec.kernels.activation import sigmoid
from mmrec.kernels.threads import COMPILE, REDUCE

CHUNK = 32
EPSILON = 1e-6


@njit(**REDUCE)
def _normalise(x, out):
    """out = x (|x|² + ε)^-½; returns the factor."""
    total = x.dtype.type(EPSILON)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = x.dtype.type(1) / x.dtype.type(math.sqrt(total))
    for i in range(x.shape[0]):
        out[i] = x[i] * factor
    return factor


@njit(**REDUCE)
def _read(state, key, out):
    """out = stateᵀ key, four rows of the state at a time."""
    n = out.shape[0]
    out[:] = 0
    for i in range(0, n - n % 4, 4):
        s0, s1, s2, s3 = state[i], state[i + 1], state[i + 2], state[i + 3]
        k0, k1, k2, k3 = key[i], key[i + 1], key[i + 2], key[i + 3]
        for j in range(n):
            out[j] += k0 * s0[j] + k1 * s1[j] + k2 * s2[j] + k3 * s3[j]
    for i in range(n - n % 4, n):
        for j in range(n):
            out[j] += key[i] * state[i, j]


@njit(**REDUCE)
def _decay_and_write(before, alpha, key, value, after):
    """after = alpha before + key valueᵀ; before and after may be the same."""
    n = value.shape[0]
    for i in range(n):
        s, u, k = before[i], after[i], key[i]
        for j in range(n):
            u[j] = alpha * s[j] + k * value[j]


@njit(**REDUCE)
def _pull_read(state, dout, query, adjoint, dquery):
    """Adjoint of out = stateᵀ query: dquery = state dout, adjoint += query doutᵀ."""
    n = dout.shape[0]
    for i in range(n):
        s, a, x = state[i], adjoint[i], query[i]
        total = dout.dtype.type(0)
        for j in range(n):
            total += s[j] * dout[j]
            a[j] += x * dout[j]
        dquery[i] = total


@njit(**REDUCE)
def _pull_write(before, alpha, key, error, dread, adjoint, dkey):
    """Adjoint of read and write together; fills dkey, moves adjoint a step back, returns <A, S>."""
    n = error.shape[0]
    dalpha = error.dtype.type(0)
    for i in range(n):
        s, a, k = before[i], adjoint[i], key[i]
        total = error.dtype.type(0)
        for j in range(n):
            total += a[j] * error[j] + s[j] * dread[j]
            dalpha += a[j] * s[j]
            a[j] = alpha * a[j] + k * dread[j]
        dkey[i] = total
    return dalpha


@njit(**REDUCE)
def _pull_normalise(unit, factor, dunit, out):
    """out = factor (dunit - unit (unit · dunit)), the adjoint of _normalise."""
    dot = unit.dtype.type(0)
    for i in range(unit.shape[0]):
        dot += unit[i] * dunit[i]
    for i in range(unit.shape[0]):
        out[i] = factor * (dunit[i] - unit[i] * dot)


@njit(**COMPILE)
def memory_fwd(
    q, q_sb, q_st, k, k_sb, k_st, v, v_sb, v_st, a, a_sb, a_st, b, b_sb, b_st, state, out, kept
):
    """Fill out (B, T, H, P); state (B, H, P, P) goes from S_0 to S_T; kept (B, H, T/CHUNK, P, P)
    receives the state at the start of each chunk, unless it is empty."""
    batch, time, heads, size = out.shape
    for task in prange(batch * heads):  # rows x heads: independent
        row, head = task // heads, task % heads
        s, lo = state[row, head], head * size
        key, query = np.empty(size, out.dtype), np.empty(size, out.dtype)
        read, error = np.empty(size, out.dtype), np.empty(size, out.dtype)
        for t in range(time):
            if kept.shape[2] > 0 and t % CHUNK == 0:
                kept[row, head, t // CHUNK] = s
            qt, kt = row * q_sb + t * q_st + lo, row * k_sb + t * k_st + lo
            vt = row * v_sb + t * v_st + lo
            value = v[vt : vt + size]
            _normalise(k[kt : kt + size], key)
            _normalise(q[qt : qt + size], query)
            alpha = sigmoid(a[row * a_sb + t * a_st + head])
            beta = sigmoid(b[row * b_sb + t * b_st + head])
            _read(s, key, read)
            for j in range(size):
                error[j] = beta * (value[j] - alpha * read[j])
            _decay_and_write(s, alpha, key, error, s)
            _read(s, query, out[row, t, head])


@njit(**COMPILE)
def memory_bwd(
    q, q_sb, q_st, k, k_sb, k_st, v, v_sb, v_st, a, a_sb, a_st, b, b_sb, b_st,
    kept, do, do_sb, do_st, adjoint, dq, dk, dv, da, db,
):  # fmt: skip
    """Fill dq, dk, dv (B, T, H, P), da, db (B, T, H); adjoint (B, H, P, P): from dS_T to dS_0."""
    batch, time, heads, size = dq.shape
    one = dq.dtype.type(1)
    for task in prange(batch * heads):  # rows x heads: independent
        row, head = task // heads, task % heads
        lo, grad = head * size, adjoint[row, head]
        states = np.empty((CHUNK + 1, size, size), dq.dtype)
        keys, errors = np.empty((CHUNK, size), dq.dtype), np.empty((CHUNK, size), dq.dtype)
        reads, factors = np.empty((CHUNK, size), dq.dtype), np.empty(CHUNK, dq.dtype)
        query, dquery = np.empty(size, dq.dtype), np.empty(size, dq.dtype)
        derror, dkey, dread = (
            np.empty(size, dq.dtype),
            np.empty(size, dq.dtype),
            np.empty(size, dq.dtype),
        )
        for chunk in range((time + CHUNK - 1) // CHUNK - 1, -1, -1):
            start, end = chunk * CHUNK, min(time, chunk * CHUNK + CHUNK)
            states[0] = kept[row, head, chunk]
            for t in range(start, end):
                i = t - start
                kt, vt = row * k_sb + t * k_st + lo, row * v_sb + t * v_st + lo
                value = v[vt : vt + size]
                factors[i] = _normalise(k[kt : kt + size], keys[i])
                alpha = sigmoid(a[row * a_sb + t * a_st + head])
                beta = sigmoid(b[row * b_sb + t * b_st + head])
                _read(states[i], keys[i], reads[i])
                for j in range(size):
                    errors[i, j] = beta * (value[j] - alpha * reads[i, j])
                _decay_and_write(states[i], alpha, keys[i], errors[i], states[i + 1])
            for t in range(end - 1, start - 1, -1):
                i = t - start
                qt, vt = row * q_sb + t * q_st + lo, row * v_sb + t * v_st + lo
                ot = row * do_sb + t * do_st + lo
                value, dout = v[vt : vt + size], do[ot : ot + size]
                alpha = sigmoid(a[row * a_sb + t * a_st + head])
                beta = sigmoid(b[row * b_sb + t * b_st + head])
                factor = _normalise(q[qt : qt + size], query)
                _pull_read(states[i + 1], dout, query, grad, dquery)
                _pull_normalise(query, factor, dquery, dq[row, t, head])
                _read(grad, keys[i], derror)
                dalpha, dbeta = dq.dtype.type(0), dq.dtype.type(0)
                for j in range(size):
                    dvalue = beta * derror[j]
                    dbeta += derror[j] * (value[j] - alpha * reads[i, j])
                    dalpha -= dvalue * reads[i, j]
                    dread[j] = -alpha * dvalue
                    dv[row, t, head, j] = dvalue
                dalpha += _pull_write(states[i], alpha, keys[i], errors[i], dread, grad, dkey)
                _pull_normalise(keys[i], factors[i], dkey, dk[row, t, head])
                da[row, t, head] = dalpha * alpha * (one - alpha)
                db[row, t, head] = dbeta * beta * (one - beta)
