"""Gated recurrence: against its reference, gradcheck, and the laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import gated_recurrence, scan
from mmrec.kernels.recurrence import reference
from tests.kernels import laws


def inputs(b: int, t: int, d: int, g: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    z, gate, decay = (torch.randn(b, t, d, dtype=dtype) for _ in range(3))
    return [z, gate, decay, torch.randn(g, d // g, d // g, dtype=dtype) * 0.7,
            torch.randn(b, d, dtype=dtype)]  # fmt: skip


@given(
    st.sampled_from([1, 2, 3, 8, 9]), st.integers(0, 6), st.sampled_from([1, 2, 3]), st.booleans()
)
def test_agrees_with_reference(b: int, t: int, g: int, mixed: bool) -> None:
    def op(*x: Tensor) -> tuple[Tensor, Tensor]:
        return gated_recurrence(*x, mixed=mixed)

    def truth(*x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.gated_recurrence(*x, mixed=mixed)

    laws.agrees(op, truth, inputs(b, t, 6, g), 1e-12)
    laws.agrees(op, truth, inputs(b, t, 6, g, torch.float32), 1e-5)


@pytest.mark.parametrize("g", [1, 2])
def test_gradcheck(g: int) -> None:
    ready = [x.requires_grad_() for x in inputs(2, 4, 4, g)]
    assert torch.autograd.gradcheck(gated_recurrence, ready)


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(1, 8), st.sampled_from([2, 8]))
def test_laws(cuts: list[int], at: int, batch: int) -> None:
    *sequences, weight, h0 = inputs(batch, 9, 6, 2, torch.float32)
    laws.splits(gated_recurrence, sequences, [weight], h0, cuts)
    laws.is_causal(gated_recurrence, sequences, [weight], h0, at)
    laws.reads_strides(gated_recurrence, sequences, [weight], h0)


def test_threads_do_not_change_bits() -> None:
    for batch in (3, 9):
        *rest, _, h0 = inputs(batch, 8, 16, 1, torch.float32)
        laws.ignores_threads(lambda *x: gated_recurrence(*x[:3], None, x[3]), [*rest, h0])


def test_without_weight_it_is_a_scan() -> None:
    z, gate, decay, _, h0 = inputs(2, 7, 5, 1)
    gamma = torch.sigmoid(decay)
    want, _ = scan(gamma, (1 - gamma) * z * torch.sigmoid(gate), h0)
    torch.testing.assert_close(gated_recurrence(z, gate, decay, None, h0)[0], want)


def test_full_weight_may_be_a_matrix_and_state_may_be_absent() -> None:
    z, gate, decay, weight, _ = inputs(2, 5, 4, 1)
    got, last = gated_recurrence(z, gate, decay, weight[0])
    want, _ = reference.gated_recurrence(z, gate, decay, weight, torch.zeros(2, 4).double())
    torch.testing.assert_close(got, want)
    assert torch.equal(last, got[:, -1])


def test_saturated_logits_stay_finite() -> None:
    z, gate, decay, weight, h0 = inputs(2, 5, 4, 1, torch.float32)
    for big in (-1e4, 1e4):
        leaf = (decay * big).requires_grad_()
        h, _ = gated_recurrence(z, gate * big, leaf, weight, h0)
        h.sum().backward()
        assert torch.isfinite(h).all()
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("gate", (2, 3), r"gate must have shape \(B, T, D\) = \(2, 3, 4\); got \(2, 3\)"),
        ("decay", (2, 3, 5), r"decay must have shape \(B, T, D\) = \(2, 3, 4\); got \(2, 3, 5\)"),
        ("weight", (4, 5), r"weight must have shape \(D, D\) = \(4, 4\); got \(4, 5\)"),
        ("weight", (2, 3, 2), r"weight must have shape \(G, D/G, D/G\) = \(2, 2, 2\); got"),
        ("h0", (2, 5), r"h0 must have shape \(B, D\) = \(2, 4\); got \(2, 5\)"),
    ],
)
def test_bad_input(name: str, shape: tuple[int, ...], message: str) -> None:
    args = dict.fromkeys(("z", "gate", "decay"), torch.ones(2, 3, 4)) | {name: torch.ones(shape)}
    with pytest.raises(ValueError, match=message):
        gated_recurrence(**args)
