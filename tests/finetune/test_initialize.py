"""Runs that start from a checkpoint: moments and their age, freezing, replay, resuming."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrec.checkpoint import manager as saved
from mmrec.checkpoint.checkpoint import load_model, open_moments
from mmrec.config import TrainConfig
from mmrec.data.corpus import Corpus
from mmrec.data.dataloader import ReplayLoader, WindowLoader
from mmrec.errors import InputError
from mmrec.finetune.grow import Growth
from mmrec.finetune.start import freeze, grow_checkpoint
from mmrec.model import Model
from mmrec.training.trainer import Trainer, train
from tests.conftest import SMALL, make_trainer

LARGE = replace(SMALL, width=48, depth=3, layer_types="sbb", ffn_multiplier=2.5, dropout=0.1)


@pytest.fixture(scope="module")
def source(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The end of a run of 12 steps, with its moments."""
    folder = tmp_path_factory.mktemp("source") / "run"
    train(make_trainer(corpus, folder))
    return folder / "last.h5"


def grown_trainer(corpus: Corpus, folder: Path, source: Path, **settings: object) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    plain = make_trainer(corpus, folder, grow_from=str(source), **settings)
    return Trainer(folder, corpus, LARGE, plain.config, "tiny", lambda line: None)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path).model.named_parameters())


def read_moments(path: Path, model: Model) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
    with open_moments(path, model) as (kept, steps):
        return dict(kept), steps


def test_a_cut_run_of_a_grown_model_goes_on_bit_for_bit(
    corpus: Corpus, source: Path, tmp_path: Path
) -> None:
    """Its moments came with their age, which AdamW counts in, and are found again with it."""
    whole = grown_trainer(corpus, tmp_path / "whole", source, keep=3)
    whole.start_from(load_model(source))
    assert whole.progress.aged == 12
    assert {float(s["step"]) for s in whole.optimizer.state.values()} == {12.0}
    train(whole)
    for kept in ("step-0.h5", "step-5.h5"):
        cut = tmp_path / kept
        cut.mkdir()
        for name in (kept, "config.toml"):
            shutil.copy(tmp_path / "whole" / name, cut)
        train(grown_trainer(corpus, cut, source), resume=True)
        want, got = (weights(run / "last.h5") for run in (tmp_path / "whole", cut))
        assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_run_that_was_never_saved_again_has_its_start(
    corpus: Corpus, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are on the disk before anything that a resume would take for a run."""
    trainer = grown_trainer(corpus, tmp_path / "run", source)
    trainer.start_from(load_model(source))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmrec.training.trainer.write_text", die)
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    assert not (tmp_path / "run/config.toml").exists()
    kept = weights(tmp_path / "run/step-0.h5")
    assert all(torch.equal(kept[n], p) for n, p in trainer.model.named_parameters())


def test_without_its_start_a_run_is_not_resumed(
    corpus: Corpus, source: Path, tmp_path: Path
) -> None:
    trainer = grown_trainer(corpus, tmp_path / "run", source)
    (tmp_path / "run/config.toml").touch()
    with pytest.raises(InputError, match="lost its checkpoints"):
        train(trainer, resume=True)


def test_a_grown_file_can_be_grown_again(source: Path, tmp_path: Path) -> None:
    """Twice in two files is the same function, and the moments keep their age."""
    middle, end = tmp_path / "middle.h5", tmp_path / "end.h5"
    between = replace(LARGE, depth=2, layer_types="sb")
    grow_checkpoint(load_model(source), between, middle, name="m", how="preserve", seed=1)
    grow_checkpoint(load_model(middle), LARGE, end, name="e", how="preserve", seed=2)
    first, last = load_model(source), load_model(end)
    assert last.info["preset"] == "e"
    x = torch.arange(100)[None]
    with torch.no_grad():
        assert (first.model(x)[0] - last.model(x)[0]).abs().max() < 1e-4
    moments, steps = read_moments(end, last.model)
    assert steps == 12
    before, _ = read_moments(source, first.model)
    growth = Growth(first.model.config, LARGE)
    c = growth.c
    torch.testing.assert_close(
        moments["embedding"]["exp_avg"][:, :32], before["embedding"]["exp_avg"] / c
    )
    torch.testing.assert_close(
        moments["embedding"]["exp_avg_sq"][:, :32], before["embedding"]["exp_avg_sq"] / c**2
    )
    anew = tmp_path / "anew.h5"
    grow_checkpoint(first, LARGE, anew, name="r", how="random", seed=0)
    assert read_moments(anew, load_model(anew).model) == ({}, 0)
    best = source.with_name("best.h5")
    assert read_moments(best, load_model(best).model) == ({}, 0)


@pytest.mark.parametrize(
    ("what", "frozen"),
    [
        ("embeddings", {"embedding"}),
        ("layers:1", {"layers.1."}),
        ("layers:0-0,embeddings", {"layers.0.", "embedding"}),
        (
            "memory",
            {
                ".conv_weight",
                ".project",
                ".decay",
                ".memory",
                ".recurrent",
                "recurrence_norm",
                "delta_norm",
                ".merge",
            },
        ),
    ],
)
def test_what_is_frozen_stays_and_the_rest_moves(
    corpus: Corpus, tmp_path: Path, what: str, frozen: set[str]
) -> None:
    trainer = make_trainer(corpus, tmp_path / "run", freeze=what, steps=3)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    train(trainer)
    for name, p in trainer.model.named_parameters():
        stays = any(part in name for part in frozen)
        assert torch.equal(before[name], p) == stays, name


@pytest.mark.parametrize(
    "what", ["heads", "layers:", "layers:2", "layers:1-0", "embeddings,layers:0-1", "layers:-1"]
)
def test_a_wrong_freeze_is_refused(what: str) -> None:
    with pytest.raises(InputError, match="freeze must"):
        freeze(Model(SMALL), what)


def test_lower_layers_learn_at_lower_rates(corpus: Corpus, tmp_path: Path) -> None:
    """With a decay of nearly nothing only the top layer and the last norm move."""
    trainer = make_trainer(corpus, tmp_path / "half", layer_decay=0.5)
    model, peaks = trainer.model, {}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            peaks[p] = group["peak"] / (0.02 if group["use_muon"] else 0.01)
    assert len(peaks) == len(list(model.parameters()))
    wanted = {"embedding": 0.25, "layers.0": 0.5, "layers.1": 1.0, "norm.weight": 1.0}
    for name, p in model.named_parameters():
        assert peaks[p] == next(v for k, v in wanted.items() if name.startswith(k)), name
    trainer = make_trainer(corpus, tmp_path / "top", layer_decay=1e-12, steps=3)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    train(trainer)
    for name, p in trainer.model.named_parameters():
        moved = float((p - before[name]).detach().abs().max())
        assert (moved > 1e-5) == name.startswith(("layers.1", "norm")), name


def test_a_share_of_the_windows_is_old() -> None:
    new = WindowLoader(np.zeros(4000, np.uint16), 8, 10, seed=0)
    old = WindowLoader(np.ones(900, np.uint16), 8, 10, seed=0)
    mixed = ReplayLoader(new, old, 0.2)
    shares = []
    for step in range(mixed.steps_per_epoch):
        x, y = mixed.batch_at(step)
        assert x.shape == y.shape == (8, 10)
        assert torch.equal(x[:, 0], y[:, 0])
        assert torch.equal(x, mixed.batch_at(step)[0])
        shares.append(float(x.float().mean()))
    assert sum(shares) / len(shares) == pytest.approx(0.2, abs=0.02)
    assert {round(8 * share) for share in shares} == {1, 2}


def test_replay_wants_a_text() -> None:
    with pytest.raises(InputError, match="replay needs replay_data"):
        TrainConfig(replay=0.1)


def test_a_resume_wants_the_same_replay(corpus: Corpus, tmp_path: Path) -> None:
    old = tmp_path / "old.txt"
    old.write_text("an old text, " * 300)
    replay: dict[str, object] = {"replay": 0.5, "replay_data": str(old)}
    train(make_trainer(corpus, tmp_path / "run", steps=2, **replay))
    train(make_trainer(corpus, tmp_path / "run", steps=3, **replay), resume=True)
    old.write_text("another text, " * 300)
    with pytest.raises(InputError, match=r"the text of .*old.txt changed since"):
        train(make_trainer(corpus, tmp_path / "run", steps=4, **replay), resume=True)


def test_the_tokenizer_of_a_run_is_found_past_a_damaged_file(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(source.parent, run)
    want = load_model(source).tokenizer.to_json()
    (run / "last.h5").write_bytes(b"damaged")
    assert saved.run_tokenizer(run).to_json() == want
