"""Vectors of up to LANES numbers for the gates of recurrences: parts of rows, sigmoid and tanh.

The operators + - * work on them, too (``_simd.py``). Written with them, a step of a gate is one
loop that reads and writes many arrays. LLVM does not vectorise such a loop by itself, because it
cannot prove that the arrays do not overlap.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from mmrec.kernels._jit import overload
from mmrec.kernels._math import (
    _C2,
    _C3,
    _C4,
    _C5,
    _C6,
    _LN2_HIGH,
    _LN2_LOW,
    _LOG2E,
    _ROUND,
    _ROUND_BITS,
    sigmoid,
)
from mmrec.kernels._simd import LANES, _intrinsic, _Vector, _VectorBuilder, load, store


def load_part(array: np.ndarray, at: int, count: int) -> np.ndarray:
    """The vector of ``count`` <= LANES numbers from array[at] on."""
    return array[at : at + count].copy()


def store_part(array: np.ndarray, at: int, count: int, vector: np.ndarray) -> None:
    """Write the first ``count`` <= LANES numbers of a vector from array[at] on."""
    array[at : at + count] = vector


def one_minus(x: np.ndarray) -> np.ndarray:
    """1 - x."""
    return 1 - x


def sigmoids(x: np.ndarray) -> np.ndarray:
    """Sigmoid, in float32 within 2 units in the last place."""
    return np.array([sigmoid(value) for value in x], x.dtype)


def tanhs(x: np.ndarray) -> np.ndarray:
    """Hyperbolic tangent as 2 σ(2 x) - 1: its absolute error is a rounding of 1."""
    half = sigmoids(x + x)
    return half + half - 1


@_intrinsic
def _load_masked(typing: Any, array: Any, at: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _VectorBuilder(context, builder, array.dtype, LANES)
        return vectors.load(vectors.element(array, *args[:2]), vectors.first_lanes(args[2]))

    return _Vector(array.dtype)(array, types.intp, types.intp), generate


@_intrinsic
def _store_masked(typing: Any, array: Any, at: Any, count: Any, vector: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _VectorBuilder(context, builder, array.dtype, LANES)
        place = vectors.element(array, *args[:2])
        vectors.store(args[3], place, vectors.first_lanes(args[2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, vector), generate


def _constant(vectors: Any, value: float) -> Any:
    return ir.Constant(vectors.type, [value] * vectors.lanes)


def _emit_sigmoid(vectors: Any, dtype: Any, x: Any) -> Any:
    """The steps of ``_math.py``, for a vector."""
    builder, one = vectors.builder, _constant(vectors, 1.0)
    limit = 87.0 if dtype == types.float32 else 700.0
    y = builder.fsub(_constant(vectors, -0.0), x)
    for sign, value in ((">", limit), ("<", -limit)):  # NaN stays
        bound = _constant(vectors, value)
        y = builder.select(builder.fcmp_ordered(sign, y, bound), bound, y)
    if dtype != types.float32:
        exponential = vectors._call(f"llvm.exp.{vectors._suffix}", vectors.type, y)
        return builder.fdiv(one, builder.fadd(one, exponential))

    def fma(a: Any, b: Any, c: Any) -> Any:
        return vectors.fma(a, b, c)

    rounding = _constant(vectors, float(_ROUND))
    shifted = fma(y, _constant(vectors, float(_LOG2E)), rounding)
    n = builder.fsub(shifted, rounding)
    r = fma(n, _constant(vectors, -float(_LN2_HIGH)), y)
    r = fma(n, _constant(vectors, -float(_LN2_LOW)), r)
    p = _constant(vectors, float(_C6))
    for coefficient in (_C5, _C4, _C3, _C2, 1.0, 1.0):
        p = fma(r, p, _constant(vectors, float(coefficient)))
    integers = ir.VectorType(ir.IntType(32), vectors.lanes)

    def integer(value: int) -> Any:
        return ir.Constant(integers, [value] * vectors.lanes)

    bits = builder.sub(builder.bitcast(shifted, integers), integer(int(_ROUND_BITS) - 127))
    power = builder.bitcast(builder.shl(bits, integer(23)), vectors.type)
    return builder.fdiv(one, fma(p, power, one))


@_intrinsic
def _one_minus(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _VectorBuilder(context, builder, x.dtype, LANES)
        return builder.fsub(_constant(vectors, 1.0), args[0])

    return x(x), generate


@_intrinsic
def _sigmoids(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _VectorBuilder(context, builder, x.dtype, LANES)
        return _emit_sigmoid(vectors, x.dtype, args[0])

    return x(x), generate


@_intrinsic
def _tanhs(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _VectorBuilder(context, builder, x.dtype, LANES)
        half = _emit_sigmoid(vectors, x.dtype, builder.fadd(args[0], args[0]))
        return vectors.fma(half, _constant(vectors, 2.0), _constant(vectors, -1.0))

    return x(x), generate


@overload(load_part)
def _load_part(array, at, count):  # type: ignore[no-untyped-def]
    def compiled(array, at, count):  # type: ignore[no-untyped-def]
        if count < LANES:
            return _load_masked(array, at, count)
        return load(array, at)

    return compiled


@overload(store_part)
def _store_part(array, at, count, vector):  # type: ignore[no-untyped-def]
    def compiled(array, at, count, vector):  # type: ignore[no-untyped-def]
        if count < LANES:
            _store_masked(array, at, count, vector)
        else:
            store(array, at, vector)

    return compiled


overload(one_minus)(lambda x: lambda x: _one_minus(x))
overload(sigmoids)(lambda x: lambda x: _sigmoids(x))
overload(tanhs)(lambda x: lambda x: _tanhs(x))
