"""The truth the associative memory is held against: a plain differentiable loop."""

import torch
from torch import Tensor

EPSILON = 1e-6  # added to |k|² and |q|², so that a zero key has a gradient


def associative_memory(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, write: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor]:
    """Gated delta rule; q, k, v (B, T, H, P), decay and write (B, T, H) logits, s0 (B, H, P, P)."""
    k = k * (k.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    q = q * (q.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    alpha, beta = torch.sigmoid(decay)[..., None], torch.sigmoid(write)[..., None]
    s, out = s0, []
    for t in range(q.shape[1]):
        read = torch.einsum("bhij,bhi->bhj", s, k[:, t])
        error = beta[:, t] * (v[:, t] - alpha[:, t] * read)
        s = alpha[:, t, :, :, None] * s + k[:, t, :, :, None] * error[:, :, None, :]
        out.append(torch.einsum("bhij,bhi->bhj", s, q[:, t]))
    return (torch.stack(out, 1) if out else torch.empty_like(v)), s
