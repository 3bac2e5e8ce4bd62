"""The one place that decides how many threads the kernels use, and how they compile.

torch and Numba each bring an OpenMP pool. ``torch.set_num_threads`` does not reach Numba, and
Numba's own setting holds for one Python thread only, so every public op calls ``follow_torch``.
"""

import numba
import torch

# Exact but for fused multiply-adds. Sums are only reordered where a kernel says so.
COMPILE = {"parallel": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}
# For helpers whose reductions may be reordered into vector lanes; their order is still fixed.
REDUCE = {"cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


def follow_torch() -> int:
    """Give Numba, for this Python thread, as many threads as torch uses; return that number."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    return threads
