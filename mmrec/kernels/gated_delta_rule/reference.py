"""References for ``gated_delta_rule``: a plain differentiable loop, and a chunked form in torch."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

EPSILON = 1e-6  # added to |k|² and |q|², so that a zero key has a gradient


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    use_logsigmoid_in_kernel: bool,
) -> tuple[Tensor, ...]:
    """q and k as they are used, one per value head; the log decay; β; the initial state."""
    if use_qk_l2norm_in_kernel:
        k = k * (k.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
        q = q * (q.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    g = logsigmoid(g) if use_logsigmoid_in_kernel else g
    beta = beta.sigmoid() if use_beta_sigmoid_in_kernel else beta
    if initial_state is None:
        initial_state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    return q, k, g, beta, initial_state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    use_logsigmoid_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """``S_t = α_t S_{t-1} + k_t β_t (v_t - α_t S_{t-1}ᵀ k_t)ᵀ``, ``o_t = scale S_tᵀ q_t``.

    q, k (B, T, H, K); v (B, T, HV, V); g, beta (B, T, HV), with α the exponential of g;
    initial_state (B, HV, K, V). The flags are those of the op.
    """
    q, k, g, beta, s = _prepare(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel,
        use_logsigmoid_in_kernel,
    )
    alpha, beta, outputs = g.exp()[..., None], beta[..., None], []
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
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    use_logsigmoid_in_kernel: bool = False,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of steps, the form that a torch user would write for speed.

    One triangular solve gives the errors of all chunks at once, and a loop over the chunks carries
    the state. T must be a multiple of ``chunk_size``.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
    Length" (arXiv:2406.06484), section 3.
    """
    q, k, g, beta, s = _prepare(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel,
        use_logsigmoid_in_kernel,
    )
    # (B, T, H, …) -> (B, H, chunks, chunk_size, …)
    q, k, v = (x.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    g, beta = (x.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2) for x in (g, beta))
    log_decay = g.cumsum(-1)
    lower = torch.ones(chunk_size, chunk_size, dtype=torch.bool).tril()
    between = log_decay[..., :, None] - log_decay[..., None, :]
    decay = between.masked_fill(~lower, -torch.inf).exp()  # from step s to step t >= s
    decay_from_start, beta, kt = log_decay.exp()[..., None], beta[..., None], k.mT
    system = (beta * decay * (k @ kt)).tril(-1)  # unit diagonal, left out
    right = torch.cat((beta * v, beta * decay_from_start * k), -1)
    solution = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    value, key = solution.split((v.shape[-1], k.shape[-1]), -1)
    scores, query = decay * (q @ kt), decay_from_start * q
    chunk_decay, keys = decay_from_start[..., -1:, :], (decay[..., -1, :, None] * k).mT
    outputs = []
    for c in range(q.shape[2]):
        error = value[:, :, c] - key[:, :, c] @ s
        outputs.append(query[:, :, c] @ s + scores[:, :, c] @ error)
        s = chunk_decay[:, :, c] * s + keys[:, :, c] @ error
    return torch.stack(outputs, 2).permute(0, 2, 3, 1, 4).flatten(1, 2), s
