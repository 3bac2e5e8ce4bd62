"""The truth the associative memory is held against: a plain differentiable loop."""

import torch
from torch import Tensor

EPSILON = 1e-6  # added to |k|² and |q|², so that a zero key has a gradient


def associative_memory(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, write: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor]:
    """Gated delta rule; q, k, v (B, T, H, P), decay and write (B, T, H) logits, s0 (B, H, P, P)."""
    k = k * (k.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    q = q * (q.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    alpha, beta = torch.sigmoid(decay)[..., None], torch.sigmoid(write)[..., None]
    s, out = s0, []
    for t in range(q.shape[1]):
        read = torch.einsum("bhij,bhi->bhj", s, k[:, t])
        error = beta[:, t] * (v[:, t] - alpha[:, t] * read)
        s = alpha[:, t, :, :, None] * s + k[:, t, :, :, None] * error[:, :, None, :]
        out.append(torch.einsum("bhij,bhi->bhj", s, q[:, t]))
    return (torch.stack(out, 1) if out else torch.empty_like(v)), s


def chunked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, write: Tensor, s: Tensor, size: int = 32
) -> tuple[Tensor, Tensor]:
    """The same in chunks of ``size`` steps, the form a torch user would write for speed.

    One triangular solve gives the errors of all chunks at once, and a loop over chunks carries the
    state (Yang et al., 2024, arXiv:2406.06484, section 3). T must be a multiple of ``size``.
    """
    k = k * (k.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    q = q * (q.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    # (B, T, H, …) -> (B, H, chunks, size, …)
    q, k, v = (x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    log, beta = (x.unflatten(1, (-1, size)).permute(0, 3, 1, 2) for x in (decay, write.sigmoid()))
    total = torch.nn.functional.logsigmoid(log).cumsum(-1)
    lower = torch.ones(size, size, dtype=torch.bool).tril()
    span = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    decayed, beta, kt = total.exp()[..., None], beta[..., None], k.mT
    system = (beta * span * (k @ kt)).tril(-1)  # its diagonal counts as one
    right = torch.cat((beta * v, beta * decayed * k), -1)
    value, key = torch.linalg.solve_triangular(
        system, right, upper=False, unitriangular=True
    ).chunk(2, -1)
    match, query = span * (q @ kt), decayed * q
    forget, keys = decayed[..., -1:, :], (span[..., -1, :, None] * k).mT
    out = []
    for c in range(q.shape[2]):
        error = value[:, :, c] - key[:, :, c] @ s
        out.append(query[:, :, c] @ s + match[:, :, c] @ error)
        s = forget[:, :, c] * s + keys[:, :, c] @ error
    return torch.stack(out, 2).permute(0, 2, 3, 1, 4).flatten(1, 2), s
