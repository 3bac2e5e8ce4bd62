"""Gated recurrence: against its reference, gradcheck, the laws, and what torch does around it."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import gated_recurrence
from mmrec.kernels.gated_recurrence import reference
from tests.kernels import laws

# Widths with blocks of W below, at, and off whole vectors: scalars, one vector, overlapping ones.
SHAPES = [(6, 1), (6, 3), (36, 2), (64, 2), (101, 1)]


def inputs(b: int, t: int, d: int, g: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    z, gate, decay = (torch.randn(b, t, d, dtype=dtype) for _ in range(3))
    weight = torch.randn(g, d // g, d // g, dtype=dtype) * 1.7 / (d // g) ** 0.5
    return [z, gate, decay, weight, torch.randn(b, d, dtype=dtype)]


def single(b: int, t: int, d: int, g: int) -> list[Tensor]:
    return inputs(b, t, d, g, torch.float32)


@given(st.integers(1, 19), st.integers(0, 6), st.sampled_from(SHAPES), st.booleans())
def test_agrees_with_reference(b: int, t: int, shape: tuple[int, int], scale_input: bool) -> None:
    def op(*x: Tensor) -> tuple[Tensor, Tensor]:
        return gated_recurrence(*x, scale_input=scale_input)

    def truth(*x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.gated_recurrence(*x, scale_input=scale_input)

    laws.agrees(op, truth, inputs(b, t, *shape), 1e-12)
    laws.agrees(op, truth, single(b, t, *shape), 1e-5)


def test_agrees_over_a_long_sequence() -> None:
    laws.agrees(gated_recurrence, reference.gated_recurrence, single(3, 301, 36, 1), 1e-5)


def test_gradcheck() -> None:
    *rest, initial = (x.requires_grad_() for x in inputs(1, 6, 4, 2))
    states = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 1, 1, 4, 6])
    assert torch.autograd.gradcheck(gated_recurrence, [*rest, initial])
    assert torch.autograd.gradcheck(lambda *x: gated_recurrence(*x, cu_seqlens=cu), [*rest, states])


CUTS = st.lists(st.integers(0, 9), max_size=3)


@given(CUTS, st.integers(1, 8), st.sampled_from([1, 2, 3, 9]), st.sampled_from(SHAPES))
def test_laws(cuts: list[int], at: int, batch: int, shape: tuple[int, int]) -> None:
    *sequences, weight, initial = single(batch, 9, *shape)
    laws.splits(gated_recurrence, sequences, [weight], initial, cuts)
    laws.is_causal(gated_recurrence, sequences, [weight], initial, at)
    laws.reads_strides(gated_recurrence, sequences, [weight], initial)


@given(st.lists(st.integers(0, 40), max_size=21), st.sampled_from(SHAPES))
def test_packs(cuts: list[int], shape: tuple[int, int]) -> None:
    *sequences, weight, _ = inputs(1, 40, *shape)
    states = torch.randn(len(cuts) + 1, shape[0], dtype=torch.float64)
    laws.packs(gated_recurrence, sequences, [weight], states, cuts)


def test_packed_sequences_do_not_leak() -> None:
    z, gate, decay, weight, _ = single(1, 9, 6, 1)
    z[:, 3:6] = torch.nan
    z.requires_grad_()
    h, last = gated_recurrence(z, gate, decay, weight, cu_seqlens=torch.tensor([0, 3, 6, 9]))
    h[:, [*range(3), *range(6, 9)]].sum().backward()
    assert h.isnan().any(-1).tolist() == [[False] * 3 + [True] * 3 + [False] * 3]
    assert last.isnan().any(-1).tolist() == [False, True, False]
    assert z.grad is not None
    assert torch.isfinite(z.grad[:, [*range(3), *range(6, 9)]]).all()


@pytest.mark.parametrize("batch", [1, 3, 9, 21])
def test_threads_do_not_change_bits(batch: int) -> None:
    laws.ignores_threads(gated_recurrence, single(batch, 8, 101, 1))
    cu = torch.arange(batch + 1) ** 2
    packed = [*single(1, batch**2, 36, 2)[:4], torch.randn(batch, 36)]
    laws.ignores_threads(lambda *x: gated_recurrence(*x, cu_seqlens=cu), packed)


def test_low_precision() -> None:
    *sequences, weight, initial = single(3, 5, 36, 2)
    laws.low_precision(gated_recurrence, sequences, [weight], initial)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    laws.compiles(gated_recurrence, single(2, 5, 6, 2), backend)


def test_compiles_packed_sequences() -> None:
    *rest, _ = single(1, 5, 6, 2)
    cu = torch.tensor([0, 2, 5])
    laws.compiles(gated_recurrence, [*rest, torch.randn(2, 6)], cu_seqlens=cu)


def test_is_a_valid_torch_op() -> None:
    *rest, weight, initial = (x.requires_grad_() for x in single(1, 5, 6, 2))
    cu, states = torch.tensor([0, 2, 5]), torch.randn(2, 6, requires_grad=True)
    op = torch.ops.mmrec.gated_recurrence.default
    torch.library.opcheck(op, (*rest, weight, initial, None, True, True))
    torch.library.opcheck(op, (*rest, weight, states, cu, False, True))
    torch.library.opcheck(op, (*rest, weight.detach()[:0], initial, None, True, True))


def test_checkpointing_and_no_gradients() -> None:
    laws.survives_checkpointing(gated_recurrence, single(2, 5, 6, 2))
    laws.works_without_gradients(gated_recurrence, single(2, 5, 6, 2))


def test_gates_are_saved_only_for_gradients() -> None:
    op = torch.ops.mmrec.gated_recurrence.default
    assert laws.saves_only_for_gradients(gated_recurrence, op, single(2, 5, 6, 2)) == 60


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap loops, and torch says so
def test_function_transforms() -> None:
    x = single(2, 5, 6, 2)

    def loss(*args: Tensor) -> Tensor:
        h, last = gated_recurrence(*args)
        return h.sin().sum() + last.sum()

    leaves = [v.clone().requires_grad_() for v in x]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for got, expected in zip(torch.func.grad(loss, tuple(range(5)))(*x), want, strict=True):
        torch.testing.assert_close(got, expected)
    many = torch.stack((x[0], 2 * x[0]))
    got = torch.func.vmap(lambda z: gated_recurrence(z, *x[1:])[0])(many)
    grads = torch.func.vmap(torch.func.grad(lambda z: loss(z, *x[1:])))(many)
    torch.testing.assert_close(got[1], gated_recurrence(many[1], *x[1:])[0])
    torch.testing.assert_close(grads[0], want[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_missing_derivatives_raise() -> None:
    z, *rest = single(2, 5, 6, 2)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda z: gated_recurrence(z, *rest)[0], (z,), (z,))
    z.requires_grad_()
    (first,) = torch.autograd.grad(gated_recurrence(z, *rest)[0].sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


def test_gate_and_decay_broadcast() -> None:
    z, gate, decay, weight, initial = inputs(2, 5, 6, 2)
    small = [z, gate[:, :, :1].clone(), decay[0, 0].clone(), weight, initial]

    def truth(z: Tensor, gate: Tensor, decay: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return reference.gated_recurrence(z, gate.expand_as(z), decay.expand_as(z), *rest)

    laws.agrees(gated_recurrence, truth, small, 1e-12)


def test_weight_and_state_may_be_absent() -> None:
    z, gate, decay, weight, initial = inputs(2, 7, 5, 1)
    got, last = gated_recurrence(z, gate, decay)
    want, _ = reference.gated_recurrence(z, gate, decay, None, torch.zeros_like(initial))
    torch.testing.assert_close(got, want)
    assert torch.equal(last, got[:, -1])
    got, _ = gated_recurrence(z, gate, decay, weight[0], initial)
    assert torch.equal(got, gated_recurrence(z, gate, decay, weight, initial)[0])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 4)])
def test_empty_and_single(shape: tuple[int, int, int]) -> None:
    z, gate, decay, weight, initial = (x.requires_grad_() for x in single(*shape, 1))
    h, last = gated_recurrence(z, gate, decay, weight, initial)
    (h.sum() + last.sum()).backward()
    assert h.shape == shape
    assert last.shape == initial.shape
    assert all(x.grad is not None for x in (z, gate, decay, weight, initial))


def test_saturated_logits_stay_finite() -> None:
    z, gate, decay, weight, initial = single(2, 5, 4, 1)
    for big in (-1e4, 1e4):
        leaf = (decay * big).requires_grad_()
        h, _ = gated_recurrence(z, gate * big, leaf, weight, initial)
        h.sum().backward()
        assert torch.isfinite(h).all()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


CU = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gate_logits": torch.ones(2, 2)},
            "gate_logits must broadcast to (B, T, D) = (2, 3, 4); got (2, 2)",
        ),
        (
            {"decay_logits": torch.ones(5)},
            "decay_logits must broadcast to (B, T, D) = (2, 3, 4); got (5,)",
        ),
        (
            {"decay_logits": torch.ones(4).double()},
            "decay_logits must have dtype float32; got float64",
        ),
        ({"weight": torch.ones(4, 5)}, "weight must have shape (D, D) = (4, 4); got (4, 5)"),
        ({"weight": torch.ones(2, 3, 2)}, "weight must have shape (G, D/G, D/G) = (2, 2, 2)"),
        ({"weight": torch.ones(3, 1, 1)}, "weight must have shape (D, D) = (4, 4); got (3, 1, 1)"),
        (
            {"initial_state": torch.ones(2, 5)},
            "initial_state must have shape (B, D) = (2, 4); got (2, 5)",
        ),
        ({"z": torch.ones(2, 4)}, "z must have axes (B, T, D); got shape (2, 4)"),
        ({"z": [1.0]}, "z must be a tensor of shape (B, T, D); got list"),
        ({"cu_seqlens": CU}, "B of z must be 1; got 2"),
        ({"cu_seqlens": CU, "z": torch.ones(1, 3, 4)}, "cu_seqlens must rise from 0 to T = 3"),
        ({"cu_seqlens": CU.float()}, "cu_seqlens must be a tensor of dtype int32 or int64"),
        ({"check_finite": True, "z": torch.full((2, 3, 4), torch.nan)}, "z must be finite"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    args = {
        "z": torch.ones(2, 3, 4),
        "gate_logits": torch.ones(4),
        "decay_logits": torch.ones(4),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_recurrence(**(args | change))  # type: ignore[arg-type]
