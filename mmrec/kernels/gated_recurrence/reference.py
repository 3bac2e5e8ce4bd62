"""Reference for ``gated_recurrence``: a plain differentiable loop."""

import torch
from torch import Tensor


def gated_recurrence(
    z: Tensor,
    gate_logits: Tensor,
    decay_logits: Tensor,
    weight: Tensor | None,
    initial_state: Tensor,
    *,
    scale_input: bool = True,
) -> tuple[Tensor, Tensor]:
    """``h_t = c_t z_t σ(h_{t-1} W + g_t) + γ_t h_{t-1}``, γ = σ(decay_logits), c = 1 - γ or 1.

    z, gate_logits g, decay_logits (B, T, D); weight (G, D/G, D/G), the diagonal blocks of W;
    initial_state (B, D).
    """
    dense = None if weight is None else torch.block_diag(*weight)
    h, states = initial_state, []
    for t in range(z.shape[1]):
        gamma = torch.sigmoid(decay_logits[:, t])
        logits = gate_logits[:, t] if dense is None else h @ dense + gate_logits[:, t]
        scale = 1 - gamma if scale_input else 1.0
        h = scale * z[:, t] * torch.sigmoid(logits) + gamma * h
        states.append(h)
    return (torch.stack(states, 1) if states else torch.empty_like(z)), h
