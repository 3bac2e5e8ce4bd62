"""RMSprop with one mean square per row as a torch op that writes to its arguments."""

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._in_place import register_in_place
from mmrec.kernels._math import cdiv
from mmrec.kernels._tensors import FULL_PRECISION
from mmrec.kernels.rowwise_rmsprop import kernel


def _update(
    weight: Tensor,
    mean_square: Tensor,
    indices: Tensor,
    gradients: Tensor,
    lr: float,
    decay: float,
    weight_decay: float,
) -> None:
    places = indices.numpy()
    if not places.size:
        return
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    is_first = np.empty(len(ordered), np.bool_)
    is_first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    begins = np.append(np.flatnonzero(is_first), len(ordered))
    rows = ordered[begins[:-1]]
    dtype = mean_square.numpy().dtype.type
    kernel.rowwise_rmsprop(
        weight.view(-1).numpy(),
        mean_square.numpy(),
        rows,
        begins,
        order,
        gradients.contiguous().view(-1).numpy(),
        weight.shape[1],
        dtype(lr),
        dtype(decay),
        dtype(weight_decay),
        tasks=cdiv(len(rows), kernel.BLOCK),
        work=0.2 * gradients.numel(),
    )


def _update_fake(
    weight: Tensor,
    mean_square: Tensor,
    indices: Tensor,
    gradients: Tensor,
    lr: float,
    decay: float,
    weight_decay: float,
) -> None:
    pass


_op = register_in_place(
    "rowwise_rmsprop_",
    "(Tensor(a!) weight, Tensor(b!) mean_square, Tensor indices, Tensor gradients, float lr, "
    "float decay, float weight_decay) -> ()",
    _update,
    _update_fake,
)


def rowwise_rmsprop_(
    weight: Tensor,
    mean_square: Tensor,
    indices: Tensor,
    gradients: Tensor,
    lr: float,
    decay: float = 0.99,
    weight_decay: float = 0.0,
) -> None:
    """Update in place the rows of an embedding for which there are gradients.

    For each row r with the sum g (D,) of its gradients and s = mean(g²), the mean square m_r
    becomes s at the row's first gradient and ``decay * m_r + (1 - decay) * s`` later, and the row
    ``(1 - lr * weight_decay) * w_r - lr * g / sqrt(m_r)``. Rows without a gradient, or with one
    that is zero, are left as they are. So the cost does not depend on the number of rows.

    Args:
        weight: (rows, D) float32 or float64, contiguous.
        mean_square: (rows,) of its dtype, contiguous; zero before a row's first gradient.
        indices: (N,) int64, in [0, rows), which is not checked; a row may occur again and again.
        gradients: (N, D) of the dtype of weight. Those of one row are added in their order.
        lr: learning rate.
        decay: of the mean square, per gradient that the row gets.
        weight_decay: multiplied by lr.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: RMSprop, Tieleman and Hinton 2012 (lecture 6.5 of "Neural Networks for Machine
    Learning"), with one number per row as in rowwise_adagrad of FBGEMM
    (github.com/pytorch/FBGEMM).
    """
    if weight.dtype not in FULL_PRECISION or weight.device.type != "cpu" or weight.dim() != 2:
        raise ValueError(
            "weight must be (rows, D) float32 or float64 on the CPU; got "
            f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
        )
    rows, width = weight.shape
    count = len(indices)
    for name, x, shape, dtype in (
        ("mean_square", mean_square, (rows,), weight.dtype),
        ("indices", indices, (count,), torch.int64),
        ("gradients", gradients, (count, width), weight.dtype),
    ):
        if tuple(x.shape) != shape or x.dtype != dtype:
            raise ValueError(f"{name} must be {shape} {dtype}; got {tuple(x.shape)} {x.dtype}")
    if not (weight.is_contiguous() and mean_square.is_contiguous()):
        raise ValueError("weight and mean_square must be contiguous")
    _op(weight, mean_square, indices, gradients, lr, decay, weight_decay)
