"""Divergence: how it is noticed, and how far the ways of going on may go."""

import statistics
from collections.abc import Sequence

SKIPS_IN_ROW, SKIPS = 5, 100
ROLLBACKS, CUT = 3, 0.5  # each rollback multiplies the learning rates by CUT
WINDOW, QUIET = 100, 500  # losses that a spike is measured by; steps between two mentions


def limit_reached(policy: str, in_row: int, skipped: int, rollbacks: int) -> str | None:
    """Why ``--on-nan`` may not go on once more, in words; None if it may."""
    if policy == "skip" and in_row >= SKIPS_IN_ROW:
        return f"after {in_row} skipped steps in a row"
    if policy == "skip" and skipped >= SKIPS:
        return f"after {skipped} skipped steps"
    if policy == "rollback" and rollbacks >= ROLLBACKS:
        return f"after {rollbacks} rollbacks"
    return None


def spike(losses: Sequence[float]) -> float | None:
    """The running median, if the last of the losses lies far above it.

    Far is eight times the usual distance from the median (the median of those distances), and at
    least a sixth of the median itself, so that neither noise nor a quiet run is called a spike.
    """
    before = losses[-WINDOW - 1 : -1]
    if len(before) < WINDOW // 4:
        return None
    median = statistics.median(before)
    usual = statistics.median(abs(x - median) for x in before)
    return median if losses[-1] > median + 8 * max(usual, median / 48) else None
