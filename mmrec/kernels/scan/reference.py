"""The truth that scan and product-scan kernels are held against: plain differentiable loops."""

import torch
from torch import Tensor


def scan(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """First-order scan ``h_t = a_t h_{t-1} + b_t``; a, b (B, T, D), h0 (B, D)."""
    h, out = h0, []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        out.append(h)
    return (torch.stack(out, 1) if out else torch.empty_like(b)), h


def cumprod(gamma: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
    """Product scan ``y_t = gamma_t y_{t-1}``; gamma (B, T, D), y0 (B, D)."""
    return scan(gamma, torch.zeros_like(gamma), y0)


def log_cumprod(gamma: Tensor, l0: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the product scan ``l_t = log(gamma_t) + l_{t-1}``, gamma > 0."""
    return scan(torch.ones_like(gamma), gamma.log(), l0)
