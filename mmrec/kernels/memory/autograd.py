"""Public associative memory: checked once, then compiled kernels under autograd.

Axes: B batch, T time, H heads, P head width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec.kernels.arrays import check, check_lead, flat
from mmrec.kernels.memory import kernel
from mmrec.kernels.threads import follow_torch


class _AssociativeMemory(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, write: Tensor, s0: Tensor
    ) -> tuple[Tensor, Tensor]:
        follow_torch()
        batch, time, heads, size = q.shape
        chunks = -(-time // kernel.CHUNK) if any(ctx.needs_input_grad) else 0
        kept = q.new_empty((batch, heads, chunks, size, size))
        out = torch.empty(q.shape, dtype=q.dtype)
        state = s0.detach().clone(memory_format=torch.contiguous_format)
        inputs = [item for x in (q, k, v, decay, write) for item in flat(x)]
        kernel.memory_fwd(*inputs, state.numpy(), out.numpy(), kept.numpy())
        ctx.save_for_backward(q, k, v, decay, write, kept)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
        follow_torch()
        q, k, v, decay, write, kept = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v, decay, write)]
        adjoint = dstate.clone(memory_format=torch.contiguous_format)
        inputs = [item for x in (q, k, v, decay, write) for item in flat(x)]
        arrays = [x.numpy() for x in (adjoint, *grads)]
        kernel.memory_bwd(*inputs, kept.numpy(), *flat(dout), *arrays)
        return *grads, adjoint


def associative_memory(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, write: Tensor, s0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Associative memory under the gated delta rule, the long-term memory of MM-Rec.

    A matrix S per head is read by content and written with what it does not yet know:
    ``S_t = α_t S_{t-1} + k̂_t β_t (v_t - α_t S_{t-1}ᵀ k̂_t)ᵀ`` and ``o_t = S_tᵀ q̂_t``, where hats
    divide by the norm, ``α = σ(decay)`` and ``β = σ(write)``. Backward stores one state every 32
    steps and computes the others again.

    Args:
        q, k, v: (B, T, H, P) float32 or float64, queries, keys (both normalised inside), values.
        decay, write: (B, T, H), logits of α and β.
        s0: (B, H, P, P), the state before the first step, indexed [key, value]; zero if None.

    Returns:
        o (B, T, H, P) and S_T (B, H, P, P). Both differentiable.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024, arXiv:2412.06464), eq. 10.
    """
    check_lead("q", q, "B, T, H, P")
    batch, _, heads, size = q.shape
    check("k", k, tuple(q.shape), "B, T, H, P", q)
    check("v", v, tuple(q.shape), "B, T, H, P", q)
    check("decay", decay, tuple(q.shape[:3]), "B, T, H", q)
    check("write", write, tuple(q.shape[:3]), "B, T, H", q)
    if s0 is None:
        s0 = q.new_zeros((batch, heads, size, size))
    check("s0", s0, (batch, heads, size, size), "B, H, P, P", q)
    return _AssociativeMemory.apply(q, k, v, decay, write, s0)
