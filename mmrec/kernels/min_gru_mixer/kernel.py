"""Numba kernels of the minGRU mixer. Arrays in, arrays out, no checks.

Axes: B batch, T time, D channels, N sequences. A row of ``projected`` (B, T, 4 D) is [z, f, g, r]:
candidate, forget logits, input logits, output gate. All arrays but ``sequence_bounds`` are flat;
``p_sb`` and ``p_st`` are the strides of ``projected`` over batch row and time, ``dy_sb`` and
``dy_st`` those of dy. A row n of ``sequence_bounds``
(N, 3) holds the batch row, first step and end of sequence n.

    γ_t = σ(f_t + b),   h_t = (1 - γ_t) z_t σ(g_t) + γ_t h_{t-1},   y_t = n(h_t) silu(r_t)

with n(h) = h i, i = (mean h² + ε)^-1/2. Adjoint, with u_t the gradient of h_t:

    dr_t = dy_t n_t σ(r)(1 + r (1 - σ(r)))          e_t = dy_t silu(r_t)
    u_t  = i (e_t - n_t mean(e_t n_t)) + γ_{t+1} u_{t+1}
    dz_t = u_t (1 - γ_t) σ(g)                       dg_t = dz_t z_t (1 - σ(g))
    df_t = u_t (h_{t-1} - z_t σ(g)) γ_t (1 - γ_t),  db = Σ_t df_t

A task is one sequence. A row of ``projected`` is read from memory once; everything computed from it
happens in the first-level cache, where separate ops would pass over memory some twenty times.
Scratch rows have zeros up to a whole number of vectors.
"""

import numpy as np

from mmrec.kernels._bf16 import prefetch_row, read, write
from mmrec.kernels._gates import one_minus, sigmoids
from mmrec.kernels._jit import always_inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import cdiv
from mmrec.kernels._simd import LANES, add_lanes, fma, load, splat, store, zeros

AHEAD = 2  # steps that the backward pass fetches ahead
EPSILON = 1e-6  # added to the mean square of the RMS norm


@always_inline_jit
def _rms_scale(h, width, scalars):
    """scalars[0] = 1 / root mean square of the row h, whose first ``width`` numbers count."""
    squares, one = zeros(h), h.dtype.type(1)
    for d in range(0, h.size, LANES):
        x = load(h, d)
        squares = fma(x, x, squares)
    mean = add_lanes(squares) / h.dtype.type(width)
    scalars[0] = one / np.sqrt(mean + h.dtype.type(EPSILON))


@always_inline_jit
def _step(z, f, g, bias, state):
    """Move the state h by one step."""
    for d in range(0, state.size, LANES):
        gamma = sigmoids(load(f, d) + load(bias, d))
        written = load(z, d) * sigmoids(load(g, d))
        store(state, d, fma(gamma, load(state, d) - written, written))


@always_inline_jit
def _output(state, r, scalars, y):
    """y = n(h) silu(r)."""
    scale = splat(scalars, 0)
    for d in range(0, state.size, LANES):
        gate = load(r, d)
        store(y, d, load(state, d) * scale * gate * sigmoids(gate))


@always_inline_jit
def _output_gradients(r, h, width, scalars, grad):
    """Turn h into n, r into dr, and dy in ``grad`` into e; scalars[1] = mean(e n)."""
    scale, total = splat(scalars, 0), zeros(h)
    for d in range(0, h.size, LANES):
        normalised, dy, gate = load(h, d) * scale, load(grad, d), load(r, d)
        open_share = sigmoids(gate)
        e = dy * (gate * open_share)
        through = dy * normalised * open_share
        store(r, d, fma(through, gate * one_minus(open_share), through))
        store(h, d, normalised)
        store(grad, d, e)
        total = fma(e, normalised, total)
    scalars[1] = add_lanes(total) / h.dtype.type(width)


@always_inline_jit
def _state_gradients(z, f, g, bias, before, normalised, grad, scalars, carry, bias_grad):
    """Turn z, f and g into their gradients; move the gradient of h in ``carry`` by one step."""
    scale, mean = splat(scalars, 0), splat(scalars, 1)
    for d in range(0, carry.size, LANES):
        gamma, gate = sigmoids(load(f, d) + load(bias, d)), sigmoids(load(g, d))
        u = fma(scale, load(grad, d) - load(normalised, d) * mean, load(carry, d))
        candidate = load(z, d)
        dz = u * one_minus(gamma) * gate
        df = u * (load(before, d) - candidate * gate) * (gamma * one_minus(gamma))
        store(z, d, dz)
        store(g, d, dz * candidate * one_minus(gate))
        store(f, d, df)
        store(bias_grad, d, load(bias_grad, d) + df)
        store(carry, d, u * gamma)


@parallel_kernel
def min_gru_mixer_fwd(n, projected, p_sb, p_st, bias, initial, sequence_bounds, time, y, h, final):
    """Fill y (B, T, D), final (N, D) and, unless it is empty, h (B, T, D) for the backward pass.

    projected and y may hold bfloat16.
    """
    width = bias.size
    rows, scalars = np.zeros((7, cdiv(width, LANES) * LANES), bias.dtype), np.empty(1, bias.dtype)
    z, f, g, r, shift, state, out = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6]
    read(bias, 0, shift, 0, width)
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    read(initial, n * width, state, 0, width)
    for t in range(begin, end):
        at, out_at = row * p_sb + t * p_st, (row * time + t) * width
        read(projected, at, z, 0, width)
        read(projected, at + width, f, 0, width)
        read(projected, at + 2 * width, g, 0, width)
        read(projected, at + 3 * width, r, 0, width)
        _step(z, f, g, shift, state)
        _rms_scale(state, width, scalars)
        _output(state, r, scalars, out)
        write(out, 0, y, out_at, width)
        if h.size > 0:
            write(state, 0, h, out_at, width)
    write(state, 0, final, n * width, width)


@parallel_kernel
def min_gru_mixer_bwd(
    n,
    projected,
    p_sb,
    p_st,
    dy,
    dy_sb,
    dy_st,
    bias,
    initial,
    h,
    dfinal,
    sequence_bounds,
    time,
    dprojected,
    dbias,
    dinitial,
):
    """Fill dprojected (B, T, 4 D), dinitial (N, D) and dbias (N, D), one row per sequence.

    projected, dy and dprojected may hold bfloat16.
    """
    width = bias.size
    rows, scalars = np.zeros((10, cdiv(width, LANES) * LANES), bias.dtype), np.empty(2, bias.dtype)
    z, f, g, r, now, before, grad = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6]
    shift, carry, bias_grad = rows[7], rows[8], rows[9]
    read(bias, 0, shift, 0, width)
    row, begin, end = sequence_bounds[n, 0], sequence_bounds[n, 1], sequence_bounds[n, 2]
    read(dfinal, n * width, carry, 0, width)
    for t in range(end - 1, begin - 1, -1):
        at, here = row * p_sb + t * p_st, (row * time + t) * width
        prefetch_row(projected, at - AHEAD * p_st, 4 * width)
        prefetch_row(dprojected, 4 * (here - AHEAD * width), 4 * width)
        prefetch_row(h, here - (AHEAD + 1) * width, width)
        prefetch_row(dy, row * dy_sb + (t - AHEAD) * dy_st, width)
        read(projected, at, z, 0, width)
        read(projected, at + width, f, 0, width)
        read(projected, at + 2 * width, g, 0, width)
        read(projected, at + 3 * width, r, 0, width)
        read(dy, row * dy_sb + t * dy_st, grad, 0, width)
        read(h, here, now, 0, width)
        if t > begin:
            read(h, here - width, before, 0, width)
        else:
            read(initial, n * width, before, 0, width)
        _rms_scale(now, width, scalars)
        _output_gradients(r, now, width, scalars, grad)
        _state_gradients(z, f, g, shift, before, now, grad, scalars, carry, bias_grad)
        write(z, 0, dprojected, 4 * here, width)
        write(f, 0, dprojected, 4 * here + width, width)
        write(g, 0, dprojected, 4 * here + 2 * width, width)
        write(r, 0, dprojected, 4 * here + 3 * width, width)
    write(bias_grad, 0, dbias, n * width, width)
    write(carry, 0, dinitial, n * width, width)
