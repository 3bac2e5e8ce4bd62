"""Reference of sampling, in NumPy and float64.

V is the vocabulary size.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mmrec.config import SamplingConfig

REPETITION_WINDOW = 256
"""Newest tokens of the text that the repetition penalty applies to."""
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def uniform(seed: int, draw: int) -> float:
    """The number in [0, 1) that a draw uses: 53 bits of SplitMix64 at (seed, draw).

    It depends on nothing else, so equal seeds give equal numbers whatever else is drawn.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        return z ^ z >> 31

    state = mix(seed + _GOLDEN & _MASK)
    return (mix(state + (draw + 1) * _GOLDEN & _MASK) >> 11) * 2.0**-53


def adjust_logits(
    logits: np.ndarray,
    sampling: SamplingConfig,
    recent: Sequence[int] | np.ndarray = (),
    counts: np.ndarray | None = None,
    logit_bias: Mapping[int, float] | None = None,
) -> np.ndarray:
    """Apply the repetition, frequency and presence penalties, then the bias.

    Args:
        logits: (V,).
        sampling: the penalties.
        recent: token ids that the repetition penalty applies to, the last REPETITION_WINDOW of
            the text. Negative ones stand before the text.
        counts: (V,), how often each token was drawn so far; None for never.
        logit_bias: what is added to the logits of tokens.

    Returns:
        (V,) float64.
    """
    logits = logits.astype(np.float64)
    penalty = sampling.repetition_penalty
    if penalty != 1 and (repeated := sorted({int(t) for t in recent if t >= 0})):
        value = logits[repeated]
        logits[repeated] = np.where(value > 0, value / penalty, value * penalty)
    if counts is not None:
        logits -= sampling.frequency_penalty * counts
        logits -= sampling.presence_penalty * (counts > 0)
    for token, bias in (logit_bias or {}).items():
        logits[token] += bias
    return logits


def next_token_probabilities(logits: np.ndarray, sampling: SamplingConfig) -> np.ndarray:
    """Return the distribution that the next token is drawn from.

    Args:
        logits: (V,), after ``adjust_logits``.
        sampling: temperature and filters.

    Returns:
        Probabilities (V,) in float64. Their sum is 1; tokens that a filter drops have 0. Among
        tokens of equal probability the one with the smallest id comes first.
    """
    logits = logits.astype(np.float64)
    if sampling.temperature == 0:
        p = np.zeros_like(logits)
        p[logits.argmax()] = 1
        return p
    p = np.exp((logits - logits.max()) / sampling.temperature)
    total = p.sum()
    if (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1, 0):
        return p / total
    # Only tokens that may be kept are sorted. Those that all together have less than 1 - top_p come
    # last, and are dropped.
    top_k = min(sampling.top_k, len(p))
    least = np.partition(p, -top_k)[-top_k] if top_k else (1 - sampling.top_p) * total / len(p)
    order = np.flatnonzero(p >= least)
    order = order[np.argsort(-p[order], kind="stable")]
    if top_k:
        order = order[:top_k]
        total = p[order].sum()
    ranked = p[order] / total
    # the token that reaches top_p is kept: only those after it are dropped
    keep = ranked.cumsum() - ranked < sampling.top_p
    keep &= ranked >= sampling.min_p * ranked[0]
    kept = np.zeros_like(p)
    kept[order[keep]] = p[order[keep]]
    return kept / kept.sum()


def draw(p: np.ndarray, number: float) -> int:
    """The first token, in the order of ids, at which the sum of p exceeds ``number`` in [0, 1)."""
    sums = p.cumsum()
    token = int(np.searchsorted(sums, number * sums[-1], side="right"))
    return min(token, int(np.flatnonzero(p)[-1]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (V,) in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
