"""Reference for ``relu_squared``: plain differentiable torch."""

from torch import Tensor


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², elementwise."""
    return x.relu().square()
