"""Choose the next token from the logits of the model.

V is the vocabulary size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrec.config import SamplingConfig

REPETITION_WINDOW = 256  # newest tokens that the repetition penalty applies to


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
