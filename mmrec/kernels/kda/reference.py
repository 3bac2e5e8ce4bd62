"""Reference for ``kda``: a plain differentiable loop."""

import torch
from torch import Tensor

EPSILON = 1e-6  # added to |k|² and |q|², so that a zero key has a gradient


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """``S_t = (I - β_t k_t k_tᵀ) diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ``, ``o_t = scale S_tᵀ q_t``.

    q, k (B, T, H, K); v (B, T, HV, V), HV a multiple of H; g (B, T, HV, K); beta (B, T, HV);
    initial_state (B, HV, K, V). Value head i reads key head i // (HV / H).
    """
    if use_qk_l2norm_in_kernel:
        q, k = (x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt() for x in (q, k))
    groups = v.shape[2] // q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.repeat_interleave(groups, 2) for x in (q * scale, k))
    s, outputs = initial_state, []
    for t in range(q.shape[1]):
        s = g[:, t, :, :, None].exp() * s
        recalled = torch.einsum("bhij,bhi->bhj", s, k[:, t])
        error = beta[:, t, :, None] * (v[:, t] - recalled)
        s = s + k[:, t, :, :, None] * error[:, :, None, :]
        outputs.append(torch.einsum("bhij,bhi->bhj", s, q[:, t]))
    return (torch.stack(outputs, 1) if outputs else torch.empty_like(v)), s
