"""Layers computed again in backward: the same bits, for a part of the memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mmrec.data.corpus import Corpus
from mmrec.model import Model
from mmrec.training.replicas import Replicas, forward_backward
from tests.conftest import SMALL, make_trainer


def learn(
    checkpointing: bool,
    replicas: int,
    precision: str,
    dropout: float,
    end_of_text: int | None,
) -> list[Tensor]:
    """Losses, gradients and the carried state of two batches that follow each other."""
    torch.manual_seed(3)
    config = replace(
        SMALL, vocab_size=8, layer_types="nbsl", depth=4, dropout=dropout, ngram_buckets=16
    )
    model = Model(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.set_precision(precision)
    model.activation_checkpointing = checkpointing
    tokens, state, losses = torch.randint(8, (2, 5, 17)), None, []
    for piece in tokens:
        loss, state = forward_backward(
            model,
            Replicas(replicas),
            piece[:, :-1],
            piece[:, 1:],
            state=state,
            end_of_text=end_of_text,
        )
        losses.append(loss)
    assert state is not None
    memories = [x for layer in state.layers for x in layer if x is not None]
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return [torch.tensor(losses, dtype=torch.float64), *memories, *found, torch.rand(3)]


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("dropout", "end_of_text"), [(0.0, None), (0.3, None), (0.3, 0)])
def test_the_bits_are_the_same(
    replicas: int, precision: str, dropout: float, end_of_text: int | None
) -> None:
    """Losses, gradients, state and the random numbers after them."""
    plain = learn(False, replicas, precision, dropout, end_of_text)
    again = learn(True, replicas, precision, dropout, end_of_text)
    assert all(map(torch.equal, plain, again))


def test_dropout_from_the_global_generator() -> None:
    torch.manual_seed(0)
    model = Model(replace(SMALL, dropout=0.3))
    x, found = torch.randint(200, (2, 9)), []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(5)
        loss, _ = model.loss(x, x)
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters()]), torch.rand(2)])
    assert all(map(torch.equal, *found))


def test_the_callers_generator_stands_where_it_stood() -> None:
    model = Model(replace(SMALL, dropout=0.3))
    x, found = torch.randint(200, (2, 9)), []
    for model.activation_checkpointing in (False, True):
        generator = torch.Generator().manual_seed(5)
        model.loss(x, x, generator=generator)[0].backward()
        found.append(generator.get_state())
    assert torch.equal(*found)


def test_only_inputs_are_kept() -> None:
    """All that forward saves in the layers, but their inputs and states, is gone."""
    model, x = Model(replace(SMALL, depth=6)), torch.randint(200, (4, 64))
    kept = []
    for model.activation_checkpointing in (False, True):
        sizes: dict[int, int] = {}

        def note(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(note, lambda t: t):
            model.hidden_states(x)
        kept.append(sum(sizes.values()) - sum(4 * p.numel() for p in model.parameters()))
    assert kept[1] < kept[0] / 5


def test_frozen_layers_and_scoring_need_nothing(corpus: Corpus, tmp_path: Path) -> None:
    """A whole run, with its validations and checkpoints, has the same log."""
    logs = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        settings = {"freeze": "embeddings,layers:0", "state": "carry", "steps": 6}
        settings["activation_checkpointing"] = checkpointing
        make_trainer(corpus, folder, **settings).fit()
        logs.append((folder / "metrics.jsonl").read_text())
    assert logs[0] == logs[1]
