"""References for ``gla`` and its relatives: plain differentiable loops, and chunked forms."""

import torch
from torch import Tensor

CHUNK_PER_HEAD, CHUNK_PER_CHANNEL = 64, 16
"""Steps in a chunk of ``chunked`` for g (B, T, H), and for g (B, T, H, K)."""


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ``, ``o_t = scale S_tᵀ q_t``.

    q, k, g (B, T, H, K); v (B, T, H, V); initial_state (B, H, K, V).
    """
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    s, outputs = initial_state, []
    for t in range(q.shape[1]):
        s = g[:, t, :, :, None].exp() * s + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhij,bhi->bhj", s, q[:, t]))
    return (torch.stack(outputs, 1) if outputs else torch.empty_like(v)), s


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``gla`` with one decay per head: g (B, T, H)."""
    return gla(q, k, v, g[..., None].expand(q.shape), initial_state, scale)


def hgrn(x: Tensor, g: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """``h_t = exp(g_t) h_{t-1} + x_t``; x, g (B, T, D), initial_state (B, D)."""
    h, states = initial_state, []
    for t in range(x.shape[1]):
        h = g[:, t].exp() * h + x[:, t]
        states.append(h)
    return (torch.stack(states, 1) if states else torch.empty_like(x)), h


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of steps, the form that a torch user would write for speed.

    g is (B, T, H), which is safe, or (B, T, H, K). The latter divides keys by their decays, which
    overflows where the decays of a chunk multiply to less than 1e-38. T must be a multiple of
    ``chunk_size``, which is CHUNK_PER_HEAD or CHUNK_PER_CHANNEL by default.

    Source: Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training"
    (arXiv:2312.06635), section 4.
    """
    scalar = g.ndim == 3
    size = chunk_size or (CHUNK_PER_HEAD if scalar else CHUNK_PER_CHANNEL)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    # (B, T, H, …) -> (B, H, chunks, chunk_size, …)
    q, k, v = (x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    g = (g[..., None] if scalar else g).unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4).cumsum(-2)
    lower = torch.ones(size, size, dtype=torch.bool).tril()
    read = q * g.exp()
    if scalar:
        scores = (q @ k.mT) * (g - g.mT).masked_fill(~lower, -torch.inf).exp()
    else:
        scores = (read @ (k * (-g).exp()).mT).masked_fill(~lower, 0)
    inside = scores @ v
    keys, decay = (k * (g[..., -1:, :] - g).exp()).mT, g[..., -1, :, None].exp()
    s, outputs = initial_state, []
    for c in range(q.shape[2]):
        outputs.append(read[:, :, c] @ s + inside[:, :, c])
        s = decay[:, :, c] * s + keys[:, :, c] @ v[:, :, c]
    return torch.stack(outputs, 2).permute(0, 2, 3, 1, 4).flatten(1, 2), s
