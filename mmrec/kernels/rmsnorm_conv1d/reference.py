"""Reference for ``rmsnorm_conv1d``: plain differentiable torch."""

import torch
from torch import Tensor

EPSILON = 1e-6  # added to the mean square of the RMS norm


def rmsnorm_conv1d(x: Tensor, weight: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """``u_t = Σ_k weight_k n_{t-K+1+k}`` with n = x / rms(x).

    x (B, T, D); weight (K, D); initial_state (B, K - 1, D), the rows of n before the first step.
    Returns u (B, T, D) and the last K - 1 rows of n.
    """
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)
    padded = torch.cat((initial_state, n), 1)
    time = x.shape[1]
    products = [padded[:, k : k + time] * weight[k] for k in range(weight.shape[0])]
    return torch.stack(products).sum(0), padded[:, time:]
