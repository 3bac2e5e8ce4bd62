"""Reference of Mamba 2's recurrence: a plain differentiable loop, of any floating-point dtype."""

import torch
from torch import Tensor


def ssd(
    x: Tensor,
    dt: Tensor,
    g: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    initial_states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (B, L, H, P), dt and g (B, L, H), b, c (B, L, G, N), d (H, P): y and the last state.

    ``S_t = exp(g_t) S_{t-1} + dt_t x_t b_tᵀ`` and ``y_t = S_t c_t + d x_t``.
    """
    batch, time, heads, width = x.shape
    b, c = (v.repeat_interleave(heads // v.shape[2], 2) for v in (b, c))
    state = initial_states
    if state is None:
        state = x.new_zeros(batch, heads, width, b.shape[3])
    ys = []
    for t in range(time):
        write = dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, t, :, None]
        state = g[:, t].exp()[..., None, None] * state + write
        ys.append((state * c[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return (y if d is None else y + d * x), state
