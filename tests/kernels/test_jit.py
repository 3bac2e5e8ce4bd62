"""Names of compiled functions. The linker tells functions apart by them; see ``_jit._claim``."""

import re

import numba
import numpy as np
import pytest
from numba import config

from mmrec.kernels._jit import compiled_kernel, inline_jit, overload
from mmrec.kernels._products import FULL, add_tiled_product
from mmrec.kernels._simd import LANES, fma, load, splat, store, zeros
from mmrec.kernels._tiles import add_product, scale_add_product, store_product
from mmrec.kernels._vector_math import exp2, sigmoid


def use_everything(x: np.ndarray, out: np.ndarray) -> None:
    """Use several functions that have the same types of arguments."""
    a, b = load(x, 0), splat(x, 3)
    store(out, 0, fma(a * b, exp2(a - b), sigmoid(a + b)) + zeros(x))
    for columns in (LANES, 2 * LANES):
        add_tiled_product(x, 0, 4, 1, x, 0, columns, out, 0, columns, 4, 4, columns, FULL)
    store_product(x, 0, 4, 1, x, 0, LANES, out, 0, LANES, 8, 4)
    add_product(x, 0, 4, 1, x, 0, LANES, out, 0, LANES, 8, 4)
    scale_add_product(x, x, 0, 4, 1, x, 0, LANES, out, 0, LANES, 8, 4)


@pytest.mark.skipif(config.DISABLE_JIT, reason="nothing is compiled")  # type: ignore[attr-defined]
def test_no_two_compiled_functions_have_one_name() -> None:
    compiled = inline_jit(use_everything)
    compiled.compile((numba.float32[::1], numba.float32[::1]))  # type: ignore[attr-defined]
    [result] = compiled.overloads.values()  # type: ignore[attr-defined]
    library = result.library._final_module
    names = [f.name for f in library.functions if not f.is_declaration]
    # numbers that Numba counts in each process look like B3v27, the length before a v and a number
    ours = [re.sub(r"B\d+v\d+", "", name, count=1) for name in names if "mmrec" in name]
    assert len(ours) == len(set(ours))


@pytest.mark.skipif(config.DISABLE_JIT, reason="nothing is compiled")  # type: ignore[attr-defined]
def test_python_cannot_call_what_is_linked_into_kernels() -> None:
    """There is no code at its address, so a call would end the process."""

    def add_half(x: float) -> float:
        return x + 0.5

    def use_half(x: np.ndarray) -> None:
        x[0] = half(x[0])

    half, x = inline_jit(add_half), np.zeros(1)
    for _ in range(2):  # before and after a kernel has compiled it
        with pytest.raises(TypeError, match="add_half is for kernels"):
            half(1.0)
        compiled_kernel(use_half)(x)
    assert x[0] == 1.0


def test_a_name_stands_for_one_function() -> None:
    def make(value: int, variant: str = "") -> None:
        def function() -> int:
            return value

        inline_jit(function, variant)

    make(1, "one")
    make(2, "two")
    with pytest.raises(ValueError, match="needs a variant"):
        make(3, "two")

    def plain() -> None: ...

    overload(plain)(lambda: lambda: None)
    with pytest.raises(ValueError, match="names of their own"):
        overload(plain)(lambda: lambda: 1)
