"""Activations of scalars for kernels.

Sigmoid: float32 by a polynomial that vectorises, float64 by the library's exp.
"""

import math

import numpy as np
from numba import types
from numba.extending import overload

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # ln 2 in two parts, so that n ln 2 is subtracted exactly
_LN2_LOW = np.float32(-2.12194440e-4)
_C2, _C3, _C4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
_C5, _C6, _ONE = np.float32(1 / 120), np.float32(1 / 720), np.float32(1)
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to nearest
_LIMIT = np.float32(87.0)
_ZERO = np.float32(0)


def _sigmoid32(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)) to 2 units in the last place; exp by Cody-Waite reduction and Taylor."""
    y = min(max(-x, -_LIMIT), _LIMIT)
    shifted = y * _LOG2E + _ROUND
    n = shifted - _ROUND
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    p = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    scale = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return _ONE / (_ONE + p * scale)


def _sigmoid64(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


def sigmoid(x):  # type: ignore[no-untyped-def]
    """Sigmoid of one float32 or float64 scalar."""
    return _sigmoid32(x) if isinstance(x, np.float32) else _sigmoid64(x)


@overload(sigmoid, jit_options={"fastmath": {"contract"}})
def _sigmoid_compiled(x):  # type: ignore[no-untyped-def]
    return _sigmoid32 if x == types.float32 else _sigmoid64


def _relu32(x):  # type: ignore[no-untyped-def]
    return _ZERO if x < _ZERO else x


def _relu64(x):  # type: ignore[no-untyped-def]
    return 0.0 if x < 0.0 else x


def relu(x):  # type: ignore[no-untyped-def]
    """The larger of 0 and one float32 or float64 scalar, in its own type; NaN stays."""
    return _relu32(x) if isinstance(x, np.float32) else _relu64(x)


@overload(relu)
def _relu_compiled(x):  # type: ignore[no-untyped-def]
    return _relu32 if x == types.float32 else _relu64
