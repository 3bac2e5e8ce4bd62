"""Reference for ``min_gru_mixer``: a plain differentiable loop."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6  # added to the mean square of the RMS norm


def min_gru_mixer(
    projected: Tensor, forget_bias: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """``h_t = (1 - γ_t) z_t σ(g_t) + γ_t h_{t-1}``, γ = σ(f + bias); y = rms_norm(h) silu(r).

    projected (B, T, 4 D) holds [z, f, g, r]; forget_bias (D,); initial_state (B, D).
    """
    h, outputs = initial_state, []
    for t in range(projected.shape[1]):
        z, f, g, r = projected[:, t].chunk(4, -1)
        gamma = torch.sigmoid(f + forget_bias)
        h = (1 - gamma) * z * torch.sigmoid(g) + gamma * h
        outputs.append(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPSILON) * F.silu(r))
    width = initial_state.shape[-1]
    return (torch.stack(outputs, 1) if outputs else projected[..., :width] * 1), h
