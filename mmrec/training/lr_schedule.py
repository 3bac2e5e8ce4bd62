"""Learning-rate schedules: the learning rate as a share of its peak."""

import math


def lr_factor(
    fraction: float, warmup: float, schedule: str, final_ratio: float, decay_fraction: float = 0.2
) -> float:
    """Compute the learning rate at a point of a run, as a share of its peak.

    Args:
        fraction: how much of the run is done, 0 to 1.
        warmup: share of the run in which the rate rises linearly to its peak.
        schedule: shape of the decay from there to the end: ``cosine``, ``linear``, ``constant``, or
            ``wsd``: at the peak, and then a linear decay.
        final_ratio: share of the peak that is left at the end; ``constant`` ignores it.
        decay_fraction: share of the run, at its end, in which the rate of ``wsd`` decays.

    Returns:
        A factor from 0 to 1.

    Source of the cosine: Loshchilov and Hutter 2017, "SGDR" (arXiv:1608.03983, eq. 5). Source of
    ``wsd``: Hu et al. 2024, "MiniCPM" (arXiv:2404.06395, section 4), with a linear decay.
    """
    if fraction < warmup:
        return fraction / warmup
    decayed = min(1.0, (fraction - warmup) / (1 - warmup)) if warmup < 1 else 1.0
    if schedule == "constant" or (schedule == "wsd" and fraction <= 1 - decay_fraction):
        return 1.0
    if schedule == "wsd":
        remaining = max(0.0, (1 - fraction) / decay_fraction)
    elif schedule == "linear":
        remaining = 1 - decayed
    else:
        remaining = 0.5 * (1 + math.cos(math.pi * decayed))
    return final_ratio + (1 - final_ratio) * remaining
