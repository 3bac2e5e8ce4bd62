"""Functions of the vectors of ``_simd.py``: powers of two, sigmoid, softplus, sums over lanes.

exp2 is a polynomial after a reduction to |r| <= 1/2, and everything else is made of it: decays are
powers of two of logarithms that were scaled by LOG2E once. float32 results are right within 2 units
in the last place; float64 ones within 4. Exponents beyond the range of normal numbers are clamped,
so the smallest result is 2^-126 (2^-1022) and no decay is a denormal number. Each function is plain
NumPy when nothing is compiled (``NUMBA_DISABLE_JIT=1``).
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from mmrec.kernels._jit import overload
from mmrec.kernels._simd import LANES, _intrinsic, _Vector, _VectorBuilder, load

LOG2E = 1.4426950408889634
_LN2 = 0.6931471805599453
_LIMITS_32, _LIMITS_64 = (-126.0, 127.9), (-1022.0, 1023.9)  # of an exponent
# (2^r - 1) / r: a minimax fit of relative error 9e-8 in float32, Taylor's series in float64
_EXP2_32 = (0.69314698, 0.24022242, 0.05550734, 0.00967151, 0.00132647)
_EXP2_64 = tuple(_LN2**k / math.factorial(k) for k in range(1, 14))
# artanh(s) / s as a series in s², for s <= 1/3
_ARTANH_32 = tuple(1 / (2 * k + 1) for k in range(9))
_ARTANH_64 = tuple(1 / (2 * k + 1) for k in range(18))


class _Emitter:
    """Emits the instructions of the functions below on vectors of one dtype."""

    def __init__(self, context: Any, builder: Any, dtype: Any) -> None:
        self.builder, self.single = builder, dtype == types.float32
        self.vectors = _VectorBuilder(context, builder, dtype, LANES)

    def constant(self, value: float) -> Any:
        return ir.Constant(
            self.vectors.type, [float(np.float32(value) if self.single else value)] * LANES
        )

    def polynomial(self, x: Any, coefficients: tuple[float, ...]) -> Any:
        total = self.constant(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            total = self.vectors.fma(total, x, self.constant(c))
        return total

    def clamp(self, x: Any, low: float, high: float) -> Any:
        """NaN stays NaN."""
        for limit, compare in ((low, "<"), (high, ">")):
            bound = self.constant(limit)
            x = self.builder.select(self.builder.fcmp_ordered(compare, x, bound), bound, x)
        return x

    def exp2(self, x: Any) -> Any:
        builder, bits, shift = self.builder, (32, 64)[not self.single], (23, 52)[not self.single]
        x = self.clamp(x, *(_LIMITS_32 if self.single else _LIMITS_64))
        # adding and subtracting 1.5 * 2^23 (2^52) rounds to nearest
        rounder = self.constant(1.5 * 2.0**shift)
        shifted = builder.fadd(x, rounder)
        r = builder.fsub(x, builder.fsub(shifted, rounder))
        fit = self.polynomial(r, _EXP2_32 if self.single else _EXP2_64)
        power = self.vectors.fma(fit, r, self.constant(1.0))
        integers = ir.VectorType(ir.IntType(bits), LANES)
        by = ir.Constant(integers, [shift] * LANES)
        exponent = builder.shl(builder.bitcast(shifted, integers), by)
        scaled = builder.add(builder.bitcast(power, integers), exponent)
        return builder.bitcast(scaled, self.vectors.type)

    def sigmoid(self, x: Any) -> Any:
        one, scaled = self.constant(1.0), self.builder.fmul(x, self.constant(-LOG2E))
        return self.builder.fdiv(one, self.builder.fadd(one, self.exp2(scaled)))

    def softplus(self, x: Any) -> Any:
        """max(x, 0) + log(1 + e) with e = exp(-|x|), and log(1 + e) = 2 artanh(e / (2 + e))."""
        builder, zero = self.builder, self.constant(0.0)
        negative = builder.fcmp_ordered("<", x, zero)
        magnitude = builder.select(negative, builder.fsub(zero, x), x)
        e = self.exp2(builder.fmul(magnitude, self.constant(-LOG2E)))
        s = builder.fdiv(e, builder.fadd(e, self.constant(2.0)))
        series = _ARTANH_32 if self.single else _ARTANH_64
        log = builder.fmul(builder.fadd(s, s), self.polynomial(builder.fmul(s, s), series))
        return builder.fadd(builder.select(negative, zero, x), log)


def exp2(x: np.ndarray) -> np.ndarray:
    """2^x per lane."""
    return np.exp2(np.clip(x, *(_LIMITS_32 if x.dtype == np.float32 else _LIMITS_64)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) per lane."""
    return 1 / (1 + np.exp(np.minimum(-x, x.dtype.type(88))))


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)) per lane."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sum_rows(source: np.ndarray, at: int) -> np.ndarray:
    """The sums of the LANES rows of a matrix (LANES, LANES) that begins at source[at]."""
    return np.stack([load(source, at + LANES * i) for i in range(LANES)]).sum(1)


def _unary(name: str) -> Any:
    @_intrinsic
    def function(typing: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(_Emitter(context, builder, x.dtype), name)(*args)

        return x(x), generate

    return function


_exp2, _sigmoid, _softplus = _unary("exp2"), _unary("sigmoid"), _unary("softplus")


@_intrinsic
def _sum_rows(typing: Any, source: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _VectorBuilder(context, builder, source.dtype, LANES)
        begin, rows = vectors.element(source, *args), []
        for i in range(LANES):
            rows.append(vectors.load(cgutils.gep_inbounds(builder, begin, i * LANES)))
        for size in (8, 4, 2, 1):  # lane j of row i becomes a part of the sum of row i + (j & size)
            halves = []
            for a, b in zip(rows[:size], rows[size:], strict=True):
                kept = [j + LANES if j & size else j for j in range(LANES)]
                moved = [(j ^ size) + LANES if j & size else j ^ size for j in range(LANES)]
                halves.append(
                    builder.fadd(vectors.shuffle(a, b, kept), vectors.shuffle(a, b, moved))
                )
            rows = halves
        return rows[0]

    return _Vector(source.dtype)(source, types.intp), generate


def _of_vectors(function: Any, instruction: Any) -> None:
    overload(function)(lambda x: (lambda x: instruction(x)) if isinstance(x, _Vector) else None)


_of_vectors(exp2, _exp2)
_of_vectors(sigmoid, _sigmoid)
_of_vectors(softplus, _softplus)
overload(sum_rows)(lambda source, at: lambda source, at: _sum_rows(source, at))
