"""RMSprop with one mean square per row: the reference, rows that stay, order, threads."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels._launch import parallel_threshold
from mmrec.kernels.rowwise_rmsprop import kernel, reference
from mmrec.kernels.rowwise_rmsprop.op import rowwise_rmsprop_


def draw(rows: int, count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A weight, its mean squares, indices and gradients."""
    weight, gradients = torch.randn(rows, width), torch.randn(count, width)
    indices = torch.randint(rows, (count,))
    tensors = [weight, torch.zeros(rows), indices, gradients]
    return [x.to(dtype) if x.is_floating_point() else x for x in tensors]


@given(
    st.integers(1, 9),
    st.integers(0, 40),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0, 0.999),
    st.floats(0, 3),
)
def test_agrees_with_reference(
    rows: int, count: int, width: int, dtype: torch.dtype, decay: float, weight_decay: float
) -> None:
    """Over three steps, of which the later ones have mean squares."""
    weight, mean_square, _, _ = draw(rows, count, width, dtype)
    exact = [weight.double(), mean_square.double()]
    for _ in range(3):
        _, _, indices, gradients = draw(rows, count, width, dtype)
        settings = (0.1, decay, weight_decay)
        rowwise_rmsprop_(weight, mean_square, indices, gradients, *settings)
        reference.rowwise_rmsprop_(*exact, indices, gradients.double(), *settings)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for got, want in zip((weight, mean_square), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_a_first_step_moves_by_the_rate_whatever_the_size_of_the_gradient() -> None:
    weight, mean_square, indices, gradients = draw(5, 3, 16)
    for size in (1e-12, 1.0, 1e12):
        moved, unknown = weight.clone(), mean_square.clone()
        rowwise_rmsprop_(moved, unknown, indices[:1], size * gradients[:1], 0.1)
        step = (moved - weight)[indices[0]]
        assert step.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-3)


def test_rows_without_a_gradient_stay_as_they_are() -> None:
    weight, mean_square, _, gradients = draw(6, 4, 7)
    gradients[3] = 0
    before = weight.clone()
    indices = torch.tensor([1, 4, 1, 2])
    rowwise_rmsprop_(weight, mean_square, indices, gradients, 0.1, weight_decay=1.0)
    for row in (0, 2, 3, 5):
        assert torch.equal(weight[row], before[row])
        assert mean_square[row] == 0
    for row in (1, 4):
        assert not torch.equal(weight[row], before[row])


def test_threads_change_no_bit() -> None:
    tensors = draw(1000, 5 * kernel.BLOCK, 33)
    results = []
    for threshold in (0, 1e12):
        weight, mean_square = tensors[0].clone(), tensors[1].clone()
        with parallel_threshold(threshold):
            rowwise_rmsprop_(weight, mean_square, *tensors[2:], 0.1)
        results.append((weight, mean_square))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_indices_of_a_coalesced_tensor_and_of_rows_side_by_side_agree() -> None:
    """A gradient in parts is the sum of its parts."""
    weight, mean_square, indices, gradients = draw(20, 50, 8)
    summed = torch.sparse_coo_tensor(
        indices[None], gradients, (20, 8), check_invariants=False
    ).coalesce()
    other, other_square = weight.clone(), mean_square.clone()
    rowwise_rmsprop_(weight, mean_square, indices, gradients, 0.1)
    rowwise_rmsprop_(other, other_square, summed.indices()[0], summed.values(), 0.1)
    torch.testing.assert_close(weight, other)
    torch.testing.assert_close(mean_square, other_square)


def test_op() -> None:
    torch.library.opcheck(
        torch.ops.mmrec.rowwise_rmsprop_.default, (*draw(9, 6, 5), 0.1, 0.99, 0.5)
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.ones(9), r"weight must be \(rows, D\) .*; got \(9,\) torch.float32 on cpu"),
        (0, torch.ones(9, 5, dtype=torch.int64), "weight must be .*; got .* torch.int64"),
        (1, torch.zeros(8), r"mean_square must be \(9,\) torch.float32; got \(8,\)"),
        (2, torch.zeros(6), r"indices must be \(6,\) torch.int64; got \(6,\) torch.float32"),
        (3, torch.zeros(6, 4), r"gradients must be \(6, 5\) torch.float32; got \(6, 4\)"),
        (0, torch.ones(5, 9).T, "weight and mean_square must be contiguous"),
    ],
)
def test_bad_input_is_named(place: int, value: Any, message: str) -> None:
    tensors = draw(9, 6, 5)
    tensors[place] = value
    with pytest.raises(ValueError, match=message):
        rowwise_rmsprop_(*tensors, 0.1)  # type: ignore[call-arg, arg-type]


def test_bits_do_not_depend_on_how_the_gradient_lies_in_memory() -> None:
    weight, mean_square, indices, gradients = draw(9, 6, 5)
    other = weight.clone()
    rowwise_rmsprop_(weight, mean_square.clone(), indices, gradients, 0.1)
    rowwise_rmsprop_(other, mean_square, indices, gradients.T.contiguous().T, 0.1)
    assert np.array_equal(weight.numpy(), other.numpy())
