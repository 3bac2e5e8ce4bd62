"""Product scans: against their references, gradcheck, the laws, and products out of range."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import cumprod, log_cumprod
from mmrec.kernels.cumprod import reference
from tests.kernels import laws

sizes = st.tuples(st.integers(1, 3), st.integers(0, 9), st.sampled_from([1, 3, 4, 6, 33]))
cuts = st.lists(st.integers(0, 9), max_size=3)
PRODUCTS = [(cumprod, reference.cumprod), (log_cumprod, reference.log_cumprod)]
OPS = [cumprod, log_cumprod]


def gamma_inputs(b: int, t: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.rand(b, t, d, dtype=dtype) + 0.3, torch.rand(b, d, dtype=dtype) + 0.5]


@pytest.mark.parametrize(("op", "truth"), PRODUCTS)
@given(sizes)
def test_products_agree_with_reference(op: laws.Op, truth: laws.Op, size: tuple) -> None:
    laws.agrees(op, truth, gamma_inputs(*size), 1e-12)
    laws.agrees(op, truth, gamma_inputs(*size, torch.float32), 1e-5)


def test_long_sequences_of_few_channels() -> None:
    """More steps than fit a tile, and channels that four does not divide."""
    for width in (2, 6):
        gamma = 1 + 0.1 * (torch.rand(2, 1100, width, dtype=torch.float64) - 0.5)
        laws.agrees(cumprod, reference.cumprod, [gamma, torch.rand(2, width).double()], 1e-11)


def test_gradcheck() -> None:
    for op in OPS:
        assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in gamma_inputs(2, 5, 3)])


@given(st.integers(1, 8))
def test_causality(at: int) -> None:
    for op in OPS:
        gamma, start = gamma_inputs(2, 9, 5)
        laws.is_causal(op, [gamma], [], start, at)


@given(cuts)
def test_packed_sequences_do_not_meet(cuts: list[int]) -> None:
    for width in (3, 5):
        gamma, _ = gamma_inputs(1, 9, width)
        states = torch.randn(len(cuts) + 1, width, dtype=torch.float64).abs() + 0.5
        for op in OPS:
            laws.packs(op, [gamma], [], states, cuts)


@given(cuts)
def test_cumprod_splits(cuts: list[int]) -> None:
    gamma, start = gamma_inputs(2, 9, 5)
    laws.splits(cumprod, [gamma], [], start, cuts)


def test_threads_do_not_change_bits() -> None:
    for width in (5, 200):
        for op in OPS:
            laws.ignores_threads(op, gamma_inputs(3, 8, width, torch.float32))


def test_low_precision_in_and_out() -> None:
    for op in OPS:
        gamma, start = gamma_inputs(2, 9, 5, torch.float32)
        laws.low_precision(op, [gamma], [], start)


def test_is_a_valid_torch_op() -> None:
    for library_op in (torch.ops.mmrec.cumprod.default, torch.ops.mmrec.log_cumprod.default):
        leaves = (x.requires_grad_() for x in gamma_inputs(2, 5, 3))
        torch.library.opcheck(library_op, (*leaves, None))
    for op in OPS:
        laws.compiles(op, gamma_inputs(2, 6, 5))
        laws.survives_checkpointing(op, gamma_inputs(2, 6, 5))
        laws.works_without_gradients(op, gamma_inputs(2, 6, 5))


def test_missing_derivatives_raise() -> None:
    gamma = gamma_inputs(2, 5, 3)[0]
    for op in OPS:
        torch.testing.assert_close(
            torch.func.grad(lambda g, op=op: op(g)[0].sum())(gamma),
            gradient_of(lambda g, op=op: op(g)[0].sum(), gamma),
        )
        many = torch.stack((gamma, gamma / 2))
        with pytest.warns(UserWarning, match="performance drop"):
            each = torch.vmap(lambda g, op=op: op(g)[0])(many)
        torch.testing.assert_close(each[1], op(many[1])[0])
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(lambda g, op=op: op(g)[0], (gamma,), (gamma,))
        x = gamma.clone().requires_grad_()
        (first,) = torch.autograd.grad(op(x)[0].sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="a second derivative is not supported"):
            first.sum().backward()


def gradient_of(call: object, x: Tensor) -> Tensor:
    ready = x.clone().requires_grad_()
    return torch.autograd.grad(call(ready), ready)[0]  # type: ignore[operator]


def test_long_product_does_not_underflow() -> None:
    gamma = torch.full((1, 65_536, 1), 0.5)
    logs, last = log_cumprod(gamma)
    assert last.item() == pytest.approx(-65_536 * math.log(2), rel=1e-6)
    assert torch.isfinite(logs).all()
    # the product itself falls to 2^-2000 on its way and comes back, also in float32
    there_and_back = torch.cat((torch.full((1, 2000, 1), 0.5), torch.full((1, 2000, 1), 2.0)), 1)
    assert cumprod(there_and_back)[1].item() == 1.0
    assert torch.cumprod(there_and_back, 1)[0, -1].item() == 0.0


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of NumPy, uncompiled
@pytest.mark.parametrize("width", [1, 3, 6, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_that_leave_the_range_of_a_float_and_return(
    width: int, dtype: torch.dtype
) -> None:
    """Against mantissa and exponent separated at every step: the same bits, near one and far."""
    size = (1, 1100, width)
    for magnitude in (0, 30, 100):  # powers of two by which a factor may differ from one
        powers = torch.randint(-magnitude, magnitude + 1, size).double()
        gamma = ((torch.rand(size) + 0.5) * powers.exp2()).to(dtype)
        gamma[:, 600:700:7, 0], gamma[:, 900:, -1] = -1e-30, 0.0
        m, e, want = torch.ones(width).double(), torch.zeros(width), []
        for t in range(size[1]):
            m, power = torch.frexp(m * gamma[0, t].double())
            e += power
            half = (e.clamp(-2000, 2000) / 2).floor().double()
            want.append(m * half.exp2() * (e.clamp(-2000, 2000) - half).exp2())
        assert torch.equal(cumprod(gamma)[0][0], torch.stack(want).to(dtype))
        start = torch.ones(1, width).double()
        laws.splits(cumprod, [gamma[:, :10].double()], [], start, [3, 7])


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
        (lambda x: cumprod(x.cfloat()), "gamma must have one of the dtypes .*; got complex64"),
        (lambda x: cumprod(x.to("meta")), "gamma must be on the CPU.*; got meta"),
        (lambda x: cumprod(3), "gamma must be a tensor"),
        (lambda x: log_cumprod(x[0]), r"gamma must have axes \(B, T, D\)"),
        (lambda x: log_cumprod(-x, check_finite=True), "gamma must be >= 0; got -1"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, 4))  # type: ignore[operator]
