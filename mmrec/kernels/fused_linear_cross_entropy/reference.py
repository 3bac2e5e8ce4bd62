"""The truth that the softmax in parts is held against."""

from torch import Tensor


def softmax_parts(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x - max x), its sum over the last axis, and the cross-entropy of each row in nats."""
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    sums = powers.sum(-1)
    nats = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return powers, sums, nats
