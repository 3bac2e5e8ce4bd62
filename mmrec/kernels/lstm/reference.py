"""Reference for ``lstm``: a plain differentiable loop."""

import torch
from torch import Tensor


def lstm(
    projected: Tensor, weight: Tensor, initial_state: Tensor, initial_cell: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The recurrence of ``torch.nn.LSTM`` on inputs that are projected already.

    projected (B, T, 4D), weight (4D, D), initial_state and initial_cell (B, D); gates in torch's
    order i, f, g, o.
    """
    h, c, states = initial_state, initial_cell, []
    for t in range(projected.shape[1]):
        i, f, g, o = (projected[:, t] + h @ weight.T).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    output = torch.stack(states, 1) if states else projected[:, :, : h.shape[1]]
    return output, (h, c)
