"""Reference for ``gru``: a plain differentiable loop."""

import torch
from torch import Tensor


def gru(
    projected: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of ``torch.nn.GRU`` on inputs that are projected already.

    projected (B, T, 3D), weight (3D, D), bias (3D,), initial_state (B, D); gates in torch's order
    r, z, n.
    """
    h, states = initial_state, []
    for t in range(projected.shape[1]):
        p_r, p_z, p_n = projected[:, t].chunk(3, -1)
        w_r, w_z, w_n = (h @ weight.T + bias).chunk(3, -1)
        r, z = torch.sigmoid(p_r + w_r), torch.sigmoid(p_z + w_z)
        n = torch.tanh(p_n + r * w_n)
        h = (1 - z) * n + z * h
        states.append(h)
    output = torch.stack(states, 1) if states else projected[:, :, : h.shape[1]]
    return output, h
