"""The one place that decides how many threads the kernels use, and how they compile.

torch and Numba each bring an OpenMP pool. ``torch.set_num_threads`` does not reach Numba, and
Numba's own setting holds for one Python thread only, so every public op calls ``follow_torch``.
"""

from typing import Any

import numba
import torch

# Exact but for fused multiply-adds. Sums are only reordered where a kernel says so.
COMPILE: dict[str, Any] = {
    "parallel": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract"},
}
# For helpers whose reductions may be reordered into vector lanes; their order is still fixed.
REDUCE: dict[str, Any] = {
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz"},
}


def follow_torch() -> int:
    """Give Numba, for this Python thread, as many threads as torch uses; return that number."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = min(torch.get_num_threads(), most)
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    return threads
