"""minGRU mixer: against its reference and the ops it fuses, gradcheck, the laws, bfloat16."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import gated_recurrence, min_gru_mixer
from mmrec.kernels.min_gru_mixer import reference
from tests.kernels import laws

WIDTHS = st.sampled_from([1, 6, 16, 37])


def inputs(b: int, t: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.randn(b, t, 4 * d, dtype=dtype),
        torch.randn(d, dtype=dtype),
        torch.randn(b, d, dtype=dtype),
    ]


@given(st.integers(1, 9), st.integers(0, 6), WIDTHS)
def test_agrees_with_reference(b: int, t: int, d: int) -> None:
    laws.agrees(min_gru_mixer, reference.min_gru_mixer, inputs(b, t, d, torch.float64), 1e-12)
    laws.agrees(min_gru_mixer, reference.min_gru_mixer, inputs(b, t, d), 1e-5)


def test_is_the_recurrence_without_weight_then_norm_and_gate() -> None:
    projected, bias, initial = inputs(3, 300, 32)
    z, f, g, r = projected.chunk(4, -1)
    h, want_last = gated_recurrence(z, g, f + bias, None, initial)
    y, last = min_gru_mixer(projected, bias, initial)
    torch.testing.assert_close(y, F.rms_norm(h, (32,), eps=1e-6) * F.silu(r), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, want_last, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    projected, bias, initial = (x.requires_grad_() for x in inputs(1, 6, 3, torch.float64))
    states = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 1, 1, 4, 6])
    assert torch.autograd.gradcheck(min_gru_mixer, [projected, bias, initial])
    assert torch.autograd.gradcheck(
        lambda *x: min_gru_mixer(*x, cu_seqlens=cu), [projected, bias, states]
    )


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(1, 8), WIDTHS)
def test_laws(cuts: list[int], at: int, d: int) -> None:
    projected, bias, initial = inputs(3, 9, d)
    laws.splits(min_gru_mixer, [projected], [bias], initial, cuts)
    laws.is_causal(min_gru_mixer, [projected], [bias], initial, at)


@given(st.lists(st.integers(0, 20), max_size=5), WIDTHS)
def test_packs(cuts: list[int], d: int) -> None:
    projected, bias, _ = inputs(1, 20, d, torch.float64)
    states = torch.randn(len(cuts) + 1, d, dtype=torch.float64)
    laws.packs(min_gru_mixer, [projected], [bias], states, cuts)


def test_reads_strides() -> None:
    projected, bias, initial = inputs(3, 5, 16)
    time_first = projected.transpose(0, 1).contiguous().transpose(0, 1)
    assert not time_first.is_contiguous()
    for got, want in zip(
        min_gru_mixer(time_first, bias, initial),
        min_gru_mixer(projected, bias, initial),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_threads_do_not_change_bits() -> None:
    laws.ignores_threads(min_gru_mixer, inputs(9, 8, 101))


def test_bfloat16_is_rounded_at_the_edges_only() -> None:
    projected, bias, initial = inputs(2, 9, 37)
    projected = projected.bfloat16()
    exact = projected.float().requires_grad_()
    y, last = min_gru_mixer(projected.requires_grad_(), bias, initial)
    want, want_last = min_gru_mixer(exact, bias, initial)
    assert torch.equal(y, want.bfloat16())
    assert torch.equal(last, want_last)
    dy = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, projected, dy)
    (want_grad,) = torch.autograd.grad(want, exact, dy.float())
    assert torch.equal(got, want_grad.bfloat16())


def test_is_a_valid_torch_op() -> None:
    projected, bias, initial = (x.requires_grad_() for x in inputs(1, 5, 6))
    op = torch.ops.mmrec.min_gru_mixer.default
    torch.library.opcheck(op, (projected, bias, initial, None, True))
    cu, states = torch.tensor([0, 2, 5]), torch.randn(2, 6, requires_grad=True)
    torch.library.opcheck(op, (projected, bias, states, cu, True))
    laws.compiles(min_gru_mixer, inputs(2, 5, 6))
    laws.survives_checkpointing(min_gru_mixer, inputs(2, 5, 6))
    laws.works_without_gradients(min_gru_mixer, inputs(2, 5, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p, b, h: (p[..., :-1], b, h),
            "projected must have axes (B, T, 4 D); got shape (2, 3, 15)",
        ),
        (lambda p, b, h: (p, b[:-1], h), "forget_bias must have shape (D) = (4,); got (3,)"),
        (
            lambda p, b, h: (p, b, h[:1]),
            "initial_state must have shape (B, D) = (2, 4); got (1, 4)",
        ),
        (
            lambda p, b, h: (p.int(), b, h),
            "projected must have one of the dtypes float32, float64, b",
        ),
        (lambda p, b, h: (p, b.double(), h), "forget_bias must have dtype float32; got float64"),
    ],
)
def test_bad_input_is_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=re.escape(message)):
        min_gru_mixer(*change(*inputs(2, 3, 4)))
