"""References of Mamba's ops: plain differentiable torch, of any floating-point dtype."""

import torch
from torch import Tensor
from torch.nn import functional


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """u, delta, z (B, D, L), a (D, N), b, c as ``selective_scan_fn``: out and the last h."""
    batch, channels, time = u.shape

    def steps(x: Tensor) -> tuple[Tensor, ...]:  # per step (B, D, N), or what broadcasts to it
        if x.ndim == 2:
            return (x,) * time
        x = x[:, None] if x.ndim == 3 else x
        repeats = channels // x.shape[1] if x.shape[1] > 1 else 1
        return tuple(y.repeat_interleave(repeats, 1) for y in x.unbind(-1))

    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = functional.softplus(delta)
    h = u.new_zeros(batch, channels, a.shape[1]) if initial_state is None else initial_state
    ys = []
    inputs = (u[..., None].unbind(2), delta[..., None].unbind(2), steps(b), steps(c))
    for u_t, step, b_t, c_t in zip(*inputs, strict=True):
        h = torch.exp(step * a) * h + step * b_t * u_t
        ys.append((h * c_t).sum(-1))
    y = torch.stack(ys, -1) if ys else torch.zeros_like(u)
    if d is not None:
        y = y + u * d[:, None]
    return (y if z is None else y * functional.silu(z)), h


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step, as the op of this name: out and the new state."""
    if state.ndim == 3:
        x, dt, b, c, state = (v[:, None] for v in (x, dt, b, c, state))
        a, z = a[None], None if z is None else z[:, None]
        d, dt_bias = (None if v is None else v[None] for v in (d, dt_bias))
        out, state = selective_state_update(state, x, dt, a, b, c, d, z, dt_bias, dt_softplus)
        return out[:, 0], state[:, 0]
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = functional.softplus(dt)
    heads = state.shape[1] // b.shape[1]
    b, c = (v.repeat_interleave(heads, 1)[:, :, None] for v in (b, c))
    dt = dt[..., None]
    state = torch.exp(dt * a) * state + dt * b * x[..., None]
    out = (state * c).sum(-1)
    if d is not None:
        out = out + x * d
    return (out if z is None else out * functional.silu(z)), state
