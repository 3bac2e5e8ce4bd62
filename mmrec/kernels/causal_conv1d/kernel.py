"""Numba kernels of the causal depthwise convolution. Arrays in, arrays out, no checks.

Axes: B batch, D channels, L time, W width of the convolution, S sequences. x, out and their
gradients are flat with strides (batch, time, channel); weight (D, W), bias (D) and the inputs
before the first step, initial (B, D, W - 1), are contiguous. A row of ``runs`` (S, 4) holds the
batch row, first step and end of a sequence, and whether it begins from initial (else from zeros).

    p_t = bias + Σ_k w_k x_{t-W+1+k}        out_t = p_t σ(p_t)   (or p_t)

Adjoint:

    dp_t = dout_t σ(p_t) (1 + p_t (1 - σ(p_t)))     dx_t = Σ_k w_k dp_{t+W-1-k}
    dw_k = Σ_t dp_t x_{t-W+1+k}                     dbias = Σ_t dp_t

A vector holds LANES channels: a block. A task is a slice of at most SLICE blocks of one sequence;
tasks share nothing that they write. Both passes go forward in time, tile by tile, and keep the last
W - 1 rows of x (and of dp) of each block. dx lags by W - 1 steps.
"""

import numpy as np

from mmrec.kernels._channel_tiles import (
    TILE_STEPS,
    load_columns,
    load_tile,
    store_columns,
    store_tile,
)
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import cdiv
from mmrec.kernels._math import sigmoid as scalar_sigmoid
from mmrec.kernels._simd import LANES, fma, load, store, zeros
from mmrec.kernels._vector_math import sigmoid

SLICE = 8
"""Blocks of channels in a task."""


@inline_jit
def _copy_rows(source, source_at, target, target_at, rows):
    """Copy vectors."""
    for i in range(0, rows * LANES, LANES):
        store(target, target_at + i, load(source, source_at + i))


@inline_jit
def _load_block(weight, bias, initial, row, from_initial, channel, channels, width, w, b, past):
    """The weights (W, LANES), bias (LANES) and inputs (W - 1, LANES) before the first step."""
    one = w.dtype.type(1)
    load_columns(weight, channel * width, width, channels, one, w, 0)
    load_columns(bias, channel, 1, channels, one, b, 0)
    past[: (width - 1) * LANES] = 0
    if from_initial:
        at = (row * (bias.shape[0]) + channel) * (width - 1)
        load_columns(initial, at, width - 1, channels, one, past, 0)


@parallel_kernel
def causal_conv1d_fwd(
    task, runs, channels_total, silu, x, x_strides, weight, bias, initial, out, out_strides
):
    """Fill out (B, D, L)."""
    width, dtype = weight.shape[0] // channels_total, out.dtype
    blocks = cdiv(channels_total, LANES)
    slices = cdiv(blocks, SLICE)
    run, first = task // slices, task % slices * SLICE
    count, keep = min(SLICE, blocks - first), width - 1
    row, first_step, end = runs[run, 0], runs[run, 1], runs[run, 2]
    w, b = np.empty(SLICE * width * LANES, dtype), np.empty(SLICE * LANES, dtype)
    past = np.empty(SLICE * keep * LANES, dtype)
    rows = np.empty((keep + TILE_STEPS) * LANES, dtype)
    ys = np.empty(TILE_STEPS * LANES, dtype)
    for i in range(count):
        channel = (first + i) * LANES
        channels = min(LANES, channels_total - channel)
        _load_block(
            weight,
            bias,
            initial,
            row,
            runs[run, 3],
            channel,
            channels,
            width,
            w[i * width * LANES :],
            b[i * LANES :],
            past[i * keep * LANES :],
        )
    for begin in range(first_step, end, TILE_STEPS):
        steps = min(TILE_STEPS, end - begin)
        for i in range(count):
            channel = (first + i) * LANES
            channels = min(LANES, channels_total - channel)
            _copy_rows(past, i * keep * LANES, rows, 0, keep)
            at = row * x_strides[0] + begin * x_strides[1] + channel * x_strides[2]
            load_tile(x, at, x_strides[1], x_strides[2], steps, channels, rows, keep * LANES)
            _copy_rows(rows, steps * LANES, past, i * keep * LANES, keep)
            for t in range(0, steps * LANES, LANES):
                total = load(b, i * LANES)
                for k in range(0, width * LANES, LANES):
                    total = fma(load(rows, t + k), load(w, i * width * LANES + k), total)
                store(ys, t, total)
            if silu:
                for t in range(0, steps * LANES, LANES):
                    total = load(ys, t)
                    store(ys, t, total * sigmoid(total))
            at = row * out_strides[0] + begin * out_strides[1] + channel * out_strides[2]
            store_tile(ys, 0, out, at, out_strides[1], out_strides[2], steps, channels)


@parallel_kernel
def causal_conv1d_bwd(
    task,
    runs,
    channels_total,
    silu,
    x,
    x_strides,
    weight,
    bias,
    initial,
    dout,
    dout_strides,
    dx,
    dx_strides,
    dweight,
    dbias,
    dinitial,
):
    """Fill dx (B, D, L) and dinitial (B, D, W - 1).

    dweight (S, D, W) and dbias (S, D) hold a sum per sequence.
    """
    width, dtype = weight.shape[0] // channels_total, dx.dtype
    blocks = cdiv(channels_total, LANES)
    slices = cdiv(blocks, SLICE)
    run, first = task // slices, task % slices * SLICE
    count, keep = min(SLICE, blocks - first), width - 1
    row, first_step, end, from_initial = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
    w, b = np.empty(SLICE * width * LANES, dtype), np.empty(SLICE * LANES, dtype)
    dw, db = np.zeros(SLICE * width * LANES, dtype), np.zeros(SLICE * LANES, dtype)
    past, dpast = np.empty(SLICE * keep * LANES, dtype), np.zeros(SLICE * keep * LANES, dtype)
    dfirst = np.zeros(SLICE * keep * LANES, dtype)
    rows = np.empty((keep + TILE_STEPS) * LANES, dtype)
    drows, dxs = np.empty((keep + TILE_STEPS) * LANES, dtype), np.empty(TILE_STEPS * LANES, dtype)
    one = np.ones(LANES, dtype)
    for i in range(count):
        channel = (first + i) * LANES
        channels = min(LANES, channels_total - channel)
        _load_block(
            weight,
            bias,
            initial,
            row,
            from_initial,
            channel,
            channels,
            width,
            w[i * width * LANES :],
            b[i * LANES :],
            past[i * keep * LANES :],
        )
    # beyond the end dp is zero, and the steps there flush the last rows of dx
    for begin in range(first_step, end + keep, TILE_STEPS):
        steps = max(min(TILE_STEPS, end - begin), 0)
        lagging = min(TILE_STEPS, end + keep - begin)
        for i in range(count):
            channel = (first + i) * LANES
            channels = min(LANES, channels_total - channel)
            _copy_rows(past, i * keep * LANES, rows, 0, keep)
            _copy_rows(dpast, i * keep * LANES, drows, 0, keep)
            at = row * x_strides[0] + begin * x_strides[1] + channel * x_strides[2]
            load_tile(x, at, x_strides[1], x_strides[2], steps, channels, rows, keep * LANES)
            at = row * dout_strides[0] + begin * dout_strides[1] + channel * dout_strides[2]
            load_tile(
                dout, at, dout_strides[1], dout_strides[2], steps, channels, drows, keep * LANES
            )
            _copy_rows(rows, steps * LANES, past, i * keep * LANES, keep)
            weights, ones = i * width * LANES, load(one, 0)
            if silu:
                for t in range(0, steps * LANES, LANES):
                    total = load(b, i * LANES)
                    for k in range(0, width * LANES, LANES):
                        total = fma(load(rows, t + k), load(w, weights + k), total)
                    part = sigmoid(total)
                    slope = part * fma(total, ones - part, ones)
                    now = keep * LANES + t
                    store(drows, now, load(drows, now) * slope)
            total = load(db, i * LANES)
            for t in range(0, steps * LANES, LANES):
                total = total + load(drows, keep * LANES + t)
            store(db, i * LANES, total)
            for k in range(0, width * LANES, LANES):
                total = load(dw, weights + k)
                for t in range(0, steps * LANES, LANES):
                    total = fma(load(drows, keep * LANES + t), load(rows, t + k), total)
                store(dw, weights + k, total)
            for t in range(0, lagging * LANES, LANES):
                total = zeros(dxs)
                for k in range(0, width * LANES, LANES):
                    total = fma(load(drows, keep * LANES + t - k), load(w, weights + k), total)
                store(dxs, t, total)
            _copy_rows(drows, lagging * LANES, dpast, i * keep * LANES, keep)
            early = max(min(first_step + keep - begin, lagging), 0)  # rows before the first step
            _copy_rows(dxs, 0, dfirst, (i * keep + begin - first_step) * LANES, early)
            at = row * dx_strides[0] + (begin - keep + early) * dx_strides[1]
            at += channel * dx_strides[2]
            store_tile(
                dxs,
                early * LANES,
                dx,
                at,
                dx_strides[1],
                dx_strides[2],
                lagging - early,
                channels,
            )
    for i in range(count):
        channel = (first + i) * LANES
        channels = min(LANES, channels_total - channel)
        at = run * channels_total + channel
        store_columns(dw, i * width * LANES, width, channels, dweight, at * width)
        store_columns(db, i * LANES, 1, channels, dbias, at)
        if from_initial:
            at = (row * channels_total + channel) * keep
            store_columns(dfirst, i * keep * LANES, keep, channels, dinitial, at)


@parallel_kernel
def causal_conv1d_step(task, channels_total, silu, x, weight, bias, state, places, out):
    """One step x (B, D) of a batch row, which has the state number places[row].

    The state (…, D, K) moves on by one step; its last W - 1 numbers are those before x.
    """
    width = weight.shape[0] // channels_total
    place = places[task]
    if place < 0:  # padding
        return
    size = state.shape[1]
    last, shift = size - width + 1, task * channels_total
    at = place * channels_total
    for d in range(channels_total):
        now, total = x[shift + d], bias[d]
        for k in range(width - 1):
            total += weight[d * width + k] * state[at + d, last + k]
        out[shift + d] = total + weight[d * width + width - 1] * now
        for k in range(size - 1):
            state[at + d, k] = state[at + d, k + 1]
        if size > 0:
            state[at + d, size - 1] = now
    if silu:
        begin = np.uint64(shift)
        for d in range(np.uint64(channels_total)):
            out[begin + d] *= scalar_sigmoid(out[begin + d])
