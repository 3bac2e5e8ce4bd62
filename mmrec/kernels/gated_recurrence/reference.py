"""The truth the gated recurrence is held against: a plain differentiable loop."""

import torch
from torch import Tensor


def gated_recurrence(
    z: Tensor, gate: Tensor, decay: Tensor, weight: Tensor | None, h0: Tensor, *, mixed: bool = True
) -> tuple[Tensor, Tensor]:
    """``h_t = c_t z_t σ(h_{t-1} W + gate_t) + γ_t h_{t-1}``, γ = σ(decay), c = 1 - γ or 1.

    z, gate, decay (B, T, D); weight (G, D/G, D/G), the diagonal blocks of W; h0 (B, D).
    """
    dense = None if weight is None else torch.block_diag(*weight)
    h, out = h0, []
    for t in range(z.shape[1]):
        gamma = torch.sigmoid(decay[:, t])
        pre = gate[:, t] if dense is None else h @ dense + gate[:, t]
        scale = 1 - gamma if mixed else 1.0
        h = scale * z[:, t] * torch.sigmoid(pre) + gamma * h
        out.append(h)
    return (torch.stack(out, 1) if out else torch.empty_like(z)), h
