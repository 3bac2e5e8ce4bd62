"""Scalar functions for kernels: sigmoid, exp, relu, and ceiling division.

Sigmoid and exp use a polynomial for float32, which LLVM vectorises, and the C library's exp for
float64. Every function also runs as plain Python (``NUMBA_DISABLE_JIT=1``).
"""

import math

import numpy as np
from numba import types
from numba.extending import register_jitable

from mmrec.kernels._jit import overload

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # ln 2 as a sum of two, so that n ln 2 is subtracted exactly
_LN2_LOW = np.float32(-2.12194440e-4)
_C2, _C3, _C4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
_C5, _C6, _ONE = np.float32(1 / 120), np.float32(1 / 720), np.float32(1)
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to nearest
_ROUND_BITS, _BIAS, _MANTISSA = np.int32(0x4B400000), np.int32(127), np.int32(23)
_LIMIT = np.float32(87.0)
_ZERO = np.float32(0)


@register_jitable(error_model="numpy")
def cdiv(a, b):  # type: ignore[no-untyped-def]
    """Ceiling division of integers, or of an array of integers by one."""
    return -(-a // b)


@register_jitable(fastmath={"contract"})
def _exp32(x):  # type: ignore[no-untyped-def]
    """exp(x) for |x| <= 87, within 2 units in the last place; NaN gives NaN.

    With n = round(x / ln 2) and r = x - n ln 2 (Cody and Waite's reduction), exp(x) is
    2^n exp(r), and exp(r) is a Taylor polynomial of degree 6.
    """
    shifted = np.float32(x * _LOG2E + _ROUND)
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    exponent = np.int32(shifted.view(np.int32) - _ROUND_BITS)  # n, from the low mantissa bits
    return p * np.int32(np.int32(exponent + _BIAS) << _MANTISSA).view(np.float32)


def _sigmoid32(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)), within 2 units in the last place."""
    return _ONE / (_ONE + _exp32(min(max(-x, -_LIMIT), _LIMIT)))


def _sigmoid64(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


def sigmoid(x):  # type: ignore[no-untyped-def]
    """Sigmoid of one float32 or float64 scalar."""
    return _sigmoid32(x) if isinstance(x, np.float32) else _sigmoid64(x)


@overload(sigmoid, jit_options={"fastmath": {"contract"}})
def _sigmoid_compiled(x):  # type: ignore[no-untyped-def]
    return _sigmoid32 if x == types.float32 else _sigmoid64


def _exp_nonpositive32(x):  # type: ignore[no-untyped-def]
    return _exp32(-_LIMIT if x < -_LIMIT else x)


def _exp_nonpositive64(x):  # type: ignore[no-untyped-def]
    return math.exp(x)


def exp_nonpositive(x):  # type: ignore[no-untyped-def]
    """exp of one float32 or float64 scalar x <= 0.

    In float32 the smallest result is exp(-87) = 2e-38. NaN gives NaN.
    """
    return _exp_nonpositive32(x) if isinstance(x, np.float32) else _exp_nonpositive64(x)


@overload(exp_nonpositive, jit_options={"fastmath": {"contract"}})
def _exp_nonpositive_compiled(x):  # type: ignore[no-untyped-def]
    return _exp_nonpositive32 if x == types.float32 else _exp_nonpositive64


def _relu32(x):  # type: ignore[no-untyped-def]
    return _ZERO if x < _ZERO else x


def _relu64(x):  # type: ignore[no-untyped-def]
    return 0.0 if x < 0.0 else x


def relu(x):  # type: ignore[no-untyped-def]
    """max(x, 0) of one float32 or float64 scalar, in its own type; NaN gives NaN."""
    return _relu32(x) if isinstance(x, np.float32) else _relu64(x)


@overload(relu)
def _relu_compiled(x):  # type: ignore[no-untyped-def]
    return _relu32 if x == types.float32 else _relu64
