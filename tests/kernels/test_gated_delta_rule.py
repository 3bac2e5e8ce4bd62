"""Gated delta rule: against its reference and other packages, gradcheck, the laws, and recall."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softplus

from mmrec.kernels import (
    delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_rule,
    gated_delta_rule_update,
)
from mmrec.kernels.gated_delta_rule import kernel, reference
from tests.kernels import laws

OP = torch.ops.mmrec.gated_delta_rule.default
SINGLE = torch.float32
LOGITS = {
    "use_qk_l2norm_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "use_logsigmoid_in_kernel": True,
}
"""Unit keys and queries, and logits as gates."""


def run(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The op with the initial state as the sixth argument, as the laws call it."""
    *sequences, state = args
    out, final = gated_delta_rule(
        *sequences, initial_state=state, output_final_state=True, **options
    )
    assert final is not None
    return out, final


def exact(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The reference, called likewise."""
    *sequences, state = args
    return reference.gated_delta_rule(*sequences, initial_state=state, **options)


def inputs(
    b: int,
    t: int,
    h: int,
    key_width: int,
    dtype: torch.dtype = torch.float64,
    *,
    group: int = 1,
    value_width: int | None = None,
    n: int | None = None,
) -> list[Tensor]:
    """q and k of norm about 1, v, log decays, writing strengths and a state."""
    value_width = value_width or key_width
    q, k = (torch.randn(b, t, h, key_width, dtype=dtype) * key_width**-0.5 for _ in range(2))
    v = torch.randn(b, t, h * group, value_width, dtype=dtype)
    g, beta = -torch.rand(b, t, h * group, dtype=dtype), torch.rand(b, t, h * group, dtype=dtype)
    return [q, k, v, g, beta, torch.randn(n or b, h * group, key_width, value_width, dtype=dtype)]


@given(
    st.integers(1, 2),
    st.sampled_from([0, 1, 2, 5, 32, 33, 70]),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([{}, {"scale": -1.5}, LOGITS, {"use_qk_l2norm_in_kernel": True, "scale": 2.0}]),
)
def test_agrees_with_reference(
    b: int, t: int, h: int, group: int, keys: int, values: int, options: dict[str, Any]
) -> None:
    op, want = partial(run, **options), partial(exact, **options)
    args = inputs(b, t, h, keys, group=group, value_width=values)
    laws.agrees(op, want, args, 1e-10)
    laws.agrees(op, want, [x.float() for x in args], 2e-5)


@pytest.mark.parametrize(
    ("keys", "values"), [(16, 16), (17, 32), (48, 20), (64, 64), (128, 128), (96, 40), (256, 33)]
)
def test_agrees_at_every_width(keys: int, values: int) -> None:
    for t in (1, 35):
        laws.agrees(run, exact, inputs(1, t, 1, keys, value_width=values, group=2), 1e-10)


@pytest.mark.parametrize("package", ["fla.ops.gated_delta_rule.naive", "transformers"])
def test_agrees_with_other_packages(package: str) -> None:
    """In names, order, shapes and defaults."""
    q, k, v, g, beta, state = inputs(2, 70, 2, 8, SINGLE, value_width=12)
    options: dict[str, Any] = {"initial_state": state, "output_final_state": True}
    if package == "transformers":
        name = "transformers.models.qwen3_5.modeling_qwen3_5"
        other = pytest.importorskip(name).torch_chunk_gated_delta_rule
        options |= {"use_qk_l2norm_in_kernel": True}
    else:
        other = pytest.importorskip(package).naive_chunk_gated_delta_rule
    for got, want in zip(
        gated_delta_rule(q, k, v, g, beta, **options),
        other(q, k, v, g=g, beta=beta, **options),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_long_sequences_stay_exact() -> None:
    """Rounding in the gradient of the decay does not grow along many chunks."""
    single = inputs(1, 1000, 1, 16, SINGLE)
    single[3] *= 0.02  # slow decay, long memory
    normalised = {"use_qk_l2norm_in_kernel": True}
    laws.agrees(partial(run, **normalised), partial(exact, **normalised), single, 2e-5)


def test_gradient_of_strong_decay_is_exact() -> None:
    """Σ g dg per head, which is the gradient of A_log where g = -exp(A_log) softplus(…).

    Every number that goes into it is tiny where the decay is strong, beside those in dq and dv.
    """
    double = inputs(1, 64, 16, 16)[:5]
    double[3] = -torch.linspace(1, 16, 16) * softplus(torch.randn(1, 64, 16).double() + 1)
    upstream = torch.randn(1, 64, 16, 16)

    def log_rate_gradient(form: Callable[..., Any], dtype: torch.dtype) -> Tensor:
        q, k, v, g, beta = (x.float().to(dtype) for x in double)
        g.requires_grad_()
        out = form(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]
        (dg,) = torch.autograd.grad(out, g, upstream.to(dtype))
        return (g * dg).detach().double().sum((0, 1))

    want = log_rate_gradient(reference.gated_delta_rule, torch.float64)
    plain = ((log_rate_gradient(reference.chunked, SINGLE) - want) / want).abs().max()
    error = ((log_rate_gradient(gated_delta_rule, SINGLE) - want) / want).abs().max()
    assert error < plain / 10


@pytest.mark.parametrize("shift", [-200.0, -30.0, 30.0, 200.0])
def test_extreme_gates(shift: float) -> None:
    for at in (3, 4):
        args = inputs(1, 40, 1, 4)
        args[at] += shift
        laws.agrees(partial(run, **LOGITS), partial(exact, **LOGITS), args, 1e-9)
    if shift < 0:
        args = inputs(1, 40, 1, 4)
        args[3] += shift
        laws.agrees(run, exact, args, 1e-9)


def test_full_and_no_writing() -> None:
    """β = 0 and β = 1 have exact gradients: nothing is divided by β."""
    args = inputs(1, 40, 1, 4)
    args[4] = (args[4] > 0.5).double()
    laws.agrees(run, exact, args, 1e-10)


def test_chunked_form_agrees_with_reference() -> None:
    for size in (8, 16):

        def chunked(*args: Tensor, size: int = size) -> tuple[Tensor, Tensor]:
            return reference.chunked(*args[:5], initial_state=args[5], chunk_size=size)

        laws.agrees(chunked, exact, inputs(2, 32, 2, 5, value_width=3), 1e-9)


def test_constants_agree() -> None:
    assert kernel.EPSILON == reference.EPSILON


def test_gradcheck() -> None:
    ready = [x.requires_grad_() for x in inputs(2, 4, 1, 3, group=2, value_width=2)]
    assert torch.autograd.gradcheck(partial(run, **LOGITS), ready, fast_mode=True)
    cu = torch.tensor([0, 2, 2, 5])
    ready = [x.requires_grad_() for x in inputs(1, 5, 2, 3, n=3)]
    assert torch.autograd.gradcheck(partial(run, cu_seqlens=cu), ready, fast_mode=True)


@given(st.lists(st.integers(0, 2), max_size=3), st.integers(1, 39))
def test_laws(blocks: list[int], at: int) -> None:
    """Cut at multiples of STEPS, a sequence gives the same bits."""
    *sequences, initial = inputs(2, 40, 2, 4, SINGLE, value_width=6)
    laws.splits(run, sequences, [], initial, [kernel.STEPS * n for n in blocks])
    laws.is_causal(run, sequences, [], initial, at)
    laws.reads_strides(run, sequences, [], initial)


def test_other_cuts_change_only_rounding() -> None:
    args = inputs(1, 9, 1, 4)
    want, want_state = run(*args)
    first, state = run(*(x[:, :5] for x in args[:5]), args[5])
    second, state = run(*(x[:, 5:] for x in args[:5]), state)
    torch.testing.assert_close(torch.cat((first, second), 1), want)
    torch.testing.assert_close(state, want_state)


@given(st.lists(st.integers(0, 60), max_size=4))
def test_packed_sequences_do_not_meet(cuts: list[int]) -> None:
    *sequences, states = inputs(1, 60, 2, 3, n=len(cuts) + 1)
    laws.packs(run, sequences, [], states, cuts)


@pytest.mark.parametrize("width", [8, 48])
def test_threads_do_not_change_bits(width: int) -> None:
    laws.ignores_threads(run, inputs(2, 40, 2, width, SINGLE, group=2))
    packed = partial(run, cu_seqlens=torch.tensor([0, 3, 3, 40]))
    laws.ignores_threads(packed, inputs(1, 40, 3, width, SINGLE, n=3))


def test_low_precision_and_modes() -> None:
    for group in (1, 2):
        *sequences, initial = inputs(2, 20, 2, 4, SINGLE, group=group, value_width=20)
        laws.low_precision(run, sequences, [], initial)
        laws.works_without_gradients(run, [*sequences, initial])
        laws.survives_checkpointing(run, [*sequences, initial])


def test_bfloat16_gradients_are_those_of_float32_rounded() -> None:
    low = [x.bfloat16() for x in inputs(1, 40, 2, 20, SINGLE)[:5]]
    leaves = [x.clone().requires_grad_() for x in low]
    wide = [x.float().requires_grad_() for x in low]
    upstream = torch.randn(1, 40, 2, 20).bfloat16()
    got = torch.autograd.grad(gated_delta_rule(*leaves)[0], leaves, upstream)
    want = torch.autograd.grad(gated_delta_rule(*wide)[0], wide, upstream.float())
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y.bfloat16())


def test_gates_may_have_another_dtype() -> None:
    """As models pass them: float32 decays beside bfloat16 queries, keys and values."""
    q, k, v, g, beta, _ = inputs(1, 5, 2, 4, SINGLE)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    out, _ = gated_delta_rule(q, k, v, g, beta.bfloat16())
    wide, _ = gated_delta_rule(q.float(), k.float(), v.float(), g, beta.bfloat16().float())
    assert torch.equal(out, wide.bfloat16())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside inductor
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles(backend: str) -> None:
    laws.compiles(run, inputs(2, 20, 1, 4, SINGLE, group=2), backend)


def test_compiles_packed_sequences() -> None:
    cu = torch.tensor([0, 7, 20])
    laws.compiles(run, inputs(1, 20, 2, 4, SINGLE, n=2), cu_seqlens=cu)


def test_opcheck() -> None:
    cu, options = torch.tensor([0, 3, 3, 40], dtype=torch.int32), (0.5, True, False, True)
    torch.library.opcheck(OP, (*inputs(2, 18, 1, 3, group=2), None, False, *options))
    packed = inputs(1, 40, 2, 3, n=3)
    torch.library.opcheck(OP, (*packed, cu, False, *options))
    torch.library.opcheck(OP, (*(x.requires_grad_() for x in packed), cu, True, *options))
    *step, state = inputs(2, 1, 2, 3)
    steps = torch.ops.mmrec.gated_delta_rule_steps.default
    torch.library.opcheck(steps, (*step, state, None, *options))
    update = torch.ops.mmrec.gated_delta_rule_update.default
    torch.library.opcheck(update, (state, *(x[:, 0] for x in step), *options))


def test_gates_broadcast() -> None:
    q, k, v, a, b, initial = inputs(2, 20, 3, 4)

    def expanded(*args: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, a, b, initial = args
        shape = q.shape[:3]
        return run(q, k, v, a.expand(shape).clone(), b.expand(shape).clone(), initial)

    for gates in ((a[0, 0], b[:, :, :1]), (a[:, :, :1], b[0, 0]), (a[0, 0, 0], b)):
        args = [q, k, v, *gates, initial]
        pairs = zip(laws.gradients(run, args), laws.gradients(expanded, args), strict=True)
        for got, want in pairs:
            assert got.shape == want.shape
            torch.testing.assert_close(got, want)


def test_transforms_work_or_are_refused() -> None:
    q, *rest = inputs(1, 3, 1, 2)

    def loss(q: Tensor) -> Tensor:
        return run(q, *rest)[0].square().sum()

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
    size = laws.saves_only_for_gradients(run, OP, inputs(2, 200, 2, 16))
    assert 0 < size <= 2 * 200 * 2 * 16 * 16 / 8


def test_recalls_what_was_written() -> None:
    """With full writing and no decay, a key returns its newest value; an older one is replaced."""
    keys = torch.eye(4).repeat(2, 1)[None, :, None]  # each of four keys written twice
    values, on = torch.randn(1, 8, 1, 4), torch.ones(1, 8, 1)
    _, state = delta_rule(keys, keys, values, on, scale=1.0, output_final_state=True)
    first = keys[:, :4]
    out, none = delta_rule(first, first, values[:, :4], 0 * on[:, :4], 1.0, state)
    torch.testing.assert_close(out, values[:, 4:], rtol=1e-5, atol=1e-5)
    assert none is None


def test_other_forms_are_the_same_rule() -> None:
    q, k, v, g, beta, state = inputs(2, 5, 2, 8, SINGLE, group=2, value_width=20)
    options = {"initial_state": state, "output_final_state": True}
    for got, want in zip(
        delta_rule(q, k, v, beta, **options),  # type: ignore[arg-type]
        gated_delta_rule(q, k, v, 0 * g, beta, **options),  # type: ignore[arg-type]
        strict=True,
    ):
        assert torch.equal(got, want)
    short = fused_recurrent_gated_delta_rule(q, k, v, g, beta, **options)  # type: ignore[arg-type]
    want, want_state = run(q, k, v, g, beta, state)
    torch.testing.assert_close(short[0], want)
    # steps one by one, in place
    outputs = [
        gated_delta_rule_update(state, q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t])
        for t in range(5)
    ]
    torch.testing.assert_close(torch.stack(outputs, 1), want)
    torch.testing.assert_close(state, want_state)
    low = [x[:, 0].bfloat16() for x in (q, k, v)]
    assert gated_delta_rule_update(state, *low, g[:, 0], beta[:, 0]).dtype == torch.bfloat16


@pytest.mark.parametrize(("keys", "values"), [(3, 5), (16, 16), (17, 20), (128, 64)])
def test_few_steps_agree_with_reference(keys: int, values: int) -> None:
    few = fused_recurrent_gated_delta_rule
    for time, dtype in ((0, SINGLE), (1, SINGLE), (8, torch.float64)):
        *sequences, state = inputs(2, time, 2, keys, dtype, group=2, value_width=values)
        before = state.mT.contiguous().mT  # any strides are read, and the state is kept
        for options in ({"scale": -1.5}, LOGITS):
            got = few(*sequences, initial_state=before, output_final_state=True, **options)  # type: ignore[arg-type]
            for x, want in zip(got, exact(*sequences, state, **options), strict=True):
                torch.testing.assert_close(x, want, rtol=2e-5, atol=2e-5)
        assert torch.equal(before, state)
    *packed, states = inputs(1, 4, 2, keys, n=3, value_width=values)
    cu = {"cu_seqlens": torch.tensor([0, 1, 1, 4]), "output_final_state": True}
    got = few(*packed, initial_state=states, **cu)  # type: ignore[arg-type]
    for x, want in zip(got, run(*packed, states, cu_seqlens=cu["cu_seqlens"]), strict=True):
        torch.testing.assert_close(x, want)
    low = [x.bfloat16() for x in inputs(2, 2, 2, keys, SINGLE, value_width=values)[:5]]
    wide, _ = few(*(x.float() for x in low))
    assert torch.equal(few(*low)[0], wide.bfloat16())


def test_update_refuses_what_it_cannot_do() -> None:
    *step, state = inputs(1, 1, 2, 4)
    step = [x[:, 0] for x in step]
    with pytest.raises(ValueError, match="state must be contiguous"):
        gated_delta_rule_update(state.mT, *step)
    with pytest.raises(ValueError, match=r"state must have dtype float64; got float32"):
        gated_delta_rule_update(state.float(), *step)
    with pytest.raises(ValueError, match=r"state must have shape \(B, HV, K, V\) = \(1, 2, 4, 4\)"):
        gated_delta_rule_update(state[:, :1], *step)
    step[0].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        gated_delta_rule_update(state, *step)
    with torch.no_grad():
        gated_delta_rule_update(state, *step)


def test_zero_keys_have_finite_gradients() -> None:
    q, k, v, g, beta, initial = inputs(1, 3, 1, 4, SINGLE)
    k = torch.zeros_like(k).requires_grad_()
    run(q, k, v, g, beta, initial, use_qk_l2norm_in_kernel=True)[0].sum().backward()
    assert torch.isfinite(k.grad).all()


@pytest.mark.parametrize(
    ("at", "shape", "message"),
    [
        (0, (2, 3, 4), r"q must have axes \(B, T, H, K\); got shape \(2, 3, 4\)"),
        (0, (2, 3, 2, 0), r"k must have shape \(B, T, H, K\) = \(2, 3, 2, 0\)"),
        (1, (2, 3, 2, 5), r"k must have shape \(B, T, H, K\) = \(2, 3, 2, 4\); got \(2, 3, 2, 5\)"),
        (2, (2, 3, 4), r"v must have axes \(B, T, HV, V\); got shape \(2, 3, 4\)"),
        (2, (2, 4, 2, 4), r"v must have shape \(B, T, HV, V\) = \(2, 3, 2, 4\); got"),
        (2, (2, 3, 3, 4), r"v must have a multiple of the 2 heads of q and k, at least 1; got 3"),
        (2, (2, 3, 2, 257), r"v must have a head width V from 1 to 256; got 257"),
        (3, (2, 3, 5), r"g must broadcast to \(B, T, HV\) = \(2, 3, 2\); got \(2, 3, 5\)"),
        (4, (2, 3), r"beta must broadcast to"),
        (
            5,
            (2, 2, 4),
            r"initial_state must have shape \(B, HV, K, V\) = \(2, 2, 4, 4\); got \(2, 2, 4\)",
        ),
    ],
)
def test_bad_shape(at: int, shape: tuple[int, ...], message: str) -> None:
    args = inputs(2, 3, 2, 4)
    args[at] = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        run(*args)


def test_bad_values_types_and_edges() -> None:
    args = inputs(1, 6, 2, 4)
    with pytest.raises(ValueError, match=r"v must have dtype float64; got float32"):
        run(*args[:2], args[2].float(), *args[3:])
    with pytest.raises(ValueError, match=r"g must have dtype float64; got int64"):
        run(*args[:3], args[3].long(), *args[4:])
    for edges, message in (([0, 7], "cu_seqlens must rise from 0 to T = 6"), ([0], "N >= 1")):
        with pytest.raises(ValueError, match=message):
            run(*args, cu_seqlens=torch.tensor(edges))
    with pytest.raises(ValueError, match=r"\(N, HV, K, V\) = \(2, 2, 4, 4\)"):
        run(*args, cu_seqlens=torch.tensor([0, 3, 6]))
    for scale in (0.0, float("nan")):
        with pytest.raises(ValueError, match="scale must be finite and not 0"):
            run(*args, scale=scale)
    run(*args, check=True)
    args[3][0, 1, 1] = 0.5
    run(*args)
    with pytest.raises(
        ValueError, match="g must be a log decay, at most 0; its largest value is 0"
    ):
        run(*args, check=True)
    run(*args, check=True, use_logsigmoid_in_kernel=True)
    args[4][0, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="beta must be finite"):
        run(*args, check=True)


def test_tensors_on_another_device_are_refused() -> None:
    args = [x.to("meta") for x in inputs(1, 6, 2, 4)]
    with pytest.raises(ValueError, match="q must be on the CPU, where these kernels run; got meta"):
        run(*args)
