"""Replicas: the same gradients as one thread's, in one order, and errors that are not lost."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mmrec.model import Model
from mmrec.runtime.distributed import ProcessGroup
from mmrec.training.replicas import Replicas, forward_backward
from tests.conftest import SMALL


def made(count: int, dropout: float = 0.0, share: float = 1.0) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(3)
    model = Model(replace(SMALL, dropout=dropout, vocab_size=64))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(64, (5, 33))
    loss, _ = forward_backward(model, Replicas(count), tokens[:, :-1], tokens[:, 1:], share)
    return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("count", [2, 3])
def test_replicas_add_up_to_one_thread(count: int) -> None:
    """Also where a batch of five does not divide."""
    (one, alone), (many, together) = made(1), made(count)
    assert many == pytest.approx(one, rel=1e-5)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)


def test_the_bits_and_the_dropout_are_those_of_the_seed() -> None:
    (one, first), (two, again) = made(2, dropout=0.3), made(2, dropout=0.3)
    assert one == two != made(2)[0]
    assert all(map(torch.equal, first, again))


def test_a_share_scales_gradients_not_the_loss() -> None:
    (one, whole), (two, half) = made(2), made(2, share=0.5)
    assert one == two
    for a, b in zip(whole, half, strict=True):
        torch.testing.assert_close(a / 2, b)


def test_texts_and_carried_states_do_not_depend_on_the_replicas() -> None:
    torch.manual_seed(3)
    model = Model(replace(SMALL, vocab_size=8, layer_types="nbsl", depth=4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(8, (2, 5, 17))
    found = []
    for count in (1, 3):
        model.zero_grad(set_to_none=True)
        state, losses = None, []
        for piece in tokens:
            loss, state = forward_backward(
                model, Replicas(count), piece[:, :-1], piece[:, 1:], state=state, end_of_text=0
            )
            losses.append(loss)
        assert state is not None
        memories = [x for layer in state.layers for x in layer if x is not None]
        assert not any(x.requires_grad for x in memories)
        found.append(
            [
                torch.tensor(losses),
                state.recent_tokens,
                *memories,
                *(p.grad for p in model.parameters()),
            ]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5)


def test_replicas_run_side_by_side_on_one_thread_each() -> None:
    before = torch.get_num_threads()
    both = threading.Barrier(2)
    tasks: list[Callable[[], object]] = [lambda: both.wait(10) >= 0, torch.get_num_threads]
    replicas = Replicas(2)
    assert replicas.run([tasks[0], tasks[0]]) == [True, True]
    assert replicas.run([tasks[1]]) == [1]
    assert torch.get_num_threads() == before


def test_an_error_in_a_replica_comes_out_when_the_others_have_ended() -> None:
    ended = []

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Replicas(2).run([fail, lambda: ended.append(1)])
    assert ended == [1]


def test_processes_of_one_replica_add_up_to_replicas() -> None:
    """Dropout included: each draws what its replica would have drawn."""
    torch.manual_seed(3)
    model = Model(replace(SMALL, dropout=0.3, vocab_size=64))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, y = torch.randint(64, (2, 4, 16))

    def found(count: int, *groups: ProcessGroup) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        losses, states = [], []
        for group in groups:
            torch.manual_seed(5)
            rows = slice(group.rank * 4 // group.size, (group.rank + 1) * 4 // group.size)
            loss, _ = forward_backward(
                model, Replicas(count), x[rows], y[rows], 1 / group.size, process_group=group
            )
            losses.append(loss)
            states.append(torch.get_rng_state())
        assert all(torch.equal(s, states[0]) for s in states)
        return [torch.tensor(losses).mean(), *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    two = [ProcessGroup(), ProcessGroup()]
    for rank, group in enumerate(two):
        group.rank, group.size = rank, 2  # type: ignore[misc]
    for a, b in zip(found(2, ProcessGroup()), found(1, *two), strict=True):
        torch.testing.assert_close(a, b)
