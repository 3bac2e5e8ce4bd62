"""What this machine does faster."""

import math
import time
from collections.abc import Callable

import torch

BFLOAT16_ADVANTAGE = 1.3
"""How much faster bfloat16 products must be. The casts cost memory traffic, so less is no gain."""


def matrix_product_rate(
    dtype: torch.dtype, shape: tuple[int, int, int] = (1024, 512, 512), repeats: int = 5
) -> float:
    """Measure how fast this machine multiplies matrices, with torch's current number of threads.

    Args:
        dtype: That of both factors and of the product.
        shape: ``(m, k, n)`` for a product of ``(m, k)`` and ``(k, n)``.
        repeats: Products timed, after one that is not counted. The fastest counts.

    Returns:
        Floating-point operations per second. A multiplication and an addition are two.
    """
    m, k, n = shape
    generator = torch.Generator()  # the global random state stays as it is
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(k, n, generator=generator).to(dtype)
    a @ b
    best = math.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * m * k * n / best


def bfloat16_is_faster(rate: Callable[[torch.dtype], float] = matrix_product_rate) -> bool:
    """Measure whether this processor multiplies clearly faster in bfloat16 than in float32.

    Args:
        rate: Measures the FLOP/s of a dtype.

    Returns:
        Whether the bfloat16 rate exceeds ``BFLOAT16_ADVANTAGE`` times the float32 rate.
    """
    return rate(torch.bfloat16) > BFLOAT16_ADVANTAGE * rate(torch.float32)
