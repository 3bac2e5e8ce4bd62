"""Learning-rate schedules: the rate as a share of its peak, from how far the run has come."""

import math


def lr_factor(progress: float, warmup: float, shape: str, floor: float) -> float:
    """Share of the peak learning rate.

    Args:
        progress: how far the run is, 0 to 1.
        warmup: share of the run that rises linearly to the peak.
        shape: ``cosine``, ``linear`` or ``constant`` from there to the end.
        floor: share of the peak that is left at the end (not for ``constant``).

    The cosine is that of Loshchilov & Hutter, "SGDR" (2017, arXiv:1608.03983), eq. 5.
    """
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / (1 - warmup)) if warmup < 1 else 1.0
    if shape == "constant":
        return 1.0
    left = 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return floor + (1 - floor) * left
