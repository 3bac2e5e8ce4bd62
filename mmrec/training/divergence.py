"""Divergence: how a loss spike is found, and how often training may continue after a NaN."""

import statistics
from collections.abc import Sequence

MAX_CONSECUTIVE_SKIPS, MAX_SKIPS, MAX_ROLLBACKS = 5, 100, 3
"""More skipped steps or rollbacks than these end the run."""
ROLLBACK_LR_SCALE = 0.5
"""Each rollback multiplies the learning rates by this."""
SPIKE_WINDOW = 100
"""Number of earlier losses that a loss is compared with."""
STEPS_BETWEEN_WARNINGS = 500
"""A warning of a loss spike is not repeated within this many steps."""


def limit_reached(policy: str, consecutive_skips: int, skips: int, rollbacks: int) -> str | None:
    """Tell whether a run has used up what its ``on_nan`` policy allows.

    Args:
        policy: ``stop``, ``skip`` or ``rollback``.
        consecutive_skips: steps skipped since the last step that was taken.
        skips: steps skipped since the run began.
        rollbacks: rollbacks since the run began.

    Returns:
        The end of an error message, such as "after 3 rollbacks"; None if training may continue.
    """
    if policy == "skip" and consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
        return f"after {consecutive_skips} skipped steps in a row"
    if policy == "skip" and skips >= MAX_SKIPS:
        return f"after {skips} skipped steps"
    if policy == "rollback" and rollbacks >= MAX_ROLLBACKS:
        return f"after {rollbacks} rollbacks"
    return None


def loss_spike(losses: Sequence[float]) -> float | None:
    """Find out whether the last loss lies far above the running median.

    Far means more than eight median absolute deviations, and more than a sixth of the median. The
    first bound leaves out noise, the second one the small steps of a nearly constant loss.

    Args:
        losses: nats per token, one per step, the newest last.

    Returns:
        The median of the losses before the last one if that is a spike, else None.
    """
    earlier = losses[-SPIKE_WINDOW - 1 : -1]
    if len(earlier) < SPIKE_WINDOW // 4:
        return None
    median = statistics.median(earlier)
    deviation = statistics.median(abs(x - median) for x in earlier)
    return median if losses[-1] > median + 8 * max(deviation, median / 48) else None
