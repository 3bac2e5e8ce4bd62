"""Gated linear attention and its relatives: against their references, and the laws."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import (
    fused_recurrent_gla,
    fused_recurrent_simple_gla,
    gla,
    hgrn,
    kda,
    lightning_attn,
    retention,
    simple_gla,
)
from mmrec.kernels.gla import reference
from tests.kernels import laws

OP = torch.ops.mmrec.linear_attention.default
SINGLE = torch.float32


def inputs(
    b: int,
    t: int,
    h: int = 2,
    k: int = 4,
    v: int = 3,
    *,
    by_step: bool = False,
    dtype: torch.dtype = torch.float64,
    n: int | None = None,
) -> list[Tensor]:
    queries = [torch.randn(b, t, h, k, dtype=dtype) for _ in range(2)]
    shape = (b, t, h) if by_step else (b, t, h, k)
    g = torch.nn.functional.logsigmoid(torch.randn(shape, dtype=dtype) + 1)
    values = torch.randn(b, t, h, v, dtype=dtype)
    return [*queries, values, g, torch.randn(n or b, h, k, v, dtype=dtype)]


def op(*args: Tensor, function: Any = gla, **options: Any) -> tuple[Tensor, Tensor]:
    """``function`` as the laws call it: the state is the last argument, and is returned."""
    *tensors, state = args
    out, final = function(*tensors, initial_state=state, output_final_state=True, **options)
    return out, final


simple = partial(op, function=simple_gla)
FORMS = [
    pytest.param(op, reference.gla, False, id="gla"),
    pytest.param(simple, reference.simple_gla, True, id="simple_gla"),
]
Form = Callable[..., tuple[Tensor, Tensor]]


@given(
    st.integers(1, 2),
    st.sampled_from([0, 1, 16, 17, 70]),
    st.integers(1, 2),
    st.sampled_from([(1, 3), (4, 1), (5, 6), (17, 2)]),
)
def test_agrees_with_reference(b: int, t: int, h: int, widths: tuple[int, int]) -> None:
    for call, right, by_step in (
        (op, reference.gla, False),
        (simple, reference.simple_gla, True),
    ):
        laws.agrees(call, right, inputs(b, t, h, *widths, by_step=by_step), 1e-10)
        single = inputs(b, t, h, *widths, by_step=by_step, dtype=SINGLE)
        laws.agrees(call, right, single, 2e-5)


@pytest.mark.parametrize(("call", "right", "by_step"), FORMS)
def test_agrees_at_every_width(call: Form, right: Form, by_step: bool) -> None:
    for widths in ((16, 16), (32, 48), (128, 128), (40, 256)):
        laws.agrees(call, right, inputs(1, 35, 1, *widths, by_step=by_step), 1e-10)


@pytest.mark.parametrize(("call", "right", "by_step"), FORMS)
def test_long_sequences_and_extreme_decays(call: Form, right: Form, by_step: bool) -> None:
    args = inputs(1, 1000, 1, by_step=by_step, dtype=SINGLE)
    args[3] = args[3] / 50  # slow decay, long memory
    laws.agrees(call, right, args, 5e-5)
    for by in (0.0, 30.0, 1e4):  # products of decays leave the range of the dtype
        args = inputs(1, 40, by_step=by_step)
        args[3] = args[3] * by
        args[3][:, ::3] = 0
        laws.agrees(call, right, args, 1e-9)
        laws.agrees(call, right, [x.float() for x in args], 2e-5)


@pytest.mark.parametrize(("call", "right", "by_step"), FORMS)
def test_chunked_form_agrees_with_reference(call: Form, right: Form, by_step: bool) -> None:
    for size in (8, 16):
        chunked = partial(reference.chunked, chunk_size=size)
        laws.agrees(chunked, right, inputs(2, 32, by_step=by_step), 1e-9)


@pytest.mark.parametrize(("call", "right", "by_step"), FORMS)
def test_gradcheck(call: Form, right: Form, by_step: bool) -> None:
    ready = [x.requires_grad_() for x in inputs(2, 4, by_step=by_step)]
    assert torch.autograd.gradcheck(call, ready, fast_mode=True)
    ready = [x.requires_grad_() for x in inputs(1, 5, by_step=by_step, n=3)]
    packed = partial(call, cu_seqlens=torch.tensor([0, 2, 2, 5]), scale=1.3)
    assert torch.autograd.gradcheck(packed, ready, fast_mode=True)


@given(st.lists(st.sampled_from([16, 32, 64]), max_size=3), st.integers(1, 69), st.booleans())
def test_laws(cuts: list[int], at: int, by_step: bool) -> None:
    call = simple if by_step else op
    *sequences, state = inputs(2, 70, by_step=by_step, dtype=SINGLE)
    laws.splits(call, sequences, [], state, cuts)
    laws.is_causal(call, sequences, [], state, at)
    laws.reads_strides(call, sequences, [], state)


@given(st.lists(st.integers(0, 70), max_size=4), st.booleans())
def test_packed_sequences_do_not_meet(cuts: list[int], by_step: bool) -> None:
    *sequences, states = inputs(1, 70, by_step=by_step, n=len(cuts) + 1)
    laws.packs(simple if by_step else op, sequences, [], states, cuts)


@pytest.mark.parametrize(("call", "right", "by_step"), FORMS)
def test_modes(call: Form, right: Form, by_step: bool) -> None:
    args = inputs(2, 40, 2, 20, 17, by_step=by_step, dtype=SINGLE)
    laws.ignores_threads(call, args)
    laws.low_precision(call, args[:-1], [], args[-1])
    laws.works_without_gradients(call, args)
    laws.survives_checkpointing(call, args)
    laws.saves_only_for_gradients(call, OP, args)


@pytest.mark.parametrize(("call", "right", "by_step"), FORMS)
def test_compiles(call: Form, right: Form, by_step: bool) -> None:
    laws.compiles(call, inputs(2, 20, by_step=by_step, dtype=SINGLE))
    cu = torch.tensor([0, 7, 20])
    laws.compiles(call, inputs(1, 20, by_step=by_step, dtype=SINGLE, n=2), cu_seqlens=cu)


def test_opcheck() -> None:
    cu = torch.tensor([0, 3, 3, 70], dtype=torch.int32)
    q, k, v, g, state = (x.requires_grad_() for x in inputs(1, 70, n=3))
    torch.library.opcheck(OP, (q, k, v, g, None, state, cu, 0.5, False, True))
    q, k, v, g, state = inputs(2, 18, by_step=True)
    torch.library.opcheck(OP, (q, k, v, g, None, state, None, 0.5, False, False))


@pytest.mark.parametrize("t", [1, 3])
def test_steps_agree_with_chunks(t: int) -> None:
    few, few_simple = (
        partial(op, function=function)
        for function in (fused_recurrent_gla, fused_recurrent_simple_gla)
    )
    for dtype, tolerance in ((torch.float64, 1e-10), (SINGLE, 2e-5)):
        laws.agrees(few, reference.gla, inputs(2, t, 2, 20, 17, dtype=dtype), tolerance)
        args = inputs(2, t, 2, 20, 17, by_step=True, dtype=dtype)
        laws.agrees(few_simple, reference.simple_gla, args, tolerance)


def test_one_decay_for_all_steps() -> None:
    q, k, v, _, state = inputs(2, 20, 3)
    gamma = -torch.rand(3, dtype=torch.float64)

    def right(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return reference.simple_gla(q, k, v, gamma.expand(q.shape[:3]), s)

    def call(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return simple(q, k, v, None, gamma, s)

    laws.agrees(call, right, [q, k, v, gamma, state], 1e-10)
    for name, want in (
        ("none", torch.zeros(3, dtype=torch.float64)),
        ("retention", (1 - 2 ** (-5 - torch.arange(3, dtype=torch.float64))).log()),
        ("lightning", -8 / 3 * (1 - 2 / 5) * torch.arange(3, dtype=torch.float64)),
    ):
        got = {
            "none": lambda *x: simple(*x),
            "retention": partial(op, function=retention),
            "lightning": partial(op, function=lightning_attn, layer_idx=2, num_layers=5),
        }[name](q, k, v, state)
        for x, y in zip(got, right(q, k, v, want, state), strict=True):
            torch.testing.assert_close(x, y)


@given(st.integers(1, 2), st.sampled_from([0, 1, 9]), st.integers(1, 5))
def test_hgrn(b: int, t: int, d: int) -> None:
    def args(dtype: torch.dtype, n: int = b) -> list[Tensor]:
        x, g = torch.randn(2, b, t, d, dtype=dtype)
        return [x, torch.nn.functional.logsigmoid(g), torch.randn(n, d, dtype=dtype)]

    call = partial(op, function=hgrn)
    laws.agrees(call, reference.hgrn, args(torch.float64), 1e-10)
    laws.agrees(call, reference.hgrn, args(SINGLE), 2e-5)
    *sequences, state = args(SINGLE)
    laws.low_precision(call, sequences, [], state)
    if b == 1:
        *sequences, states = args(torch.float64, n=2)
        laws.packs(call, sequences, [], states, [t // 2])
    assert hgrn(*sequences)[1] is None


def _naive(op_name: str) -> Any:
    """The plain torch form of flash-linear-attention, which needs no GPU; skip if it is absent."""
    pytest.importorskip("einops")
    spec = importlib.util.find_spec("fla")
    if spec is None or spec.origin is None:
        pytest.skip("flash-linear-attention is not installed")
    path = Path(spec.origin).parent / "ops" / op_name / "naive.py"
    module_spec = importlib.util.spec_from_file_location(f"naive_{op_name}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def test_agrees_with_flash_linear_attention() -> None:
    q, k, v, g, state = inputs(2, 64, dtype=SINGLE)
    calls: list[tuple[Any, Any]] = [
        (op(q, k, v, g, state), _naive("gla").naive_recurrent_gla(q, k, v, g, state, True)),
        (
            simple(q, k, v, g[..., 0], state),
            _naive("simple_gla").naive_recurrent_simple_gla(
                q, k, v, g[..., 0], initial_state=state, output_final_state=True
            ),
        ),
        (
            (retention(q, k, v)[0],),
            (
                _naive("retention")
                .naive_retention(*(x.transpose(1, 2) for x in (q, k, v)))
                .transpose(1, 2),
            ),
        ),
        (
            op(v[:, :, 0], g[..., :3].flatten(2)[..., :3], state[:, 0, 0], function=hgrn),
            _naive("hgrn").naive_recurrent_hgrn(
                v[:, :, 0], g[..., :3].flatten(2)[..., :3], state[:, 0, 0], True
            ),
        ),
    ]
    beta, unit = torch.rand(2, 64, 2), torch.nn.functional.normalize(k, dim=-1)
    naive = _naive("kda")
    for form in (naive.naive_recurrent_kda, naive.naive_chunk_kda):
        want = form(q, unit, v, g, beta, None, state, True)
        calls.append((kda(q, unit, v, g, beta, None, state, True), want))
    for got, want in calls:
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def test_bad_arguments() -> None:
    q, k, v, g, state = inputs(2, 3)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: gla(q, k, v, g[..., 0]), r"g must have axes \(B, T, H, K\); got \(2, 3, 2\)"),
        (lambda: gla(q, k, v[:, :, :1], g), r"v must have shape \(B, T, H, V\) = \(2, 3, 2, 3\)"),
        (
            lambda: gla(q, k, v, g, initial_state=state[:1]),
            r"initial_state must have shape \(B, H, K, V\) = \(2, 2, 4, 3\); got \(1, 2, 4, 3\)",
        ),
        (lambda: gla(q, k, v, -g, check=True), r"g must hold logarithms of decays, <= 0; got"),
        (lambda: simple_gla(q, k, v, g), r"g must have shape \(B, T, H\) = \(2, 3, 2\)"),
        (lambda: simple_gla(q, k, v, g[..., 0], g[0, 0, :, 0]), "takes g or g_gamma; got both"),
        (
            lambda: simple_gla(q, k, v, g_gamma=g[0, 0, 0]),
            r"g_gamma must have shape \(H\) = \(2,\); got \(4,\)",
        ),
        (
            lambda: lightning_attn(q, k, v, 4, 4),
            r"layer_idx must be from 0 up to num_layers - 1 = 3; got 4",
        ),
        (lambda: retention(q[0], k, v), r"q must have axes \(B, T, H, K\)"),
        (lambda: hgrn(v[..., 0], g[..., 0, :]), r"g must have shape \(B, T, D\) = \(2, 3, 2\)"),
        (lambda: hgrn(v[..., 0], -g[..., 0], check=True), r"<= 0; got"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
