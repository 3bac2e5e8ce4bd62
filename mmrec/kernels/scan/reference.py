"""Reference for ``scan``: a plain differentiable loop."""

import torch
from torch import Tensor


def scan(a: Tensor, b: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """``h_t = a_t h_{t-1} + b_t``; a, b (B, T, D), initial_state (B, D)."""
    h, states = initial_state, []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return (torch.stack(states, 1) if states else torch.empty_like(b)), h
