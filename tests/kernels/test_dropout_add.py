"""Dropout and a residual addition in one pass."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.kernels import dropout_add
from mmrec.kernels._launch import parallel_threshold
from mmrec.kernels.dropout_add import kernel, op, reference


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keep(count: int, p: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Which of ``count`` elements stay."""
    return dropout_add(torch.ones(count), torch.zeros(count), p, generator=generator) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 100, 2 * kernel.BLOCK + 3])
def test_agrees_with_reference(count: int, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(count).to(dtype).requires_grad_()
    residual = torch.randn(count, dtype=wide, requires_grad=True)
    key, p = torch.tensor([-5, 2**31 - 1], dtype=torch.int32), 0.3
    y = op._op(x, residual, key, p)
    want = reference.dropout_add(x, residual, key, p)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(residual)
    for got, right in zip(
        torch.autograd.grad(y, (x, residual), dy),
        torch.autograd.grad(want, (x, residual), dy),
        strict=True,
    ):
        assert got.dtype == right.dtype
        torch.testing.assert_close(got, right)


def test_gradcheck_and_op() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    key = torch.tensor([1, 2], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, r: op._op(x, r, key, 0.4), (x, residual))
    torch.library.opcheck(torch.ops.mmrec.dropout_add.default, (x, residual, key, 0.4))


@given(st.integers(0, 2**40), st.floats(0.01, 0.99))
def test_the_share_that_drops_is_p(seed: int, p: float) -> None:
    """Within six standard deviations of the binomial distribution."""
    count = 20_000
    dropped = count - int(keep(count, p, seeded(seed)).sum())
    assert abs(dropped - count * p) < 6 * math.sqrt(count * p * (1 - p)) + 1


@pytest.mark.parametrize("distance", [1, 2, 3, 16, 128, kernel.BLOCK])
def test_elements_drop_independently_of_their_neighbours(distance: int) -> None:
    """Pairs of any distance, and the same element with another key, agree as often as chance."""
    count, p = 1 << 18, 0.25
    generator = seeded(3)
    mask, other = keep(count, p, generator).float(), keep(count, p, generator).float()
    expected, deviation = (1 - p) ** 2, 6 / math.sqrt(count)
    assert abs(float((mask[distance:] * mask[:-distance]).mean()) - expected) < deviation
    assert abs(float((mask * other).mean()) - expected) < deviation
    assert abs(float((mask[distance:] * other[:-distance]).mean()) - expected) < deviation


def test_bits_of_counters_are_uniform() -> None:
    """Each of the 32 bits is set half of the time, for small and for neighbouring keys."""
    keys = [(0, 0), (0, 1), (1, 0), (2**32 - 1, 7)]
    for key in keys:
        words = torch.tensor([k - 2**32 if k >= 2**31 else k for k in key], dtype=torch.int32)
        for bit in range(1, 5):  # shares below 2^-bit
            share = 1 - float(reference.keep_mask(1 << 16, words, 0.5**bit).float().mean())
            assert abs(share - 0.5**bit) < 6 / math.sqrt(1 << 16)
    counters = np.arange(1 << 16, dtype=np.uint32)
    with np.errstate(over="ignore"):
        bits = np.array([int(kernel_bits(c, 5, 9)) for c in counters[: 1 << 12]], np.uint32)
    ones = (bits[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(0)
    assert np.abs(ones - 0.5).max() < 6 / math.sqrt(len(bits))


def kernel_bits(counter: np.uint32, key_0: int, key_1: int) -> np.uint32:
    """The kernel's own function, as plain Python."""
    function = getattr(kernel.random_bits, "py_func", kernel.random_bits)
    bits: np.uint32 = function(counter, np.uint32(key_0), np.uint32(key_1))
    return bits


def test_a_generator_repeats_and_nothing_is_drawn_without_dropout() -> None:
    count = 3 * kernel.BLOCK
    assert torch.equal(keep(count, 0.5, seeded(1)), keep(count, 0.5, seeded(1)))
    assert not torch.equal(keep(count, 0.5, seeded(1)), keep(count, 0.5, seeded(2)))
    generator = seeded(1)
    before = generator.get_state()
    x, residual = torch.randn(2, 50).unbind()
    for p, training in ((0.0, True), (0.5, False)):
        assert torch.equal(dropout_add(x, residual, p, training, generator=generator), x + residual)
    assert torch.equal(generator.get_state(), before)
    torch.manual_seed(4)
    first = keep(count, 0.5)
    torch.manual_seed(4)
    assert torch.equal(keep(count, 0.5), first)


def test_threads_do_not_change_the_mask() -> None:
    x, residual = torch.randn(2, 5 * kernel.BLOCK).unbind()
    results = []
    for threshold in (0.0, math.inf):
        with parallel_threshold(threshold):
            results.append(dropout_add(x, residual, 0.2, generator=seeded()))
    assert torch.equal(*results)


def test_bad_input_is_named() -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match="x must be float32, float64, bfloat16 or float16"):
        dropout_add(torch.ones(2, dtype=torch.int64), x)
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\); got 1"):
        dropout_add(x, x, 1.0)
    with pytest.raises(ValueError, match="residual must have shape"):
        dropout_add(x, torch.ones(3))
    with pytest.raises(ValueError, match="residual must have dtype float64"):
        dropout_add(x.double(), x)
