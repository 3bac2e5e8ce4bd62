"""Gated delta rule: against its reference, gradcheck, the laws, and recall itself."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import gated_delta_rule
from mmrec.kernels.gated_delta_rule import kernel, reference
from tests.kernels import laws

OP = torch.ops.mmrec.gated_delta_rule.default
SINGLE = torch.float32


def inputs(
    b: int, t: int, h: int, p: int, dtype: torch.dtype = torch.float64, n: int | None = None
) -> list[Tensor]:
    vectors = [torch.randn(b, t, h, p, dtype=dtype) for _ in range(3)]
    gates = [torch.randn(b, t, h, dtype=dtype) for _ in range(2)]
    return [*vectors, *gates, torch.randn(n or b, h, p, p, dtype=dtype)]


@given(
    st.integers(1, 2), st.sampled_from([0, 1, 5, 32, 33, 70]), st.integers(1, 2), st.integers(1, 6)
)
def test_agrees_with_reference(b: int, t: int, h: int, p: int) -> None:
    laws.agrees(gated_delta_rule, reference.gated_delta_rule, inputs(b, t, h, p), 1e-10)
    single = inputs(b, t, h, p, SINGLE)
    laws.agrees(gated_delta_rule, reference.gated_delta_rule, single, 2e-5)


@pytest.mark.parametrize("p", [16, 17, 32, 48, 64, 128])
def test_agrees_at_every_width(p: int) -> None:
    for t in (1, 35):
        laws.agrees(gated_delta_rule, reference.gated_delta_rule, inputs(1, t, 2, p), 1e-10)


def test_long_sequences_stay_exact() -> None:
    """Rounding in the gradient of the decay does not grow along many chunks."""
    single = inputs(1, 1000, 1, 16, SINGLE)
    single[3] += 4  # slow decay, long memory
    laws.agrees(gated_delta_rule, reference.gated_delta_rule, single, 2e-5)


@pytest.mark.parametrize("shift", [-200.0, -30.0, 30.0, 200.0])
def test_extreme_gates(shift: float) -> None:
    for at in (3, 4):
        args = inputs(1, 40, 1, 4)
        args[at] += shift
        laws.agrees(gated_delta_rule, reference.gated_delta_rule, args, 1e-9)


def test_chunked_form_agrees_with_reference() -> None:
    for size in (8, 16):
        chunked = partial(reference.chunked, chunk_size=size)
        laws.agrees(chunked, reference.gated_delta_rule, inputs(2, 32, 2, 5), 1e-9)


def test_constants_agree() -> None:
    assert kernel.EPSILON == reference.EPSILON


def test_gradcheck() -> None:
    ready = [x.requires_grad_() for x in inputs(2, 4, 2, 3)]
    assert torch.autograd.gradcheck(gated_delta_rule, ready, fast_mode=True)
    cu = torch.tensor([0, 2, 2, 5])
    ready = [x.requires_grad_() for x in inputs(1, 5, 2, 3, n=3)]
    packed = partial(gated_delta_rule, cu_seqlens=cu)
    assert torch.autograd.gradcheck(packed, ready, fast_mode=True)


@given(st.lists(st.integers(0, 40), max_size=3), st.integers(1, 39))
def test_laws(cuts: list[int], at: int) -> None:
    *sequences, initial = inputs(2, 40, 2, 4, SINGLE)
    laws.splits(gated_delta_rule, sequences, [], initial, cuts)
    laws.is_causal(gated_delta_rule, sequences, [], initial, at)
    laws.reads_strides(gated_delta_rule, sequences, [], initial)


@given(st.lists(st.integers(0, 60), max_size=4))
def test_packed_sequences_do_not_meet(cuts: list[int]) -> None:
    *sequences, states = inputs(1, 60, 2, 3, n=len(cuts) + 1)
    laws.packs(gated_delta_rule, sequences, [], states, cuts)


@pytest.mark.parametrize("p", [8, 32])
def test_threads_do_not_change_bits(p: int) -> None:
    laws.ignores_threads(gated_delta_rule, inputs(2, 40, 3, p, SINGLE))
    packed = partial(gated_delta_rule, cu_seqlens=torch.tensor([0, 3, 3, 40]))
    laws.ignores_threads(packed, inputs(1, 40, 3, p, SINGLE, n=3))


def test_low_precision_and_modes() -> None:
    *sequences, initial = inputs(2, 20, 2, 4, SINGLE)
    laws.low_precision(gated_delta_rule, sequences, [], initial)
    laws.works_without_gradients(gated_delta_rule, [*sequences, initial])
    laws.survives_checkpointing(gated_delta_rule, [*sequences, initial])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside inductor
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    laws.compiles(gated_delta_rule, inputs(2, 20, 2, 4, SINGLE), backend)
    cu = torch.tensor([0, 7, 20])
    laws.compiles(gated_delta_rule, inputs(1, 20, 2, 4, SINGLE, n=2), backend, cu_seqlens=cu)


def test_opcheck() -> None:
    cu = torch.tensor([0, 3, 3, 40], dtype=torch.int32)
    torch.library.opcheck(OP, (*inputs(2, 18, 2, 3), None, False))
    packed = inputs(1, 40, 2, 3, n=3)
    torch.library.opcheck(OP, (*packed, cu, False))
    torch.library.opcheck(OP, (*(x.requires_grad_() for x in packed), cu, True))


def test_gates_broadcast() -> None:
    q, k, v, a, b, initial = inputs(2, 20, 3, 4)

    def expanded(*args: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, a, b, initial = args
        shape = q.shape[:3]
        return gated_delta_rule(q, k, v, a.expand(shape).clone(), b.expand(shape).clone(), initial)

    for gates in ((a[0, 0], b[:, :, :1]), (a[:, :, :1], b[0, 0]), (a[0, 0, 0], b)):
        args = [q, k, v, *gates, initial]
        pairs = zip(
            laws.gradients(gated_delta_rule, args), laws.gradients(expanded, args), strict=True
        )
        for got, want in pairs:
            assert got.shape == want.shape
            torch.testing.assert_close(got, want)


def test_transforms_work_or_are_refused() -> None:
    q, *rest = inputs(1, 3, 1, 2)

    def loss(q: Tensor) -> Tensor:
        return gated_delta_rule(q, *rest)[0].square().sum()

    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert torch.equal(torch.func.grad(loss)(q), first)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.sum(), leaf)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(loss, (q,), (q,))
    with pytest.warns(UserWarning, match="performance drop"):  # torch runs it in a loop
        each = torch.func.vmap(loss)(torch.stack((q, q / 2)))
    torch.testing.assert_close(each[1], loss(q / 2))


def test_chunk_states_are_few_and_only_for_gradients() -> None:
    """At most an eighth of all states is saved; none where no gradient can be asked for."""
    size = laws.saves_only_for_gradients(gated_delta_rule, OP, inputs(2, 200, 2, 4))
    assert 0 < size <= 2 * 200 * 2 * 4 * 4 / 8


def test_recalls_what_was_written() -> None:
    """With full writing and no decay, a key returns its newest value; an older one is replaced."""
    keys = torch.eye(4).repeat(2, 1)[None, :, None]  # each of four keys written twice
    values = torch.randn(1, 8, 1, 4)
    on = torch.full((1, 8, 1), 30.0)
    _, state = gated_delta_rule(keys, keys, values, on, on)
    out, _ = gated_delta_rule(keys[:, :4], keys[:, :4], values[:, :4], on[:, :4], -on[:, :4], state)
    torch.testing.assert_close(out, values[:, 4:], rtol=1e-4, atol=1e-4)


def test_zero_keys_have_finite_gradients() -> None:
    q, k, v, a, b, initial = inputs(1, 3, 1, 4, SINGLE)
    k = torch.zeros_like(k).requires_grad_()
    gated_delta_rule(q, k, v, a, b, initial)[0].sum().backward()
    assert torch.isfinite(k.grad).all()


@pytest.mark.parametrize(
    ("at", "shape", "message"),
    [
        (0, (2, 3, 4), r"q must have axes \(B, T, H, P\); got shape \(2, 3, 4\)"),
        (0, (2, 3, 2, 0), r"q must have a head width P of at least 1"),
        (1, (2, 3, 2, 5), r"k must have shape \(B, T, H, P\) = \(2, 3, 2, 4\); got \(2, 3, 2, 5\)"),
        (2, (2, 3, 4), r"v must have shape"),
        (3, (2, 3, 5), r"g_logits must broadcast to \(B, T, H\) = \(2, 3, 2\); got \(2, 3, 5\)"),
        (4, (2, 3), r"beta_logits must broadcast to"),
        (
            5,
            (2, 2, 4),
            r"initial_state must have shape \(B, H, P, P\) = \(2, 2, 4, 4\); got \(2, 2, 4\)",
        ),
    ],
)
def test_bad_shape(at: int, shape: tuple[int, ...], message: str) -> None:
    args = inputs(2, 3, 2, 4)
    args[at] = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(*args)


def test_bad_values_types_and_edges() -> None:
    args = inputs(1, 6, 2, 4)
    with pytest.raises(ValueError, match=r"v must have dtype float64; got float32"):
        gated_delta_rule(*args[:2], args[2].float(), *args[3:])
    for edges, message in (([0, 7], "cu_seqlens must rise from 0 to T = 6"), ([0], "N >= 1")):
        with pytest.raises(ValueError, match=message):
            gated_delta_rule(*args, cu_seqlens=torch.tensor(edges))
    with pytest.raises(ValueError, match=r"\(N, H, P, P\) = \(2, 2, 4, 4\)"):
        gated_delta_rule(*args, cu_seqlens=torch.tensor([0, 3, 6]))
    args[4][0, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="beta_logits must be finite"):
        gated_delta_rule(*args, check_finite=True)
