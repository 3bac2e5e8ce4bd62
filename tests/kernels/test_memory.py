"""Associative memory: against its reference, gradcheck, the laws, and recall itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import associative_memory
from mmrec.kernels.memory import kernel, reference
from tests.kernels import laws


def inputs(b: int, t: int, h: int, p: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    vectors = [torch.randn(b, t, h, p, dtype=dtype) for _ in range(3)]
    gates = [torch.randn(b, t, h, dtype=dtype) for _ in range(2)]
    return [*vectors, *gates, torch.randn(b, h, p, p, dtype=dtype)]


@given(
    st.integers(1, 2), st.sampled_from([0, 1, 5, 32, 33, 70]), st.integers(1, 2), st.integers(1, 6)
)
def test_agrees_with_reference(b: int, t: int, h: int, p: int) -> None:
    laws.agrees(associative_memory, reference.associative_memory, inputs(b, t, h, p), 1e-10)
    single = inputs(b, t, h, p, torch.float32)
    laws.agrees(associative_memory, reference.associative_memory, single, 2e-5)


def test_constants_agree() -> None:
    assert kernel.EPSILON == reference.EPSILON


def test_gradcheck() -> None:
    ready = [x.requires_grad_() for x in inputs(2, 4, 2, 3)]
    assert torch.autograd.gradcheck(associative_memory, ready)


@given(st.lists(st.integers(0, 40), max_size=3), st.integers(1, 39))
def test_laws(cuts: list[int], at: int) -> None:
    *sequences, s0 = inputs(2, 40, 2, 4, torch.float32)
    laws.splits(associative_memory, sequences, [], s0, cuts)
    laws.is_causal(associative_memory, sequences, [], s0, at)
    laws.reads_strides(associative_memory, sequences, [], s0)


def test_threads_do_not_change_bits() -> None:
    laws.ignores_threads(associative_memory, inputs(2, 40, 3, 8, torch.float32))


def test_recalls_what_was_written() -> None:
    """With full writing and no decay, a key returns its newest value; an older one is replaced."""
    keys = torch.eye(4).repeat(2, 1)[None, :, None]  # each of four keys written twice
    values = torch.randn(1, 8, 1, 4)
    on = torch.full((1, 8, 1), 30.0)
    _, state = associative_memory(keys, keys, values, on, on)
    out, _ = associative_memory(
        keys[:, :4], keys[:, :4], values[:, :4], on[:, :4], -on[:, :4], state
    )
    torch.testing.assert_close(out, values[:, 4:], rtol=1e-4, atol=1e-4)


def test_zero_keys_have_finite_gradients() -> None:
    q, k, v, a, b, s0 = inputs(1, 3, 1, 4, torch.float32)
    k = torch.zeros_like(k).requires_grad_()
    associative_memory(q, k, v, a, b, s0)[0].sum().backward()
    assert torch.isfinite(k.grad).all()


@pytest.mark.parametrize(
    ("at", "shape", "message"),
    [
        (1, (2, 3, 2, 5), r"k must have shape \(B, T, H, P\) = \(2, 3, 2, 4\); got \(2, 3, 2, 5\)"),
        (2, (2, 3, 4), r"v must have shape"),
        (3, (2, 3, 2, 1), r"decay must have shape \(B, T, H\) = \(2, 3, 2\); got \(2, 3, 2, 1\)"),
        (4, (2, 3), r"write must have shape"),
        (5, (2, 2, 4), r"s0 must have shape \(B, H, P, P\) = \(2, 2, 4, 4\); got \(2, 2, 4\)"),
    ],
)
def test_bad_input(at: int, shape: tuple[int, ...], message: str) -> None:
    args = inputs(2, 3, 2, 4)
    args[at] = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        associative_memory(*args)
