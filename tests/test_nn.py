"""Modules against the interface of torch.nn.GRU: shapes, states, packed sequences, learning."""

import pytest
import torch
from torch import nn

from mmrec.nn import GatedDeltaRule, GatedRecurrence


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_shapes_are_those_of_gru(batch_first: bool, batched: bool) -> None:
    shape = ((3, 7, 5) if batch_first else (7, 3, 5)) if batched else (7, 5)
    x = torch.randn(shape)
    ours = GatedRecurrence(5, 8, 2, batch_first=batch_first)
    theirs = nn.GRU(5, 8, 2, batch_first=batch_first)
    for got, want in zip(ours(x), theirs(x), strict=True):
        assert got.shape == want.shape
    out, state = GatedDeltaRule(5, 8, 2, batch_first=batch_first)(x)
    assert out.shape == theirs(x)[0].shape
    assert state.shape == ((3, 2, 4, 4) if batched else (2, 4, 4))


MODULES = [
    lambda: GatedRecurrence(5, 8, 2, batch_first=True, blocks=2),
    lambda: GatedDeltaRule(5, 8, 2, batch_first=True),
]


@pytest.mark.parametrize("make", MODULES)
def test_state_carries_over_and_packed_sequences_are_independent(make: object) -> None:
    module = make()  # type: ignore[operator]
    x = torch.randn(2, 9, 5)
    want, want_state = module(x)
    first, state = module(x[:, :4])
    second, state = module(x[:, 4:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), want)
    torch.testing.assert_close(state, want_state)
    time_first = make()  # type: ignore[operator]
    time_first.load_state_dict(module.state_dict())
    time_first.batch_first = False
    torch.testing.assert_close(time_first(x.transpose(0, 1))[0].transpose(0, 1), want)
    packed, states = module(x.reshape(1, 18, 5), cu_seqlens=torch.tensor([0, 9, 18]))
    torch.testing.assert_close(packed.reshape(want.shape), want)
    torch.testing.assert_close(states, want_state)
    alone, state = module(x[0])
    torch.testing.assert_close(alone, want[0])
    axis = 0 if isinstance(module, GatedDeltaRule) else 1  # of the batch in the state
    torch.testing.assert_close(module(x[1], state)[0], module(x[1:], state.unsqueeze(axis))[0][0])


def test_it_learns_to_recall_the_first_input() -> None:
    """The answer at the end is the sign seen six steps before."""
    module, head = GatedRecurrence(1, 16, batch_first=True), nn.Linear(16, 1)
    optimizer = torch.optim.AdamW([*module.parameters(), *head.parameters()], 2e-2)
    for _ in range(100):
        x = torch.randn(64, 6, 1)
        answer = (x[:, :1] > 0).float().squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(head(module(x)[1][-1]), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.35  # guessing costs ln 2 = 0.69


DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error of each, as a share of the largest value."""


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", MODULES)
def test_dtypes_and_autocast_are_those_of_gru(make: object, autocast: torch.dtype | None) -> None:
    """What nn.GRU takes is taken, what it refuses is refused, and outputs have its dtypes."""
    for weights in DTYPES:
        for dtype in DTYPES:
            module, gru = make().to(weights), nn.GRU(5, 8, batch_first=True).to(weights)  # type: ignore[operator]
            x = torch.randn(2, 6, 5).to(dtype).requires_grad_()
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                try:
                    want_dtype = gru(x)[0].dtype
                except (ValueError, RuntimeError):
                    with pytest.raises(ValueError, match="input must have the dtype of the weig"):
                        module(x)
                    continue
                got = module(x)
            assert got[0].dtype == want_dtype
            assert got[1].dtype == (dtype if dtype == torch.float64 else torch.float32)
            parameters = [x, *module.parameters()]
            exact = make().double()  # type: ignore[operator]
            exact.load_state_dict(module.state_dict())
            exact_x = x.detach().double().requires_grad_()
            want = exact(exact_x)
            sums = [out.double().cos().sum() + state.double().sum() for out, state in (got, want)]
            got += torch.autograd.grad(sums[0], parameters)
            want += torch.autograd.grad(sums[1], [exact_x, *exact.parameters()])
            coarsest = max(DTYPES[dtype], DTYPES[weights])
            if autocast and dtype != torch.float64:
                coarsest = max(coarsest, DTYPES[autocast])
            for actual, expected in zip(got, want, strict=True):
                error = (actual.double() - expected).abs().max() / expected.abs().max()
                assert error < coarsest, (weights, dtype, autocast)
            for gradient, p in zip(got[2:], parameters, strict=True):
                assert gradient.dtype == p.dtype


@pytest.mark.parametrize("make", MODULES)
def test_compiled_under_autocast(make: object) -> None:
    torch._dynamo.reset()
    module, x = make(), torch.randn(2, 6, 5)  # type: ignore[operator]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(x), module(x)
        got[0].sum().backward()
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", None])
@pytest.mark.parametrize(
    "call",
    [
        lambda v: GatedRecurrence(input_size=v, hidden_size=8),
        lambda v: GatedRecurrence(input_size=4, hidden_size=v),
        lambda v: GatedRecurrence(4, 8, num_layers=v),
        lambda v: GatedRecurrence(4, 8, blocks=v),
        lambda v: GatedDeltaRule(input_size=v, hidden_size=8),
        lambda v: GatedDeltaRule(input_size=4, hidden_size=v),
        lambda v: GatedDeltaRule(4, 8, num_heads=v),
    ],
)
def test_a_size_is_a_whole_number_of_at_least_one(call: object, value: object) -> None:
    is_number = type(value) is int
    rule = f">= 1; got {value}" if is_number else f"a whole number .int.; got {value!r}"
    with pytest.raises(ValueError if is_number else TypeError, match=rf"^[a-z_]+ must be {rule}"):
        call(value)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 1.5}, ValueError, "dropout must be a number in .0, 1.; got 1.5"),
        ({"dropout": -0.1}, ValueError, "got -0.1"),
        ({"dropout": float("nan")}, ValueError, "got nan"),
        ({"dropout": True}, TypeError, "dropout must be a number .*; got True .bool."),
        ({"dropout": "0.1"}, TypeError, "got '0.1' .str."),
        ({"batch_first": 1}, TypeError, "batch_first must be True or False; got 1 .int."),
    ],
)
def test_other_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GatedRecurrence(4, 8, 2, **options)  # type: ignore[arg-type]
    if "batch_first" in options:
        with pytest.raises(error, match=message):
            GatedDeltaRule(4, 8, **options)  # type: ignore[arg-type]


def test_dropout_without_a_second_layer_is_warned_of_as_by_gru() -> None:
    for make in (nn.GRU, GatedRecurrence):
        with pytest.warns(UserWarning, match="dropout"):
            make(4, 8, dropout=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GatedRecurrence(4, 6, blocks=4), "blocks must divide hidden_size 6; got 4"),
        (lambda: GatedDeltaRule(4, 6, 4), "num_heads must divide hidden_size 6; got 4"),
        (lambda: GatedRecurrence(4, 6)(None), "input must be a tensor; got NoneType"),
        (lambda: GatedRecurrence(4, 6)(torch.ones(2, 3)), r"with I = 4; got \(2, 3\)"),
        (
            lambda: GatedRecurrence(4, 6)(torch.ones(2, 3, 4), torch.ones(3, 6)),
            r"hx must have shape \(num_layers, N, D\); got \(3, 6\)",
        ),
        (
            lambda: GatedDeltaRule(4, 6, 2)(torch.ones(2, 3, 4), torch.ones(3, 6)),
            r"initial_state must have shape",
        ),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
