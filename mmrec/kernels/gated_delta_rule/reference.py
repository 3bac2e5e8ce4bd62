"""References for ``gated_delta_rule``: a plain differentiable loop, and a chunked form in torch."""

import torch
from torch import Tensor

EPSILON = 1e-6  # added to |k|² and |q|², so that a zero key has a gradient


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_logits: Tensor,
    beta_logits: Tensor,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """``S_t = α_t S_{t-1} + k̂_t β_t (v_t - α_t S_{t-1}ᵀ k̂_t)ᵀ``, ``o_t = S_tᵀ q̂_t``.

    q, k, v (B, T, H, P); g_logits, beta_logits (B, T, H), with α and β their sigmoids;
    initial_state (B, H, P, P).
    """
    k = k * (k.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    q = q * (q.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    alpha, beta = torch.sigmoid(g_logits)[..., None], torch.sigmoid(beta_logits)[..., None]
    s, outputs = initial_state, []
    for t in range(q.shape[1]):
        recalled = torch.einsum("bhij,bhi->bhj", s, k[:, t])
        error = beta[:, t] * (v[:, t] - alpha[:, t] * recalled)
        s = alpha[:, t, :, :, None] * s + k[:, t, :, :, None] * error[:, :, None, :]
        outputs.append(torch.einsum("bhij,bhi->bhj", s, q[:, t]))
    return (torch.stack(outputs, 1) if outputs else torch.empty_like(v)), s


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_logits: Tensor,
    beta_logits: Tensor,
    initial_state: Tensor,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of steps, the form that a torch user would write for speed.

    One triangular solve gives the errors of all chunks at once, and a loop over the chunks carries
    the state. T must be a multiple of ``chunk_size``.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
    Length" (arXiv:2406.06484), section 3.
    """
    k = k * (k.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    q = q * (q.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    # (B, T, H, …) -> (B, H, chunks, chunk_size, …)
    q, k, v = (x.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    logits, beta = (
        x.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2)
        for x in (g_logits, beta_logits.sigmoid())
    )
    log_decay = torch.nn.functional.logsigmoid(logits).cumsum(-1)
    lower = torch.ones(chunk_size, chunk_size, dtype=torch.bool).tril()
    between = log_decay[..., :, None] - log_decay[..., None, :]
    decay = between.masked_fill(~lower, -torch.inf).exp()  # from step s to step t >= s
    decay_from_start, beta, kt = log_decay.exp()[..., None], beta[..., None], k.mT
    system = (beta * decay * (k @ kt)).tril(-1)  # unit diagonal, left out
    right = torch.cat((beta * v, beta * decay_from_start * k), -1)
    value, key = torch.linalg.solve_triangular(
        system, right, upper=False, unitriangular=True
    ).chunk(2, -1)
    scores, query = decay * (q @ kt), decay_from_start * q
    chunk_decay, keys = decay_from_start[..., -1:, :], (decay[..., -1, :, None] * k).mT
    s, outputs = initial_state, []
    for c in range(q.shape[2]):
        error = value[:, :, c] - key[:, :, c] @ s
        outputs.append(query[:, :, c] @ s + scores[:, :, c] @ error)
        s = chunk_decay[:, :, c] * s + keys[:, :, c] @ error
    return torch.stack(outputs, 2).permute(0, 2, 3, 1, 4).flatten(1, 2), s
