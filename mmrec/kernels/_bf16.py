"""bfloat16 inside kernels. Numba has no such type, so its bits come as uint16 and leave as uint16.

A bfloat16 is the upper half of a float32. Every function takes float32 and float64 as they are.
"""

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from mmrec.kernels import _tensors as arrays
from mmrec.kernels._launch import helper
from mmrec.kernels._tensors import DTYPES, flat

_ROUND, _ONE = np.uint32(0x7FFF), np.uint32(1)
_HALF, _NAN = np.uint32(16), np.uint16(0x7FC0)


TYPES = (*DTYPES, torch.bfloat16)  # what these kernels take


def bits(x: Tensor) -> Tensor:
    """A bfloat16 tensor as its bits, any other as it is."""
    return x.view(torch.uint16) if x.dtype == torch.bfloat16 else x


def flat_bits(x: Tensor) -> tuple[np.ndarray, int, int]:
    """``arrays.flat`` of a tensor that may be bfloat16."""
    return flat(bits(x.detach()))


def line(x: Tensor) -> np.ndarray:
    """A tensor as a 1-D array, copied only if it is not contiguous."""
    return arrays.as_array(bits(x.detach().contiguous()).view(-1))


def _wide_bits(x):
    return np.uint32(np.uint32(x) << _HALF).view(np.float32)


def _wide_same(x):
    return x


def wide(x):
    """The number that an element read from an array stands for."""
    return _wide_bits(x) if isinstance(x, np.uint16) else x


@overload(wide)
def _wide(x):
    return _wide_bits if x == types.uint16 else _wide_same


def _narrow_bits(x, like):
    whole = np.float32(x).view(np.uint32)
    near = np.uint16(np.uint32(whole + _ROUND + ((whole >> _HALF) & _ONE)) >> _HALF)
    return near if x == x else _NAN


def _narrow_same(x, like):
    return x


def narrow(x, like):
    """What to write into the array ``like`` for a number: rounded to nearest, ties to even."""
    if like.dtype != np.uint16:
        return x
    with np.errstate(over="ignore"):  # uint32 arithmetic wraps for NaN
        return _narrow_bits(x, like)


@overload(narrow)
def _narrow(x, like):
    return _narrow_bits if like.dtype == types.uint16 else _narrow_same


@helper
def read(source, at, out, to, width):
    """Copy ``width`` numbers of source from ``at`` on to ``to`` on in out."""
    at, to = np.uint64(at), np.uint64(to)
    for d in range(np.uint64(width)):
        out[to + d] = wide(source[at + d])


@helper
def write(values, at, target, to, width):
    """Copy ``width`` numbers from ``at`` on into target, which may hold bfloat16."""
    at, to = np.uint64(at), np.uint64(to)
    for d in range(np.uint64(width)):
        target[to + d] = narrow(values[at + d], target)


@helper
def dot(x, x_at, y, y_at, lanes, width):
    """Σ_d x_d y_d, in 16 running sums that are added in one order: that makes vectors of it."""
    x_at, y_at = np.uint64(x_at), np.uint64(y_at)
    whole = np.uint64(width // 16 * 16)
    for j in range(np.uint64(16)):
        lanes[j] = 0
    for at in range(np.uint64(0), whole, np.uint64(16)):
        for j in range(np.uint64(16)):
            lanes[j] += x[x_at + at + j] * y[y_at + at + j]
    for j in range(np.uint64(width) - whole):
        lanes[j] += x[x_at + whole + j] * y[y_at + whole + j]
    for j in range(8):
        lanes[j] += lanes[j + 8]
    for j in range(4):
        lanes[j] += lanes[j + 4]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
