"""Reference for ``rowwise_rmsprop_``: plain torch, one row after the other."""

from torch import Tensor


def rowwise_rmsprop_(
    weight: Tensor,
    mean_square: Tensor,
    indices: Tensor,
    gradients: Tensor,
    lr: float,
    decay: float,
    weight_decay: float,
) -> None:
    """See ``op.rowwise_rmsprop_``."""
    for row in indices.unique().tolist():
        gradient = gradients[indices == row].sum(0)
        square = gradient.square().mean()
        if square == 0:
            continue
        before = mean_square[row]
        mean_square[row] = square if before == 0 else decay * before + (1 - decay) * square
        weight[row] *= 1 - lr * weight_decay
        weight[row] -= lr * gradient / mean_square[row].sqrt()
