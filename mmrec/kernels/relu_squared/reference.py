"""The truth that the squared relu is held against."""

from torch import Tensor


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)²."""
    return x.relu().square()
