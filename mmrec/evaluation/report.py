"""What the mean score hides: scores by document, by position in it, and calibration.

Axes: n tokens of a text in their order, N documents, V vocabulary size.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrec.checkpoint.outputs import check_output
from mmrec.evaluation.evaluate import TokenScores
from mmrec.runtime.names import shorten
from mmrec.runtime.pictures import LABEL_CHARS, picture

RESAMPLES = 2_000
RESAMPLED_AT_ONCE = 1 << 20  # documents that are drawn in one batch of resamples, for memory
CONFIDENCE_BINS = 10


@dataclass(frozen=True)
class Report:
    """Scores of one model on one text, by document, position and confidence."""

    documents: int
    interval: tuple[float, float] | None
    """95 % bootstrap interval of bits per byte over the documents; None below two documents."""
    positions: list[dict[str, float]]
    """Mean loss by position in the document, in bins of powers of two. Keys: from, to (inclusive),
    tokens, loss (nats per token)."""
    calibration: list[dict[str, float]]
    """Tokens in ten bins by the probability of the most likely token. Keys: tokens, confidence (the
    mean of that probability), correct (fraction of tokens that were the most likely one)."""
    calibration_error: float
    """Expected calibration error: the mean of abs(confidence - correct) over the bins, weighted by
    their tokens. Source: Guo et al. 2017, arXiv:1706.04599, eq. 3."""


def bootstrap_interval(
    nats: np.ndarray, sizes: np.ndarray, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of bits per byte, with documents resampled.

    Args:
        nats: (N,) float64, sum of the cross-entropies of each document in nats.
        sizes: (N,) int64, bytes of each document.
        seed: seed of the resampling.

    Returns:
        Low and high end (percentile method) of the ratio of sums; None below two documents.
    """
    if len(nats) < 2:
        return None
    from scipy.stats import bootstrap

    def bits_per_byte(nats: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
        ratio: np.ndarray = nats.sum(axis) / np.maximum(1, sizes.sum(axis)) / math.log(2)
        return ratio

    interval = bootstrap(
        (nats, sizes),
        bits_per_byte,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, RESAMPLED_AT_ONCE // len(nats)),
        confidence_level=0.95,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def make_report(
    tokens: np.ndarray,
    eot: int,
    token_bytes: np.ndarray,
    scores: TokenScores,
    answers: np.ndarray | None = None,
) -> Report:
    """Break the scores of tokens down by document, position and confidence.

    Args:
        tokens: (n,) token ids; every document ends with ``eot``, except perhaps the last.
        eot: id of the end token.
        token_bytes: (V,) int64, bytes that each token stands for.
        scores: scores of the tokens.
        answers: (n,) bool, the tokens that were scored; None for all.
    """
    counted = np.ones(len(tokens), bool) if answers is None else answers
    ends = np.flatnonzero(tokens == eot) + 1
    starts = np.concatenate(([0], ends[ends < len(tokens)]))
    nats = np.where(counted, scores.nats, 0).astype(np.float64)
    position = np.arange(len(tokens)) - np.repeat(starts, np.diff(starts, append=len(tokens)))
    positions: list[dict[str, float]] = []
    low, high = 0, 1
    while low <= position.max():
        in_bin = counted & (position >= low) & (position < high)
        if in_bin.any():
            positions.append(
                {
                    "from": low,
                    "to": high - 1,
                    "tokens": int(in_bin.sum()),
                    "loss": float(nats[in_bin].mean()),
                }
            )
        low, high = high, 2 * high
    calibration: list[dict[str, float]] = []
    confidence_of_scored = np.where(counted, scores.confidence, 0)
    bins = np.minimum((confidence_of_scored * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    error = 0.0
    for i in range(CONFIDENCE_BINS):
        in_bin = counted & (bins == i)
        if in_bin.any():
            confidence = float(scores.confidence[in_bin].mean())
            correct = float(scores.correct[in_bin].mean())
            calibration.append(
                {"tokens": int(in_bin.sum()), "confidence": confidence, "correct": correct}
            )
            error += abs(confidence - correct) * (in_bin.sum() / counted.sum())
    interval = bootstrap_interval(
        np.add.reduceat(nats, starts),
        np.add.reduceat(np.where(counted, token_bytes[tokens], 0), starts),
    )
    return Report(len(starts), interval, positions, calibration, float(error))


def draw_report(report: Report, path: Path, title: str, *, force: bool = False) -> None:
    """Write a PNG with two plots: loss against position in the document, and calibration.

    Args:
        report: what is drawn.
        path: the file.
        title: title of the picture.
        force: replace a file that is no picture of mmrec.

    Raises:
        InputError: the file must not be replaced; see ``check_output``.
        StorageError: the picture cannot be drawn or written.
    """
    check_output(path, "picture", option="path", force=force)
    with picture(path, 10.0) as figure:
        left, right = figure.subplots(1, 2)
        middles = [math.sqrt((b["from"] + 1) * (b["to"] + 1)) for b in report.positions]
        left.plot(middles, [b["loss"] for b in report.positions], "o-", color="tab:orange")
        left.set(
            xscale="log",
            xlabel="position in the document",
            ylabel="loss (nats/token)",
            title=shorten(title, LABEL_CHARS),
        )
        left.xaxis.set_major_formatter("{x:g}")  # 100 for 10^2, which would be a formula
        left.xaxis.set_minor_formatter("")
        right.plot([0, 1], [0, 1], color="gray", linewidth=0.8, label="perfectly calibrated")
        confidence = [b["confidence"] for b in report.calibration]
        right.plot(confidence, [b["correct"] for b in report.calibration], "o-", label="the model")
        right.set(
            xlabel="probability of the most likely token",
            ylabel="fraction of tokens that were it",
            title=f"calibration error {report.calibration_error:.3f}",
        )
        right.legend()
        axes: Any
        for axes in (left, right):
            axes.grid(alpha=0.3)
