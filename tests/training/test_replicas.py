"""Replicas: the gradients of a single thread, in a fixed order; errors reach the caller."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mmrec.config import MAX_DENSE_ROWS
from mmrec.model import Model
from mmrec.runtime.distributed import ProcessGroup
from mmrec.training.replicas import Replicas, forward_backward
from tests.conftest import SMALL


def loss_and_gradients(
    count: int, dropout: float = 0.0, scale: float = 1.0
) -> tuple[float, list[torch.Tensor]]:
    """Run a fixed model on a fixed batch of five rows, divided over ``count`` replicas."""
    torch.manual_seed(3)
    model = Model(replace(SMALL, dropout=dropout, vocab_size=64))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(64, (5, 33))
    loss, _ = forward_backward(model, Replicas(count), tokens[:, :-1], tokens[:, 1:], scale)
    return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("count", [2, 3])
def test_replicas_compute_what_one_thread_computes(count: int) -> None:
    """Also if the batch of five rows cannot be divided evenly."""
    (loss, gradients), (replica_loss, replica_gradients) = (
        loss_and_gradients(1),
        loss_and_gradients(count),
    )
    assert replica_loss == pytest.approx(loss, rel=1e-5)
    for a, b in zip(gradients, replica_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)


def test_sparse_gradients_add_up_to_dense_ones() -> None:
    """Over two batches, each divided over three replicas."""
    torch.manual_seed(3)
    model = Model(replace(SMALL, vocab_size=64, ngram_buckets=MAX_DENSE_ROWS + 1))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    batches = torch.randint(64, (2, 5, 33))
    gradients = []
    for model.sparse_gradients in (False, True):
        model.zero_grad(set_to_none=True)
        for tokens in batches:
            forward_backward(model, Replicas(3), tokens[:, :-1], tokens[:, 1:])
        assert model.ngram_embedding.grad is not None
        assert model.ngram_embedding.grad.is_sparse == model.sparse_gradients
        gradients.append([p.grad.to_dense() for p in model.parameters() if p.grad is not None])
    for dense, sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=2e-4, atol=1e-6)


def test_equal_seeds_give_equal_bits_with_dropout() -> None:
    loss, gradients = loss_and_gradients(2, dropout=0.3)
    loss_again, gradients_again = loss_and_gradients(2, dropout=0.3)
    assert loss == loss_again != loss_and_gradients(2)[0]
    assert all(map(torch.equal, gradients, gradients_again))


def test_scale_multiplies_the_gradients_and_not_the_loss() -> None:
    loss, gradients = loss_and_gradients(2)
    same_loss, half_gradients = loss_and_gradients(2, scale=0.5)
    assert loss == same_loss
    for gradient, half in zip(gradients, half_gradients, strict=True):
        torch.testing.assert_close(gradient / 2, half)


def test_documents_and_carried_states_do_not_depend_on_the_number_of_replicas() -> None:
    torch.manual_seed(3)
    model = Model(replace(SMALL, vocab_size=8, layer_types="nbsl", depth=4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(8, (2, 5, 17))
    results = []
    for count in (1, 3):
        model.zero_grad(set_to_none=True)
        state, losses = None, []
        for chunk in tokens:
            loss, state = forward_backward(
                model, Replicas(count), chunk[:, :-1], chunk[:, 1:], state=state, end_of_text=0
            )
            losses.append(loss)
        assert state is not None
        layer_states = [x for layer in state.layers for x in layer if x is not None]
        assert not any(x.requires_grad for x in layer_states)
        results.append(
            [
                torch.tensor(losses),
                state.recent_tokens,
                *layer_states,
                *(p.grad for p in model.parameters()),
            ]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5)


def test_replicas_run_side_by_side_on_one_thread_each() -> None:
    threads = torch.get_num_threads()
    barrier = threading.Barrier(2)
    meet: Callable[[], object] = lambda: barrier.wait(10) >= 0  # noqa: E731
    replicas = Replicas(2)
    assert replicas.run([meet, meet]) == [True, True]
    assert replicas.run([torch.get_num_threads]) == [1]
    assert torch.get_num_threads() == threads


def test_an_error_in_a_replica_is_raised_after_the_others_have_ended() -> None:
    ended = []

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Replicas(2).run([fail, lambda: ended.append(1)])
    assert ended == [1]


def test_two_processes_compute_what_two_replicas_compute() -> None:
    """Each process draws the dropout mask that the replica of the same rows would draw."""
    torch.manual_seed(3)
    model = Model(replace(SMALL, dropout=0.3, vocab_size=64))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, y = torch.randint(64, (2, 4, 16))

    def loss_and_gradients_of(count: int, *groups: ProcessGroup) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        losses, random_states = [], []
        for group in groups:
            torch.manual_seed(5)
            rows = slice(group.rank * 4 // group.size, (group.rank + 1) * 4 // group.size)
            loss, _ = forward_backward(
                model, Replicas(count), x[rows], y[rows], 1 / group.size, process_group=group
            )
            losses.append(loss)
            random_states.append(torch.get_rng_state())
        assert all(torch.equal(s, random_states[0]) for s in random_states)
        return [torch.tensor(losses).mean(), *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    processes = [ProcessGroup(), ProcessGroup()]
    for rank, group in enumerate(processes):
        group.rank, group.size = rank, 2  # type: ignore[misc]
    in_replicas = loss_and_gradients_of(2, ProcessGroup())
    in_processes = loss_and_gradients_of(1, *processes)
    for a, b in zip(in_replicas, in_processes, strict=True):
        torch.testing.assert_close(a, b)
