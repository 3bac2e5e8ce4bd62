"""Public gated recurrence: checked once, then compiled kernels under autograd.

Axes: B batch, T time, D channels, G blocks of W_g, P = D / G.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec.kernels.arrays import check, check_lead, flat
from mmrec.kernels.recurrence import kernel
from mmrec.kernels.threads import follow_torch


class _GatedRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, gate: Tensor, decay: Tensor, w: Tensor, h0: Tensor, mixed: bool
    ) -> tuple[Tensor, Tensor]:
        follow_torch()
        batch, time, width = z.shape
        h = torch.empty(z.shape, dtype=z.dtype)
        # The gates are kept only if somebody will ask for gradients.
        s = z.new_empty((batch, time if any(ctx.needs_input_grad) else 0, width))
        start, blocks = h0.detach().contiguous(), w.detach().contiguous()
        kernel.recurrence_fwd(
            *flat(z), *flat(gate), *flat(decay),
            blocks.numpy(), start.numpy(), h.numpy(), s.numpy(), mixed,
        )  # fmt: skip
        ctx.save_for_backward(z, decay, w, start, h, s)
        ctx.mixed = mixed
        return h, (h[:, -1].clone() if time else h0.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dht: Tensor) -> tuple[Tensor | None, ...]:
        follow_torch()
        z, decay, w, h0, h, s = ctx.saved_tensors
        batch, time = h.shape[:2]
        dz, dg, df, dh0 = (torch.empty_like(x) for x in (h, h, h, h0))
        wt = w.detach().transpose(1, 2).contiguous()
        arrays = [x.numpy() for x in (dht.contiguous(), dz, dg, df, dh0)]
        kernel.recurrence_bwd(
            *flat(z), *flat(decay), wt.numpy(), h0.numpy(), h.numpy(), s.numpy(),
            *flat(dh), *arrays, ctx.mixed,
        )  # fmt: skip
        dw = None
        if w.shape[0] and ctx.needs_input_grad[3]:
            before = torch.cat((h0[:, None], h[:, :-1]), 1) if time else h
            split = (batch * time, *w.shape[:2])
            dw = torch.einsum("ngi,ngj->gij", before.reshape(split), dg.reshape(split))
        return dz, dg, df, dw, dh0, None


def gated_recurrence(
    z: Tensor,
    gate: Tensor,
    decay: Tensor,
    weight: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    mixed: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gated nonlinear recurrence, the short-term memory of MM-Rec.

    ``h_t = (1 - γ_t) ⊙ z_t ⊙ σ(h_{t-1} W + gate_t) + γ_t ⊙ h_{t-1}`` with ``γ_t = σ(decay_t)``;
    with ``mixed=False`` the factor ``1 - γ_t`` is left out; with ``gate = 0`` that is the published
    formula ``h_t = z_t ⊙ σ(W h_{t-1}) + γ ⊙ h_{t-1}``. The activations run inside the kernel.

    Args:
        z: (B, T, D) float32 or float64, candidate values.
        gate: (B, T, D), logits added to the recurrent product.
        decay: (B, T, D), logits of γ.
        weight: (D, D), or (G, D/G, D/G) for a block-diagonal W; None for W = 0.
        h0: (B, D), the state before the first step; zero if None.

    Returns:
        h (B, T, D), all states, and h_T (B, D), the state to go on from. Both differentiable.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: design of MM-Rec, section 2; the gate on the recurrent product follows the minimal
    gated unit (Zhou et al. 2016, arXiv:1603.09420, eq. 5).
    """
    check_lead("z", z, "B, T, D")
    batch, _, width = z.shape
    check("gate", gate, tuple(z.shape), "B, T, D", z)
    check("decay", decay, tuple(z.shape), "B, T, D", z)
    if weight is None:
        weight = z.new_empty((0, width, width))
    elif weight.ndim == 3 and weight.shape[0] and width % weight.shape[0] == 0:
        size = width // weight.shape[0]
        check("weight", weight, (weight.shape[0], size, size), "G, D/G, D/G", z)
    else:
        check("weight", weight, (width, width), "D, D", z)
        weight = weight[None]
    if h0 is None:
        h0 = z.new_zeros((batch, width))
    check("h0", h0, (batch, width), "B, D", z)
    return _GatedRecurrence.apply(z, gate, decay, weight, h0, mixed)
