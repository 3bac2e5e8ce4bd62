"""Numba functions that choose the next token. They are compiled into the decoder. No checks.

V is the vocabulary size. The definition is in ``reference.py``; here exponentials are float32, and
no full sort is needed: the tokens that the filters keep are found by partitions, as in quickselect.
"""

import functools
from typing import NamedTuple

import numpy as np

from mmrec.kernels._jit import inline_jit
from mmrec.kernels._math import exp_nonpositive


class SampleScratch(NamedTuple):
    """Memory of ``sample``, arrays (V,) of float32 values and int32 tokens."""

    values: np.ndarray
    kept_values: np.ndarray
    kept_tokens: np.ndarray
    ordered_values: np.ndarray
    ordered_tokens: np.ndarray
    histogram: np.ndarray
    """(1024,) float64."""


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_FEW = 256  # values that are partitioned without a histogram
_BLOCK = 64  # values that are added up at once
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@inline_jit
def _mix(z):
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@inline_jit
def uniform(seed, draw):
    """The number in [0, 1) of a draw; seed and draw are uint64."""
    state = _mix(seed + _GOLDEN)
    return np.float64(_mix(state + (draw + np.uint64(1)) * _GOLDEN) >> _S11) * 2.0**-53


@inline_jit
def adjust_logits(
    logits, repetition, frequency, presence, recent, counts, bias_tokens, bias_values, seen
):
    """Apply penalties and biases to logits (V,), in place.

    Args:
        logits: float32.
        repetition, frequency, presence: the penalties.
        recent: (W,) int32, the tokens that the repetition penalty applies to, or negative.
        counts: (V,) int32 how often each token was drawn, or empty.
        bias_tokens, bias_values: tokens (n,) int32 and what is added to their logits.
        seen: (V,) uint8 scratch of zeros, left as zeros.
    """
    if repetition != 1:
        for i in range(recent.size):
            token = recent[i]
            if token >= 0 and seen[token] == 0:
                seen[token] = 1
                value = np.float64(logits[token])
                value = value / repetition if value > 0 else value * repetition
                logits[token] = np.float32(value)
        for i in range(recent.size):
            if recent[i] >= 0:
                seen[recent[i]] = 0
    if counts.size > 0:
        for i in range(counts.size):
            if counts[i] > 0:
                logits[i] = np.float32(logits[i] - frequency * counts[i] - presence)
    for i in range(bias_tokens.size):
        logits[bias_tokens[i]] = np.float32(logits[bias_tokens[i]] + bias_values[i])


@functools.partial(inline_jit, allocates=True)
def argmax(x):
    """Index of the first largest number of x (V,)."""
    best = 0
    lanes = np.empty(16, x.dtype)
    aligned = x.size // 16 * 16
    if aligned:
        for j in range(np.uint64(16)):
            lanes[j] = x[j]
        for i in range(np.uint64(0), np.uint64(aligned), np.uint64(16)):
            for j in range(np.uint64(16)):
                lanes[j] = max(lanes[j], x[i + j])
        top = lanes[0]
        for j in range(16):
            top = max(top, lanes[j])
    else:
        top = x[0]
    for i in range(aligned, x.size):
        top = max(top, x[i])
    while best < x.size - 1 and x[best] != top:
        best += 1
    return best


@functools.partial(inline_jit, allocates=True)
def all_finite(x):
    """Whether no number of x (V,) is NaN or infinite."""
    lanes = np.zeros(16, x.dtype)
    aligned = x.size // 16 * 16
    zero = x.dtype.type(0)
    for i in range(np.uint64(0), np.uint64(aligned), np.uint64(16)):
        for j in range(np.uint64(16)):
            lanes[j] += x[i + j] * zero  # NaN if x is not finite
    for i in range(aligned, x.size):
        lanes[0] += x[i] * zero
    return lanes.sum() == 0


@functools.partial(inline_jit, allocates=True)
def _sum(values, begin, end):
    """The sum of values[begin:end] in float64, in eight parts that LLVM turns into vectors."""
    sums = np.zeros(8, np.float64)
    aligned = np.uint64(begin + (end - begin) // 8 * 8)
    for i in range(np.uint64(begin), aligned, np.uint64(8)):
        for j in range(np.uint64(8)):
            sums[j] += np.float64(values[i + j])
    for i in range(aligned, np.uint64(end)):
        sums[0] += np.float64(values[i])
    return sums.sum()


@inline_jit
def exponentials(logits, top, inverse_temperature, out):
    """out = exp((logits - top) / temperature); returns their sum in float64."""
    factor = np.float32(inverse_temperature)
    for i in range(np.uint64(logits.size)):
        out[i] = exp_nonpositive((logits[i] - top) * factor)
    return _sum(out, 0, logits.size)


@inline_jit
def _comes_first(value, token, other_value, other_token):
    """Whether a token stands before another one: larger value, or equal value and smaller id."""
    return value > other_value or (value == other_value and token < other_token)


@inline_jit
def _select(values, tokens, size, most, mass):
    """Find the fewest first tokens whose sum of values reaches ``mass``, at most ``most`` tokens.

    Args:
        values, tokens: (size,) values and their ids, in any order; reordered in place.
        size: how many there are.
        most: largest number of tokens to keep.
        mass: the sum to reach.

    Returns:
        How many tokens are kept; they come first in the arrays afterwards. And their sum.
    """
    begin, end, kept_sum = 0, size, 0.0
    while begin < end:
        # the pivot is the median of three
        a, b, c = begin, (begin + end) // 2, end - 1
        if _comes_first(values[b], tokens[b], values[a], tokens[a]):
            a, b = b, a
        if _comes_first(values[c], tokens[c], values[b], tokens[b]):
            b = c
            if _comes_first(values[b], tokens[b], values[a], tokens[a]):
                b = a
        pivot_value, pivot_token = values[b], tokens[b]
        # tokens up to the pivot to the front
        middle, front_sum = begin, 0.0
        for i in range(begin, end):
            value, token = values[i], tokens[i]
            if not _comes_first(pivot_value, pivot_token, value, token):
                values[i], tokens[i] = values[middle], tokens[middle]
                values[middle], tokens[middle] = value, token
                middle += 1
                front_sum += np.float64(value)
        before = front_sum - np.float64(pivot_value)
        if middle - begin == 1 and (kept_sum + front_sum >= mass or middle >= most):
            return middle, kept_sum + front_sum
        if kept_sum + front_sum >= mass or middle >= most:
            if kept_sum + before < mass and middle - 1 < most:
                # the pivot itself is the last one: put it last among the front
                for i in range(begin, middle):
                    if tokens[i] == pivot_token:
                        values[i], tokens[i] = values[middle - 1], tokens[middle - 1]
                        values[middle - 1], tokens[middle - 1] = pivot_value, pivot_token
                        break
                return middle, kept_sum + front_sum
            # too many: without the pivot, look among those before it
            for i in range(begin, middle):
                if tokens[i] == pivot_token:
                    values[i], tokens[i] = values[middle - 1], tokens[middle - 1]
                    values[middle - 1], tokens[middle - 1] = pivot_value, pivot_token
                    break
            end = middle - 1
        else:
            begin, kept_sum = middle, kept_sum + front_sum
    return begin, kept_sum


@inline_jit
def _narrow(values, tokens, size, mass, histogram):
    """Find the last of the fewest first tokens whose sum of values reaches ``mass``.

    It is the last one, in order, of the tokens that are returned. Values of many tokens are
    summed in a histogram first, by their exponent and three bits more, to leave out most of them.

    Returns:
        How many tokens are left; they come first in the arrays afterwards.
    """
    if size > _FEW:
        bits = values.view(np.int32)
        histogram[:] = 0
        for i in range(size):
            histogram[bits[i] >> 20] += np.float64(values[i])
        bucket = histogram.size - 1
        while bucket > 0 and histogram[bucket] < mass:
            mass -= histogram[bucket]
            bucket -= 1
        left = 0
        for i in range(size):
            value, token = values[i], tokens[i]
            values[left], tokens[left] = value, token
            left += bits[left] >> 20 == bucket
        size = left
    kept, _ = _select(values, tokens, size, size, mass)
    return kept


@inline_jit
def _gather(values, least, kept_values, kept_tokens):
    """Copy the values that are at least ``least``, in the order of tokens; returns their number."""
    count, aligned = 0, values.size // 16 * 16
    for begin in range(np.uint64(0), np.uint64(aligned), np.uint64(16)):
        some = False
        for j in range(np.uint64(16)):
            some |= values[begin + j] >= least
        if some:
            for j in range(np.uint64(16)):
                kept_values[count], kept_tokens[count] = values[begin + j], begin + j
                count += values[begin + j] >= least
    for i in range(aligned, values.size):
        kept_values[count], kept_tokens[count] = values[i], i
        count += values[i] >= least
    return count


@inline_jit
def _bound_of_top_k(values, top_k, maxima, blocks):
    """A number that the ``top_k`` largest values reach; maxima and blocks are (V,) scratch.

    The largest values of k blocks are k values, so the k-th largest value is at least the smallest
    of them.
    """
    count = values.size // 16
    if count <= top_k:
        return np.float32(0)
    for b in range(count):
        begin = np.uint64(16 * b)
        most = values[begin]
        for j in range(np.uint64(16)):
            most = max(most, values[begin + j])
        maxima[b], blocks[b] = most, b
    kept, _ = _select(maxima, blocks, count, top_k, np.inf)
    least = maxima[0]
    for b in range(kept):
        least = min(least, maxima[b])
    return least


@inline_jit
def _draw(values, size, total, number):
    """Index of the first of ``size`` values at which their sum exceeds ``number`` of the total."""
    goal, reached, begin = number * total, 0.0, 0
    while begin + _BLOCK < size:
        after = reached + _sum(values, begin, begin + _BLOCK)
        if after > goal:
            break
        reached, begin = after, begin + _BLOCK
    for i in range(begin, size):
        reached += np.float64(values[i])
        if reached > goal:
            return i
    last = size - 1  # after rounding, the sum may end just below the goal
    while last > 0 and values[last] == 0:
        last -= 1
    return last


@inline_jit
def sample(logits, temperature, top_k, top_p, min_p, number, s):
    """Draw a token.

    Args:
        logits: (V,) float32, finite, after penalties.
        temperature, top_k, top_p, min_p: as in ``SamplingConfig``.
        number: the random number in [0, 1).
        s: SampleScratch.

    Returns:
        The token, or -1 if the temperature is too small for float32.
    """
    best = argmax(logits)
    if temperature == 0:
        return best
    inverse, size = 1.0 / temperature, logits.size
    if not np.isfinite(np.float32(inverse)):
        return -1
    total = exponentials(logits, logits[best], inverse, s.values)
    if top_k == 0 and top_p >= 1 and min_p == 0:
        return np.int64(_draw(s.values, size, total, number))
    if top_k > 0:
        least = _bound_of_top_k(s.values, top_k, s.ordered_values, s.ordered_tokens)
    else:
        # Tokens below min_p come last in the order of values, so they can be left out at once. So
        # can those that all together have less than 1 - top_p.
        least = np.float32(max(min_p, (1 - top_p) * total / size))
    count = _gather(s.values, least, s.kept_values, s.kept_tokens)
    if top_k > 0 or top_p < 1:
        for i in range(count):
            s.ordered_values[i], s.ordered_tokens[i] = s.kept_values[i], s.kept_tokens[i]
        first, mass = count, total
        if top_k > 0:
            first, mass = _select(s.ordered_values, s.ordered_tokens, first, top_k, np.inf)
        if top_p < 1:
            first = _narrow(s.ordered_values, s.ordered_tokens, first, top_p * mass, s.histogram)
        threshold, last = s.ordered_values[0], s.ordered_tokens[0]
        for i in range(first):
            if _comes_first(threshold, last, s.ordered_values[i], s.ordered_tokens[i]):
                threshold, last = s.ordered_values[i], s.ordered_tokens[i]
        kept, smallest = 0, np.float32(min_p)
        for i in range(count):
            value, token = s.kept_values[i], s.kept_tokens[i]
            s.kept_values[kept], s.kept_tokens[kept] = value, token
            is_first = (value > threshold) | ((value == threshold) & (token <= last))
            kept += is_first & (value >= smallest)
        count = kept
    total = _sum(s.kept_values, 0, count)
    return np.int64(s.kept_tokens[_draw(s.kept_values, count, total, number)])


@inline_jit
def log_sum_exp(logits, values):
    """log Σ exp(logits) in float64; values is (V,) scratch."""
    top = logits[argmax(logits)]
    return np.float64(top) + np.log(exponentials(logits, top, 1.0, values))


@inline_jit
def largest(logits, normaliser, tokens, logprobs):
    """Fill tokens (n,) int32 with the most likely tokens and logprobs (n,) with theirs."""
    n, size = tokens.size, 0
    if n == 0:
        return
    for i in range(logits.size):
        value = logits[i]
        if size < n or value > logprobs[n - 1]:
            j = size if size < n else n - 1
            while j > 0 and value > logprobs[j - 1]:
                logprobs[j], tokens[j] = logprobs[j - 1], tokens[j - 1]
                j -= 1
            logprobs[j], tokens[j] = value, i
            size = min(size + 1, n)
    for j in range(n):
        logprobs[j] = np.float32(logprobs[j] - normaliser)
