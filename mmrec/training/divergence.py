"""Divergence: how it is noticed, and how often training may go on after it."""

import statistics
from collections.abc import Sequence

MAX_CONSECUTIVE_SKIPS, MAX_SKIPS = 5, 100
MAX_ROLLBACKS = 3
ROLLBACK_LR_SCALE = 0.5
"""Each rollback multiplies the learning rates by this."""
SPIKE_WINDOW = 100
"""Losses that a spike is measured against."""
STEPS_BETWEEN_WARNINGS = 500


def limit_reached(policy: str, consecutive_skips: int, skips: int, rollbacks: int) -> str | None:
    """Say why ``on_nan`` may not go on once more; None if it may.

    Args:
        policy: ``stop``, ``skip`` or ``rollback``.
        consecutive_skips: steps skipped since the last step that was taken.
        skips: all steps skipped.
        rollbacks: all rollbacks.
    """
    if policy == "skip" and consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
        return f"after {consecutive_skips} skipped steps in a row"
    if policy == "skip" and skips >= MAX_SKIPS:
        return f"after {skips} skipped steps"
    if policy == "rollback" and rollbacks >= MAX_ROLLBACKS:
        return f"after {rollbacks} rollbacks"
    return None


def loss_spike(losses: Sequence[float]) -> float | None:
    """Return the running median if the last loss lies far above it, else None.

    Far means eight times the median absolute deviation, and at least a sixth of the median itself,
    so that neither noise nor a quiet run counts as a spike.
    """
    earlier = losses[-SPIKE_WINDOW - 1 : -1]
    if len(earlier) < SPIKE_WINDOW // 4:
        return None
    median = statistics.median(earlier)
    deviation = statistics.median(abs(x - median) for x in earlier)
    return median if losses[-1] > median + 8 * max(deviation, median / 48) else None
