"""Fused linear cross-entropy, its softmax kernel, and the exp in that kernel."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.kernels import fused_linear_cross_entropy
from mmrec.kernels._math import exp_nonpositive
from mmrec.kernels.fused_linear_cross_entropy import kernel, reference
from mmrec.kernels.fused_linear_cross_entropy.op import LOGITS_CHUNK, softmax_parts

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = [1, 5, kernel.LANES, 2 * kernel.LANES + 1, 5000]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_agrees_with_reference(columns: int, dtype: torch.dtype, scale: float) -> None:
    logits = (scale * torch.randn(9, columns)).to(dtype)
    targets = torch.randint(columns, (9,))
    got = softmax_parts(logits, targets)
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in got] == [dtype, sum_dtype, sum_dtype]
    for actual, expected in zip(
        got, reference.softmax_parts(logits.double(), targets), strict=True
    ):
        torch.testing.assert_close(actual, expected.to(actual.dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, kernel.LANES, -1])
def test_a_row_that_is_not_finite_gives_nan(bad: float, at: int) -> None:
    logits = torch.randn(2, kernel.LANES + 3)
    logits[0, at] = bad
    _, denominators, losses = softmax_parts(logits, torch.ones(2, dtype=torch.int64))
    assert denominators.isnan().tolist() == losses.isnan().tolist() == [True, False]


def test_a_logit_of_minus_infinity_has_probability_zero() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    numerators, denominators, losses = softmax_parts(logits, torch.tensor([0]))
    assert numerators[0, 1] < 1e-37
    assert denominators.item() == 2
    assert losses.item() == pytest.approx(math.log(2))


@given(st.floats(-200, 0, width=32))
def test_exp(x: float) -> None:
    got, want = exp_nonpositive(np.float32(x)), math.exp(max(x, -87.0))
    assert abs(float(got) - want) <= 2.5e-7 * want
    assert exp_nonpositive(x) == math.exp(x)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_loss_is_cross_entropy(bf16: bool, with_bias: bool) -> None:
    """Two chunks and a remainder, against torch on all logits at once."""
    rows = 2 * LOGITS_CHUNK + 7
    hidden = torch.randn(rows, 24, requires_grad=True)
    weight = (0.3 * torch.randn(50, 24)).requires_grad_()
    bias = [torch.randn(50, requires_grad=True)] if with_bias else []
    targets = torch.randint(50, (rows,))
    got = fused_linear_cross_entropy(hidden, weight, targets, *bias, bf16=bf16)
    want = reference.fused_linear_cross_entropy(
        hidden.double(), weight.double(), targets, *[b.double() for b in bias]
    )
    torch.testing.assert_close(got.double(), want, rtol=2e-3 if bf16 else 1e-6, atol=0)
    for actual, expected in zip(
        torch.autograd.grad(got, (hidden, weight, *bias)),
        torch.autograd.grad(want, (hidden, weight, *bias)),
        strict=True,
    ):
        assert (actual - expected).norm() < (1e-2 if bf16 else 1e-5) * expected.norm()


def test_gradcheck() -> None:
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (5,))
    for inputs in ([hidden, weight], [hidden, weight, bias]):
        assert torch.autograd.gradcheck(
            lambda h, w, *b: fused_linear_cross_entropy(h, w, targets, *b), inputs
        )


def test_op() -> None:
    arguments = torch.randn(3, 40), torch.zeros(3, dtype=torch.int64)
    torch.library.opcheck(torch.ops.mmrec.softmax_parts.default, arguments)
    logits = torch.randn(3, 40, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        softmax_parts(logits, arguments[1])[2].sum().backward()


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
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
def test_bad_input_is_named(logits: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        softmax_parts(logits, targets)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "message"),
    [
        ((3,), (5, 4), (3,), r"hidden must have axes \(R, D\)"),
        ((0, 4), (5, 4), (0,), "R >= 1"),
        ((3, 4), (5, 3), (3,), r"weight must have shape \(V, D\) = \(5, 4\); got \(5, 3\)"),
        ((3, 4), (4,), (3,), "weight must have shape"),
        ((3, 4), (5, 4), (2,), r"targets must have shape \(R\) = \(3,\)"),
    ],
)
def test_bad_shape_is_named(
    hidden: tuple[int, ...], weight: tuple[int, ...], targets: tuple[int, ...], message: str
) -> None:
    labels = torch.zeros(targets, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(torch.ones(hidden), torch.ones(weight), labels)


def test_a_bias_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"bias must have shape \(V\) = \(5,\); got \(4,\)"):
        fused_linear_cross_entropy(
            torch.ones(3, 2), torch.ones(5, 2), torch.zeros(3, dtype=torch.int64), torch.ones(4)
        )
