"""The recurrences of GRU and LSTM: against references, gradcheck, laws, and torch around them."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import gru, lstm
from mmrec.kernels.gru import reference as gru_reference
from mmrec.kernels.lstm import reference as lstm_reference
from tests.kernels import laws


def _as_one_state(op: Callable[..., Any]) -> laws.Op:
    """An op of the LSTM with state and cell side by side in one tensor, as the laws want it."""

    def call(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        *rest, states = inputs
        output, final = op(*rest, *states.chunk(2, -1), **options)
        return output, torch.cat(final, -1)

    return call


class Case(NamedTuple):
    """An op, its reference, and how many gates and states it has."""

    op: laws.Op
    reference: laws.Op
    gates: int
    states: int


CASES = {
    "gru": Case(gru, gru_reference.gru, 3, 1),
    "lstm": Case(_as_one_state(lstm), _as_one_state(lstm_reference.lstm), 4, 2),
}
WIDTHS = [1, 6, 16, 35]
"""Below, at and off whole vectors and panels."""
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def inputs(case: Case, b: int, t: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Projected inputs, weights and states."""
    projected = torch.randn(b, t, case.gates * d, dtype=dtype)
    weight = torch.randn(case.gates * d, d, dtype=dtype) * 1.5 / d**0.5
    bias = [torch.randn(3 * d, dtype=dtype)] if case.gates == 3 else []
    return [projected, weight, *bias, torch.randn(b, case.states * d, dtype=dtype)]


def single(case: Case, b: int, t: int, d: int) -> list[Tensor]:
    return inputs(case, b, t, d, torch.float32)


@cases
@given(st.integers(1, 19), st.integers(0, 5), st.sampled_from(WIDTHS))
def test_agrees_with_reference(case: Case, b: int, t: int, d: int) -> None:
    laws.agrees(case.op, case.reference, inputs(case, b, t, d), 1e-12)
    laws.agrees(case.op, case.reference, single(case, b, t, d), 1e-5)


@cases
def test_agrees_over_a_long_sequence(case: Case) -> None:
    laws.agrees(case.op, case.reference, single(case, 2, 40, 17), 1e-5)


@cases
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(case: Case, reverse: bool) -> None:
    *rest, initial = (x.requires_grad_() for x in inputs(case, 1, 6, 3))
    states = torch.randn(4, initial.shape[1], dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 1, 1, 4, 6])
    op = case.op
    assert torch.autograd.gradcheck(lambda *x: op(*x, reverse=reverse), [*rest, initial])
    assert torch.autograd.gradcheck(
        lambda *x: op(*x, cu_seqlens=cu, reverse=reverse), [*rest, states]
    )


@cases
def test_reverse_and_time_first(case: Case) -> None:
    x, *rest = inputs(case, 3, 5, 6)
    flipped = laws.gradients(lambda x, *r: case.op(x.flip(1), *r), [x, *rest])
    got = laws.gradients(
        lambda x, *r: (lambda o, s: (o.flip(1), s))(*case.op(x, *r, reverse=True)), [x, *rest]
    )
    swapped = laws.gradients(
        lambda x, *r: (lambda o, s: (o.transpose(0, 1).flip(1), s))(
            *case.op(x.transpose(0, 1).contiguous(), *r, reverse=True, batch_first=False)
        ),
        [x, *rest],
    )
    for a, b, want in zip(got, swapped, flipped, strict=True):
        torch.testing.assert_close(a, want)
        torch.testing.assert_close(b, want)


CUTS = st.lists(st.integers(0, 9), max_size=3)


@cases
@given(CUTS, st.integers(1, 8), st.sampled_from([1, 2, 3, 9]), st.sampled_from(WIDTHS))
def test_laws(case: Case, cuts: list[int], at: int, batch: int, d: int) -> None:
    x, *shared, initial = single(case, batch, 9, d)
    laws.splits(case.op, [x], shared, initial, cuts)
    laws.is_causal(case.op, [x], shared, initial, at)
    wide = torch.cat((x, x), -1)
    for got, want in zip(
        case.op(wide[:, :, : x.shape[2]], *shared, initial),
        case.op(x, *shared, initial),
        strict=True,
    ):
        assert torch.equal(got, want)


@cases
@given(st.lists(st.integers(0, 40), max_size=21), st.sampled_from([6, 35]))
def test_packs(case: Case, cuts: list[int], d: int) -> None:
    x, *shared, initial = inputs(case, 1, 40, d)
    states = torch.randn(len(cuts) + 1, initial.shape[1], dtype=torch.float64)
    laws.packs(case.op, [x], shared, states, cuts)


@cases
@pytest.mark.parametrize("batch", [1, 3, 9, 21])
def test_threads_do_not_change_bits(case: Case, batch: int) -> None:
    laws.ignores_threads(case.op, single(case, batch, 8, 101))
    cu = torch.arange(batch + 1) ** 2
    *packed, state = single(case, 1, batch**2, 36)
    states = torch.randn(batch, state.shape[1])
    laws.ignores_threads(lambda *x: case.op(*x, cu_seqlens=cu), [*packed, states])


@cases
def test_low_precision(case: Case) -> None:
    x, *shared, initial = single(case, 3, 5, 36)
    laws.low_precision(case.op, [x], shared, initial)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@cases
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles(case: Case, backend: str) -> None:
    laws.compiles(case.op, single(case, 2, 5, 6), backend)
    *rest, state = single(case, 1, 5, 6)
    cu = torch.tensor([0, 2, 5])
    laws.compiles(case.op, [*rest, torch.randn(2, state.shape[1])], backend, cu_seqlens=cu)


def test_are_valid_torch_ops() -> None:
    cu = torch.tensor([0, 2, 5])
    for case, op in zip(CASES.values(), (torch.ops.mmrec.gru, torch.ops.mmrec.lstm), strict=True):
        x, *shared, _ = single(case, 1, 5, 6)
        for batch_first, bounds in ((True, None), (False, None), (True, cu)):
            states = [torch.randn(1 if bounds is None else 2, 6) for _ in range(case.states)]
            projected = x if batch_first else x.transpose(0, 1).contiguous()
            leaves = [y.detach().clone().requires_grad_() for y in (projected, *shared, *states)]
            options = (batch_first, not batch_first, True)
            torch.library.opcheck(op.default, (*leaves, bounds, *options))


@cases
def test_checkpointing_and_no_gradients(case: Case) -> None:
    laws.survives_checkpointing(case.op, single(case, 2, 5, 6))
    laws.works_without_gradients(case.op, single(case, 2, 5, 6))


def test_gates_are_saved_only_for_gradients() -> None:
    op = torch.ops.mmrec.gru.default
    assert laws.saves_only_for_gradients(gru, op, single(CASES["gru"], 2, 5, 6)) == 4 * 60


def test_bias_and_states_may_be_absent() -> None:
    for case in CASES.values():
        x, weight, *_, initial = inputs(case, 2, 4, 5)
        zero = torch.zeros_like(initial)
        bias = [x.new_zeros(15)] if case.gates == 3 else []
        want, last = case.reference(x, weight, *bias, zero)
        got, state = (gru if case.gates == 3 else lstm)(x, weight)
        torch.testing.assert_close(got, want)
        state = torch.cat(state, -1) if isinstance(state, tuple) else state
        torch.testing.assert_close(state, last)


@cases
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (1, 1, 4)])
def test_empty_and_single(case: Case, shape: tuple[int, int, int]) -> None:
    leaves = [x.requires_grad_() for x in single(case, *shape)]
    h, last = case.op(*leaves)
    (h.sum() + last.sum()).backward()
    assert h.shape == shape
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in leaves)


@cases
def test_saturated_logits_stay_finite(case: Case) -> None:
    x, *rest = single(case, 2, 5, 4)
    for big in (-1e4, 1e4):
        leaf = (x * big).requires_grad_()
        h, _ = case.op(leaf, *rest)
        h.sum().backward()
        assert torch.isfinite(h).all()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


@cases
def test_no_value_passes_between_packed_sequences(case: Case) -> None:
    x, *shared, initial = single(case, 1, 9, 6)
    x[:, 3:6] = torch.nan
    states = torch.zeros(3, initial.shape[1])
    h, last = case.op(x, *shared, states, cu_seqlens=torch.tensor([0, 3, 6, 9]))
    assert h.isnan().any(-1).tolist() == [[False] * 3 + [True] * 3 + [False] * 3]
    assert last.isnan().any(-1).tolist() == [False, True, False]


def test_second_derivatives_are_refused() -> None:
    for case in CASES.values():
        x, *rest = single(case, 2, 3, 4)
        x.requires_grad_()
        (first,) = torch.autograd.grad(case.op(x, *rest)[0].sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            first.sum().backward()


X, W = torch.ones(2, 3, 12), torch.ones(12, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gru(X[0], W), "projected must have axes (B, T, 3D); got shape (3, 12)"),
        (lambda: gru([1.0], W), "projected must be a tensor of shape (B, T, 3D); got list"),
        (lambda: gru(X[:, :, :11], W), "(B, T, 3D), 3 gates side by side; got (2, 3, 11)"),
        (lambda: lstm(X[:, :, :11], W), "(B, T, 4D), 4 gates side by side; got (2, 3, 11)"),
        (lambda: gru(X, W[:, :3]), "weight must have shape (3D, D) = (12, 4); got (12, 3)"),
        (lambda: gru(X, W.double()), "weight must have dtype float32; got float64"),
        (lambda: gru(X, W, W[:3, 0]), "bias must have shape (3D) = (12,); got (3,)"),
        (
            lambda: gru(X, W, None, torch.ones(3, 4)),
            "initial_state must have shape (N, D) = (2, 4); got (3, 4)",
        ),
        (
            lambda: lstm(X, W[:, :3], None, torch.ones(3, 4)),
            "initial_cell must have shape (N, D) = (2, 3); got (3, 4)",
        ),
        (lambda: gru(X, W, cu_seqlens=torch.tensor([0, 3])), "B of projected must be 1; got 2"),
        (
            lambda: gru(X, W, cu_seqlens=torch.tensor([0, 3]), batch_first=False),
            "B of projected must be 1; got 3",
        ),
        (lambda: gru(X / 0, W, check_finite=True), "projected must be finite"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
