"""Scan and product scans: against their references, gradcheck, and the laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import cumprod, log_cumprod, scan
from mmrec.kernels.scan import reference
from tests.kernels import laws

sizes = st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(1, 7))
PRODUCTS = [(cumprod, reference.cumprod), (log_cumprod, reference.log_cumprod)]


def scan_inputs(b: int, t: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.rand(b, t, d, dtype=dtype) * 1.5 - 0.4, torch.randn(b, t, d, dtype=dtype),
            torch.randn(b, d, dtype=dtype)]  # fmt: skip


def gamma_inputs(b: int, t: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.rand(b, t, d, dtype=dtype) + 0.3, torch.rand(b, d, dtype=dtype) + 0.5]


@given(sizes)
def test_scan_agrees_with_reference(size: tuple[int, int, int]) -> None:
    laws.agrees(scan, reference.scan, scan_inputs(*size), 1e-12)
    laws.agrees(scan, reference.scan, scan_inputs(*size, torch.float32), 1e-5)


@pytest.mark.parametrize(("op", "truth"), PRODUCTS)
@given(sizes)
def test_products_agree_with_reference(op: laws.Op, truth: laws.Op, size: tuple) -> None:
    laws.agrees(op, truth, gamma_inputs(*size), 1e-12)
    laws.agrees(op, truth, gamma_inputs(*size, torch.float32), 1e-5)


def test_gradcheck() -> None:
    ready = [x.requires_grad_() for x in scan_inputs(2, 5, 3)]
    assert torch.autograd.gradcheck(scan, ready)
    for op, _ in PRODUCTS:
        assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in gamma_inputs(2, 5, 3)])


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(1, 8))
def test_splits_and_causality(cuts: list[int], at: int) -> None:
    a, b, h0 = scan_inputs(2, 9, 5, torch.float32)
    laws.splits(scan, [a, b], [], h0, cuts)
    laws.is_causal(scan, [a, b], [], h0, at)
    for op, _ in PRODUCTS:
        gamma, start = gamma_inputs(2, 9, 5)
        laws.is_causal(op, [gamma], [], start, at)


@given(st.lists(st.integers(0, 9), max_size=3))
def test_cumprod_splits(cuts: list[int]) -> None:
    gamma, start = gamma_inputs(2, 9, 5)
    laws.splits(cumprod, [gamma], [], start, cuts)


def test_strides_and_broadcasts() -> None:
    a, b, h0 = scan_inputs(3, 6, 4)
    laws.reads_strides(scan, [a, b], [], h0)
    gate = a[:1, :1].expand(3, 6, 4)  # one gate a channel: no copy is made
    torch.testing.assert_close(scan(gate, b, h0)[0], reference.scan(gate, b, h0)[0])
    turned = a.transpose(0, 2).contiguous().transpose(0, 2)  # last stride not 1: copied
    assert torch.equal(scan(turned, b, h0)[0], scan(a, b, h0)[0])


def test_threads_do_not_change_bits() -> None:
    laws.ignores_threads(scan, scan_inputs(3, 8, 200, torch.float32))
    laws.ignores_threads(cumprod, gamma_inputs(1, 8, 200, torch.float32))


def test_long_product_does_not_underflow() -> None:
    gamma = torch.full((1, 65_536, 1), 0.5)
    logs, last = log_cumprod(gamma)
    assert last.item() == pytest.approx(-65_536 * math.log(2), rel=1e-6)
    assert torch.isfinite(logs).all()
    # the product itself falls to 2^-2000 on its way and comes back, also in float32
    there_and_back = torch.cat((torch.full((1, 2000, 1), 0.5), torch.full((1, 2000, 1), 2.0)), 1)
    assert cumprod(there_and_back)[1].item() == 1.0
    assert torch.cumprod(there_and_back, 1)[0, -1].item() == 0.0


def test_gradient_is_exact_at_zero() -> None:
    gamma = torch.tensor([2.0, 0.0, 3.0, 0.0, 5.0], dtype=torch.float64)[None, :, None]
    mine, theirs = gamma.clone().requires_grad_(), gamma.clone().requires_grad_()
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)[None, :, None]
    (cumprod(mine)[0] * weights).sum().backward()
    (torch.cumprod(theirs, 1) * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


def test_log_product_from_a_zero_on() -> None:
    gamma = torch.tensor([0.5, 0.25, 0.0, 0.5])[None, :, None].requires_grad_()
    logs, last = log_cumprod(gamma)
    assert logs[0, :2, 0].tolist() == pytest.approx([math.log(0.5), math.log(0.125)])
    assert (logs[0, 2:] == -math.inf).all()
    assert last.item() == -math.inf
    logs.sum().backward()
    assert gamma.grad.flatten().tolist() == pytest.approx([2 / 0.5, 1 / 0.25, 0.0, 0.0])
    assert torch.isnan(log_cumprod(torch.full((1, 1, 1), -1.0))[0]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: scan(x[0], x), r"b must have axes|a must have shape"),
        (
            lambda x: scan(x, x[:, :1]),
            r"a must have shape \(B, T, D\) = \(2, 1, 4\); got \(2, 3, 4\)",
        ),
        (lambda x: scan(x, x, x), r"h0 must have shape \(B, D\) = \(2, 4\); got \(2, 3, 4\)"),
        (lambda x: scan(x.double(), x), "a must have dtype torch.float32; got torch.float64"),
        (lambda x: scan(x, x.half()), "b must have dtype float32 or float64; got torch.float16"),
        (lambda x: cumprod(x.to("meta")), "gamma must be on the CPU; got device meta"),
        (lambda x: cumprod(3), "gamma must be a tensor"),
        (lambda x: scan(None, x), "a must be a tensor"),
        (lambda x: scan(x.to("meta"), x), "a must be on the CPU; got device meta"),
        (lambda x: log_cumprod(x[0]), r"gamma must have axes \(B, T, D\)"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, 4))  # type: ignore[operator]
