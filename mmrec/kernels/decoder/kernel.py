"""Numba kernel of the decoder: whole tokens of a model in one call. No checks.

Axes: B streams, T tokens per stream, R = B T rows, D width, H heads, P = D / H, F feed-forward
width, V vocabulary, K convolution width. Row b T + t is token t of stream b. Rows of scratch arrays
are padded to whole panels (see ``mmrec.kernels._panels``).

``forward`` runs rows through all layers; ``run`` is what Python calls.

A team of threads runs one call together: every member calls the same function with its number.
Between two barriers the members have different parts of the work: panels of a matrix, rows,
channels, heads or streams. Every number is computed by one member in one fixed order, so results do
not depend on the size of the team, on B, or on how a text is cut into calls.
"""

from typing import NamedTuple

import numpy as np

from mmrec.kernels._bf16 import dot, from_bf16
from mmrec.kernels._jit import compiled_kernel, inline_jit
from mmrec.kernels._math import sigmoid
from mmrec.kernels._panels import (
    ADD,
    PANEL,
    RELU_SQUARED,
    STORE,
    barrier,
    product,
)
from mmrec.kernels._simd import LANES, fma, load, splat, store, zeros
from mmrec.kernels.decoder.arguments import BROKEN, DECODE, READ, SCORE, STOPPED
from mmrec.kernels.sampling.kernel import (
    SampleScratch,
    adjust_logits,
    all_finite,
    largest,
    log_sum_exp,
    sample,
    uniform,
)

EPSILON = 1e-6  # added to mean squares and to |k|² and |q|²
LAYER_FIELDS = (
    "has_recurrence",
    "has_delta_rule",
    "recurrent_block",  # channels of a block of the recurrent weight; 0 without it
    "conv",
    "forget_bias",
    "recurrence_norm",
    "delta_decay_bias",
    "delta_norm",
    "ffn_norm",
    "in_proj",
    "in_proj_rows",
    "in_proj_scale",
    "recurrent",
    "recurrent_scale",
    "out_proj",
    "out_proj_scale",
    "up_proj",
    "up_proj_scale",
    "down_proj",
    "down_proj_scale",
    "conv_state",
    "hidden_state",
    "delta_state",
)
"""Columns of ``Weights.layers``: facts of a layer, and where its parts begin in flat arrays."""
(
    HAS_RECURRENCE,
    HAS_DELTA_RULE,
    RECURRENT_BLOCK,
    CONV,
    FORGET_BIAS,
    RECURRENCE_NORM,
    DELTA_DECAY_BIAS,
    DELTA_NORM,
    FFN_NORM,
    IN_PROJ,
    IN_PROJ_ROWS,
    IN_PROJ_SCALE,
    RECURRENT,
    RECURRENT_SCALE,
    OUT_PROJ,
    OUT_PROJ_SCALE,
    UP_PROJ,
    UP_PROJ_SCALE,
    DOWN_PROJ,
    DOWN_PROJ_SCALE,
    CONV_STATE,
    HIDDEN_STATE,
    DELTA_STATE,
) = range(len(LAYER_FIELDS))


class Weights(NamedTuple):
    """A model, laid out for the kernel. ``layout.py`` makes it."""

    matrices: np.ndarray
    """Flat float32, bfloat16 bits as uint16, or int8: all matrices in panels."""
    scales: np.ndarray
    """Flat float32, a scale per row of each matrix; empty if there are none."""
    ngrams: np.ndarray
    """Flat, of the dtype of matrices: the n-gram embedding, (buckets, D), row after row."""
    ngram_scales: np.ndarray
    """(buckets,) float32, or empty."""
    vectors: np.ndarray
    """Flat float32: convolutions, biases and norms."""
    layers: np.ndarray
    """(depth, len(LAYER_FIELDS)) int64."""
    hashes: np.ndarray
    """(max_ngram - 1, 2) int64, multiplier and mixer of each n-gram; empty without n-grams."""
    embedding: int
    """Where the embedding begins in matrices."""
    embedding_scale: int
    final_norm: int
    """Where the final norm begins in vectors."""
    width: int
    heads: int
    ffn_width: int
    vocab_size: int
    conv_width: int
    buckets: int


class Scratch(NamedTuple):
    """Memory that the members of a team share; row sizes are padded to panels."""

    x: np.ndarray
    """(R, D), the residual stream."""
    u: np.ndarray
    """(R, D), the input of a matrix product."""
    projected: np.ndarray
    """(R, the most rows of an in_proj)."""
    y: np.ndarray
    """(R, D), the output of the gated recurrence, then of the memories."""
    o: np.ndarray
    """(R, D), the output of the gated delta rule."""
    activations: np.ndarray
    """(R, F)."""
    logits: np.ndarray
    """(rows with logits, V)."""
    new_conv: np.ndarray
    """(B, K - 1, D), the next state of a convolution."""
    arrived: np.ndarray
    """(1,) int64, for barriers; 0 when a call begins."""


class Private(NamedTuple):
    """Memory of one member of a team."""

    sums: np.ndarray
    wide: np.ndarray
    columns: np.ndarray
    """(the deepest matrix) int32."""
    ring: np.ndarray
    """(K D)."""
    row: np.ndarray
    """(max(D, 3 P) + 1)."""
    dots: np.ndarray
    """(16,)"""
    values: np.ndarray
    """(max(V, D)) float32, with padding."""
    raw: np.ndarray
    """(V,) float32, logits before penalties."""
    sampling: SampleScratch
    seen: np.ndarray
    """(V,) uint8, zeros."""


# Numba compiles a function anew for every literal argument, so literals are passed as np.int64.


@inline_jit
def _share(count, member, members):
    """The part [first, end) of ``count`` things that a member has."""
    return count * member // members, count * (member + 1) // members


@inline_jit
def _embed(w, token, window, at, out, out_at, row):
    """out = the embedding of the token window[at] and of the n-grams that end there."""
    width, matrices, ngrams = w.width, w.matrices, w.ngrams
    begin = w.embedding + token // PANEL * width * PANEL + token % PANEL
    for d in range(width):
        out[out_at + d] = from_bf16(matrices[begin + d * PANEL])
    if w.scales.size > 0:
        scale = w.scales[w.embedding_scale + token]
        for d in range(width):
            out[out_at + d] *= scale
    key = np.int64(token)
    for n in range(w.hashes.shape[0]):
        earlier = np.int64(max(0, window[at - 1 - n]))  # 0 stands before the text
        key = earlier * w.hashes[n, 0] + key
        mixed = key * w.hashes[n, 1]
        bucket = ((mixed >> 7) ^ mixed) % w.buckets
        begin = bucket * width
        for d in range(width):
            row[d] = from_bf16(ngrams[begin + d])
        if w.ngram_scales.size > 0:
            scale = w.ngram_scales[bucket]
            for d in range(width):
                row[d] *= scale
        for d in range(width):
            out[out_at + d] += row[d]


@inline_jit
def _rms_scale(x, at, width, dots):
    """1 / root mean square of x[at : at + width]."""
    mean = dot(x, at, x, at, dots, width) / np.float32(width)
    return np.float32(1) / np.sqrt(mean + np.float32(EPSILON))


@inline_jit
def _norm(x, at, weight, weight_at, out, out_at, width, dots):
    """out = rms_norm(x) times a weight."""
    scale = _rms_scale(x, at, width, dots)
    at, weight_at, out_at = np.uint64(at), np.uint64(weight_at), np.uint64(out_at)
    for d in range(np.uint64(width)):
        out[out_at + d] = x[at + d] * scale * weight[weight_at + d]


@inline_jit
def _norm_conv(w, layer, s, p, values, slots, count, steps, stride, first, end):
    """u = causal convolution of rms_norm(x) for the rows ``first`` up to ``end``.

    The next state of the convolution is put into ``new_conv``.
    """
    width, kernel, x, u, new_conv = w.width, w.conv_width, s.x, s.u, s.new_conv
    ring, row, vectors = p.ring, p.row, w.vectors
    state_at, conv, carried = layer[CONV_STATE], layer[CONV], w.conv_width - 1
    for r in range(first, end):
        b, t = r // steps, r % steps
        state = values[slots[b]]
        begin = t if r > first and t > 0 else t - carried
        for i in range(begin, t + 1):  # step i of the stream lies at i % kernel of the ring
            place = np.uint64((i + kernel) % kernel * width)
            if i < 0:
                source = np.uint64(state_at + (carried + i) * width)
                for d in range(np.uint64(width)):
                    ring[place + d] = state[source + d]
            else:
                source = np.uint64((b * steps + i) * stride)
                scale = _rms_scale(x, source, width, p.dots)
                for d in range(np.uint64(width)):
                    ring[place + d] = x[source + d] * scale
        out = np.uint64(r * stride)
        for k in range(kernel):
            place = np.uint64((t - carried + k + kernel) % kernel * width)
            weight = np.uint64(conv + k * width)
            if k == 0:
                for d in range(np.uint64(width)):
                    row[d] = ring[place + d] * vectors[weight + d]
            else:
                for d in range(np.uint64(width)):
                    row[d] += ring[place + d] * vectors[weight + d]
        for d in range(np.uint64(width)):
            u[out + d] = row[d]
        if t == steps - 1:
            for k in range(carried):
                place = np.uint64((t - carried + 1 + k + kernel) % kernel * width)
                target = np.uint64((b * carried + k) * width)
                for d in range(np.uint64(width)):
                    new_conv[target + d] = ring[place + d]


@inline_jit
def _recurrence(w, layer, projected, row, state, y, first, end, bias):
    """One step of the gated recurrence for the channels ``first`` up to ``end``; y = h.

    The logits of the input gate in ``projected`` already hold the recurrent product.
    """
    width, vectors = w.width, w.vectors
    z, f, g = np.uint64(row), np.uint64(row + width), np.uint64(row + 2 * width)
    one, h = np.float32(1), np.uint64(layer[HIDDEN_STATE])
    b = np.uint64(bias)
    for d in range(np.uint64(first), np.uint64(end)):
        projected[f + d] = sigmoid(projected[f + d] + vectors[b + d])
    for d in range(np.uint64(first), np.uint64(end)):
        projected[g + d] = sigmoid(projected[g + d])
    for d in range(np.uint64(first), np.uint64(end)):
        gamma = projected[f + d]
        state[h + d] = (one - gamma) * projected[z + d] * projected[g + d] + gamma * state[h + d]
    for d in range(np.uint64(first), np.uint64(end)):
        y[d] = state[h + d]


@inline_jit
def _recurrent_product(w, layer, p, state, projected, at):
    """projected[at :] += h W, the recurrent part of the input gate."""
    block, values = layer[RECURRENT_BLOCK], p.values
    panels = (block + PANEL - 1) // PANEL
    for g in range(w.width // block):
        begin = layer[RECURRENT] + g * panels * PANEL * block
        product(
            w.matrices,
            begin,
            w.scales,
            layer[RECURRENT_SCALE] + g * panels * PANEL,
            np.int64(0),
            panels,
            block,
            state,
            layer[HIDDEN_STATE] + g * block,
            np.int64(0),
            p.columns,
            p.values,
            np.int64(0),
            np.int64(0),
            np.int64(1),
            np.int64(STORE),
            np.int64(0),
            p.sums,
            p.wide,
        )
        to = np.uint64(at + g * block)
        for d in range(np.uint64(block)):
            projected[to + d] += values[d]


@inline_jit
def _unit(x, at, size, out, out_at, dots):
    """out = x / |x|."""
    norm = dot(x, at, x, at, dots, size)
    scale = np.float32(1) / np.sqrt(norm + np.float32(EPSILON))
    at, out_at = np.uint64(at), np.uint64(out_at)
    for d in range(np.uint64(size)):
        out[out_at + d] = x[at + d] * scale


@inline_jit
def _delta_step(projected, q_at, width, head, heads, size, bias, state, s_at, p, out, out_at):
    """One step of the gated delta rule for one head."""
    row = p.row  # q̂, k̂, the error, and α at the end
    q, k, error = 0, size, 2 * size
    _unit(projected, q_at + head * size, size, row, np.int64(0), p.dots)
    _unit(projected, q_at + width + head * size, size, row, size, p.dots)
    gates = q_at + 3 * width + head
    alpha = sigmoid(projected[gates] + bias)
    beta = sigmoid(projected[gates + heads])
    v, s_at, out_at = q_at + 2 * width + head * size, np.int64(s_at), np.int64(out_at)
    decay = row.size - 1
    row[decay] = alpha
    aligned = size // LANES * LANES
    for j in range(0, aligned, LANES):  # LANES columns of the state at a time
        recalled = zeros(row)
        for i in range(size):
            recalled = fma(load(state, s_at + i * size + j), splat(row, k + i), recalled)
        store(row, error + j, recalled)
    for j in range(aligned, size):
        row[error + j] = np.float32(0)
        for i in range(size):
            row[error + j] += state[s_at + i * size + j] * row[k + i]
    for j in range(size):
        row[error + j] = beta * (projected[v + j] - alpha * row[error + j])
    for j in range(0, aligned, LANES):
        read_out, e = zeros(row), load(row, error + j)
        for i in range(size):
            place = s_at + i * size + j
            new = fma(e, splat(row, k + i), load(state, place) * splat(row, decay))
            store(state, place, new)
            read_out = fma(new, splat(row, q + i), read_out)
        store(out, out_at + j, read_out)
    for j in range(aligned, size):
        out[out_at + j] = np.float32(0)
        for i in range(size):
            place = s_at + i * size + j
            state[place] = alpha * state[place] + row[k + i] * row[error + j]
            out[out_at + j] += state[place] * row[q + i]


@inline_jit
def _memories(w, layer, s, p, values, slots, count, steps, stride, wide_stride, member, members):
    """Run the memories of a layer over all rows, and put their gated output into y."""
    width, y, o, projected, new_conv = w.width, s.y, s.o, s.projected, s.new_conv
    if layer[HAS_RECURRENCE]:
        block = layer[RECURRENT_BLOCK]
        if block:
            b_first, b_end = _share(count, member, members)
            c_first, c_end = 0, width
        else:
            b_first, b_end = 0, count
            chunks = (width + 15) // 16
            c_first, c_end = _share(chunks, member, members)
            c_first, c_end = c_first * 16, min(c_end * 16, width)
        for b in range(b_first, b_end):
            state = values[slots[b]]
            for t in range(steps):
                r = b * steps + t
                row = r * wide_stride
                if block:
                    _recurrent_product(w, layer, p, state, projected, row + 2 * width)
                h = y[r * stride : r * stride + width]
                _recurrence(w, layer, projected, row, state, h, c_first, c_end, layer[FORGET_BIAS])
    if layer[HAS_DELTA_RULE]:
        heads, size = w.heads, width // w.heads
        begin = 3 * width * layer[HAS_RECURRENCE]
        first, end = _share(count * heads, member, members)
        for task in range(first, end):
            b, head = task // heads, task % heads
            bias = w.vectors[layer[DELTA_DECAY_BIAS] + head]
            s_at = layer[DELTA_STATE] + head * size * size
            state = values[slots[b]]
            for t in range(steps):
                r = b * steps + t
                _delta_step(
                    projected,
                    r * wide_stride + begin,
                    width,
                    head,
                    heads,
                    size,
                    bias,
                    state,
                    s_at,
                    p,
                    o,
                    r * stride + head * size,
                )
    carried = (w.conv_width - 1) * width
    first, end = _share(count, member, members)
    for b in range(first, end):
        state, to, source = values[slots[b]], np.uint64(layer[CONV_STATE]), np.uint64(b * carried)
        for d in range(np.uint64(carried)):
            state[to + d] = new_conv[source + d]
    barrier(s.arrived, members)
    first, end = _share(count * steps, member, members)
    for r in range(first, end):
        at, gate = np.uint64(r * stride), np.uint64(r * wide_stride + layer[IN_PROJ_ROWS] - width)
        if layer[HAS_RECURRENCE]:
            if layer[RECURRENT_BLOCK]:
                _norm(y, at, w.vectors, layer[RECURRENCE_NORM], y, at, width, p.dots)
            else:
                scale = _rms_scale(y, at, width, p.dots)
                for d in range(np.uint64(width)):
                    y[at + d] *= scale
        if layer[HAS_DELTA_RULE]:
            _norm(o, at, w.vectors, layer[DELTA_NORM], o, at, width, p.dots)
            if layer[HAS_RECURRENCE]:
                for d in range(np.uint64(width)):
                    y[at + d] += o[at + d]
            else:
                for d in range(np.uint64(width)):
                    y[at + d] = o[at + d]
        for d in range(np.uint64(width)):
            r_d = projected[gate + d]
            y[at + d] *= r_d * sigmoid(r_d)


@inline_jit
def _matrix(
    w, at, scale, rows, depth, x, x_row, out, out_row, count, how, skip, p, member, members
):
    """This member's part of a matrix product with all rows."""
    first, end = _share((rows + PANEL - 1) // PANEL, member, members)
    product(
        w.matrices,
        at,
        w.scales,
        scale,
        first,
        end,
        depth,
        x,
        np.int64(0),
        x_row,
        p.columns,
        out,
        np.int64(0),
        out_row,
        count,
        how,
        skip,
        p.sums,
        p.wide,
    )


@inline_jit
def _padded(size):
    """A size, rounded up to whole panels."""
    return (size + PANEL - 1) // PANEL * PANEL


@inline_jit
def forward(w, s, p, values, slots, count, window, begin, steps, member, members):
    """Let ``count`` streams read ``steps`` tokens each.

    Args:
        w, s, p: Weights, Scratch, Private.
        values: (streams, state_size) float32, the recurrent states, which advance.
        slots: (count,) int64, the rows of ``values`` and ``window`` that take part.
        window: (streams, W) int32, texts; the tokens from ``begin`` on are read.
        begin: index of the first token to read.
        steps: T.
        member, members: number of this thread, and threads in the team.

    The result is in ``s.x`` (R, D), without the final norm. All members have passed a barrier.
    """
    rows, width, stride = count * steps, w.width, _padded(w.width)
    ffn_stride, wide_stride = _padded(w.ffn_width), np.int64(0)
    for n in range(w.layers.shape[0]):
        wide_stride = max(wide_stride, _padded(w.layers[n, IN_PROJ_ROWS]))
    first, end = _share(rows, member, members)
    for r in range(first, end):
        text, at = window[slots[r // steps]], begin + r % steps
        _embed(w, np.int64(text[at]), text, at, s.x, r * stride, p.row)
    barrier(s.arrived, members)
    for n in range(w.layers.shape[0]):
        layer = w.layers[n]
        _norm_conv(w, layer, s, p, values, slots, count, steps, stride, first, end)
        barrier(s.arrived, members)
        _matrix(
            w,
            layer[IN_PROJ],
            layer[IN_PROJ_SCALE],
            layer[IN_PROJ_ROWS],
            width,
            s.u,
            stride,
            s.projected,
            wide_stride,
            rows,
            np.int64(STORE),
            np.int64(0),
            p,
            member,
            members,
        )
        barrier(s.arrived, members)
        _memories(w, layer, s, p, values, slots, count, steps, stride, wide_stride, member, members)
        barrier(s.arrived, members)
        _matrix(
            w,
            layer[OUT_PROJ],
            layer[OUT_PROJ_SCALE],
            width,
            width,
            s.y,
            stride,
            s.x,
            stride,
            rows,
            np.int64(ADD),
            np.int64(0),
            p,
            member,
            members,
        )
        barrier(s.arrived, members)
        for r in range(first, end):
            at = r * stride
            _norm(s.x, at, w.vectors, layer[FFN_NORM], s.u, at, width, p.dots)
        barrier(s.arrived, members)
        _matrix(
            w,
            layer[UP_PROJ],
            layer[UP_PROJ_SCALE],
            w.ffn_width,
            width,
            s.u,
            stride,
            s.activations,
            ffn_stride,
            rows,
            np.int64(RELU_SQUARED),
            np.int64(0),
            p,
            member,
            members,
        )
        barrier(s.arrived, members)
        _matrix(
            w,
            layer[DOWN_PROJ],
            layer[DOWN_PROJ_SCALE],
            width,
            w.ffn_width,
            s.activations,
            ffn_stride,
            s.x,
            stride,
            rows,
            np.int64(ADD),
            np.int64(1),
            p,
            member,
            members,
        )
        barrier(s.arrived, members)


@inline_jit
def _logits(w, s, p, rows, member, members):
    """s.logits = the logits of all rows of s.x."""
    stride = _padded(w.width)
    first, end = _share(rows, member, members)
    for r in range(first, end):
        at = r * stride
        _norm(s.x, at, w.vectors, w.final_norm, s.u, at, w.width, p.dots)
    barrier(s.arrived, members)
    _matrix(
        w,
        w.embedding,
        w.embedding_scale,
        w.vocab_size,
        w.width,
        s.u,
        stride,
        s.logits,
        _padded(w.vocab_size),
        rows,
        np.int64(STORE),
        np.int64(0),
        p,
        member,
        members,
    )
    barrier(s.arrived, members)


@inline_jit
def _draw(w, s, p, window, last, streams, drawn, row, b):
    """Draw the next token of stream b from the logits in row ``row``; update all but its state."""
    stride = _padded(w.vocab_size)
    logits = s.logits[row * stride : row * stride + w.vocab_size]
    if not all_finite(logits):
        drawn.status[b] = BROKEN
        return
    n, settings = drawn.counts[b], streams.settings[b]
    if drawn.logprobs.shape[1] > 0:
        normaliser = log_sum_exp(logits, p.values)
        largest(logits, normaliser, drawn.top_tokens[b, n], drawn.top_logprobs[b, n])
        for i in range(w.vocab_size):
            p.raw[i] = logits[i]
    bias_begin, bias_end = streams.bias_bounds[b], streams.bias_bounds[b + 1]
    adjust_logits(
        logits,
        settings[0],
        settings[1],
        settings[2],
        window[b, : last + 1],
        streams.counts[b],
        streams.bias_tokens[bias_begin:bias_end],
        streams.bias_values[bias_begin:bias_end],
        p.seen,
    )
    number = uniform(streams.seeds[b], np.uint64(streams.drawn[b]))
    token = sample(
        logits,
        settings[3],
        np.int64(settings[4]),
        settings[5],
        settings[6],
        number,
        p.sampling,
    )
    if token < 0:
        drawn.status[b] = BROKEN
        return
    if token == streams.end_token or token == streams.stop_tokens[b]:
        drawn.status[b] = STOPPED
        return
    drawn.tokens[b, n] = token
    if drawn.logprobs.shape[1] > 0:
        drawn.logprobs[b, n] = np.float32(p.raw[token] - normaliser)
    for i in range(last):
        window[b, i] = window[b, i + 1]
    window[b, last] = token
    if streams.counts.shape[1] > 0:
        streams.counts[b, token] += 1
    streams.drawn[b] += 1
    drawn.counts[b] = n + 1


@inline_jit
def _score(w, s, p, window, slots, begin, steps, drawn, member, members):
    """Fill ``drawn`` with the log-probability of the token after each that was read."""
    stride = _padded(w.vocab_size)
    first, end = _share(slots.size * steps, member, members)
    for r in range(first, end):
        b, t = r // steps, r % steps
        logits = s.logits[r * stride : r * stride + w.vocab_size]
        normaliser = log_sum_exp(logits, p.values)
        target = window[b, begin + t + 1]
        drawn.logprobs[b, t] = np.float32(logits[target] - normaliser)
        largest(logits, normaliser, drawn.top_tokens[b, t], drawn.top_logprobs[b, t])


@compiled_kernel
def run(w, s, p, task, values, window, begin, steps, streams, drawn, slots, member, members):
    """Do a task with B streams.

    There is one function for all tasks because Numba compiles all that a function calls for it.

    Args:
        w, s, p: Weights, Scratch, and Private of this member.
        task: READ, SCORE, LOGITS or DECODE.
        values: (B, state_size) float32, the recurrent states; they advance.
        window: (B, W) int32. For DECODE the newest tokens, the pending one last; they advance. Else
            texts, of which ``steps`` tokens are read from ``begin`` on. For SCORE one more token
            follows them.
        begin: index of the first token that is read.
        steps: tokens that each stream reads; for DECODE the most tokens to draw.
        streams: Streams, for DECODE.
        drawn: Drawn; DECODE fills it, and SCORE fills its log-probabilities.
        slots: (B,) int64 scratch of this member.
        member, members: number of this thread, and threads in the team.
    """
    rounds, length = (steps, np.int64(1)) if task == DECODE else (np.int64(1), steps)
    for _ in range(rounds):
        count = np.int64(0)
        for b in range(values.shape[0]):
            if task != DECODE or (drawn.status[b] == 0 and drawn.counts[b] < streams.limits[b]):
                slots[count] = b
                count += 1
        if count == 0:
            break
        barrier(s.arrived, members)  # all members have seen who takes part
        forward(w, s, p, values, slots, count, window, begin, length, member, members)
        if task == READ:
            break
        _logits(w, s, p, count * length, member, members)
        if task == SCORE:
            _score(w, s, p, window, slots, begin, steps, drawn, member, members)
        elif task == DECODE:
            first, end = _share(count, member, members)
            for row in range(first, end):
                _draw(w, s, p, window, begin, streams, drawn, row, slots[row])
        barrier(s.arrived, members)
