"""First-order scan: against its reference, gradcheck of both orders, and the laws."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import scan
from mmrec.kernels.scan import reference
from tests.kernels import laws

sizes = st.tuples(st.integers(1, 3), st.integers(0, 9), st.sampled_from([1, 3, 4, 6, 33]))
cuts = st.lists(st.integers(0, 9), max_size=3)


def scan_inputs(b: int, t: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        torch.rand(b, t, d, dtype=dtype) * 1.5 - 0.4,
        torch.randn(b, t, d, dtype=dtype),
        torch.randn(b, d, dtype=dtype),
    ]


@given(sizes)
def test_scan_agrees_with_reference(size: tuple[int, int, int]) -> None:
    laws.agrees(scan, reference.scan, scan_inputs(*size), 1e-12)
    laws.agrees(scan, reference.scan, scan_inputs(*size, torch.float32), 1e-5)


def test_long_sequences_of_few_channels() -> None:
    """More steps than fit a tile, in both directions, and channels that four does not divide."""
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


def test_gradcheck_of_complex_numbers() -> None:
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


@given(cuts)
def test_packed_sequences_do_not_meet(cuts: list[int]) -> None:
    for width in (3, 5):
        a, b, _ = scan_inputs(1, 9, width)
        states = torch.randn(len(cuts) + 1, width, dtype=torch.float64)
        laws.packs(scan, [a, b], [], states, cuts)


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


def test_low_precision_in_and_out() -> None:
    a, b, initial = scan_inputs(2, 9, 5, torch.float32)
    laws.low_precision(scan, [a, b], [], initial)


def test_is_a_valid_torch_op() -> None:
    inputs = scan_inputs(2, 6, 5)
    cu = torch.tensor([0, 4, 6])
    ops = torch.ops.mmrec
    torch.library.opcheck(ops.scan.default, (*inputs, None, False))
    torch.library.opcheck(ops.scan.default, (inputs[0][:1], inputs[1][:1], inputs[2], cu, True))
    a, b, initial = inputs
    torch.library.opcheck(ops.scan_bwd.default, (a, initial, b, b, initial, None, False))
    laws.compiles(scan, inputs)
    laws.compiles(partial(scan, reverse=True), [x[:1] for x in inputs])
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
        (lambda x: scan(None, x), "a must be a tensor"),
        (lambda x: scan(x.to("meta"), x), "a must be on the CPU"),
        (lambda x: scan(x, x, cu_seqlens=CU([0, 3])), "B of b must be 1; got 2"),
        (lambda x: scan(x[:1], x[:1], cu_seqlens=CU([0.0, 3])), "int32 or int64; got float32"),
        (lambda x: scan(x[:1], x[:1], cu_seqlens=CU([0])), r"shape \(N \+ 1,\).*; got \(1,\)"),
        (lambda x: scan(x[:1], x[:1], cu_seqlens=CU([0, 2])), r"rise from 0 to T = 3.*\[0, 2\]"),
        (lambda x: scan(x[:1], x[:1], cu_seqlens=CU([0, 2, 1, 3])), r"without falling; got \[0, 2"),
        (lambda x: scan(x, x / 0, check_finite=True), "b must be finite; it holds NaN or infinity"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, 4))  # type: ignore[operator]
