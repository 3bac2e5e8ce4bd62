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
    batch, _, heads, width = x.shape
    b, c = (v.repeat_interleave(heads // v.shape[2], 2) for v in (b, c))
    state = initial_states
    if state is None:
        state = x.new_zeros(batch, heads, width, b.shape[3])
    ys = []
    steps = (y.unbind(1) for y in (x[..., None], dt[..., None, None], g.exp(), b, c))
    for x_t, dt_t, decay, b_t, c_t in zip(*steps, strict=True):
        state = decay[..., None, None] * state + dt_t * x_t * b_t[:, :, None]
        ys.append((state * c_t[:, :, None]).sum(-1))
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return (y if d is None else y + d * x), state
