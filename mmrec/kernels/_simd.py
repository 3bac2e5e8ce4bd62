"""Vectors of LANES numbers as values inside kernels, so that sums stay in registers.

Numba leaves vectorising to LLVM, which does not keep the sums of a small matrix product in
registers. These few functions say it outright. They index flat arrays without bounds checks or
wraparound. LLVM splits the vectors into what the processor has, so the order of every sum, hence
every bit but for fused multiply-adds, is the same on all of them. Without the compiler
(``NUMBA_DISABLE_JIT=1``) they mean the NumPy below.
"""

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

LANES = 16


def load(array: np.ndarray, at: int) -> np.ndarray:
    """The LANES numbers from ``at`` on."""
    return array[at : at + LANES].copy()


def store(array: np.ndarray, at: int, vector: np.ndarray) -> None:
    """Put a vector at ``at``."""
    array[at : at + LANES] = vector


def spread(array: np.ndarray, at: int) -> np.ndarray:
    """The number at ``at`` in every lane."""
    return np.full(LANES, array[at])


def zeros(array: np.ndarray) -> np.ndarray:
    """Zero in every lane, of the dtype of the array."""
    return np.zeros(LANES, array.dtype)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z, lane by lane, in one rounding where the processor can."""
    return x * y + z


def transpose(
    source: np.ndarray, at: int, step: int, target: np.ndarray, to: int, stride: int
) -> None:
    """Turn a square: its rows are ``step`` apart in source and ``stride`` apart in target."""
    rows = np.stack([source[at + step * i : at + step * i + LANES] for i in range(LANES)])
    for i in range(LANES):
        target[to + stride * i : to + stride * i + LANES] = rows[:, i]


class _Vector(types.Type):
    def __init__(self, dtype: Any) -> None:
        super().__init__(name=f"Vector({dtype}, {LANES})")
        self.dtype = dtype


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        number = manager.lookup(kind.dtype).get_value_type()
        super().__init__(manager, kind, ir.VectorType(number, LANES))


def _instruction(build: Any) -> Any:
    """Numba's intrinsic; its signature is not that of the function it decorates."""
    return intrinsic(build)


def _element(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Pointer to array[at]."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _get(builder: Any, number: Any, address: Any) -> Any:
    vector = ir.VectorType(number, LANES)
    # aligned like one number: slices start anywhere
    return builder.load(
        builder.bitcast(address, vector.as_pointer()), align=4 if number == ir.FloatType() else 8
    )


def _put(builder: Any, value: Any, address: Any) -> None:
    pointer = builder.bitcast(address, value.type.as_pointer())
    builder.store(value, pointer, align=4 if value.type.element == ir.FloatType() else 8)


def _mask(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


@_instruction
def _load(typing: Any, array: Any, at: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = context.get_value_type(array.dtype)
        return _get(builder, number, _element(context, builder, array, *args))

    return _Vector(array.dtype)(array, types.intp), build


@_instruction
def _store(typing: Any, array: Any, at: Any, vector: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _put(builder, args[2], _element(context, builder, array, *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), build


@_instruction
def _spread(typing: Any, array: Any, at: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = builder.load(_element(context, builder, array, *args))
        empty = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
        first = builder.insert_element(empty, number, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, empty, _mask([0] * LANES))

    return _Vector(array.dtype)(array, types.intp), build


@_instruction
def _zeros(typing: Any, array: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.VectorType(context.get_value_type(array.dtype), LANES), None)

    return _Vector(array.dtype)(array), build


@_instruction
def _fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        name = f"llvm.fmuladd.v{LANES}f{32 if kind.element == ir.FloatType() else 64}"
        call = ir.FunctionType(kind, [kind] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, call, name), args)

    return x(x, y, z), build


@_instruction
def _transpose(
    typing: Any, source: Any, at: Any, step: Any, target: Any, to: Any, stride: Any
) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = context.get_value_type(source.dtype)
        start, put = (
            _element(context, builder, kind, array, place)
            for kind, array, place in ((source, *args[:2]), (target, *args[3:5]))
        )
        rows = []
        for _ in range(LANES):
            rows.append(_get(builder, number, start))
            start = builder.gep(start, [args[2]])
        # swap blocks of 1, 2, 4, 8 across the diagonal
        for size in (1, 2, 4, 8):
            for i in (i for i in range(LANES) if not i & size):
                a, b = rows[i], rows[i | size]
                lanes = [j if not j & size else LANES + j - size for j in range(LANES)]
                rows[i] = builder.shuffle_vector(a, b, _mask(lanes))
                lanes = [j + size if not j & size else LANES + j for j in range(LANES)]
                rows[i | size] = builder.shuffle_vector(a, b, _mask(lanes))
        for row in rows:
            _put(builder, row, put)
            put = builder.gep(put, [args[5]])
        return context.get_dummy_value()

    ints = types.intp
    return types.void(source, ints, ints, target, ints, ints), build


@_instruction
def _times(typing: Any, x: Any, y: Any) -> Any:
    return x(x, y), lambda context, builder, signature, args: builder.fmul(*args)


@_instruction
def _plus(typing: Any, x: Any, y: Any) -> Any:
    return x(x, y), lambda context, builder, signature, args: builder.fadd(*args)


@_instruction
def _minus(typing: Any, x: Any, y: Any) -> Any:
    return x(x, y), lambda context, builder, signature, args: builder.fsub(*args)


overload(load)(lambda array, at: lambda array, at: _load(array, at))
overload(store)(lambda array, at, vector: lambda array, at, vector: _store(array, at, vector))
overload(spread)(lambda array, at: lambda array, at: _spread(array, at))
overload(zeros)(lambda array: lambda array: _zeros(array))
overload(fma)(lambda x, y, z: lambda x, y, z: _fma(x, y, z))
overload(transpose)(
    lambda source, at, step, target, to, stride: (
        lambda source, at, step, target, to, stride: _transpose(
            source, at, step, target, to, stride
        )
    )
)


def _arithmetic(sign: Any, made: Any) -> None:
    overload(sign)(
        lambda x, y: (
            (lambda x, y: made(x, y)) if isinstance(x, _Vector) and isinstance(y, _Vector) else None
        )
    )


_arithmetic(operator.mul, _times)
_arithmetic(operator.add, _plus)
_arithmetic(operator.sub, _minus)
