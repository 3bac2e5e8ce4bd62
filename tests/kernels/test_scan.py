"""Scan and product scans: against their references, gradcheck, and the laws."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import cumprod, log_cumprod, scan
from mmrec.kernels.cumprod import reference as product_reference
from mmrec.kernels.scan import reference
from tests.kernels import laws

sizes = st.tuples(st.integers(1, 3), st.integers(0, 9), st.sampled_from([1, 3, 4, 6, 33]))
cuts = st.lists(st.integers(0, 9), max_size=3)
PRODUCTS = [(cumprod, product_reference.cumprod), (log_cumprod, product_reference.log_cumprod)]


def scan_inputs(b: int, t: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        torch.rand(b, t, d, dtype=dtype) * 1.5 - 0.4,
        torch.randn(b, t, d, dtype=dtype),
        torch.randn(b, d, dtype=dtype),
    ]


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


def test_long_sequences_of_few_channels() -> None:
    """More steps than fit a tile, in both directions, and channels that four does not divide."""
    for width in (2, 6):
        gamma = 1 + 0.1 * (torch.rand(2, 1100, width, dtype=torch.float64) - 0.5)
        laws.agrees(
            cumprod, product_reference.cumprod, [gamma, torch.rand(2, width).double()], 1e-11
        )
    inputs = scan_inputs(2, 1100, 6)
    for reverse in (False, True):
        op = partial(scan, reverse=reverse)
        laws.agrees(
            op,
            partial(reversed_in_time, reference.scan) if reverse else reference.scan,
            inputs,
            1e-11,
        )


def reversed_in_time(op: laws.Op, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """An op on the sequences reversed in time, which is what ``reverse`` means."""
    *long, state = inputs
    h, last = op(*(x.flip(1) for x in long), state)
    return h.flip(1), last


@given(sizes)
def test_reverse_is_the_scan_of_the_sequence_reversed_in_time(size: tuple[int, int, int]) -> None:
    laws.agrees(
        partial(scan, reverse=True),
        partial(reversed_in_time, reference.scan),
        scan_inputs(*size),
        1e-12,
    )


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_derivatives_of_both_orders_and_modes(width: int, reverse: bool, packed: bool) -> None:
    a, b, initial = (x.requires_grad_() for x in scan_inputs(1 if packed else 2, 4, width))
    options = {"reverse": reverse}
    if packed:  # the second sequence is empty
        options["cu_seqlens"], initial = torch.tensor([0, 1, 1, 4]), torch.randn(3, width).double()
    op = partial(scan, **options)
    ready = [a, b, initial.requires_grad_()]
    assert torch.autograd.gradcheck(op, ready, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(op, ready)


def test_gradcheck_of_products_and_of_complex_numbers() -> None:
    for op, _ in PRODUCTS:
        assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in gamma_inputs(2, 5, 3)])
    for width in (2, 4):
        ready = [torch.randn(1, 3, width, dtype=torch.complex128, requires_grad=True) for _ in "ab"]
        ready.append(torch.randn(1, width, dtype=torch.complex128, requires_grad=True))
        assert torch.autograd.gradcheck(scan, ready, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(scan, ready)
        for got, want in zip(scan(*ready), reference.scan(*ready), strict=True):
            torch.testing.assert_close(got, want)


@given(cuts, st.integers(1, 8))
def test_splits_and_causality(cuts: list[int], at: int) -> None:
    for width in (3, 5):
        a, b, initial = scan_inputs(2, 9, width, torch.float32)
        laws.splits(scan, [a, b], [], initial, cuts)
        laws.is_causal(scan, [a, b], [], initial, at)
    for op, _ in PRODUCTS:
        gamma, start = gamma_inputs(2, 9, 5)
        laws.is_causal(op, [gamma], [], start, at)


@given(cuts)
def test_packed_sequences_do_not_meet(cuts: list[int]) -> None:
    for width in (3, 5):
        a, b, _ = scan_inputs(1, 9, width)
        states = torch.randn(len(cuts) + 1, width, dtype=torch.float64)
        laws.packs(scan, [a, b], [], states, cuts)
        for op, _ in PRODUCTS:
            laws.packs(op, [gamma_inputs(1, 9, width)[0]], [], states.abs() + 0.5, cuts)


@given(cuts)
def test_cumprod_splits(cuts: list[int]) -> None:
    gamma, start = gamma_inputs(2, 9, 5)
    laws.splits(cumprod, [gamma], [], start, cuts)


def test_strides_and_broadcasts() -> None:
    a, b, initial = scan_inputs(3, 6, 4)
    laws.reads_strides(scan, [a, b], [], initial)
    strided = a.transpose(0, 2).contiguous().transpose(0, 2)  # last stride not 1: copied
    assert torch.equal(scan(strided, b, initial)[0], scan(a, b, initial)[0])
    swapped = b.transpose(0, 1).contiguous().transpose(0, 1)  # time first in memory: read in place
    assert torch.equal(scan(a, swapped, initial)[0], scan(a, b, initial)[0])


@pytest.mark.parametrize("width", [3, 4, 40])
def test_gates_of_a_channel_or_a_token(width: int) -> None:
    a, b, initial = scan_inputs(2, 6, width)
    for gate in (a[0, 0], a[:, :, :1], a[:1, :1, :1]):

        def plain(gate: Tensor, b: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
            return reference.scan(gate.expand_as(b), b, initial)

        laws.agrees(scan, plain, [gate, b, initial], 1e-12)


def test_threads_do_not_change_bits() -> None:
    for width in (5, 200):
        laws.ignores_threads(scan, scan_inputs(3, 8, width, torch.float32))
        for op, _ in PRODUCTS:
            laws.ignores_threads(op, gamma_inputs(3, 8, width, torch.float32))


def test_half_precision_in_and_out() -> None:
    a, b, initial = scan_inputs(2, 9, 5, torch.float32)
    laws.low_precision(scan, [a, b], [], initial)
    for op, _ in PRODUCTS:
        gamma, start = gamma_inputs(2, 9, 5, torch.float32)
        laws.low_precision(op, [gamma], [], start)


def test_torch_takes_the_ops_whole() -> None:
    inputs = scan_inputs(2, 6, 5)
    cu = torch.tensor([0, 4, 6])
    ops = torch.ops.mmrec
    torch.library.opcheck(ops.scan.default, (*inputs, None, False))
    torch.library.opcheck(ops.scan.default, (inputs[0][:1], inputs[1][:1], inputs[2], cu, True))
    a, b, initial = inputs
    torch.library.opcheck(ops.scan_bwd.default, (a, initial, b, b, initial, None, False))
    for op in (ops.cumprod.default, ops.log_cumprod.default):
        torch.library.opcheck(op, (*(x.requires_grad_() for x in gamma_inputs(2, 5, 3)), None))
    laws.compiles(scan, inputs)
    laws.compiles(partial(scan, reverse=True), [x[:1] for x in inputs])
    for op, _ in PRODUCTS:
        laws.compiles(op, gamma_inputs(2, 6, 5))
        laws.survives_checkpointing(op, gamma_inputs(2, 6, 5))
        laws.works_without_gradients(op, gamma_inputs(2, 6, 5))
    laws.survives_checkpointing(scan, inputs)
    laws.works_without_gradients(scan, inputs)


def test_function_transforms() -> None:
    a, b = torch.rand(4, 2, 5, 3), torch.randn(4, 2, 5, 3)

    def value(a: Tensor, b: Tensor) -> Tensor:
        return scan(a, b)[0].sin().sum()

    each = torch.stack([scan(x, b[0])[0] for x in a])
    assert torch.equal(torch.vmap(lambda x: scan(x, b[0])[0])(a), each)
    assert torch.equal(
        torch.vmap(lambda x: scan(x, b[0])[0], 1, 1)(a.transpose(0, 1)), each.transpose(0, 1)
    )
    grads = torch.vmap(torch.func.grad(value))(a, b)  # per-sample gradients
    for n in range(4):
        x = a[n].clone().requires_grad_()
        torch.testing.assert_close(grads[n], torch.autograd.grad(value(x, b[n]), x)[0])
    small = (a[0, :1, :3, :2].double(), b[0, :1, :3, :2].double())
    twice = torch.func.jacrev(torch.func.jacrev(value))(*small)
    assert twice.shape == (1, 3, 2, 1, 3, 2)

    def slope(x: Tensor) -> Tensor:
        """x · ∇f(x), whose gradient is ∇f(x) + H x."""
        return torch.func.jvp(lambda y: value(y, small[1]), (x,), (x,))[1]

    want = torch.func.grad(value)(*small) + torch.einsum("abcdef,def->abc", twice, small[0])
    torch.testing.assert_close(torch.func.grad(slope)(small[0]), want)
    with pytest.raises(RuntimeError, match="no forward mode inside forward mode"):
        torch.func.jacfwd(slope)(small[0])
    with pytest.raises(RuntimeError, match=r"scan_bwd has no forward-mode derivative"):
        torch.func.hessian(lambda x: value(x, small[1]))(small[0])


def test_derivatives_that_do_not_exist_say_so() -> None:
    gamma = gamma_inputs(2, 5, 3)[0]
    for op, _ in PRODUCTS:
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
    """Against mantissa and exponent kept apart at every step: the same bits, near one and far."""
    size = (1, 1100, width)
    for spread in (0, 30, 100):  # powers of two by which a factor may differ from one
        powers = torch.randint(-spread, spread + 1, size).double()
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


CU = torch.tensor


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: scan(x, x[0]), r"b must have axes \(B, T, D\); got shape \(3, 4\)"),
        (
            lambda x: scan(x, x[:, :1]),
            r"a must broadcast to \(B, T, D\) = \(2, 1, 4\); got \(2, 3, 4\)",
        ),
        (
            lambda x: scan(x, x, x),
            r"initial_state must have shape \(N, D\) = \(2, 4\); got \(2, 3, 4\)",
        ),
        (lambda x: scan(x.double(), x), "a must have dtype float32; got float64"),
        (lambda x: scan(x, x.int()), "b must have one of the dtypes float32, .*; got int32"),
        (lambda x: cumprod(x.cfloat()), "gamma must have one of the dtypes .*; got complex64"),
        (lambda x: cumprod(x.to("meta")), "gamma must be on the CPU.*; got meta"),
        (lambda x: cumprod(3), "gamma must be a tensor"),
        (lambda x: scan(None, x), "a must be a tensor"),
        (lambda x: scan(x.to("meta"), x), "a must be on the CPU"),
        (lambda x: log_cumprod(x[0]), r"gamma must have axes \(B, T, D\)"),
        (lambda x: scan(x, x, cu_seqlens=CU([0, 3])), "B of b must be 1; got 2"),
        (lambda x: scan(x[:1], x[:1], cu_seqlens=CU([0.0, 3])), "int32 or int64; got float32"),
        (lambda x: scan(x[:1], x[:1], cu_seqlens=CU([0])), r"shape \(N \+ 1,\).*; got \(1,\)"),
        (lambda x: scan(x[:1], x[:1], cu_seqlens=CU([0, 2])), r"rise from 0 to T = 3.*\[0, 2\]"),
        (lambda x: scan(x[:1], x[:1], cu_seqlens=CU([0, 2, 1, 3])), r"without falling; got \[0, 2"),
        (lambda x: scan(x, x / 0, check_finite=True), "b must be finite; it holds NaN or infinity"),
        (lambda x: log_cumprod(-x, check_finite=True), "gamma must be >= 0; got -1"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, 4))  # type: ignore[operator]
