"""Runs that start from a checkpoint: moments and their steps, freezing, replay, resuming."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrec.checkpoint.checkpoint import load_model, open_moments
from mmrec.checkpoint.manager import run_tokenizer
from mmrec.config import TrainConfig
from mmrec.data.corpus import Corpus
from mmrec.data.dataloader import ReplayLoader, WindowLoader
from mmrec.errors import InputError, StorageError
from mmrec.finetune.freeze import freeze_parameters
from mmrec.finetune.grow import GrowthPlan, grow_checkpoint
from mmrec.model import Model
from mmrec.training.setup import initialize_trainer
from mmrec.training.trainer import Trainer
from tests.conftest import SMALL, make_trainer

LARGE = replace(SMALL, width=48, depth=3, layer_types="sbb", ffn_multiplier=2.5, dropout=0.1)


@pytest.fixture(scope="module")
def source(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The end of a run of 12 steps, with its moments."""
    folder = tmp_path_factory.mktemp("source") / "run"
    make_trainer(corpus, folder).fit()
    return folder / "last.h5"


def grown_trainer(corpus: Corpus, folder: Path, source: Path, **settings: object) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    config = make_trainer(corpus, folder, initialize_from=str(source), **settings).config
    return Trainer(folder, corpus, LARGE, config, "tiny", echo=lambda line: None)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path).model.named_parameters())


def read_moments(path: Path, model: Model) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
    with open_moments(path, model) as (kept, steps):
        return dict(kept), steps


def test_a_cut_run_of_a_grown_model_continues_bit_for_bit(
    corpus: Corpus, source: Path, tmp_path: Path
) -> None:
    """AdamW counts the steps that its moments have seen; a resume finds the count again."""
    uncut = grown_trainer(corpus, tmp_path / "uncut", source, keep_checkpoints=3)
    initialize_trainer(uncut, load_model(source))
    assert uncut.progress.optimizer_step_offset == 12
    assert {float(s["step"]) for s in uncut.optimizer.state.values()} == {12.0}
    uncut.fit()
    for checkpoint in ("step-0.h5", "step-5.h5"):
        cut = tmp_path / checkpoint
        cut.mkdir()
        for name in (checkpoint, "config.toml"):
            shutil.copy(tmp_path / "uncut" / name, cut)
        grown_trainer(corpus, cut, source).fit(resume=True)
        want, got = (weights(run / "last.h5") for run in (tmp_path / "uncut", cut))
        assert all(torch.equal(want[name], got[name]) for name in want)


def test_the_initial_weights_are_saved_before_the_run_exists(
    corpus: Corpus, source: Path, tmp_path: Path
) -> None:
    """A resume takes a folder with a config.toml for a run, so the weights come before it."""
    trainer = grown_trainer(corpus, tmp_path / "run", source)
    initialize_trainer(trainer, load_model(source))
    (tmp_path / "run/config.toml/occupied").mkdir(parents=True)
    with pytest.raises(StorageError):
        trainer.fit()
    saved = weights(tmp_path / "run/step-0.h5")
    assert all(torch.equal(saved[n], p) for n, p in trainer.model.named_parameters())


def test_without_its_initial_weights_a_run_is_not_resumed(
    corpus: Corpus, source: Path, tmp_path: Path
) -> None:
    trainer = grown_trainer(corpus, tmp_path / "run", source)
    (tmp_path / "run/config.toml").touch()
    with pytest.raises(InputError, match="checkpoint"):
        trainer.fit(resume=True)


def test_a_grown_file_can_be_grown_again(source: Path, tmp_path: Path) -> None:
    """Twice in two files is the same function, and the moments keep their steps."""
    middle, end = tmp_path / "middle.h5", tmp_path / "end.h5"
    between = replace(LARGE, depth=2, layer_types="sb")
    grow_checkpoint(load_model(source), between, middle, preset="m", seed=1)
    grow_checkpoint(load_model(middle), LARGE, end, preset="e", seed=2)
    first, last = load_model(source), load_model(end)
    assert last.metadata["preset"] == "e"
    x = torch.arange(100)[None]
    with torch.no_grad():
        assert (first.model(x)[0] - last.model(x)[0]).abs().max() < 1e-4
    moments, steps = read_moments(end, last.model)
    assert steps == 12
    before, _ = read_moments(source, first.model)
    plan = GrowthPlan(first.model.config, LARGE)
    c = plan.c
    torch.testing.assert_close(
        moments["embedding"]["exp_avg"][:, :32], before["embedding"]["exp_avg"] / c
    )
    torch.testing.assert_close(
        moments["embedding"]["exp_avg_sq"][:, :32], before["embedding"]["exp_avg_sq"] / c**2
    )
    anew, random_state = tmp_path / "anew.h5", torch.get_rng_state()
    grow_checkpoint(first, LARGE, anew, preset="r", method="random")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert read_moments(anew, load_model(anew).model) == ({}, 0)
    again = tmp_path / "again.h5"
    grow_checkpoint(first, LARGE, again, preset="r", method="random")
    assert all(map(torch.equal, weights(anew).values(), weights(again).values()))
    best = source.with_name("best.h5")
    assert read_moments(best, load_model(best).model) == ({}, 0)


@pytest.mark.parametrize(
    ("spec", "frozen"),
    [
        ("embeddings", {"embedding"}),
        ("layers:1", {"layers.1."}),
        ("layers:0-0,embeddings", {"layers.0.", "embedding"}),
        (
            "memory",
            {
                ".conv_weight",
                ".in_proj",
                ".forget_bias",
                ".delta_decay_bias",
                ".recurrent_weight",
                "recurrence_norm",
                "delta_norm",
                ".out_proj",
            },
        ),
    ],
)
def test_what_is_frozen_stays_and_the_rest_moves(
    corpus: Corpus, tmp_path: Path, spec: str, frozen: set[str]
) -> None:
    trainer = make_trainer(corpus, tmp_path / "run", freeze=spec, steps=3)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.fit()
    for name, p in trainer.model.named_parameters():
        stays = any(part in name for part in frozen)
        assert torch.equal(before[name], p) == stays, name


@pytest.mark.parametrize(
    "spec", ["heads", "layers:", "layers:2", "layers:1-0", "embeddings,layers:0-1", "layers:-1"]
)
def test_a_wrong_freeze_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match="freeze must"):
        freeze_parameters(Model(SMALL), spec)


def test_lower_layers_learn_at_lower_rates(corpus: Corpus, tmp_path: Path) -> None:
    """With a decay of nearly nothing only the top layer and the last norm move."""
    trainer = make_trainer(corpus, tmp_path / "half", layerwise_lr_decay=0.5)
    model, peaks = trainer.model, {}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            peaks[p] = group["initial_lr"] / (0.02 if group["use_muon"] else 0.01)
    assert len(peaks) == len(list(model.parameters()))
    wanted = {"embedding": 0.25, "layers.0": 0.5, "layers.1": 1.0, "norm.weight": 1.0}
    for name, p in model.named_parameters():
        assert peaks[p] == next(v for k, v in wanted.items() if name.startswith(k)), name
    trainer = make_trainer(corpus, tmp_path / "top", layerwise_lr_decay=1e-12, steps=3)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.fit()
    for name, p in trainer.model.named_parameters():
        moved = float((p - before[name]).detach().abs().max())
        assert (moved > 1e-5) == name.startswith(("layers.1", "norm")), name


def test_a_share_of_the_windows_is_old() -> None:
    new = WindowLoader(np.zeros(4000, np.uint16), 8, 10, seed=0)
    old = WindowLoader(np.ones(900, np.uint16), 8, 10, seed=0)
    mixed = ReplayLoader(new, old, 0.2)
    shares = []
    for step in range(round(mixed.batches_per_epoch)):
        x, y = mixed.batch_at(step)
        assert x.shape == y.shape == (8, 10)
        assert torch.equal(x[:, 0], y[:, 0])
        assert torch.equal(x, mixed.batch_at(step)[0])
        shares.append(float(x.float().mean()))
    assert sum(shares) / len(shares) == pytest.approx(0.2, abs=0.02)
    assert {round(8 * share) for share in shares} == {1, 2}


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_an_epoch_with_replay_is_one_pass_over_the_new_text(fraction: float) -> None:
    new = WindowLoader(np.arange(24 * 10 + 1), 8, 10, seed=0)
    old = WindowLoader(np.full(900, -1), 8, 10, seed=0)
    mixed = ReplayLoader(new, old, fraction)
    batches = round(20 * mixed.batches_per_epoch)
    firsts = torch.cat([mixed.batch_at(number)[0][:, 0] for number in range(batches)])
    counts = torch.bincount(firsts[firsts >= 0])
    assert counts[counts > 0].tolist() == pytest.approx([20] * 24, abs=1)
    order = torch.cat([new.batch_at(number)[0][:, 0] for number in range(20 * 3 + 1)])
    read = firsts[firsts >= 0]
    assert torch.equal(read, order[: len(read)])  # none left out, and in its own order


def test_replay_wants_a_text() -> None:
    with pytest.raises(InputError, match="replay_fraction needs replay_data"):
        TrainConfig.from_flat({"replay_fraction": 0.1})


def test_a_resume_wants_the_same_replay(corpus: Corpus, tmp_path: Path) -> None:
    old = tmp_path / "old.txt"
    old.write_text("an old text, " * 300)
    replay: dict[str, object] = {"replay_fraction": 0.5, "replay_data": str(old)}
    make_trainer(corpus, tmp_path / "run", steps=2, **replay).fit()
    make_trainer(corpus, tmp_path / "run", steps=3, **replay).fit(resume=True)
    old.write_text("another text, " * 300)
    with pytest.raises(InputError, match=r"the text of .*old.txt is another one, or changed since"):
        make_trainer(corpus, tmp_path / "run", steps=4, **replay).fit(resume=True)


def test_the_tokenizer_of_a_run_is_found_past_a_damaged_file(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(source.parent, run)
    want = load_model(source).tokenizer.to_json()
    (run / "last.h5").write_bytes(b"damaged")
    assert run_tokenizer(run).to_json() == want
