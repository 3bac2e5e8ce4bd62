"""Matrix products in panels: against NumPy in float64, and bit for bit against each other."""

import numpy as np
import pytest

from mmrec.config import WEIGHT_DTYPES
from mmrec.kernels._jit import compiled_kernel
from mmrec.kernels._panels import BLOCK, PANEL, STORE, pad, product, to_panels
from mmrec.kernels.decoder.layout import quantize


@compiled_kernel
def multiply(weights, scales, first, end, depth, x, out, count, skip, index, sums, wide):  # type: ignore[no-untyped-def]
    zero = np.int64(0)
    row = np.int64(out.size // count)
    product(
        weights,
        zero,
        scales,
        zero,
        first,
        end,
        depth,
        x,
        zero,
        depth,
        index,
        out,
        zero,
        row,
        count,
        np.int64(STORE),
        skip,
        sums,
        wide,
    )


def panels_product(
    matrix: np.ndarray, scales: np.ndarray, x: np.ndarray, *, skip: bool = False, parts: int = 1
) -> np.ndarray:
    """x (count, depth) times the transposed matrix (rows, depth), in ``parts`` ranges of panels."""
    rows, depth = matrix.shape
    padded_scales = np.zeros(pad(rows) if scales.size else 0, np.float32)
    padded_scales[: scales.size] = scales
    out = np.zeros((len(x), pad(rows)), np.float32)
    index, sums = np.zeros(depth, np.int32), np.empty(max(2, len(x)) * PANEL, np.float32)
    wide, panels = np.empty(BLOCK * PANEL, np.float32), pad(rows) // PANEL
    for part in range(parts):
        multiply(
            to_panels(matrix),
            padded_scales,
            panels * part // parts,
            panels * (part + 1) // parts,
            depth,
            x.reshape(-1),
            out.reshape(-1),
            len(x),
            int(skip),
            index,
            sums,
            wide,
        )
    return out[:, :rows]


@pytest.mark.parametrize("weights", WEIGHT_DTYPES)
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (70, 33), (96, 300), (257, 129)])
def test_product_is_that_of_numpy(weights: str, rows: int, depth: int) -> None:
    rng = np.random.default_rng(rows)
    full = rng.standard_normal((rows, depth)).astype(np.float32)
    matrix, scales = quantize(full, weights)
    exact = matrix.astype(np.float64)
    if weights == "bfloat16":
        exact = (matrix.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    exact = exact * scales[:, None] if scales.size else exact
    x = rng.standard_normal((17, depth)).astype(np.float32)
    got = panels_product(matrix, scales, x)
    np.testing.assert_allclose(got, x @ exact.T, rtol=1e-5, atol=2e-6 * depth**0.5)
    for count in (1, 2, 3, 4, 5, 7):  # a vector's result has the same bits in any company
        np.testing.assert_array_equal(panels_product(matrix, scales, x[:count]), got[:count])
    np.testing.assert_array_equal(panels_product(matrix, scales, x, parts=3), got)
    np.testing.assert_array_equal(panels_product(matrix, scales, x[:1], parts=2), got[:1])
    sparse = x[:1] * (rng.random(depth) < 0.3)
    np.testing.assert_array_equal(
        panels_product(matrix, scales, sparse, skip=True),
        panels_product(matrix, scales, np.repeat(sparse, 2, 0))[:1],
    )


def test_quantization_errors() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((40, 60)).astype(np.float32)
    matrix[3] = 0
    bits, none = quantize(matrix, "bfloat16")
    assert none.size == 0
    rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    assert (np.abs(rounded - matrix) <= np.abs(matrix) * 2.0**-8).all()
    integers, scales = quantize(matrix, "int8")
    assert integers.dtype == np.int8
    assert (np.abs(integers).max(1)[np.arange(40) != 3] == 127).all()
    error = np.abs(integers * scales[:, None] - matrix)
    assert (error <= scales[:, None] * 0.501).all()
    assert not integers[3].any()
    assert scales[3] == 0
