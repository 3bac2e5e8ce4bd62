"""The truth the gated scan is held against: a plain differentiable loop."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_scan(p: Tensor, bias: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """``h_t = (1 - γ_t) z_t σ(g_t) + γ_t h_{t-1}``, γ = σ(f + bias); y = rms_norm(h) silu(r).

    p (B, T, 4 D), a row being [z, f, g, r]; bias (D,); h0 (B, D).
    """
    h, out = h0, []
    for t in range(p.shape[1]):
        z, f, g, r = p[:, t].chunk(4, -1)
        gamma = torch.sigmoid(f + bias)
        h = (1 - gamma) * z * torch.sigmoid(g) + gamma * h
        out.append(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * F.silu(r))
    return (torch.stack(out, 1) if out else p[..., : h0.shape[-1]] * 1), h
