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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GatedRecurrence(4, 6, blocks=4), "blocks must divide hidden_size 6; got 4"),
        (lambda: GatedDeltaRule(4, 6, 4), "num_heads must divide hidden_size 6; got 4"),
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
