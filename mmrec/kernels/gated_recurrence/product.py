"""Matrix products in registers: what the gated recurrence spends its time on.

The sums of a block of rows and columns stay in vector registers over the whole depth, so an element
of W is loaded once for all rows. Every output is one sum in the order of depth, by fused
multiply-adds where the processor has them: how rows and columns are grouped never shows in the
results, and so neither does the number of threads.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from mmrec.kernels._launch import helper

_WIDE = binding.get_host_cpu_features().get("avx512f", False)
_VECTOR, _REGISTERS = (64, 32) if _WIDE else (32, 16)  # bytes in a vector register; their number


def add_product(  # type: ignore[no-untyped-def]
    x, at, row, step, w, w_at, w_row, out, out_at, out_row, rows, depth, columns
):
    """out[out_at + r out_row + j] += Σ_k x[at + r row + k step] w[w_at + k w_row + j], all flat.

    For r below rows, k below depth, j below columns. This is the uncompiled form.
    """
    for r in range(rows):
        to = slice(out_at + r * out_row, out_at + r * out_row + columns)
        for k in range(depth):
            start = w_at + k * w_row
            out[to] += x[at + r * row + k * step] * w[start : start + columns]


def _block(rows: int, vectors: int, part: bool = False) -> Any:
    """Make the product of some rows with some vectors of columns, or with a part of one vector."""

    @intrinsic
    def block(  # type: ignore[no-untyped-def]
        typing, x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns
    ):
        integers = (types.intp,) * 4
        signature = types.void(x, *integers[:3], w, *integers[:2], out, *integers)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns = args
            code = _Vectors(context, builder, signature.args[0].dtype, vectors)
            x, w, out = (code.data(signature.args[n], args[n]) for n in (0, 4, 7))
            mask = code.first(columns) if part else None
            numbers = [ir.Constant(at.type, r) for r in range(rows)]
            starts = [builder.add(at, builder.mul(row, r)) for r in numbers]
            ends = [builder.add(out_at, builder.mul(out_row, r)) for r in numbers]
            sums = [cgutils.alloca_once_value(builder, code.load(out, e, mask)) for e in ends]
            with cgutils.for_range(builder, depth) as loop:
                w_k = code.load(w, builder.add(w_at, builder.mul(loop.index, w_row)), mask)
                shift = builder.mul(loop.index, step)
                for total, start in zip(sums, starts, strict=True):
                    x_k = builder.load(builder.gep(x, [builder.add(start, shift)]))
                    builder.store(code.fma(code.spread(x_k), w_k, builder.load(total)), total)
            for total, end in zip(sums, ends, strict=True):
                code.store(builder.load(total), out, end, mask)
            return context.get_dummy_value()

        return signature, generate

    return block


class _Vectors:
    """Writes LLVM instructions on vectors of one length; a mask leaves out lanes."""

    def __init__(self, context: Any, builder: Any, scalar: Any, vectors: int) -> None:
        self.context, self.builder = context, builder
        self.size = scalar.bitwidth // 8
        self.lanes = vectors * _VECTOR // self.size
        self.kind = ir.VectorType(context.get_value_type(scalar), self.lanes)
        self.suffix = f"v{self.lanes}f{scalar.bitwidth}"
        self.align = ir.Constant(ir.IntType(32), self.size)

    def data(self, kind: Any, array: Any) -> Any:
        return self.context.make_array(kind)(self.context, self.builder, array).data

    def spread(self, value: Any) -> Any:
        """A vector of one scalar."""
        number = ir.IntType(32)
        empty = ir.Constant(ir.VectorType(value.type, self.lanes), ir.Undefined)
        filled = self.builder.insert_element(empty, value, ir.Constant(number, 0))
        zeros = ir.Constant(ir.VectorType(number, self.lanes), None)
        return self.builder.shuffle_vector(filled, empty, zeros)

    def first(self, count: Any) -> Any:
        """The mask of so many lanes."""
        lane = ir.Constant(ir.VectorType(count.type, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", lane, self.spread(count))

    def load(self, data: Any, index: Any, mask: Any) -> Any:
        pointer = self._pointer(data, index)
        if mask is None:
            return self.builder.load(pointer, align=self.size)
        zero = ir.Constant(self.kind, None)
        name = f"llvm.masked.load.{self.suffix}.p0"
        return self._call(name, self.kind, pointer, self.align, mask, zero)

    def store(self, value: Any, data: Any, index: Any, mask: Any) -> None:
        pointer = self._pointer(data, index)
        if mask is None:
            self.builder.store(value, pointer, align=self.size)
        else:
            name = f"llvm.masked.store.{self.suffix}.p0"
            self._call(name, ir.VoidType(), value, pointer, self.align, mask)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self._call(f"llvm.fmuladd.{self.suffix}", self.kind, a, b, c)

    def _pointer(self, data: Any, index: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(data, [index]), self.kind.as_pointer())

    def _call(self, name: str, result: Any, *args: Any) -> Any:
        kind = ir.FunctionType(result, [a.type for a in args])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, args)


def _chunk(rows: int) -> Any:
    """Make the product of exactly so many rows, with as many columns at once as registers hold."""
    vectors = min(4, _REGISTERS // 2 // rows)
    many, one, part = _block(rows, vectors), _block(rows, 1), _block(rows, 1, part=True)

    @helper
    def chunk(  # type: ignore[no-untyped-def]
        x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns
    ):
        lanes = _VECTOR // x.itemsize
        while columns >= vectors * lanes:
            many(x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns)
            w_at, out_at = w_at + vectors * lanes, out_at + vectors * lanes
            columns -= vectors * lanes
        while columns >= lanes:
            one(x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns)
            w_at, out_at, columns = w_at + lanes, out_at + lanes, columns - lanes
        if columns > 0:
            part(x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns)

    return chunk


_one, _two, _three, _four, _eight = (_chunk(rows) for rows in (1, 2, 3, 4, 8))


@overload(add_product)
def _add_product(  # type: ignore[no-untyped-def]
    x, at, row, step, w, w_at, w_row, out, out_at, out_row, rows, depth, columns
):
    def compiled(  # type: ignore[no-untyped-def]
        x, at, row, step, w, w_at, w_row, out, out_at, out_row, rows, depth, columns
    ):
        while rows >= 8:
            _eight(x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns)
            at, out_at, rows = at + 8 * row, out_at + 8 * out_row, rows - 8
        if rows >= 4:
            _four(x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns)
            at, out_at, rows = at + 4 * row, out_at + 4 * out_row, rows - 4
        if rows == 3:
            _three(x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns)
        elif rows == 2:
            _two(x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns)
        elif rows == 1:
            _one(x, at, row, step, w, w_at, w_row, out, out_at, out_row, depth, columns)

    return compiled
