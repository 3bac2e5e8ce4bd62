"""The softmax in parts, and the exp that it stands on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.kernels import softmax_parts
from mmrec.kernels._math import exp_below
from mmrec.kernels.fused_linear_cross_entropy import kernel, reference
from mmrec.kernels.fused_linear_cross_entropy.loss import LOSS_ROWS, HeadLoss

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = [1, 5, kernel.LANES, 2 * kernel.LANES + 1, 5000]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_agrees_with_reference(columns: int, dtype: torch.dtype, scale: float) -> None:
    logits = (scale * torch.randn(9, columns)).to(dtype)
    targets = torch.randint(columns, (9,))
    got = softmax_parts(logits, targets)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in got] == [dtype, wide, wide]
    for mine, true in zip(got, reference.softmax_parts(logits.double(), targets), strict=True):
        torch.testing.assert_close(mine, true.to(mine.dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, kernel.LANES, -1])
def test_a_row_that_is_not_finite_shows(bad: float, at: int) -> None:
    logits = torch.randn(2, kernel.LANES + 3)
    logits[0, at] = bad
    _, sums, nats = softmax_parts(logits, torch.ones(2, dtype=torch.int64))
    assert sums.isnan().tolist() == nats.isnan().tolist() == [True, False]


def test_a_logit_of_minus_infinity_has_no_share() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    powers, sums, nats = softmax_parts(logits, torch.tensor([0]))
    assert powers[0, 1] < 1e-37
    assert sums.item() == 2
    assert nats.item() == pytest.approx(math.log(2))


@given(st.floats(-200, 0, width=32))
def test_exp(x: float) -> None:
    got, want = exp_below(np.float32(x)), math.exp(max(x, -87.0))
    assert abs(float(got) - want) <= 2.5e-7 * want
    assert exp_below(x) == math.exp(x)


@pytest.mark.parametrize("half", [False, True])
def test_the_loss_is_cross_entropy(half: bool) -> None:
    """Two chunks and a bit, against torch on all logits at once."""
    rows = 2 * LOSS_ROWS + 7
    x = torch.randn(rows, 24, requires_grad=True)
    weight = (0.3 * torch.randn(50, 24)).requires_grad_()
    targets = torch.randint(50, (rows,))
    got = HeadLoss.apply(x, weight, targets, half)
    want = torch.nn.functional.cross_entropy((x @ weight.T).double(), targets)
    torch.testing.assert_close(got.double(), want, rtol=2e-3 if half else 1e-6, atol=0)
    for mine, true in zip(
        torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, (x, weight)), strict=True
    ):
        assert (mine - true).norm() < (1e-2 if half else 1e-5) * true.norm()


def test_op() -> None:
    arguments = torch.randn(3, 40), torch.zeros(3, dtype=torch.int64)
    torch.library.opcheck(torch.ops.mmrec.softmax_parts.default, arguments)
    logits = torch.randn(3, 40, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        softmax_parts(logits, arguments[1])[2].sum().backward()


@pytest.mark.parametrize(
    ("logits", "targets", "said"),
    [
        (
            torch.ones(2, 3, dtype=torch.float16),
            torch.zeros(2, dtype=torch.int64),
            "float32, float64",
        ),
        (
            torch.ones(3),
            torch.zeros(3, dtype=torch.int64),
            r"axes \(R, V\), V >= 1; got shape \(3,\)",
        ),
        (torch.ones(2, 0), torch.zeros(2, dtype=torch.int64), "V >= 1"),
        (torch.ones(2, 3), torch.zeros(3, dtype=torch.int64), r"targets must have shape \(R\)"),
        (torch.ones(2, 3), torch.tensor([0, 3]), r"in \[0, V\) = \[0, 3\); got 0 to 3"),
        (torch.ones(2, 3), torch.zeros(2), "targets must have dtype int64"),
    ],
)
def test_bad_input_is_named(logits: torch.Tensor, targets: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        softmax_parts(logits, targets)
