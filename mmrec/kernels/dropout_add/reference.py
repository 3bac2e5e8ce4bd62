"""Reference for ``dropout_add``: plain differentiable torch."""

import numpy as np
import torch
from torch import Tensor


def keep_mask(count: int, key: Tensor, p: float) -> Tensor:
    """Which of ``count`` elements stay: a bool tensor (count,) for a key (2,) int32."""
    bits = np.arange(count, dtype=np.uint32)
    for word, shift, factor in zip(
        key.numpy().view(np.uint32), (16, 13), (0x85EBCA6B, 0xC2B2AE35), strict=True
    ):
        bits = bits + word
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    bits ^= bits >> np.uint32(16)
    return torch.from_numpy(bits >= np.uint32(int(p * 2**32)))


def dropout_add(x: Tensor, residual: Tensor, key: Tensor, p: float) -> Tensor:
    """residual + x m / (1 - p), for the mask m of a key."""
    keep = keep_mask(x.numel(), key, p).view(x.shape)
    return residual + torch.where(keep, x.to(residual.dtype) / (1 - p), 0)
