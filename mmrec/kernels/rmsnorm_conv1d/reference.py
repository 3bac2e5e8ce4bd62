"""The truth the norm with convolution is held against: plain differentiable torch."""

import torch
from torch import Tensor


def norm_conv(x: Tensor, taps: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """``u_t = Σ_k taps_k n_{t-K+1+k}``, n = x / rms(x), ``before`` (B, K - 1, D) being n before x.

    x (B, T, D); taps (K, D). Returns u (B, T, D) and the last K - 1 rows of n.
    """
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    padded = torch.cat((before, n), 1)
    time = x.shape[1]
    rows = [padded[:, k : k + time] * taps[k] for k in range(taps.shape[0])]
    return torch.stack(rows).sum(0), padded[:, time:]
