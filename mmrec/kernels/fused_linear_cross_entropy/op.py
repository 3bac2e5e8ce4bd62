"""Public softmax in parts: what a cross-entropy and its gradient need of logits, in one pass."""

import torch
from torch import Tensor

from mmrec.kernels._bf16 import TYPES, bits
from mmrec.kernels._register import register
from mmrec.kernels._tensors import check, empty
from mmrec.kernels.fused_linear_cross_entropy import kernel

Parts = tuple[Tensor, Tensor, Tensor]


def _run(logits: Tensor, targets: Tensor) -> Parts:
    rows, columns = logits.shape
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < columns:
        got = f"{int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"targets must lie in [0, V) = [0, {columns}); got {got}")
    powers, sums, nats = made = _fake(logits, targets)
    arrays = (bits(logits.detach().contiguous()), targets.contiguous(), bits(powers), sums, nats)
    kernel.softmax_parts_fwd(*(x.numpy() for x in arrays), tasks=rows, work=0.6 * logits.numel())
    return made


def _fake(logits: Tensor, targets: Tensor) -> Parts:
    wide = torch.float32 if logits.dtype == torch.bfloat16 else logits.dtype
    sums = logits.new_empty(logits.shape[0], dtype=wide)
    return empty(logits), sums, torch.empty_like(sums)


_op = register(
    "softmax_parts", "(Tensor logits, Tensor targets) -> (Tensor, Tensor, Tensor)", _run, _fake
)


def softmax_parts(logits: Tensor, targets: Tensor) -> Parts:
    """The parts of a softmax over each row, and each row's cross-entropy. Not differentiable: the
    gradient of the cross-entropy is powers / sum, less one at the target.

    Args:
        logits: (R, V), float32, float64 or bfloat16, V >= 1.
        targets: (R,) int64, each in [0, V).

    Returns:
        powers (R, V), exp(x - max x), of the dtype of the logits; sums (R,), theirs before they
        were rounded, and nats (R,), both float32, or float64 as the logits are. A row that holds
        NaN or +inf has NaN for both.

    Raises:
        ValueError: another dtype or shape, no columns, a target outside, or not on the CPU.
    """
    if logits.dtype not in TYPES or logits.device.type != "cpu":
        raise ValueError(
            "logits must be float32, float64 or bfloat16 on the CPU; got "
            f"{logits.dtype} on {logits.device}"
        )
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have axes (R, V), V >= 1; got shape {tuple(logits.shape)}")
    check("targets", targets, tuple(logits.shape[:1]), "R", torch.int64)
    parts: Parts = _op(logits, targets)
    return parts
