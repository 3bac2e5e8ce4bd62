"""Numba kernel of the softmax over logits. Arrays in, arrays out, no checks.

Axes: R rows (tokens), V columns (vocabulary).

    numerator_rv = exp(x_rv - max_v x_rv)      denominator_r = Σ_v numerator_rv
    loss_r = log denominator_r + max_v x_rv - x_r,target

A task is a row of logits. The row is read from memory once, for its maximum, and once more from the
nearest cache for all else. Sums and maxima run side by side in LANES, which LLVM turns into
vectors, and are combined in one fixed order.
"""

import numpy as np

from mmrec.kernels._bf16 import from_bf16, to_bf16
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel
from mmrec.kernels._math import exp_nonpositive

LANES = 32


@inline_jit
def _maximum(row, lanes):
    """The largest number of a row. NaN is skipped here; it shows in the sum later."""
    aligned = np.uint64(row.size // LANES * LANES)
    for j in range(np.uint64(LANES)):
        lanes[j] = from_bf16(row[0])
    for at in range(np.uint64(0), aligned, np.uint64(LANES)):
        for j in range(np.uint64(LANES)):
            x = from_bf16(row[at + j])
            lanes[j] = x if x > lanes[j] else lanes[j]
    largest = lanes[0]
    for j in range(LANES):
        largest = lanes[j] if lanes[j] > largest else largest
    for at in range(aligned, np.uint64(row.size)):
        x = from_bf16(row[at])
        largest = x if x > largest else largest
    return largest


@parallel_kernel
def softmax_parts_fwd(task, logits, targets, numerators, denominators, losses):
    """Fill numerators (R, V), denominators (R,) and losses (R,) from logits (R, V), targets (R,).

    logits and numerators may hold bfloat16.
    """
    row, out = logits[task], numerators[task]
    lanes = np.empty(LANES, denominators.dtype)
    largest = _maximum(row, lanes)
    aligned = np.uint64(row.size // LANES * LANES)
    for j in range(np.uint64(LANES)):
        lanes[j] = 0
    for at in range(np.uint64(0), aligned, np.uint64(LANES)):
        for j in range(np.uint64(LANES)):
            e = exp_nonpositive(from_bf16(row[at + j]) - largest)
            lanes[j] += e
            out[at + j] = to_bf16(e, out)
    for at in range(aligned, np.uint64(row.size)):
        e = exp_nonpositive(from_bf16(row[at]) - largest)
        lanes[at - aligned] += e
        out[at] = to_bf16(e, out)
    total = lanes[0]
    for j in range(1, LANES):
        total += lanes[j]
    denominators[task] = total
    losses[task] = np.log(total) + largest - from_bf16(row[targets[task]])
