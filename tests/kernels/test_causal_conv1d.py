"""Causal depthwise convolution: against its reference, gradcheck, the laws, and decoding."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrec.kernels import causal_conv1d_fn, causal_conv1d_update
from mmrec.kernels.causal_conv1d import reference
from tests.kernels import laws

OP = torch.ops.mmrec.causal_conv1d.default
SINGLE = torch.float32


def inputs(
    b: int, t: int, d: int, w: int, dtype: torch.dtype = torch.float64, *, time_last: bool = False
) -> list[Tensor]:
    """x (B, L, D) with channels side by side or, transposed, steps; weight, bias, states."""
    x = torch.randn(b, d, t, dtype=dtype).transpose(1, 2) if time_last else torch.randn(b, t, d)
    shapes = ((d, w), (d,), (b, d, w - 1))
    return [x.to(dtype), *(torch.randn(shape, dtype=dtype) for shape in shapes)]


def op(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, activation: Any = "silu") -> Any:
    """The op with time before channels, as the laws have it."""
    out, final = causal_conv1d_fn(
        x.transpose(1, 2), weight, bias, None, state, True, activation=activation
    )
    return out.transpose(1, 2), final.to(state.dtype)


def plain(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, activation: Any = "silu") -> Any:
    x = x.transpose(1, 2)
    out = reference.causal_conv1d(x, weight, bias, state, activation)
    return out.transpose(1, 2), torch.cat((state, x), -1)[..., x.shape[2] :]


@given(
    st.integers(1, 2),
    st.sampled_from([1, 2, 5, 32, 67]),
    st.sampled_from([1, 16, 35]),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([None, "silu"]),
)
def test_agrees_with_reference(
    b: int, t: int, d: int, w: int, time_last: bool, activation: str | None
) -> None:
    ours, theirs = (partial(f, activation=activation) for f in (op, plain))
    laws.agrees(ours, theirs, inputs(b, t, d, w, time_last=time_last), 1e-10)
    laws.agrees(ours, theirs, inputs(b, t, d, w, SINGLE, time_last=time_last), 2e-5)


def test_many_channels_agree() -> None:
    """More channels than one task has."""
    laws.agrees(op, plain, inputs(2, 40, 300, 4), 1e-10)


def test_gradcheck() -> None:
    ready = [x.requires_grad_() for x in inputs(2, 4, 3, 3)]
    assert torch.autograd.gradcheck(op, ready, fast_mode=True)


@given(st.lists(st.integers(0, 40), max_size=3), st.integers(1, 39))
def test_laws(cuts: list[int], at: int) -> None:
    x, *shared, state = inputs(2, 40, 18, 4, SINGLE)
    laws.splits(op, [x], shared, state, cuts)
    laws.is_causal(op, [x], shared, state, at)
    wide = torch.randn(2, 40, 30)[..., 5:23].copy_(x)
    for got, want in zip(op(wide, *shared, state), op(x, *shared, state), strict=True):
        assert torch.equal(got, want)


def test_memory_order_changes_no_bit_and_is_kept() -> None:
    x, weight, bias, _ = inputs(2, 40, 18, 4, SINGLE)
    last = causal_conv1d_fn(x.transpose(1, 2), weight, bias)
    first = causal_conv1d_fn(x.transpose(1, 2).contiguous(), weight, bias)
    assert torch.equal(last, first)
    assert last.transpose(1, 2).is_contiguous()
    assert first.is_contiguous()


@pytest.mark.parametrize("cuts", [[3, 4, 9], [32, 64], []])
def test_packed_sequences_do_not_meet(cuts: list[int]) -> None:
    x, weight, bias, _ = inputs(2, 70, 17, 4)
    x, edges = x.transpose(1, 2), [0, *cuts, 70]
    sizes = torch.tensor([b - a for a, b in pairwise(edges)])
    numbers = torch.arange(len(sizes)).repeat_interleave(sizes).expand(2, -1)

    def packed(*args: Tensor) -> tuple[Tensor, Tensor]:
        out = causal_conv1d_fn(*args, numbers, activation="silu")
        return out, out[..., -1]

    def separate(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        parts = x.split(sizes.tolist(), -1)
        out = torch.cat([reference.causal_conv1d(y, weight, bias, None, "silu") for y in parts], -1)
        return out, out[..., -1]

    laws.agrees(packed, separate, [x, weight, bias], 1e-10)
    laws.ignores_threads(packed, [x, weight, bias])
    torch.library.opcheck(OP, (x, weight, bias, x.new_zeros(2, 17, 3), numbers, True))


def test_threads_do_not_change_bits() -> None:
    laws.ignores_threads(op, inputs(2, 40, 300, 4, SINGLE))


def test_low_precision_and_modes() -> None:
    x, *shared, state = inputs(2, 20, 5, 4, SINGLE)
    laws.low_precision(op, [x], shared, state)
    laws.works_without_gradients(op, [x, *shared, state])
    laws.survives_checkpointing(op, [x, *shared, state])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside inductor
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles(backend: str) -> None:
    laws.compiles(op, inputs(2, 20, 18, 4, SINGLE), backend)


def test_opcheck() -> None:
    for time_last in (False, True):
        x, *rest = inputs(2, 20, 18, 4, time_last=time_last)
        tensors = [y.requires_grad_() for y in (x.transpose(1, 2).detach(), *rest)]
        torch.library.opcheck(OP, (*tensors, None, True))


def test_final_states_are_written_where_asked() -> None:
    x, weight, bias, state = inputs(2, 2, 5, 4)
    out = torch.empty(2, 5, 3, dtype=x.dtype)
    arguments = (x.transpose(1, 2), weight, bias, None, state, True)
    _, final = causal_conv1d_fn(*arguments, final_states_out=out)
    assert final is out
    assert torch.equal(final, torch.cat((state[..., 2:], x.transpose(1, 2)), -1))


@pytest.mark.parametrize("dtype", [torch.float64, SINGLE, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 6])
def test_update_continues_the_sequence(dtype: torch.dtype, size: int) -> None:
    x, weight, bias, _ = inputs(2, 12, 21, 4, SINGLE)
    x, weight, bias = x.transpose(1, 2).to(dtype), weight.to(dtype), bias.to(dtype)
    want = causal_conv1d_fn(x, weight, bias, activation="silu")
    state = torch.zeros(2, 21, size, dtype=dtype)
    outs = [causal_conv1d_update(x[..., t], state, weight, bias, "silu") for t in range(5)]
    outs += [causal_conv1d_update(x[..., 5:6], state, weight, bias, "silu")[..., 0]]
    outs += causal_conv1d_update(x[..., 6:], state, weight, bias, "silu").unbind(-1)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(torch.stack(outs, -1), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(state, x[..., -size:])


def test_update_of_chosen_states_and_padding() -> None:
    x, weight, bias, _ = inputs(3, 2, 21, 4)
    pool = torch.randn(5, 21, 3, dtype=x.dtype)
    for steps in (1, 2):
        state, now = pool.clone(), x.transpose(1, 2)[..., :steps].contiguous()
        out = causal_conv1d_update(
            now, state, weight, bias, conv_state_indices=torch.tensor([4, -1, 0])
        )
        own = pool[[4, 0]]
        want = causal_conv1d_update(now[[0, 2]], own, weight, bias)
        torch.testing.assert_close(out[[0, 2]], want)
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        torch.testing.assert_close(state[[4, 0]], own)
        assert torch.equal(state[1:4], pool[1:4])


def test_update_of_a_circular_buffer() -> None:
    x, weight, bias, _ = inputs(2, 9, 3, 4)
    x = x.transpose(1, 2)
    want = causal_conv1d_fn(x, weight, bias)
    state, counts, outs = torch.zeros(2, 3, 5, dtype=x.dtype), torch.tensor([0, 0]), []
    for size in (1, 3, 1, 4):
        begin = int(counts[0])
        part = x[..., begin : begin + size]
        outs.append(causal_conv1d_update(part, state, weight, bias, None, counts))
        counts = counts + size
    torch.testing.assert_close(torch.cat(outs, -1), want)
    assert torch.equal(state[..., 8 % 5], x[..., 8])


def test_update_is_differentiable_where_a_gradient_is_asked_for() -> None:
    x, weight, bias, state = inputs(2, 1, 5, 4)
    leaf, moved = weight.clone().requires_grad_(), state.clone()
    out = causal_conv1d_update(x[:, 0], moved, leaf, bias, "silu")
    with torch.no_grad():
        again = state.clone()
        assert torch.equal(again, state)
        torch.testing.assert_close(out, causal_conv1d_update(x[:, 0], again, weight, bias, "silu"))
        assert torch.equal(moved, again)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    weight = weight.clone().requires_grad_()
    full = causal_conv1d_fn(x.transpose(1, 2), weight, bias, None, state, activation="silu")
    torch.testing.assert_close(grad, torch.autograd.grad(full.sum(), weight)[0])


def test_update_compiles() -> None:
    x, weight, bias, state = inputs(2, 1, 5, 4, SINGLE)
    own, other = state.clone(), state.clone()
    compiled = torch.compile(causal_conv1d_update, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(x[:, 0], own, weight, bias, "silu"),
        causal_conv1d_update(x[:, 0], other, weight, bias, "silu"),
    )
    assert torch.equal(own, other)
    assert not torch.equal(own, state)


def test_agrees_with_transformers() -> None:
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    x, weight, bias, state = inputs(2, 20, 5, 4, SINGLE)
    x = x.transpose(1, 2)
    want = mamba.causal_conv1d_fn.__wrapped__(x, weight, bias, "silu")
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, activation="silu"), want)
    own, other = state.clone(), state.clone()
    want = mamba.causal_conv1d_update.__wrapped__(x[..., :1], other, weight, bias, "silu")
    torch.testing.assert_close(causal_conv1d_update(x[..., :1], own, weight, bias, "silu"), want)
    assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3)}, r"x must have axes \(B, D, L\); got shape \(2, 3\)"),
        ({"weight": torch.ones(4, 4)}, r"weight must have shape \(D, W\) = \(3, 4\); got \(4, 4\)"),
        ({"weight": torch.ones(3)}, r"weight must have axes \(D, W\), W >= 1; got \(3,\)"),
        ({"bias": torch.ones(4)}, r"bias must have shape \(D\) = \(3,\); got \(4,\)"),
        ({"activation": "gelu"}, r"activation must be None, 'silu' or 'swish'; got 'gelu'"),
        ({"seq_idx": torch.ones(2, 5)}, r"seq_idx must have dtype int32 or int64; got"),
        (
            {"seq_idx": torch.zeros(2, 5, dtype=torch.int32), "return_final_states": True},
            "seq_idx must be None with initial_states or return_final_states",
        ),
        ({"initial_states": torch.ones(2, 3, 4)}, r"initial_states must have shape"),
        ({"final_states_out": torch.ones(2, 3, 3)}, "final_states_out needs return_final_states"),
        ({"x": torch.ones(2, 3, 5, device="meta")}, "x must be on the CPU"),
        ({"x": torch.full((2, 3, 5), torch.nan), "check": True}, "x must be finite"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.ones(2, 3, 5), "weight": torch.ones(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        causal_conv1d_fn(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_state": torch.ones(2, 3, 2)}, r"conv_state must have axes \(B, D, K\), K >= W - 1"),
        ({"conv_state": torch.ones(3, 3, 3)}, r"conv_state must have shape"),
        (
            {"conv_state_indices": torch.tensor([0, 2])},
            r"conv_state_indices must be different numbers below the 2 states",
        ),
        ({"conv_state_indices": torch.tensor([1, 1])}, r"conv_state_indices must be different"),
        ({"cache_seqlens": torch.ones(2)}, r"cache_seqlens must have dtype int32 or int64"),
    ],
)
def test_bad_update(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.ones(2, 3), "conv_state": torch.ones(2, 3, 3)} | change
    with pytest.raises(ValueError, match=message):
        causal_conv1d_update(**arguments, weight=torch.ones(3, 4))
