"""What the decoder's kernel is asked to do, and what it fills. Nothing here imports Numba.

Axes: B streams, V vocabulary.
"""

from typing import NamedTuple

import numpy as np


class Streams(NamedTuple):
    """The texts that are written, one entry or row per stream."""

    seeds: np.ndarray
    """(B,) uint64."""
    drawn: np.ndarray
    """(B,) int64, tokens drawn so far; advanced."""
    limits: np.ndarray
    """(B,) int64, most tokens to draw in this call."""
    settings: np.ndarray
    """(B, 7) float64: repetition, frequency, presence penalty, temperature, top_k, top_p, min_p."""
    counts: np.ndarray
    """(B, V) int32 or (B, 0), how often each token was drawn; advanced."""
    bias_bounds: np.ndarray
    """(B + 1,) int64, which biases belong to which stream."""
    bias_tokens: np.ndarray
    bias_values: np.ndarray
    end_token: int
    stop_tokens: np.ndarray
    """(B,) int64, a further token that ends the text of each stream, or -1."""


class Drawn(NamedTuple):
    """What ``run`` fills."""

    counts: np.ndarray
    """(B,) int64, tokens drawn in this call."""
    status: np.ndarray
    """(B,) int64: 0, STOPPED after an end or stop token, or BROKEN if logits are not finite."""
    tokens: np.ndarray
    """(B, steps) int32."""
    logprobs: np.ndarray
    """(B, steps) float32, or (B, 0) for none."""
    top_tokens: np.ndarray
    """(B, steps, n) int32."""
    top_logprobs: np.ndarray
    """(B, steps, n) float32."""


STOPPED, BROKEN = 1, 2
READ, SCORE, LOGITS, DECODE = 0, 1, 2, 3
"""What ``run`` does: read tokens, score tokens, read and give logits, or draw tokens."""
