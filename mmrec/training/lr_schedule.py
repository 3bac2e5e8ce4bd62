"""Learning-rate schedules: the learning rate as a share of its peak."""

import math


def lr_factor(fraction: float, warmup: float, schedule: str, final_ratio: float) -> float:
    """Compute the learning rate at a point of a run, as a share of its peak.

    Args:
        fraction: how much of the run is done, 0 to 1.
        warmup: share of the run in which the rate rises linearly to its peak.
        schedule: shape of the decay from there to the end: ``cosine``, ``linear`` or ``constant``.
        final_ratio: share of the peak that is left at the end; ``constant`` ignores it.

    Returns:
        A factor from 0 to 1.

    Source of the cosine: Loshchilov and Hutter 2017, "SGDR" (arXiv:1608.03983, eq. 5).
    """
    if fraction < warmup:
        return fraction / warmup
    decay_fraction = min(1.0, (fraction - warmup) / (1 - warmup)) if warmup < 1 else 1.0
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        remaining = 1 - decay_fraction
    else:
        remaining = 0.5 * (1 + math.cos(math.pi * decay_fraction))
    return final_ratio + (1 - final_ratio) * remaining
