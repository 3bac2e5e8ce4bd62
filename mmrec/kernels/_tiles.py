"""Matrix products on LANES columns, with the sums of some rows in vector registers.

The kernel of linear attention keeps its state in panels of LANES columns, which lie one after the
other in memory and fit the cache, so all its large products have LANES columns. Every sum runs in
the order of depth, so how rows are grouped never shows in the results.

Arguments throughout: x (rows, depth), w (depth, LANES) and out (rows, LANES) are parts of flat
arrays. A matrix begins at x_at, w_at, out_at; its rows are x_row, w_row, out_row numbers apart.
Numbers in a row of x are x_step apart; those in a row of w or out are neighbours. ``rows`` is a
multiple of 8.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from mmrec.kernels._jit import inline_jit, overload
from mmrec.kernels._simd import LANES, _intrinsic, _VectorBuilder

TILE = 8 if binding.get_host_cpu_features().get("avx512f", False) else 4
"""Rows whose sums are in registers at once: half of the registers in float32."""


def store_product(  # type: ignore[no-untyped-def]
    x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth
):
    """out[r, j] = Σ_n x[r, n] w[n, j]; the arguments are described above."""
    for r in range(rows):
        out[out_at + r * out_row : out_at + r * out_row + LANES] = 0
    add_product(x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth)


def add_product(  # type: ignore[no-untyped-def]
    x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth
):
    """out[r, j] += Σ_n x[r, n] w[n, j]; the arguments are described above."""
    for r in range(rows):
        row = out[out_at + r * out_row : out_at + r * out_row + LANES]
        for n in range(depth):
            row += x[x_at + r * x_row + n * x_step] * w[w_at + n * w_row : w_at + n * w_row + LANES]


def scale_add_product(  # type: ignore[no-untyped-def]
    factor, x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth
):
    """out[r, j] = factor[r] out[r, j] + Σ_n x[r, n] w[n, j]; the arguments are described above."""
    for r in range(rows):
        out[out_at + r * out_row : out_at + r * out_row + LANES] *= factor[r]
    add_product(x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth)


_ZERO, _OUT, _SCALED_OUT = 0, 1, 2  # what the sums begin with


def _make_tile(begin: int) -> Any:
    """The product for TILE rows, of which ``row`` is the first."""

    @_intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typing, factor, row, x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, depth
    ):
        i = types.intp
        signature = types.void(factor, i, x, i, i, i, w, i, i, out, i, i, i)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, row, _, x_at, x_row, x_step, _, w_at, w_row, _, out_at, out_row, depth = args
            vectors = _VectorBuilder(context, builder, signature.args[2].dtype, LANES)
            factor, x, w, out = (vectors.data(signature.args[n], args[n]) for n in (0, 2, 6, 9))
            rows = [builder.add(row, ir.Constant(row.type, r)) for r in range(TILE)]
            inputs = [builder.gep(x, [builder.add(x_at, builder.mul(x_row, r))]) for r in rows]
            outputs = [
                builder.gep(out, [builder.add(out_at, builder.mul(out_row, r))]) for r in rows
            ]
            sums = []
            for r, pointer in zip(rows, outputs, strict=True):
                first = vectors.zeros() if begin == _ZERO else vectors.load(pointer)
                if begin == _SCALED_OUT:
                    by = vectors.splat(builder.load(builder.gep(factor, [r])))
                    first = builder.fmul(first, by)
                sums.append(cgutils.alloca_once_value(builder, first))
            w_first = builder.gep(w, [w_at])
            with cgutils.for_range(builder, depth) as loop:
                w_n = vectors.load(builder.gep(w_first, [builder.mul(loop.index, w_row)]))
                shift = builder.mul(loop.index, x_step)
                for total, pointer in zip(sums, inputs, strict=True):
                    x_rn = vectors.splat(builder.load(builder.gep(pointer, [shift])))
                    builder.store(vectors.fma(x_rn, w_n, builder.load(total)), total)
            for total, pointer in zip(sums, outputs, strict=True):
                vectors.store(builder.load(total), pointer)
            return context.get_dummy_value()

        return signature, generate

    def product(  # type: ignore[no-untyped-def]
        factor, x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth
    ):
        for row in range(0, rows, TILE):
            tile(factor, row, x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, depth)

    return inline_jit(product, f"begin {begin}")


_store, _add, _scale_add = _make_tile(_ZERO), _make_tile(_OUT), _make_tile(_SCALED_OUT)


@overload(store_product)
def _store_product(  # type: ignore[no-untyped-def]
    x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth
):
    return lambda x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth: _store(
        x, x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth
    )


@overload(add_product)
def _add_product(  # type: ignore[no-untyped-def]
    x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth
):
    return lambda x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth: _add(
        x, x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth
    )


@overload(scale_add_product)
def _scale_add_product(  # type: ignore[no-untyped-def]
    factor, x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth
):
    return (
        lambda factor, x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth: (
            _scale_add(
                factor, x, x_at, x_row, x_step, w, w_at, w_row, out, out_at, out_row, rows, depth
            )
        )
    )
