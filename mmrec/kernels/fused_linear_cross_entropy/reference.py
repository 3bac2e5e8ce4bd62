"""References for the fused linear cross-entropy and its kernel: plain torch."""

import torch.nn.functional as F
from torch import Tensor


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of the logits hidden @ weight.T + bias (R, V) against targets (R,)."""
    return F.cross_entropy(F.linear(hidden, weight, bias), targets)


def softmax_parts(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x - max x) (R, V), its sums over the last axis (R,), and cross-entropy (R,) in nats."""
    numerators = (logits - logits.amax(-1, keepdim=True)).exp()
    denominators = numerators.sum(-1)
    losses = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return numerators, denominators, losses
