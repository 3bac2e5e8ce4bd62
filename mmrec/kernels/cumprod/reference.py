"""References for ``cumprod`` and ``log_cumprod``: plain differentiable loops."""

import torch
from torch import Tensor


def cumprod(gamma: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """``y_t = gamma_t y_{t-1}``; gamma (B, T, D), initial_state (B, D)."""
    y, products = initial_state, []
    for t in range(gamma.shape[1]):
        y = gamma[:, t] * y
        products.append(y)
    return (torch.stack(products, 1) if products else torch.empty_like(gamma)), y


def log_cumprod(gamma: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """``l_t = log(gamma_t) + l_{t-1}``, gamma > 0; gamma (B, T, D), initial_state (B, D)."""
    total, sums = initial_state, []
    for t in range(gamma.shape[1]):
        total = gamma[:, t].log() + total
        sums.append(total)
    return (torch.stack(sums, 1) if sums else torch.empty_like(gamma)), total
