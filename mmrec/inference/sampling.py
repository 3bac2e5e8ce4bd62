"""Choose the next token from the logits of the model.

V is the vocabulary size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrec.errors import InputError

REPETITION_WINDOW = 256  # newest tokens that the repetition penalty applies to


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. The settings apply in the order of the fields.

    Raises:
        InputError: a setting lies outside its range.
    """

    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative logits, of the tokens among the last
    256; 1 is off. Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 is off."""
    top_p: float = 0.95
    """Keep the fewest most likely tokens whose probabilities reach this sum; 1 is off.
    Source: Holtzman et al. 2020, arXiv:1904.09751 (nucleus sampling)."""
    min_p: float = 0.0
    """Drop tokens whose probability is below this fraction of the largest one; 0 is off.
    Source: Nguyen et al. 2024, arXiv:2407.01082."""

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "finite and >= 0"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "finite and > 0"),
        ):
            if not valid:
                raise InputError(f"{name} must be {rule}; got {getattr(self, name)}")


def next_token_probabilities(
    logits: Tensor, sampling: SamplingConfig, recent_tokens: Sequence[int] = ()
) -> Tensor:
    """Return the distribution that the next token is drawn from.

    Args:
        logits: (V,) in any floating-point dtype.
        sampling: penalty, temperature and filters.
        recent_tokens: ids that the repetition penalty applies to.

    Returns:
        Probabilities (V,) in float64. Their sum is 1; tokens that a filter drops have 0.
    """
    logits = logits.double()
    if recent_tokens and sampling.repetition_penalty != 1:
        repeated = torch.tensor(sorted(set(recent_tokens)))
        value = logits[repeated]
        penalty = sampling.repetition_penalty
        logits[repeated] = torch.where(value > 0, value / penalty, value * penalty)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(0, logits.argmax(0, keepdim=True), 1.0)
    p = torch.softmax(logits / sampling.temperature, 0)
    order = p.argsort(descending=True, stable=True)
    ranked = p[order]
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
    ranked = ranked * keep / (ranked * keep).sum()
    # the token that reaches top_p is kept: only those after it are dropped
    keep &= ranked.cumsum(0) - ranked < sampling.top_p
    keep &= ranked >= sampling.min_p * ranked[0]
    mask = torch.zeros_like(p, dtype=torch.bool)
    mask[order[keep]] = True
    return p * mask / (p * mask).sum()
