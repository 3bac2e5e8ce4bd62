"""Fused linear cross-entropy: the loss of a language model whose logits are never stored.

Axes: R rows (tokens), D width of the model, V vocabulary.

With logits x_r = E h_r + b for hidden states h (R, D), an embedding E (V, D) and a bias b (V,) that
may be left out, p_r = softmax(x_r):

    loss = (1 / R) Σ_r -log p_r,target
    dh_r = (1 / R) Eᵀ (p_r - onehot_r)        dE = (1 / R) Σ_r (p_r - onehot_r) h_rᵀ
    db = (1 / R) Σ_r (p_r - onehot_r)

The logits take V numbers per token. They are computed for a chunk of tokens at a time, and the
gradients of the chunk are computed in the forward pass, while its logits are still in cache.

Source: Hsu et al. 2024, "Liger Kernel" (arXiv:2410.10989, section 3): FusedLinearCrossEntropy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.kernels._register import register
from mmrec.kernels._tensors import (
    KERNEL_DTYPES,
    cast,
    check_input,
    check_tensor,
    empty,
    flat,
    promote,
    to_compute_dtype,
)
from mmrec.kernels.fused_linear_cross_entropy import kernel

LOGITS_CHUNK = 1024
"""Rows whose logits exist at once in bfloat16; a quarter of that in other dtypes."""

Parts = tuple[Tensor, Tensor, Tensor]


def _forward(logits: Tensor, targets: Tensor) -> Parts:
    rows, columns = logits.shape
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < columns:
        got = f"{int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"targets must lie in [0, V) = [0, {columns}); got {got}")
    numerators, denominators, losses = parts = _forward_fake(logits, targets)
    kernel.softmax_parts_fwd(
        flat(logits).reshape(rows, columns),
        flat(targets),
        flat(numerators).reshape(rows, columns),
        flat(denominators),
        flat(losses),
        tasks=rows,
        work=0.6 * logits.numel(),
    )
    return parts


def _forward_fake(logits: Tensor, targets: Tensor) -> Parts:
    dtype = torch.float32 if logits.dtype == torch.bfloat16 else logits.dtype
    denominators = logits.new_empty(logits.shape[0], dtype=dtype)
    return empty(logits), denominators, torch.empty_like(denominators)


_op = register(
    "softmax_parts",
    "(Tensor logits, Tensor targets) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def softmax_parts(logits: Tensor, targets: Tensor) -> Parts:
    """Numerators and denominator of a softmax over each row, and the row's cross-entropy.

    Not differentiable: the gradient of the cross-entropy with respect to the logits is
    numerators / denominator, less one at the target.

    Args:
        logits: (R, V), float32, float64 or bfloat16, V >= 1.
        targets: (R,) int64, each in [0, V).

    Returns:
        numerators: (R, V), exp(x - max x), of the dtype of the logits.
        denominators: (R,), the sums of the numerators before these were rounded, in float32, or in
            float64 for float64 logits.
        losses: (R,), cross-entropy in nats, of the dtype of the denominators.

        A row that holds NaN or +inf has NaN as denominator and as loss.

    Raises:
        ValueError: a dtype or shape is not as above, a target lies outside [0, V), or a tensor is
            not on the CPU.
    """
    if logits.dtype not in KERNEL_DTYPES or logits.device.type != "cpu":
        raise ValueError(
            "logits must be float32, float64 or bfloat16 on the CPU; got "
            f"{logits.dtype} on {logits.device}"
        )
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have axes (R, V), V >= 1; got shape {tuple(logits.shape)}")
    check_tensor("targets", targets, tuple(logits.shape[:1]), "R", torch.int64)
    parts: Parts = _op(logits, targets)
    return parts


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """See ``fused_linear_cross_entropy``, which checks the arguments."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, bf16: bool
    ) -> Tensor:
        dtype = torch.bfloat16 if bf16 else hidden.dtype
        gradient_needed = any(ctx.needs_input_grad)
        embedding, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        dbias = None if bias is None else torch.zeros_like(bias)
        total = torch.zeros((), dtype=torch.float64)
        size = LOGITS_CHUNK if bf16 else LOGITS_CHUNK // 4  # the numerators take as much again
        for begin in range(0, hidden.shape[0], size):
            chunk = slice(begin, begin + size)
            rows, labels = hidden[chunk].to(dtype), targets[chunk]
            logits = F.linear(rows, embedding, offset)
            numerators, denominators, losses = softmax_parts(logits, labels)
            total += losses.sum(dtype=torch.float64)
            if gradient_needed:
                # softmax and one-hot go separately, which saves passes over the logits
                scale = denominators.reciprocal()
                dhidden[chunk] = (numerators @ embedding) * scale[:, None] - weight[labels]
                dweight += numerators.T @ (rows * scale[:, None]).to(dtype)
                dweight.index_add_(0, labels, hidden[chunk], alpha=-1)
                if dbias is not None:
                    dbias += numerators.T @ scale.to(dtype)
                    dbias.index_add_(0, labels, torch.ones_like(scale), alpha=-1)
        ctx.save_for_backward(dhidden, dweight, dbias)
        return (total / hidden.shape[0]).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, dbias = ctx.saved_tensors
        scale = dloss / dhidden.shape[0]
        dbias = None if dbias is None else dbias * scale
        return dhidden * scale, dweight * scale, None, dbias, None


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    bf16: bool = False,
) -> Tensor:
    """Mean cross-entropy of the logits ``hidden @ weight.T + bias``, without storing the logits.

    Args:
        hidden: (R, D) float32, float64, bfloat16 or float16, the last hidden state of each token,
            R >= 1.
        weight: (V, D) of the dtype of hidden, the embedding of each token of the vocabulary.
        targets: (R,) int64, the token to predict, each in [0, V).
        bias: (V,) of the dtype of hidden, added to the logits; None adds nothing.
        bf16: compute the matrix products in bfloat16, as under autocast to bfloat16 and for
            bfloat16 inputs. Sums of the softmax stay in float32.

    Returns:
        The mean loss in nats per token, a scalar of the dtype of hidden. Differentiable with
        respect to hidden, weight and bias, once, in reverse mode.

    Raises:
        ValueError: a shape, dtype or device is not as above, or a target lies outside [0, V).

    Source: Hsu et al. 2024, "Liger Kernel" (arXiv:2410.10989, section 3).
    """
    hidden, weight, bias = promote(hidden, weight, bias)
    check_input("hidden", hidden, "R, D", None)
    rows, width = hidden.shape
    if rows == 0:
        raise ValueError(f"hidden must have R >= 1 rows; got shape {tuple(hidden.shape)}")
    dtype = hidden.dtype
    vocabulary = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 1
    check_tensor("weight", weight, (max(1, vocabulary), width), "V, D", dtype)
    check_tensor("targets", targets, (rows,), "R", torch.int64)
    if bias is not None:
        check_tensor("bias", bias, (vocabulary,), "V", dtype)
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        bf16 = bf16 or torch.get_autocast_dtype("cpu") == torch.bfloat16
    bf16 = bf16 or dtype == torch.bfloat16
    hidden, weight, bias = (to_compute_dtype(x) for x in (hidden, weight, bias))
    with torch.autocast("cpu", enabled=False):  # the dtypes of the products are chosen above
        loss: Tensor = _FusedLinearCrossEntropy.apply(hidden, weight, targets, bias, bf16)
    return cast(loss, dtype)
