"""Numba kernels of Mamba's selective scan. Arrays in, arrays out, no checks.

Axes: B batch, D channels, L time, N state size, G groups of channels that share b and c. u, delta,
z, out and their gradients are flat with strides (batch, time, channel); b and c, which are
(B, G, N, L), with strides (batch, group, state, time). All other arrays are contiguous. Per channel
and state n:

    δ_t = softplus(delta_t + bias)   (or delta_t + bias)
    h_t = exp(δ_t A_n) h_{t-1} + δ_t u_t b_tn       y_t = Σ_n c_tn h_tn + D u_t
    out_t = y_t silu(z_t)            (or y_t)

Adjoint, with a_t = exp(δ_t A_n), x_t = δ_t u_t and g_t the gradient of h_t:

    dy_t = dout_t silu(z_t)          dz_t = dout_t y_t silu'(z_t)
    g_t = c_t dy_t + a_{t+1} g_{t+1}    dA_n = Σ_t δ_t g_t a_t h_{t-1}
    dx_t = Σ_n g_t b_tn              dδ_t = Σ_n A_n g_t a_t h_{t-1} + u_t dx_t
    du_t = δ_t dx_t + D dy_t         db_tn = Σ_d g_t x_t      dc_tn = Σ_d dy_t h_t

A vector holds LANES channels: a block. A task is a slice of at most SLICE blocks of one group of
one batch row; tasks share nothing that they write. It goes through time in tiles, and in a tile
through its blocks, and in a block through n, so that what one (block, n) needs stays in the
first-level cache and its state in registers. The forward pass saves h before each tile; the
backward pass computes the states of a tile again from it. db and dc are sums per slice, which op.py
adds in order.

The decays are powers of two of δ (A log2 e). There is one for each (d, t, n), and they are most of
the work of both passes.

Source: Gu, Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
(arXiv:2312.00752), algorithm 2. The adjoint is our own.
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
from mmrec.kernels._simd import LANES, fma, load, splat, store, zeros
from mmrec.kernels._vector_math import LOG2E, exp2, sigmoid, softplus, sum_rows

SLICE = 8
"""Blocks of channels in a task."""


@inline_jit
def _load_rows(source, at, state_stride, time_stride, states, steps, rows):
    """rows[n, t] = source[n, t]; 0 for the steps beyond ``steps``."""
    for n in range(states):
        begin = at + n * state_stride
        for t in range(steps):
            rows[n * TILE_STEPS + t] = source[begin + t * time_stride]
        for t in range(steps, TILE_STEPS):
            rows[n * TILE_STEPS + t] = 0


@inline_jit
def _discretise(steps, use_softplus, bias, bias_at, u, delta, x):
    """delta becomes δ and x becomes δ u, for tiles."""
    b = load(bias, bias_at)
    for t in range(0, steps * LANES, LANES):
        step = load(delta, t) + b
        if use_softplus:
            step = softplus(step)
        store(delta, t, step)
        store(x, t, step * load(u, t))


@parallel_kernel
def selective_scan_fwd(
    task,
    sizes,
    use_softplus,
    u,
    u_strides,
    delta,
    delta_strides,
    z,
    z_strides,
    a,
    b,
    b_strides,
    c,
    c_strides,
    skip,
    bias,
    initial,
    out,
    out_strides,
    final,
    tile_states,
):
    """Fill out (B, D, L), final (B, D, N) and, unless it is empty, tile_states.

    sizes: G, D / G, N, L. skip is D; z is empty if there is no gate. tile_states (B, tiles, blocks,
    N, LANES) receives h before each tile.
    """
    groups, size, states, time = sizes
    blocks = cdiv(size, LANES)
    slices = cdiv(blocks, SLICE)
    row, group, first = task // (groups * slices), task // slices % groups, task % slices * SLICE
    count = min(SLICE, blocks - first)
    dtype, block = out.dtype, states * LANES
    tile = TILE_STEPS * LANES
    decay, h = np.empty(SLICE * block, dtype), np.empty(SLICE * block, dtype)
    skips, biases = np.zeros(SLICE * LANES, dtype), np.zeros(SLICE * LANES, dtype)
    us, deltas, zs = np.empty(tile, dtype), np.empty(tile, dtype), np.empty(tile, dtype)
    xs, ys = np.empty(tile, dtype), np.empty(tile, dtype)
    bs, cs = np.empty(states * TILE_STEPS, dtype), np.empty(states * TILE_STEPS, dtype)
    for i in range(count):
        inside = (first + i) * LANES
        channels, channel = min(LANES, size - inside), group * size + inside
        at = channel * states
        load_columns(a, at, states, channels, dtype.type(LOG2E), decay, i * block)
        at += row * groups * size * states
        load_columns(initial, at, states, channels, dtype.type(1), h, i * block)
        for d in range(channels):
            skips[i * LANES + d], biases[i * LANES + d] = skip[channel + d], bias[channel + d]
    for begin in range(0, time, TILE_STEPS):
        steps = min(TILE_STEPS, time - begin)
        at = row * b_strides[0] + group * b_strides[1] + begin * b_strides[3]
        _load_rows(b, at, b_strides[2], b_strides[3], states, steps, bs)
        at = row * c_strides[0] + group * c_strides[1] + begin * c_strides[3]
        _load_rows(c, at, c_strides[2], c_strides[3], states, steps, cs)
        for i in range(count):
            inside = (first + i) * LANES
            channels, channel = min(LANES, size - inside), group * size + inside
            at = row * u_strides[0] + begin * u_strides[1] + channel * u_strides[2]
            load_tile(u, at, u_strides[1], u_strides[2], steps, channels, us, 0)
            at = row * delta_strides[0] + begin * delta_strides[1] + channel * delta_strides[2]
            load_tile(delta, at, delta_strides[1], delta_strides[2], steps, channels, deltas, 0)
            _discretise(steps, use_softplus, biases, i * LANES, us, deltas, xs)
            skip_i = load(skips, i * LANES)
            for t in range(0, steps * LANES, LANES):
                store(ys, t, skip_i * load(us, t))
            if tile_states.shape[0] > 0:
                tiles = cdiv(time, TILE_STEPS)
                at = (row * tiles + begin // TILE_STEPS) * groups + group
                at = (at * blocks + first + i) * block
                for n in range(0, block, LANES):
                    store(tile_states, at + n, load(h, i * block + n))
            for n in range(states):
                here, rows = i * block + n * LANES, n * TILE_STEPS
                rate, state = load(decay, here), load(h, here)
                for t in range(steps):
                    lane = t * LANES
                    new = load(xs, lane) * splat(bs, rows + t)
                    state = fma(exp2(load(deltas, lane) * rate), state, new)
                    store(ys, lane, fma(state, splat(cs, rows + t), load(ys, lane)))
                store(h, here, state)
            if z.shape[0] > 0:
                at = row * z_strides[0] + begin * z_strides[1] + channel * z_strides[2]
                load_tile(z, at, z_strides[1], z_strides[2], steps, channels, zs, 0)
                for t in range(0, steps * LANES, LANES):
                    gate = load(zs, t)
                    store(ys, t, load(ys, t) * (gate * sigmoid(gate)))
            at = row * out_strides[0] + begin * out_strides[1] + channel * out_strides[2]
            store_tile(ys, 0, out, at, out_strides[1], out_strides[2], steps, channels)
    for i in range(count):
        inside = (first + i) * LANES
        at = (row * groups * size + group * size + inside) * states
        store_columns(h, i * block, states, min(LANES, size - inside), final, at)


@parallel_kernel
def selective_scan_bwd(
    task,
    sizes,
    use_softplus,
    u,
    u_strides,
    delta,
    delta_strides,
    z,
    z_strides,
    a,
    b,
    b_strides,
    c,
    c_strides,
    skip,
    bias,
    tile_states,
    dout,
    dout_strides,
    dfinal,
    du,
    du_strides,
    ddelta,
    ddelta_strides,
    dz,
    dz_strides,
    da,
    db,
    dc,
    dskip,
    dbias,
    dinitial,
):
    """Fill the gradients.

    dinitial (B, D, N). da (B, D, N), dskip and dbias (B, D) hold a sum per batch row, and db and dc
    (slices, B, G, N, L) one per slice.
    """
    groups, size, states, time = sizes
    blocks = cdiv(size, LANES)
    slices = cdiv(blocks, SLICE)
    row, group, first = task // (groups * slices), task // slices % groups, task % slices * SLICE
    count = min(SLICE, blocks - first)
    dtype, block = du.dtype, states * LANES
    tile = TILE_STEPS * LANES
    tasks_per_slice = dfinal.shape[0] // (size * states)  # B G
    decay, dh, das = (
        np.empty(SLICE * block, dtype),
        np.empty(SLICE * block, dtype),
        np.zeros(SLICE * block, dtype),
    )
    skips, biases = np.zeros(SLICE * LANES, dtype), np.zeros(SLICE * LANES, dtype)
    dskips, dbiases = np.zeros(SLICE * LANES, dtype), np.zeros(SLICE * LANES, dtype)
    us, deltas, raw = np.empty(tile, dtype), np.empty(tile, dtype), np.empty(tile, dtype)
    zs, xs, ys = np.empty(tile, dtype), np.empty(tile, dtype), np.empty(tile, dtype)
    douts, dys = np.empty(tile, dtype), np.empty(tile, dtype)
    dxs, ddeltas = np.empty(tile, dtype), np.empty(tile, dtype)
    # of one n: a_t, h_{t-1}, and the terms of db and dc
    decays, before = np.empty(tile, dtype), np.empty(tile, dtype)
    gx, dyh = np.empty(tile, dtype), np.empty(tile, dtype)
    bs, cs = np.empty(states * TILE_STEPS, dtype), np.empty(states * TILE_STEPS, dtype)
    dbs, dcs = np.empty(states * TILE_STEPS, dtype), np.empty(states * TILE_STEPS, dtype)
    to_natural, one = np.empty(LANES, dtype), np.ones(LANES, dtype)
    to_natural[:] = 1 / LOG2E
    for i in range(count):
        inside = (first + i) * LANES
        channels, channel = min(LANES, size - inside), group * size + inside
        at = channel * states
        load_columns(a, at, states, channels, dtype.type(LOG2E), decay, i * block)
        at += row * groups * size * states
        load_columns(dfinal, at, states, channels, dtype.type(1), dh, i * block)
        for d in range(channels):
            skips[i * LANES + d], biases[i * LANES + d] = skip[channel + d], bias[channel + d]
    tiles = cdiv(time, TILE_STEPS)
    for chunk in range(tiles - 1, -1, -1):
        begin = chunk * TILE_STEPS
        steps = min(TILE_STEPS, time - begin)
        padded = cdiv(steps, LANES) * LANES  # a step beyond the end has δ, u, b, c and dout of 0
        at = row * b_strides[0] + group * b_strides[1] + begin * b_strides[3]
        _load_rows(b, at, b_strides[2], b_strides[3], states, steps, bs)
        at = row * c_strides[0] + group * c_strides[1] + begin * c_strides[3]
        _load_rows(c, at, c_strides[2], c_strides[3], states, steps, cs)
        dbs[:], dcs[:] = 0, 0
        for i in range(count):
            inside = (first + i) * LANES
            channels, channel = min(LANES, size - inside), group * size + inside
            at = row * u_strides[0] + begin * u_strides[1] + channel * u_strides[2]
            load_tile(u, at, u_strides[1], u_strides[2], steps, channels, us, 0)
            at = row * delta_strides[0] + begin * delta_strides[1] + channel * delta_strides[2]
            load_tile(delta, at, delta_strides[1], delta_strides[2], steps, channels, deltas, 0)
            at = row * dout_strides[0] + begin * dout_strides[1] + channel * dout_strides[2]
            load_tile(dout, at, dout_strides[1], dout_strides[2], steps, channels, dys, 0)
            for t in range(0, tile, LANES):
                store(raw, t, load(deltas, t))
                store(xs, t, zeros(xs))
                store(dxs, t, zeros(dxs))
                store(ddeltas, t, zeros(ddeltas))
            _discretise(steps, use_softplus, biases, i * LANES, us, deltas, xs)
            skip_i = load(skips, i * LANES)
            gated = z.shape[0] > 0
            if gated:
                at = row * z_strides[0] + begin * z_strides[1] + channel * z_strides[2]
                load_tile(z, at, z_strides[1], z_strides[2], steps, channels, zs, 0)
                for t in range(0, tile, LANES):
                    gate, grad = load(zs, t), load(dys, t)
                    store(douts, t, grad)
                    store(dys, t, grad * (gate * sigmoid(gate)))
                    store(ys, t, skip_i * load(us, t))
            states_at = ((row * tiles + chunk) * groups + group) * blocks + first + i
            for n in range(states):
                here, rows = i * block + n * LANES, n * TILE_STEPS
                rate, state = load(decay, here), load(tile_states, states_at * block + n * LANES)
                for t in range(padded):
                    lane = t * LANES
                    power = exp2(load(deltas, lane) * rate)
                    store(decays, lane, power)
                    store(before, lane, state)
                    state = fma(power, state, load(xs, lane) * splat(bs, rows + t))
                    store(dyh, lane, load(dys, lane) * state)
                    if gated:
                        store(ys, lane, fma(state, splat(cs, rows + t), load(ys, lane)))
                grad, da_n = load(dh, here), load(das, here)
                for t in range(padded - 1, -1, -1):
                    lane = t * LANES
                    now = fma(load(dys, lane), splat(cs, rows + t), grad)
                    store(gx, lane, now * load(xs, lane))
                    store(dxs, lane, fma(now, splat(bs, rows + t), load(dxs, lane)))
                    grad = now * load(decays, lane)
                    through = grad * load(before, lane)
                    store(ddeltas, lane, fma(through, rate, load(ddeltas, lane)))
                    da_n = fma(through, load(deltas, lane), da_n)
                store(dh, here, grad)
                store(das, here, da_n)
                for t in range(0, padded, LANES):
                    store(dbs, rows + t, load(dbs, rows + t) + sum_rows(gx, t * LANES))
                    store(dcs, rows + t, load(dcs, rows + t) + sum_rows(dyh, t * LANES))
            natural, ones = load(to_natural, 0), load(one, 0)
            dskip_i, dbias_i = load(dskips, i * LANES), load(dbiases, i * LANES)
            for t in range(0, steps * LANES, LANES):
                dx, dy, u_t = load(dxs, t), load(dys, t), load(us, t)
                grad = fma(load(ddeltas, t), natural, u_t * dx)
                if use_softplus:
                    grad = grad * sigmoid(load(raw, t) + load(biases, i * LANES))
                store(ddeltas, t, grad)
                store(dxs, t, fma(load(deltas, t), dx, skip_i * dy))
                dskip_i = fma(dy, u_t, dskip_i)
                dbias_i = dbias_i + grad
                if gated:
                    gate = load(zs, t)
                    open_by = sigmoid(gate)
                    slope = open_by * fma(gate, ones - open_by, ones)
                    store(ys, t, load(douts, t) * load(ys, t) * slope)
            store(dskips, i * LANES, dskip_i)
            store(dbiases, i * LANES, dbias_i)
            at = row * du_strides[0] + begin * du_strides[1] + channel * du_strides[2]
            store_tile(dxs, 0, du, at, du_strides[1], du_strides[2], steps, channels)
            at = row * ddelta_strides[0] + begin * ddelta_strides[1] + channel * ddelta_strides[2]
            store_tile(
                ddeltas, 0, ddelta, at, ddelta_strides[1], ddelta_strides[2], steps, channels
            )
            if gated:
                at = row * dz_strides[0] + begin * dz_strides[1] + channel * dz_strides[2]
                store_tile(ys, 0, dz, at, dz_strides[1], dz_strides[2], steps, channels)
        part = (first // SLICE * tasks_per_slice + row * groups + group) * states
        for n in range(states):
            at = (part + n) * time + begin
            for t in range(steps):
                db[at + t] = dbs[n * TILE_STEPS + t]
            for t in range(steps):
                dc[at + t] = dcs[n * TILE_STEPS + t]
    for i in range(count):
        inside = (first + i) * LANES
        channels = min(LANES, size - inside)
        channel = row * groups * size + group * size + inside
        store_columns(dh, i * block, states, channels, dinitial, channel * states)
        store_columns(das, i * block, states, channels, da, channel * states)
        for d in range(channels):
            dskip[channel + d], dbias[channel + d] = dskips[i * LANES + d], dbiases[i * LANES + d]


BLOCK = 64
"""Channels in a task of the update; a multiple of LANES."""


@inline_jit
def _powers(a, at, stride, count, step, powers):
    """powers[n] = 2^(step a[at + n stride]) for n < count <= LANES."""
    for n in range(count):
        powers[n] = step * a[at + n * stride]
    for n in range(count, LANES):
        powers[n] = 0
    store(powers, 0, exp2(load(powers, 0)))


@parallel_kernel
def selective_state_update(
    task,
    use_softplus,
    places,
    state,
    x,
    dt,
    dt_row,
    dt_head,
    dt_channel,
    a,
    a_head,
    a_channel,
    a_state,
    b,
    c,
    groups,
    skip,
    z,
    bias,
    bias_head,
    bias_channel,
    out,
    heads,
    size,
    states,
):
    """One step. state (…, H, P, N) changes in place; row i of x has the state places[i].

    All arrays but places are flat. x, z and out (B, H, P), b and c (B, G, N), skip (H, P) are
    contiguous; z is empty if there is no gate. dt (B, H, P), a (H, P, N) and bias (H, P) have
    strides, which may be 0; a_state is 0 or 1. A task is at most BLOCK channels of one head of one
    row. Where the decay is the same for all n, it is computed once for all of them, and where it is
    the same for all channels, once for all of these.
    """
    blocks = cdiv(size, BLOCK)
    row, head, first = task // (heads * blocks), task // blocks % heads, task % blocks * BLOCK
    place = places[row]
    if place < 0:  # padding
        return
    count, dtype = min(BLOCK, size - first), out.dtype
    steps, writes, sums = np.zeros(BLOCK, dtype), np.zeros(BLOCK, dtype), np.empty(BLOCK, dtype)
    powers, scale = np.empty(LANES, dtype), np.empty(LANES, dtype)
    totals = np.zeros(BLOCK * LANES, dtype)
    scale[:] = dtype.type(LOG2E)
    at = row * dt_row + head * dt_head + first * dt_channel
    here = head * bias_head + first * bias_channel
    for i in range(count):
        steps[i] = dt[at + i * dt_channel] + bias[here + i * bias_channel]
    channel = (row * heads + head) * size + first
    for i in range(0, count, LANES):
        step = load(steps, i)
        if use_softplus:
            step = softplus(step)
        store(steps, i, step)
    for i in range(count):
        writes[i] = steps[i] * x[channel + i]
    for i in range(0, count, LANES):
        store(steps, i, load(steps, i) * load(scale, 0))
    tied = a_state == 0
    all_tied = tied and a_channel == 0 and dt_channel == 0 and bias_channel == 0
    chosen = (row * groups + head // (heads // groups)) * states
    aligned = states - states % LANES
    for i in range(count):
        at = head * a_head + (first + i) * a_channel
        begin = ((place * heads + head) * size + first + i) * states
        write, step, total = splat(writes, i), splat(steps, i), zeros(totals)
        if tied:
            if i == 0 or not all_tied:
                _powers(a, at, 0, LANES, steps[i], powers)
            decay = load(powers, 0)
            for n in range(0, aligned, LANES):
                new = fma(load(state, begin + n), decay, load(b, chosen + n) * write)
                store(state, begin + n, new)
                total = fma(new, load(c, chosen + n), total)
        else:
            for n in range(0, aligned, LANES):
                decay = exp2(load(a, at + n) * step)
                new = fma(load(state, begin + n), decay, load(b, chosen + n) * write)
                store(state, begin + n, new)
                total = fma(new, load(c, chosen + n), total)
        store(totals, i * LANES, total)
        if aligned < states:
            if not tied:
                _powers(a, at + aligned, 1, states - aligned, steps[i], powers)
            for n in range(aligned, states):
                one = state[begin + n] * powers[n - aligned] + b[chosen + n] * writes[i]
                state[begin + n] = one
                totals[i * LANES + n - aligned] += one * c[chosen + n]
    for i in range(0, count, LANES):
        store(sums, i, sum_rows(totals, i * LANES))
    here = head * size + first
    for i in range(count):
        sums[i] += skip[here + i] * x[channel + i]
    if z.shape[0] > 0:
        for i in range(count):
            writes[i] = z[channel + i]
        for i in range(0, count, LANES):
            gate = load(writes, i)
            store(sums, i, load(sums, i) * (gate * sigmoid(gate)))
    for i in range(count):
        out[channel + i] = sums[i]
