"""The average of the weights: what it is, where it takes their place, and that training goes on.

tests/training/test_state.py kills and resumes runs that keep one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrec.checkpoint.checkpoint import load_model
from mmrec.checkpoint.header import open_checkpoint
from mmrec.data.corpus import Corpus
from mmrec.evaluation.evaluate import Evaluation, evaluate
from mmrec.inference.weights import read_parameters
from mmrec.training.callbacks import Callback
from mmrec.training.setup import initialize_trainer
from mmrec.training.trainer import Trainer
from tests.conftest import make_trainer
from tests.training.test_trainer import losses


def trained(corpus: Corpus, folder: Path, **settings: Any) -> tuple[Trainer, list[list[Tensor]]]:
    """A run that has ended, and its weights after each step."""
    trainer = make_trainer(corpus, folder, **settings)
    train_step, history = trainer.train_step, []

    def record() -> tuple[float, float, float]:
        result = train_step()
        history.append([p.detach().clone() for p in trainer.model.parameters()])
        return result

    trainer.train_step = record  # type: ignore[method-assign]
    trainer.fit()
    return trainer, history


def averages_of(history: list[list[Tensor]], decay: float) -> list[Tensor]:
    """The average after the last step, by its definition in float64."""
    averages = [x.double() for x in history[0]]
    for n, weights in enumerate(history[1:], 1):
        d = min(decay, (1 + n) / (10 + n))
        averages = [d * a + (1 - d) * x.double() for a, x in zip(averages, weights, strict=True)]
    return averages


def test_checkpoints_hold_the_average_and_training_goes_on_as_without_it(
    corpus: Corpus, tmp_path: Path
) -> None:
    """The decay is reached after eight of twelve steps. Generation reads the average as well."""
    settings = {"save_every": 4, "keep_checkpoints": 3}
    plain, _ = trained(corpus, tmp_path / "plain", **settings)
    trainer, history = trained(corpus, tmp_path / "run", ema_decay=0.5, **settings)
    assert losses(tmp_path / "plain") == losses(tmp_path / "run")
    for p, q in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(p, q)
    for step in (4, 8, 12):
        path = tmp_path / f"run/step-{step}.h5"
        loaded = load_model(path).model
        with open_checkpoint(path) as file:
            for_generation = read_parameters(file, loaded.config, None)
        pairs = zip(loaded.named_parameters(), averages_of(history[:step], 0.5), strict=True)
        for (name, p), average in pairs:
            torch.testing.assert_close(p.double(), average, rtol=0, atol=1e-6)
            assert torch.equal(p, torch.from_numpy(for_generation[name]))
        raw = make_trainer(corpus, tmp_path / "raw", ema_decay=0.5)
        raw.restore(path)
        for p, q in zip(raw.model.parameters(), history[step - 1], strict=True):
            assert torch.equal(p, q)


class Scores(Callback):
    """Scores the model that it is given at each validation."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []

    def on_validation(self, trainer: Trainer, scores: Evaluation) -> None:
        eot = trainer.corpus.tokenizer.eot
        again = evaluate(trainer.model, trainer.subset, eot, trainer.subset_bytes)
        self.pairs.append((again.loss, scores.loss))


def test_the_average_is_what_is_validated(corpus: Corpus, tmp_path: Path) -> None:
    """In the log, the best model, the table of epochs, and the model that callbacks see."""
    scores = Scores()
    settings: dict[str, Any] = {"schedule": "constant", "callbacks": [scores]}
    trainer, history = trained(corpus, tmp_path, ema_decay=0.5, **settings)
    assert len(scores.pairs) == 3
    assert all(a == b for a, b in scores.pairs)
    averaged, val = load_model(tmp_path / "best.h5").model, corpus.val
    assert trainer.progress.best_step == len(history) == 12
    for p, average in zip(averaged.parameters(), averages_of(history, 0.5), strict=True):
        torch.testing.assert_close(p.double(), average, rtol=0, atol=1e-6)
    eot = corpus.tokenizer.eot
    whole = evaluate(averaged, val.tokens, eot, val.n_bytes).loss
    assert trainer.progress.epochs[-1]["val_loss"] == pytest.approx(whole, abs=1e-6)
    of_the_weights = evaluate(trainer.model, val.tokens, eot, val.n_bytes).loss
    assert abs(of_the_weights - whole) > 1e-3
    log = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in log if x["kind"] == "val"] == [b for _, b in scores.pairs]
    told = "\n".join(trainer.lines)  # type: ignore[attr-defined]
    assert "average the weights of about 2 steps" in told


def test_another_run_begins_from_the_average(
    corpus: Corpus, tmp_path: Path, run_command: Callable[..., tuple[str, str]]
) -> None:
    """Its own average begins anew, so its first checkpoint holds what it began from."""
    trained(corpus, tmp_path / "source", ema_decay=0.5)
    source = load_model(tmp_path / "source/last.h5")
    out, _ = run_command(tmp_path, "info", "source", "--json")
    parts = json.loads(out)["bytes"]["training"]
    assert parts["average"] == parts["weights"]
    trainer = make_trainer(
        corpus, tmp_path / "run", ema_decay=0.9, steps=2, initialize_from=str(source.path)
    )
    initialize_trainer(trainer, source)
    trainer.fit()
    start, end = (load_model(tmp_path / f"run/{n}.h5").model for n in ("step-0", "last"))
    for a, b, c in zip(*(m.parameters() for m in (start, source.model, end)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_only_what_learns_is_averaged(corpus: Corpus, tmp_path: Path) -> None:
    """With LoRA the factors; best.h5 has their averages merged, last.h5 beside the weights."""
    trained(corpus, tmp_path / "source")
    source = load_model(tmp_path / "source/best.h5")
    settings = {"initialize_from": str(source.path), "lora_rank": 2, "ema_decay": 0.9}
    trainer = make_trainer(corpus, tmp_path / "run", steps=8, eval_every=8, **settings)
    initialize_trainer(trainer, source)
    trainer.fit()
    learns = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.average.values.keys() == learns
    with open_checkpoint(tmp_path / "run/last.h5") as file:
        raw: set[str] = set()
        file["raw"].visit(raw.add)
        assert raw == learns
    best, last = (load_model(tmp_path / f"run/{n}.h5").model for n in ("best", "last"))
    for p, q in zip(best.parameters(), last.parameters(), strict=True):
        assert torch.equal(p, q)
    with trainer.average.swapped():
        tokens = torch.tensor([[1, 2, 3]])
        expected = trainer.model.eval()(tokens)[0]
    torch.testing.assert_close(last(tokens)[0], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(trainer.model(tokens)[0], expected, rtol=0, atol=1e-4)
