"""Kimi Delta Attention: against its reference, the laws, and the fallback of transformers."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import fused_recurrent_kda, kda
from mmrec.kernels.kda import kernel, reference
from tests.kernels import laws

OP = torch.ops.mmrec.linear_attention.default
STEP = torch.ops.mmrec.linear_attention_step.default
SINGLE = torch.float32


def inputs(
    b: int,
    t: int,
    h: int = 2,
    k: int = 4,
    v: int = 3,
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
    n: int | None = None,
) -> list[Tensor]:
    queries = [torch.randn(b, t, h, k, dtype=dtype) * k**-0.5 for _ in range(2)]
    values = torch.randn(b, t, h * groups, v, dtype=dtype)
    g = torch.nn.functional.logsigmoid(torch.randn(b, t, h * groups, k, dtype=dtype) + 1)
    beta = torch.rand(b, t, h * groups, dtype=dtype)
    return [*queries, values, g, beta, torch.randn(n or b, h * groups, k, v, dtype=dtype)]


def op(*args: Tensor, function: Any = kda, **options: Any) -> tuple[Tensor, Tensor]:
    """``kda`` as the laws call it: the state is the last argument, and is returned."""
    *tensors, state = args
    out, final = function(*tensors, initial_state=state, output_final_state=True, **options)
    return out, final


def want(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return reference.kda(*args, **options)


@given(
    st.integers(1, 2),
    st.sampled_from([0, 1, 15, 16, 17, 70]),
    st.integers(1, 2),
    st.sampled_from([(1, 3), (4, 1), (5, 6), (17, 2)]),
    st.integers(1, 2),
    st.booleans(),
)
def test_agrees_with_reference(
    b: int, t: int, h: int, widths: tuple[int, int], groups: int, normalise: bool
) -> None:
    call = partial(op, use_qk_l2norm_in_kernel=normalise)
    right = partial(want, use_qk_l2norm_in_kernel=normalise)
    laws.agrees(call, right, inputs(b, t, h, *widths, groups), 1e-10)
    laws.agrees(call, right, inputs(b, t, h, *widths, groups, dtype=SINGLE), 2e-5)


@pytest.mark.parametrize("widths", [(16, 16), (32, 48), (128, 128), (40, 256)])
def test_agrees_at_every_width(widths: tuple[int, int]) -> None:
    for t in (1, 35):
        laws.agrees(op, want, inputs(1, t, 1, *widths), 1e-10)


def test_one_decay_per_head() -> None:
    q, k, v, g, beta, state = inputs(2, 37, groups=2)

    def expanded(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        return reference.kda(q, k, v, g[..., None].expand(*g.shape, q.shape[3]), *rest)

    laws.agrees(op, expanded, [q, k, v, g[..., 0], beta, state], 1e-10)


def test_scale_and_absent_state() -> None:
    q, k, v, g, beta, state = inputs(2, 20)
    for scale in (1.0, 0.3):
        right, last = want(q, k, v, g, beta, torch.zeros_like(state), scale=scale)
        out, final = kda(q, k, v, g, beta, scale, None, True)
        torch.testing.assert_close(out, right)
        torch.testing.assert_close(final, last)
    assert kda(q, k, v, g, beta)[1] is None


def test_long_sequences_stay_exact() -> None:
    """Rounding in the gradient of the decay does not grow along many chunks."""
    args = inputs(1, 1000, 1, 8, 8, dtype=SINGLE)
    args[3] = args[3] / 50  # slow decay, long memory
    call = partial(op, use_qk_l2norm_in_kernel=True)
    right = partial(want, use_qk_l2norm_in_kernel=True)
    laws.agrees(call, right, args, 2e-5)


@pytest.mark.parametrize("by", [0.0, 30.0, 1e4])
def test_extreme_decays(by: float) -> None:
    """No decay at all, and decays whose products leave the range of the dtype."""
    args = inputs(1, 40)
    args[3] = args[3] * by
    laws.agrees(op, want, args, 1e-9)
    single = [x.float() for x in args]
    laws.agrees(op, want, single, 2e-5)
    mixed = args[3].clone()
    mixed[:, ::3] = 0  # strong and absent decays in one chunk
    laws.agrees(op, want, [*args[:3], mixed, *args[4:]], 1e-9)


def test_constants_agree() -> None:
    assert kernel.EPSILON == reference.EPSILON


def test_gradcheck() -> None:
    call = partial(op, use_qk_l2norm_in_kernel=True)
    ready = [x.requires_grad_() for x in inputs(2, 4, groups=2)]
    assert torch.autograd.gradcheck(call, ready, fast_mode=True)
    ready = [x.requires_grad_() for x in inputs(1, 5, n=3)]
    packed = partial(op, cu_seqlens=torch.tensor([0, 2, 2, 5]))
    assert torch.autograd.gradcheck(packed, ready, fast_mode=True)


@given(st.lists(st.sampled_from([16, 32, 64]), max_size=3), st.integers(1, 69))
def test_laws(cuts: list[int], at: int) -> None:
    *sequences, state = inputs(2, 70, dtype=SINGLE)
    laws.splits(op, sequences, [], state, cuts)
    laws.is_causal(op, sequences, [], state, at)
    laws.reads_strides(op, sequences, [], state)


def test_cuts_anywhere_agree_to_rounding() -> None:
    *sequences, state = inputs(1, 50)
    out, last = op(*sequences, state)
    head, middle = op(*(x[:, :21] for x in sequences), state)
    tail, final = op(*(x[:, 21:] for x in sequences), middle)
    torch.testing.assert_close(torch.cat((head, tail), 1), out)
    torch.testing.assert_close(final, last)


@given(st.lists(st.integers(0, 70), max_size=4))
def test_packed_sequences_do_not_meet(cuts: list[int]) -> None:
    *sequences, states = inputs(1, 70, n=len(cuts) + 1)
    laws.packs(op, sequences, [], states, cuts)
    few = partial(op, function=fused_recurrent_kda)
    with torch.no_grad():
        edges = torch.tensor([0, *sorted(cuts), 70])
        for got, right in zip(
            few(*sequences, states, cu_seqlens=edges),
            op(*sequences, states, cu_seqlens=edges),
            strict=True,
        ):
            torch.testing.assert_close(got, right)


def test_threads_do_not_change_bits() -> None:
    laws.ignores_threads(op, inputs(2, 40, 2, 20, 17, 2, SINGLE))
    packed = partial(op, cu_seqlens=torch.tensor([0, 3, 3, 40]))
    laws.ignores_threads(packed, inputs(1, 40, dtype=SINGLE, n=3))


def test_low_precision_and_modes() -> None:
    for call in (op, partial(op, function=fused_recurrent_kda)):
        *sequences, state = inputs(2, 20, dtype=SINGLE)
        laws.low_precision(call, sequences, [], state)
        laws.works_without_gradients(call, [*sequences, state])
    laws.survives_checkpointing(op, [*sequences, state])
    *sequences, state = inputs(1, 20, groups=2, dtype=SINGLE)
    laws.low_precision(op, sequences, [], state)


def test_gates_may_be_single_beside_low_precision() -> None:
    q, k, v, g, beta, state = inputs(1, 20, dtype=SINGLE)
    low = [x.bfloat16() for x in (q, k, v)]
    out, _ = op(*low, g, beta, state)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, op(*(x.float() for x in low), g, beta, state)[0].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = op(low[0], k, v, g.bfloat16(), beta, state)
    right, _ = op(low[0].float(), k, v, g.bfloat16().float(), beta, state)
    assert torch.equal(mixed, right)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside inductor
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles(backend: str) -> None:
    laws.compiles(op, inputs(2, 20, groups=2, dtype=SINGLE), backend)
    laws.compiles(
        op, inputs(1, 20, dtype=SINGLE, n=2), backend, cu_seqlens=torch.tensor([0, 7, 20])
    )


def test_opcheck() -> None:
    cu = torch.tensor([0, 3, 3, 70], dtype=torch.int32)
    single, packed = inputs(2, 18, groups=2), inputs(1, 70, n=3)
    torch.library.opcheck(OP, (*single, None, 0.5, True, False))
    torch.library.opcheck(OP, (*packed, cu, 0.5, False, False))
    torch.library.opcheck(OP, (*(x.requires_grad_() for x in packed), cu, 0.5, False, True))
    torch.library.opcheck(STEP, (*single, None, 0.5, True))


@pytest.mark.parametrize("t", [0, 1, 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_steps_agree_with_chunks(t: int, normalise: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (SINGLE, 2e-5)):
        args = inputs(2, t, 2, 20, 17, 2, dtype)
        call = partial(op, function=fused_recurrent_kda, use_qk_l2norm_in_kernel=normalise)
        before = args[-1].clone()
        laws.agrees(call, partial(want, use_qk_l2norm_in_kernel=normalise), args, tolerance)
        assert torch.equal(args[-1], before)  # the state that was given is not written


def test_no_second_derivative() -> None:
    q, *rest = inputs(1, 3)
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(kda(leaf, *rest[:-1])[0].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.sum(), leaf)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: kda(x, *rest[:-1])[0], (q,), (q,))


def test_block_states_are_few_and_only_for_gradients() -> None:
    """At most one state in 64 steps is saved; none where no gradient can be asked for."""
    size = laws.saves_only_for_gradients(op, OP, inputs(2, 200, 2, 16, 16))
    assert 0 < size <= 2 * 4 * 2 * 16 * 16


def test_zero_keys_have_finite_gradients() -> None:
    q, k, v, g, beta, _ = inputs(1, 3, dtype=SINGLE)
    k = torch.zeros_like(k).requires_grad_()
    kda(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0].sum().backward()
    assert torch.isfinite(k.grad).all()


@pytest.mark.filterwarnings("ignore")  # of the package itself
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_agrees_with_transformers(dtype: torch.dtype) -> None:
    name = "transformers.models.kimi_linear.modeling_kimi_linear"
    theirs = pytest.importorskip(name, exc_type=ImportError)
    q, k, v, g, beta, state = inputs(2, 70, 2, 16, 16, dtype=SINGLE)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    tolerance = 2e-5 if dtype == SINGLE else 1e-2
    for function, other in (
        (kda, theirs.chunk_kimi_delta_attention),
        (fused_recurrent_kda, theirs.recurrent_kimi_delta_attention),
    ):
        options = {
            "g": g,
            "beta": beta,
            "initial_state": state,
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
        }
        right = getattr(other, "__wrapped__", other)(q, k, v, **options)
        for got, expected in zip(function(q, k, v, **options), right, strict=True):
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("at", "shape", "message"),
    [
        (0, (2, 3, 4), r"q must have axes \(B, T, H, K\); got shape \(2, 3, 4\)"),
        (0, (2, 3, 2, 0), r"q must have at least one head and a head width K >= 1"),
        (1, (2, 3, 2, 5), r"k must have shape \(B, T, H, K\) = \(2, 3, 2, 4\); got \(2, 3, 2, 5\)"),
        (2, (2, 3, 4), r"v must have axes \(B, T, HV, V\); got \(2, 3, 4\)"),
        (2, (2, 3, 3, 3), r"a multiple of the 2 of q, .*; got shape \(2, 3, 3, 3\)"),
        (3, (2, 3, 2, 5), r"g must have shape \(B, T, HV, K\) = \(2, 3, 2, 4\)"),
        (3, (2, 3, 3), r"g must have shape \(B, T, HV\) = \(2, 3, 2\); got \(2, 3, 3\)"),
        (4, (2, 3), r"beta must have shape \(B, T, HV\) = \(2, 3, 2\); got \(2, 3\)"),
        (5, (2, 2, 4), r"initial_state must have shape \(B, HV, K, V\) = \(2, 2, 4, 3\)"),
    ],
)
def test_bad_shape(at: int, shape: tuple[int, ...], message: str) -> None:
    for function in (kda, fused_recurrent_kda):
        args = inputs(2, 3)
        args[at] = torch.ones(shape, dtype=torch.float64)
        with pytest.raises(ValueError, match=message):
            op(*args, function=function)


def test_bad_values_types_and_edges() -> None:
    args = inputs(1, 6)
    with pytest.raises(ValueError, match=r"v must have dtype float64; got float32"):
        op(*args[:2], args[2].float(), *args[3:])
    with pytest.raises(ValueError, match=r"beta must be a tensor .*; got NoneType"):
        kda(*args[:4], None)  # type: ignore[arg-type]
    single = [x.float() for x in args]
    with pytest.raises(ValueError, match=r"g must have dtype float32; got float64"):
        op(*single[:3], args[3], *single[4:])
    with pytest.raises(ValueError, match=r"q must be on the CPU, .*; got meta"):
        op(*(x.to("meta") for x in args))
    for edges, message in (([0, 7], "cu_seqlens must rise from 0 to T = 6"), ([0], "N >= 1")):
        with pytest.raises(ValueError, match=message):
            op(*args, cu_seqlens=torch.tensor(edges))
    with pytest.raises(ValueError, match=r"\(N, HV, K, V\) = \(2, 2, 4, 3\)"):
        op(*args, cu_seqlens=torch.tensor([0, 3, 6]))
    args[3][0, 2, 1, 0] = 0.5
    with pytest.raises(ValueError, match=r"g must hold logarithms of decays, <= 0; got 0.5"):
        op(*args, check=True)
    args[3][0, 2, 1, 0] = -0.5
    args[4][0, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="beta must be finite"):
        op(*args, check=True)
