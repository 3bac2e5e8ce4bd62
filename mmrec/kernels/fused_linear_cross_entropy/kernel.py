"""Numba kernel of a softmax in parts. Arrays in, arrays out, no checks. A task is a row of logits.

The row is read once for its maximum and once more, then in the nearest cache, for all else. Sums
run side by side in LANES, which makes vectors of them, and are added in one order.
"""

import numpy as np

from mmrec.kernels._bf16 import narrow, wide
from mmrec.kernels._launch import helper, kernel
from mmrec.kernels._math import exp_below

LANES = 32


@helper
def _top(row, lanes):
    """The largest of a row; a NaN is found later, in the sum."""
    whole = np.uint64(row.size // LANES * LANES)
    for j in range(np.uint64(LANES)):
        lanes[j] = wide(row[0])
    for at in range(np.uint64(0), whole, np.uint64(LANES)):
        for j in range(np.uint64(LANES)):
            x = wide(row[at + j])
            lanes[j] = x if x > lanes[j] else lanes[j]
    top = lanes[0]
    for j in range(LANES):
        top = lanes[j] if lanes[j] > top else top
    for at in range(whole, np.uint64(row.size)):
        x = wide(row[at])
        top = x if x > top else top
    return top


@kernel
def softmax_parts_fwd(task, logits, targets, powers, sums, nats):
    """Fill powers (R, V) with exp(x - max x), sums (R,) with theirs, nats (R,) -log p_target."""
    row, out = logits[task], powers[task]
    lanes = np.empty(LANES, sums.dtype)
    top = _top(row, lanes)
    whole = np.uint64(row.size // LANES * LANES)
    for j in range(np.uint64(LANES)):
        lanes[j] = 0
    for at in range(np.uint64(0), whole, np.uint64(LANES)):
        for j in range(np.uint64(LANES)):
            e = exp_below(wide(row[at + j]) - top)
            lanes[j] += e
            out[at + j] = narrow(e, out)
    for at in range(whole, np.uint64(row.size)):
        e = exp_below(wide(row[at]) - top)
        lanes[at - whole] += e
        out[at] = narrow(e, out)
    total = lanes[0]
    for j in range(1, LANES):
        total += lanes[j]
    sums[task] = total
    nats[task] = np.log(total) + top - wide(row[targets[task]])
