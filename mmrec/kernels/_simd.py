"""Vectors of numbers inside kernels, written as LLVM instructions.

Numba leaves vectorising to LLVM, which does not keep the sums of a small matrix product in vector
registers. This module says outright what shall be a vector. It offers

* ``load``, ``store``, ``splat``, ``zeros``, ``fma``, ``add_lanes``, ``transpose`` and the operators
  + - * on vectors of LANES numbers (for the gated delta rule);
* ``make_block_product``, a matrix product with its sums in registers;
* ``prefetch``, which brings a number's cache line closer before it is used.

``_VectorBuilder`` generates the instructions of both. All of them index flat arrays without bounds
checks and without wraparound. LLVM splits vectors into what the processor has. The order of every
sum, hence every bit but for fused multiply-adds, is therefore the same on all processors. Each
public function is plain NumPy when nothing is compiled (``NUMBA_DISABLE_JIT=1``).
"""

import operator
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from mmrec.kernels._jit import overload

LANES = 16
"""Numbers in a vector of ``load``, ``store`` and so on."""


class _VectorBuilder:
    """Emits LLVM instructions on vectors of ``lanes`` numbers of one dtype.

    Where a ``mask`` is given, only its lanes are read or written.
    """

    def __init__(self, context: Any, builder: Any, dtype: Any, lanes: int) -> None:
        self.context, self.builder, self.lanes = context, builder, lanes
        self.type = ir.VectorType(context.get_value_type(dtype), lanes)
        self._suffix = f"v{lanes}f{dtype.bitwidth}"
        self._align = dtype.bitwidth // 8  # that of one number: slices start anywhere

    def data(self, array_type: Any, array: Any) -> Any:
        """Pointer to the first number of an array."""
        return self.context.make_array(array_type)(self.context, self.builder, array).data

    def element(self, array_type: Any, array: Any, index: Any) -> Any:
        """Pointer to array[index]."""
        return self.builder.gep(self.data(array_type, array), [index])

    def load(self, pointer: Any, mask: Any = None) -> Any:
        """The vector that begins at a pointer to a number; zero outside the mask."""
        address = self.builder.bitcast(pointer, self.type.as_pointer())
        if mask is None:
            return self.builder.load(address, align=self._align)
        align = ir.Constant(ir.IntType(32), self._align)
        name = f"llvm.masked.load.{self._suffix}.p0"
        return self._call(name, self.type, address, align, mask, self.zeros())

    def store(self, vector: Any, pointer: Any, mask: Any = None) -> None:
        """Write a vector from a pointer to a number on."""
        address = self.builder.bitcast(pointer, self.type.as_pointer())
        if mask is None:
            self.builder.store(vector, address, align=self._align)
            return
        align = ir.Constant(ir.IntType(32), self._align)
        name = f"llvm.masked.store.{self._suffix}.p0"
        self._call(name, ir.VoidType(), vector, address, align, mask)

    def zeros(self) -> Any:
        """Zero in every lane."""
        return ir.Constant(self.type, None)

    def splat(self, scalar: Any) -> Any:
        """A scalar, of any type, in every lane."""
        empty = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
        return self.shuffle(first, empty, [0] * self.lanes)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Lanes of a (0, 1, …) and of b (``self.lanes`` and above) by their numbers."""
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        return self.builder.shuffle_vector(a, b, mask)

    def first_lanes(self, count: Any) -> Any:
        """The mask of the first ``count`` lanes."""
        numbers = ir.Constant(ir.VectorType(count.type, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", numbers, self.splat(count))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z per lane, in one rounding where the processor has that instruction."""
        return self._call(f"llvm.fmuladd.{self._suffix}", self.type, x, y, z)

    def _call(self, name: str, result: Any, *args: Any) -> Any:
        signature = ir.FunctionType(result, [a.type for a in args])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, args)


def load(array: np.ndarray, at: int) -> np.ndarray:
    """The vector array[at : at + LANES]."""
    return array[at : at + LANES].copy()


def store(array: np.ndarray, at: int, vector: np.ndarray) -> None:
    """array[at : at + LANES] = vector."""
    array[at : at + LANES] = vector


def splat(array: np.ndarray, at: int) -> np.ndarray:
    """array[at] in every lane."""
    return np.full(LANES, array[at])


def zeros(array: np.ndarray) -> np.ndarray:
    """Zero in every lane, of the dtype of the array."""
    return np.zeros(LANES, array.dtype)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z per lane, in one rounding where the processor has that instruction."""
    return x * y + z


def add_lanes(vector: np.ndarray) -> Any:
    """The sum of all lanes: lane n and lane n + 8, then n and n + 4, and so on."""
    while vector.size > 1:
        vector = vector[: vector.size // 2] + vector[vector.size // 2 :]
    return vector[0]


def prefetch(array: np.ndarray, at: int) -> None:
    """Ask for the cache line of array[at] in the second-level cache. Changes no result."""


def transpose(
    source: np.ndarray,
    source_at: int,
    source_stride: int,
    target: np.ndarray,
    target_at: int,
    target_stride: int,
) -> None:
    """Transpose a matrix (LANES, LANES); the strides are those between its rows."""
    rows = np.stack([load(source, source_at + source_stride * i) for i in range(LANES)])
    for i in range(LANES):
        store(target, target_at + target_stride * i, rows[:, i])


class _Vector(types.Type):
    """Numba's type of a vector of LANES numbers."""

    def __init__(self, dtype: Any) -> None:
        super().__init__(name=f"Vector({dtype}, {LANES})")
        self.dtype = dtype


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: _Vector) -> None:
        number = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(number, LANES))


def _intrinsic(function: Any) -> Any:
    """Numba's decorator, untyped: it changes the signature of what it decorates."""
    return intrinsic(function)


@_intrinsic
def _load(typing: Any, array: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _VectorBuilder(context, builder, array.dtype, LANES)
        return vectors.load(vectors.element(array, *args))

    return _Vector(array.dtype)(array, types.intp), generate


@_intrinsic
def _store(typing: Any, array: Any, at: Any, vector: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _VectorBuilder(context, builder, array.dtype, LANES)
        vectors.store(args[2], vectors.element(array, *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@_intrinsic
def _splat(typing: Any, array: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _VectorBuilder(context, builder, array.dtype, LANES)
        return vectors.splat(builder.load(vectors.element(array, *args)))

    return _Vector(array.dtype)(array, types.intp), generate


@_intrinsic
def _zeros(typing: Any, array: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _VectorBuilder(context, builder, array.dtype, LANES).zeros()

    return _Vector(array.dtype)(array), generate


@_intrinsic
def _fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _VectorBuilder(context, builder, x.dtype, LANES).fma(*args)

    return x(x, y, z), generate


@_intrinsic
def _add_lanes(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (vector,), lanes = args, LANES
        undefined = ir.Constant(vector.type, ir.Undefined)
        while lanes > 1:
            lanes //= 2
            halves = (
                ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(begin, begin + lanes)))
                for begin in (0, lanes)
            )
            low, high = (builder.shuffle_vector(vector, undefined, half) for half in halves)
            vector = builder.fadd(low, high)
            undefined = ir.Constant(vector.type, ir.Undefined)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return x.dtype(x), generate


@_intrinsic
def _prefetch(typing: Any, array: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _VectorBuilder(context, builder, array.dtype, 1).element(array, *args)
        integer = ir.IntType(32)
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        function_type = ir.FunctionType(ir.VoidType(), [pointer.type, *[integer] * 3])
        name = "llvm.prefetch.p0"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        # to read it, from the second-level cache on, as data
        builder.call(function, [pointer, *(ir.Constant(integer, n) for n in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@_intrinsic
def _transpose(
    typing: Any,
    source: Any,
    source_at: Any,
    source_stride: Any,
    target: Any,
    target_at: Any,
    target_stride: Any,
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _VectorBuilder(context, builder, source.dtype, LANES)
        read_at = vectors.element(source, *args[:2])
        write_at = vectors.element(target, *args[3:5])
        rows = []
        for _ in range(LANES):
            rows.append(vectors.load(read_at))
            read_at = builder.gep(read_at, [args[2]])
        # swap blocks of 1, 2, 4, 8 across the diagonal
        for size in (1, 2, 4, 8):
            for i in (i for i in range(LANES) if not i & size):
                a, b = rows[i], rows[i | size]
                lanes = [j if not j & size else LANES + j - size for j in range(LANES)]
                rows[i] = vectors.shuffle(a, b, lanes)
                lanes = [j + size if not j & size else LANES + j for j in range(LANES)]
                rows[i | size] = vectors.shuffle(a, b, lanes)
        for row in rows:
            vectors.store(row, write_at)
            write_at = builder.gep(write_at, [args[5]])
        return context.get_dummy_value()

    integer = types.intp
    return types.void(source, integer, integer, target, integer, integer), generate


@_intrinsic
def _multiply(typing: Any, x: Any, y: Any) -> Any:
    return x(x, y), lambda context, builder, signature, args: builder.fmul(*args)


@_intrinsic
def _add(typing: Any, x: Any, y: Any) -> Any:
    return x(x, y), lambda context, builder, signature, args: builder.fadd(*args)


@_intrinsic
def _subtract(typing: Any, x: Any, y: Any) -> Any:
    return x(x, y), lambda context, builder, signature, args: builder.fsub(*args)


overload(load)(lambda array, at: lambda array, at: _load(array, at))
overload(store)(lambda array, at, vector: lambda array, at, vector: _store(array, at, vector))
overload(splat)(lambda array, at: lambda array, at: _splat(array, at))
overload(zeros)(lambda array: lambda array: _zeros(array))
overload(fma)(lambda x, y, z: lambda x, y, z: _fma(x, y, z))
overload(add_lanes)(lambda vector: lambda vector: _add_lanes(vector))
overload(prefetch)(lambda array, at: lambda array, at: _prefetch(array, at))
overload(transpose)(
    lambda source, source_at, source_stride, target, target_at, target_stride: (
        lambda source, source_at, source_stride, target, target_at, target_stride: _transpose(
            source, source_at, source_stride, target, target_at, target_stride
        )
    )
)


def _overload_operator(function: Any, instruction: Any) -> None:
    overload(function)(
        lambda x, y: (
            (lambda x, y: instruction(x, y))
            if isinstance(x, _Vector) and isinstance(y, _Vector)
            else None
        )
    )


_overload_operator(operator.mul, _multiply)
_overload_operator(operator.add, _add)
_overload_operator(operator.sub, _subtract)


# A matrix product in registers. The sums of a block of rows and columns stay in vector registers
# over the whole depth, so an element of the right matrix is loaded once for all rows. Every output
# is one sum in the order of depth, by fused multiply-adds where the processor has them. How rows
# and columns are grouped therefore never shows in the results.
#
# Arguments throughout: x (rows, depth), w (depth, columns) and out (rows, columns) are parts of
# flat arrays. A matrix begins at x_at, w_at, out_at; its rows are x_row, w_row, out_row numbers
# apart. Numbers in a row of x are x_step apart; those in a row of w or out are neighbours.

_AVX512 = binding.get_host_cpu_features().get("avx512f", False)
REGISTER_BYTES, REGISTERS = (64, 32) if _AVX512 else (32, 16)


def make_block_product(rows: int, registers: int) -> Any:
    """The product for a number of rows, and as many columns as ``registers`` registers hold."""

    @intrinsic
    def block_product(  # type: ignore[no-untyped-def]
        typing, x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, depth
    ):
        integers = (types.intp,) * 3
        signature = types.void(x, *integers, w, *integers[:2], out, *integers)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, depth = args
            dtype = signature.args[0].dtype
            lanes = registers * REGISTER_BYTES // (dtype.bitwidth // 8)
            vectors = _VectorBuilder(context, builder, dtype, lanes)
            x, w, out = (vectors.data(signature.args[n], args[n]) for n in (0, 4, 7))
            numbers = [ir.Constant(x_at.type, r) for r in range(rows)]
            x_begins = [builder.add(x_at, builder.mul(x_row, r)) for r in numbers]
            out_begins = [builder.add(out_at, builder.mul(out_row, r)) for r in numbers]
            pointers = [builder.gep(out, [begin]) for begin in out_begins]
            sums = [cgutils.alloca_once_value(builder, vectors.load(p)) for p in pointers]
            with cgutils.for_range(builder, depth) as loop:
                w_begin = builder.add(w_at, builder.mul(loop.index, w_row))
                w_k = vectors.load(builder.gep(w, [w_begin]))
                shift = builder.mul(loop.index, x_step)
                for total, begin in zip(sums, x_begins, strict=True):
                    x_rk = builder.load(builder.gep(x, [builder.add(begin, shift)]))
                    product = vectors.fma(vectors.splat(x_rk), w_k, builder.load(total))
                    builder.store(product, total)
            for total, pointer in zip(sums, pointers, strict=True):
                vectors.store(builder.load(total), pointer)
            return context.get_dummy_value()

        return signature, generate

    return block_product
