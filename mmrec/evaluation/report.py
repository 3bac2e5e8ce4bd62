"""What a mean hides: scores by document, by position, and how sure the model was.

Axes: n tokens of a split, in their order.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrec.evaluation.evaluate import TokenScores
from mmrec.runtime.atomic import atomic_path

DRAWS = 2_000
BINS = 10


@dataclass(frozen=True)
class Report:
    """Scores of one model on one text, taken apart."""

    documents: int
    interval: tuple[float, float] | None
    """95 % interval of bits per byte, documents drawn again (bootstrap); None under two of them."""
    positions: list[dict[str, float]]
    """Mean nats a token by place in its document, bins of powers of two: from, to, tokens, loss."""
    calibration: list[dict[str, float]]
    """Tokens by the probability of the likeliest one: tokens, its mean, the share that came."""
    calibration_error: float
    """Mean distance of the two, weighted by tokens (expected calibration error; Guo et al. 2017,
    arXiv:1706.04599, eq. 3)."""


def bootstrap(nats: np.ndarray, sizes: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of bits per byte from documents' nats (N,) and bytes (N,)."""
    count = len(nats)
    if count < 2:
        return None
    rng, made = np.random.default_rng(seed), np.empty(DRAWS)
    for i in range(DRAWS):
        drawn = rng.integers(0, count, count)
        made[i] = nats[drawn].sum() / max(1, sizes[drawn].sum()) / math.log(2)
    low, high = np.percentile(made, [2.5, 97.5])
    return float(low), float(high)


def make_report(tokens: np.ndarray, eot: int, sizes: np.ndarray, scores: TokenScores) -> Report:
    """Take scores apart.

    Args:
        tokens: (n,) ids; each document ends with ``eot``, the last one perhaps not.
        eot: the id that ends a document.
        sizes: (vocabulary,) bytes that each token stands for.
        scores: of the tokens.
    """
    ends = np.flatnonzero(tokens == eot) + 1
    starts = np.concatenate(([0], ends[ends < len(tokens)]))
    nats = scores.nats.astype(np.float64)
    place = np.arange(len(tokens)) - np.repeat(starts, np.diff(starts, append=len(tokens)))
    positions: list[dict[str, float]] = []
    low, high = 0, 1
    while low <= place.max():
        here = (place >= low) & (place < high)
        if here.any():
            positions.append(
                {
                    "from": low,
                    "to": high - 1,
                    "tokens": int(here.sum()),
                    "loss": float(nats[here].mean()),
                }
            )
        low, high = high, 2 * high
    calibration: list[dict[str, float]] = []
    error, bins = 0.0, np.minimum((scores.sure * BINS).astype(int), BINS - 1)
    for i in range(BINS):
        here = bins == i
        if here.any():
            sure, right = float(scores.sure[here].mean()), float(scores.right[here].mean())
            calibration.append({"tokens": int(here.sum()), "sure": sure, "right": right})
            error += abs(sure - right) * here.mean()
    sums = np.add.reduceat(nats, starts), np.add.reduceat(sizes[tokens], starts)
    return Report(len(starts), bootstrap(*sums), positions, calibration, float(error))


def draw(report: Report, path: Path, title: str) -> None:
    """Write a PNG: loss against place in the document, and calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    middle = [math.sqrt((b["from"] + 1) * (b["to"] + 1)) for b in report.positions]
    left.plot(middle, [b["loss"] for b in report.positions], "o-", color="tab:orange")
    left.set(xscale="log", xlabel="token of its document", ylabel="loss (nats/token)", title=title)
    right.plot([0, 1], [0, 1], color="gray", linewidth=0.8, label="perfectly calibrated")
    sure = [b["sure"] for b in report.calibration]
    right.plot(sure, [b["right"] for b in report.calibration], "o-", label="the model")
    right.set(
        xlabel="probability of the likeliest token",
        ylabel="share of times that it came",
        title=f"calibration error {report.calibration_error:.3f}",
    )
    right.legend()
    axes: Any
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
