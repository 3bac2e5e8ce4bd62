"""RMS norm with convolution: against its reference, gradcheck, the laws, bfloat16 output."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import rmsnorm_conv1d
from mmrec.kernels.rmsnorm_conv1d import reference
from tests.kernels import laws

WIDTHS = st.sampled_from([1, 6, 16, 37])
KERNEL_SIZES = st.integers(1, 5)


def inputs(b: int, t: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.randn(b, t, d, dtype=dtype),
        torch.randn(k, d, dtype=dtype),
        torch.randn(b, k - 1, d, dtype=dtype),
    ]


@given(st.integers(1, 9), st.integers(0, 7), WIDTHS, KERNEL_SIZES)
def test_agrees_with_reference(b: int, t: int, d: int, k: int) -> None:
    laws.agrees(rmsnorm_conv1d, reference.rmsnorm_conv1d, inputs(b, t, d, k, torch.float64), 1e-12)
    laws.agrees(rmsnorm_conv1d, reference.rmsnorm_conv1d, inputs(b, t, d, k), 2e-5)


def test_kernel_size_one_is_rms_norm() -> None:
    x, weight, _ = inputs(2, 7, 36, 1)
    u, state = rmsnorm_conv1d(x, weight)
    torch.testing.assert_close(u, F.rms_norm(x, (36,), weight[0], 1e-6))
    assert state.shape == (2, 0, 36)


def test_gradcheck() -> None:
    x, weight, initial = (y.requires_grad_() for y in inputs(1, 6, 3, 3, torch.float64))
    states = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 1, 1, 4, 6])
    assert torch.autograd.gradcheck(rmsnorm_conv1d, [x, weight, initial])
    assert torch.autograd.gradcheck(
        lambda *y: rmsnorm_conv1d(*y, cu_seqlens=cu), [x, weight, states]
    )


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(1, 8), WIDTHS, KERNEL_SIZES)
def test_laws(cuts: list[int], at: int, d: int, k: int) -> None:
    x, weight, initial = inputs(3, 9, d, k)
    x[0, 0] = 1  # the change in is_causal must not leave every normalised row as it is
    laws.splits(rmsnorm_conv1d, [x], [weight], initial, cuts)
    if d > 1:
        laws.is_causal(rmsnorm_conv1d, [x], [weight], initial, at)


@given(st.lists(st.integers(0, 20), max_size=5), WIDTHS, KERNEL_SIZES)
def test_packs(cuts: list[int], d: int, k: int) -> None:
    x, weight, _ = inputs(1, 20, d, k, torch.float64)
    states = torch.randn(len(cuts) + 1, k - 1, d, dtype=torch.float64)
    laws.packs(rmsnorm_conv1d, [x], [weight], states, cuts)


def test_reads_strides() -> None:
    x, weight, initial = inputs(3, 5, 16, 4)
    view = torch.cat((x, x), -1)[..., 16:]
    assert not view.is_contiguous()
    for got, want in zip(
        rmsnorm_conv1d(view, weight, initial), rmsnorm_conv1d(x, weight, initial), strict=True
    ):
        assert torch.equal(got, want)


def test_threads_do_not_change_bits() -> None:
    laws.ignores_threads(rmsnorm_conv1d, inputs(9, 8, 101, 4))


def test_bfloat16_out_is_the_rounded_result() -> None:
    x, weight, initial = (y.requires_grad_() for y in inputs(2, 9, 37, 4))
    u, state = rmsnorm_conv1d(x, weight, initial, output_bf16=True)
    want, want_state = rmsnorm_conv1d(x, weight, initial)
    assert torch.equal(u, want.bfloat16())
    assert torch.equal(state, want_state)
    du = torch.randn_like(u)
    got = torch.autograd.grad(u, (x, weight, initial), du)
    exact = torch.autograd.grad(want, (x, weight, initial), du.float())
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


def test_is_a_valid_torch_op() -> None:
    x, weight, initial = (y.requires_grad_() for y in inputs(1, 5, 6, 3))
    op = torch.ops.mmrec.rmsnorm_conv1d.default
    torch.library.opcheck(op, (x, weight, initial, None, False))
    cu, states = torch.tensor([0, 2, 5]), torch.randn(2, 2, 6, requires_grad=True)
    torch.library.opcheck(op, (x, weight, states, cu, True))
    laws.compiles(rmsnorm_conv1d, inputs(2, 5, 6, 3))
    laws.survives_checkpointing(rmsnorm_conv1d, inputs(2, 5, 6, 3))
    laws.works_without_gradients(rmsnorm_conv1d, inputs(2, 5, 6, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[0], w, b), "x must have axes (B, T, D); got shape (3, 4)"),
        (lambda x, w, b: (x, w[0], b), "weight must have shape (K, D) = (1, 4); got (4,)"),
        (lambda x, w, b: (x, w, b[:1]), "initial_state must have shape (B, K - 1, D) = (2, 2, 4)"),
        (lambda x, w, b: (x.int(), w, b), "x must have one of the dtypes float32, float64"),
        (lambda x, w, b: (x, w.double(), b), "weight must have dtype float32; got float64"),
    ],
)
def test_bad_input_is_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=re.escape(message)):
        rmsnorm_conv1d(*change(*inputs(2, 3, 4, 3)))
