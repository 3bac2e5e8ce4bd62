"""bfloat16 inside kernels, and short loops over rows that may be stored in it.

Numba has no bfloat16, so kernels see its bits as uint16. A bfloat16 is the upper 16 bits of a
float32. Every function here takes float32 and float64 as well and leaves their values unchanged.
"""

import numpy as np
from numba import types

from mmrec.kernels._jit import CACHE_LINE, always_inline_jit, overload
from mmrec.kernels._simd import LANES, add_lanes, fma, load, prefetch, store, zeros

_ROUND, _ONE = np.uint32(0x7FFF), np.uint32(1)
_SHIFT, _NAN = np.uint32(16), np.uint16(0x7FC0)
DOT_SUMS = LANES  # running sums of ``dot``


def _from_bits(x):
    return np.uint32(np.uint32(x) << _SHIFT).view(np.float32)


def _unchanged(x):
    return x


def from_bf16(x):
    """The number that an element of an array stands for: bfloat16 bits as float32."""
    return _from_bits(x) if isinstance(x, np.uint16) else x


@overload(from_bf16)
def _from_bf16_compiled(x):
    return _from_bits if x == types.uint16 else _unchanged


def _to_bits(x, like):
    bits = np.float32(x).view(np.uint32)
    rounded = np.uint16(np.uint32(bits + _ROUND + ((bits >> _SHIFT) & _ONE)) >> _SHIFT)
    return rounded if x == x else _NAN


def _unchanged_like(x, like):
    return x


def to_bf16(x, like):
    """The element to store in the array ``like`` for a number.

    If ``like`` holds bfloat16 bits, the number is rounded to nearest, ties to even.
    """
    if like.dtype != np.uint16:
        return x
    with np.errstate(over="ignore"):  # for NaN the uint32 sum wraps
        return _to_bits(x, like)


@overload(to_bf16)
def _to_bf16_compiled(x, like):
    return _to_bits if like.dtype == types.uint16 else _unchanged_like


# Indices are unsigned in the loops of kernels: Numba lets a signed one count from the end, and the
# test for that keeps LLVM from vectorising a loop.


@always_inline_jit
def read(source, source_at, out, out_at, width):
    """out[out_at:][:width] = source[source_at:][:width], where source may hold bfloat16."""
    source_at, out_at = np.uint64(source_at), np.uint64(out_at)
    for d in range(np.uint64(width)):
        out[out_at + d] = from_bf16(source[source_at + d])


@always_inline_jit
def write(values, values_at, target, target_at, width):
    """target[target_at:][:width] = values[values_at:][:width]; target may hold bfloat16."""
    values_at, target_at = np.uint64(values_at), np.uint64(target_at)
    for d in range(np.uint64(width)):
        target[target_at + d] = to_bf16(values[values_at + d], target)


@always_inline_jit
def prefetch_row(array, at, width):
    """Ask for the cache lines of array[at:][:width], which may lie outside of the array.

    For loops that run backwards in time: processors fetch ahead on their own only where addresses
    rise.
    """
    for d in range(0, width, CACHE_LINE // array.itemsize):
        prefetch(array, at + d)


@always_inline_jit
def dot(x, x_at, y, y_at, sums, width):
    """Σ_d x[x_at + d] y[y_at + d] for d < width.

    LANES sums run side by side in a vector and are added up in one fixed order. The scratch array
    ``sums`` of DOT_SUMS numbers takes them if the last numbers do not fill a vector.
    """
    x_at, y_at, aligned = np.int64(x_at), np.int64(y_at), np.int64(width // LANES * LANES)
    total = zeros(x)
    for d in range(0, aligned, LANES):
        total = fma(load(x, x_at + d), load(y, y_at + d), total)
    if aligned < width:
        store(sums, 0, total)
        for d in range(aligned, width):
            sums[d - aligned] += x[x_at + d] * y[y_at + d]
        total = load(sums, 0)
    return add_lanes(total)
