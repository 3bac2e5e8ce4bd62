"""The loss of a language model whose logits are never stored."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.kernels import softmax_parts

LOSS_ROWS = 1024  # tokens whose logits are alive at once


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x Eᵀ against targets, a few hundred tokens at a time.

    Logits are as large as V numbers a token; computing each chunk's gradient while its logits are
    still in cache means they are never stored, and never read back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, half: bool) -> Tensor:
        dtype = torch.bfloat16 if half else x.dtype
        need = any(ctx.needs_input_grad)
        e = weight.to(dtype)
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float64)
        size = LOSS_ROWS if half else LOSS_ROWS // 4  # the powers take as much again
        for lo in range(0, x.shape[0], size):
            rows, y = x[lo : lo + size].to(dtype), targets[lo : lo + size]
            powers, sums, nats = softmax_parts(F.linear(rows, e), y)
            total += nats.sum(dtype=torch.float64)
            if need:  # softmax minus one-hot, the two parts apart: fewer passes over the logits
                share = sums.reciprocal()[:, None]
                dx[lo : lo + size] = (powers @ e) * share - weight[y]
                dweight += powers.T @ (rows * share).to(dtype)
                dweight.index_add_(0, y, x[lo : lo + size], alpha=-1)
        ctx.save_for_backward(dx, dweight)
        return (total / x.shape[0]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        scale = grad / dx.shape[0]
        return dx * scale, dweight * scale, None, None
