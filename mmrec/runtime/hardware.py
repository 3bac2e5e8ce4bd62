"""What this machine's processor has, and how fast it multiplies."""

import math
import platform
import time

import torch

BFLOAT16_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16"}
"""Instructions that multiply bfloat16, by torch's name for them, the fastest first."""


def bfloat16_instructions() -> str:
    """Name the instructions with which torch multiplies bfloat16 matrices here.

    What the processor has decides, and no measurement: a busy machine would not change the answer.
    Processors without these instructions emulate bfloat16, many times slower than float32.

    Returns:
        One of the values of BFLOAT16_INSTRUCTIONS, or "" if the processor has none of them.
    """
    # torch multiplies bfloat16 through oneDNN, which some builds lack
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ""
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
    else:  # older versions of torch; their oneDNN asks an Arm processor for its instructions
        found = {
            "amx_bf16": torch.cpu._is_amx_tile_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "bf16": platform.machine().lower() in ("aarch64", "arm64"),
        }
    return next((name for key, name in BFLOAT16_INSTRUCTIONS.items() if found.get(key)), "")


def fastest_dtype(instructions: str) -> torch.dtype:
    """Return bfloat16 where there are instructions for it, as ``bfloat16_instructions`` names them.

    float32 is returned where there are none.
    """
    return torch.bfloat16 if instructions else torch.float32


def resolve_precision(precision: str, instructions: str) -> tuple[str, str]:
    """Choose the dtype of matrix products from the setting and from what the processor has.

    Args:
        precision: ``auto``, ``float32`` or ``bfloat16``.
        instructions: As ``bfloat16_instructions`` names them.

    Returns:
        ``float32`` or ``bfloat16``, and the reason in words.
    """
    has = f"the processor has {instructions or 'no bfloat16 instructions'}"
    if precision == "auto":
        return ("bfloat16" if instructions else "float32"), f"auto: {has}"
    if precision == "bfloat16" and not instructions:
        return precision, f"as set; slow: {has}"
    return precision, "as set"


def matrix_product_rate(
    dtype: torch.dtype, shape: tuple[int, int, int] = (1024, 512, 512), seconds: float = 0.25
) -> float:
    """Measure how fast this machine multiplies matrices, with torch's current number of threads.

    Args:
        dtype: That of both factors and of the product.
        shape: ``(m, k, n)`` for a product of ``(m, k)`` and ``(k, n)``.
        seconds: For how long products are timed, after one that is not counted. At least five are.
            The fastest counts, so that other load shows only if it lasts that long.

    Returns:
        Floating-point operations per second. A multiplication and an addition are two.
    """
    m, k, n = shape
    generator = torch.Generator()  # the global random state stays as it is
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(k, n, generator=generator).to(dtype)
    a @ b
    best, count, end = math.inf, 0, time.perf_counter() + seconds
    while count < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        a @ b
        best, count = min(best, time.perf_counter() - begin), count + 1
    return 2 * m * k * n / best
