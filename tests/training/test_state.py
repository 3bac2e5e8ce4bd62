"""A resume takes the steps that would have been taken, to the last bit, whatever ended the run."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmrec.checkpoint import manager
from mmrec.checkpoint.checkpoint import load_model, read_metadata, restore_training_state
from mmrec.data.corpus import Corpus, Split
from mmrec.errors import TrainingDivergedError, WeightsDivergedError
from mmrec.evaluation.evaluate import Evaluation
from mmrec.training.divergence import MAX_CONSECUTIVE_SKIPS, MAX_ROLLBACKS
from mmrec.training.trainer import Trainer, environment
from tests.conftest import make_trainer


class Killed(BaseException):
    """As good as SIGKILL: nothing of the run catches it."""


@pytest.fixture
def corpus(corpus: Corpus) -> Corpus:
    """A few thousand bytes, so that runs of a few steps have epochs."""

    def cut(split: Split, n: int) -> Split:
        return Split(split.tokens[:n], np.array([0, n]), np.array([n]))

    return dataclasses.replace(corpus, train=cut(corpus.train, 2000), val=cut(corpus.val, 600))


def run(
    corpus: Corpus,
    folder: Path,
    *,
    killed_at: int | None = None,
    resume: bool = False,
    bad: tuple[int, ...] = (),
    **settings: Any,
) -> Trainer:
    """Train, or resume; ``killed_at``: before that step; ``bad``: steps' data with a NaN in it."""
    # drawing is most of the time of so short a run, and tested elsewhere
    made = make_trainer(corpus, folder, draw_curve=False, **settings)
    torch.manual_seed(99)  # what the random state is by now must not count
    real = made.compute_gradients

    def gradients(at: int) -> float:
        if made.progress.step + 1 == killed_at:
            raise Killed
        return math.nan if at in bad else real(at)

    made.compute_gradients = gradients  # type: ignore[method-assign]
    try:
        made.fit(resume=resume)
    except Killed:
        assert killed_at is not None
    return made


def position(made: Trainer) -> dict[str, Any]:
    """Progress without the clock."""
    p = dataclasses.asdict(made.progress) | {"seconds": 0}
    p["epochs"] = [row | {"seconds": 0} for row in p["epochs"]]
    return p


def assert_same(a: Trainer, b: Trainer) -> None:
    assert (a.run_dir / "metrics.jsonl").read_text() == (b.run_dir / "metrics.jsonl").read_text()
    assert position(a) == position(b)
    random = [
        restore_training_state(m.run_dir / "last.h5", m.model, m.optimizer)
        and torch.get_rng_state()
        for m in (a, b)
    ]
    assert torch.equal(*random)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert a.optimizer.state[p].keys() == b.optimizer.state[q].keys()
        for key, moment in a.optimizer.state[p].items():
            assert torch.equal(moment, b.optimizer.state[q][key])
    best = [load_model(m.run_dir / "best.h5") for m in (a, b)]
    assert best[0].step == best[1].step
    for p, q in zip(best[0].model.parameters(), best[1].model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"precision": "bfloat16"},
        {"batch_size": 10, "steps": 16, "eval_every": 7},  # of six steps an epoch
        {"schedule": "cosine", "save_every": 1},
        {"state": "document"},
        {"state": "carry", "gradient_accumulation_steps": 2},
        {"state": "carry", "batch_size": 10, "steps": 16, "eval_every": 7},
    ],
    ids=str,
)
def test_kills_leave_no_trace(corpus: Corpus, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = run(corpus, tmp_path / "whole", **settings)
    run(corpus, tmp_path / "cut", killed_at=3, **settings)  # before the first step-N
    run(corpus, tmp_path / "cut", killed_at=8, resume=True, **settings)
    run(corpus, tmp_path / "cut", killed_at=12, resume=True, **settings)
    assert_same(whole, run(corpus, tmp_path / "cut", resume=True, **settings))


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_signal_ends_a_validation_and_the_resume_makes_it(
    corpus: Corpus, tmp_path: Path, at: int
) -> None:
    """The first to the last: on the subset, of an epoch, and at the end of the run."""
    settings = {"batch_size": 16, "steps": 4, "eval_every": 2}
    whole = run(corpus, tmp_path / "whole", **settings)
    trainer = make_trainer(corpus, tmp_path / "cut", draw_curve=False, **settings)
    score, calls = trainer._score, []

    def interrupted(tokens: np.ndarray, n_bytes: int) -> Evaluation:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(tokens, n_bytes)

    trainer._score = interrupted  # type: ignore[method-assign]
    trainer.fit()
    made = trainer
    assert made.stop_signal.signal_number == signal.SIGTERM
    assert json.loads((made.run_dir / "summary.json").read_text())["ended"] == "signal"
    assert_same(whole, run(corpus, tmp_path / "cut", resume=True, **settings))


def test_a_signal_during_warm_up_saves_the_start(corpus: Corpus, tmp_path: Path) -> None:
    whole = run(corpus, tmp_path / "whole")
    made = make_trainer(corpus, tmp_path / "cut")
    time_steps = made._time_steps

    def interrupted() -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGHUP)
        return time_steps()

    made._time_steps = interrupted  # type: ignore[method-assign]
    assert made.fit()["steps"] == 0
    assert made.stop_signal.signal_number == signal.SIGHUP
    assert_same(whole, run(corpus, tmp_path / "cut", resume=True))


def test_early_stopping_stays_stopped(corpus: Corpus, tmp_path: Path) -> None:
    settings = {
        "lr": 1.0,
        "matrix_lr": 1.0,
        "schedule": "constant",
        "warmup": 0.0,
        "max_grad_norm": 1e9,
        "patience": 2,
        "eval_every": 1,
        "steps": 40,
        "save_every": 1,
    }
    whole = run(corpus, tmp_path / "whole", **settings)
    end = whole.progress.step
    assert end == whole.progress.best_step + 2 < 40
    run(corpus, tmp_path / "cut", killed_at=end, **settings)
    made = make_trainer(corpus, tmp_path / "cut", **settings)
    save = made.save

    def killed(name: str, *, resumable: bool) -> None:
        if name == "last.h5":
            raise Killed
        save(name, resumable=resumable)

    made.save = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        made.fit(resume=True)
    assert_same(whole, run(corpus, tmp_path / "cut", resume=True, **settings))


def test_a_best_model_from_ahead_is_not_replaced_by_a_worse_one(
    corpus: Corpus, tmp_path: Path
) -> None:
    settings = {"eval_every": 2, "save_every": 5}
    whole = run(corpus, tmp_path / "whole", **settings)
    run(corpus, tmp_path / "cut", killed_at=10, **settings)
    assert read_metadata(tmp_path / "cut" / "best.h5")[0] == 8
    made = run(corpus, tmp_path / "cut", killed_at=8, resume=True, **settings)
    assert made.progress.best_step == 6
    assert read_metadata(tmp_path / "cut" / "best.h5")[0] == 8
    shorter = make_trainer(corpus, tmp_path / "cut", **settings)
    shorter.stop_signal.signal_number = (
        signal.SIGTERM
    )  # ends at once: the summary speaks of what best.h5 is
    assert shorter.fit(resume=True)["best_step"] == 8
    assert_same(whole, run(corpus, tmp_path / "cut", resume=True, **settings))


def test_auto_precision_is_resolved_once(corpus: Corpus, tmp_path: Path) -> None:
    """A resume keeps what the run was begun with, whatever a new measurement would say."""
    for precision in ("bfloat16", "float32"):
        folder = tmp_path / precision
        make_trainer(corpus, folder, precision=precision, steps=2).fit()
        assert f'precision = "{precision}"' in (folder / "config.toml").read_text()
        again = make_trainer(corpus, folder, precision="auto", steps=3)
        again.fit(resume=True)
        assert again.config.optimizer.precision == precision
    resolved = make_trainer(corpus, tmp_path / "auto", precision="auto").config
    assert resolved.optimizer.precision in ("bfloat16", "float32")


def test_another_environment_is_said(corpus: Corpus, tmp_path: Path) -> None:
    make_trainer(corpus, tmp_path, steps=2).fit()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        again = make_trainer(corpus, tmp_path, steps=3)
        again.fit(resume=True)
    finally:
        torch.set_num_threads(threads)
    text = "\n".join(again.lines)  # type: ignore[attr-defined]
    assert f"trained with threads {threads}, now {threads + 1}" in text
    assert environment()["threads"] == threads


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [x for x in lines if x["kind"] == kind]


@pytest.mark.parametrize("killed_at", [7, 10])
@pytest.mark.parametrize(("policy", "bad", "moved"), [("skip", (6, 7), 2), ("rollback", (6, 9), 5)])
def test_going_on_after_a_nan(
    corpus: Corpus, tmp_path: Path, policy: str, bad: tuple[int, ...], moved: int, killed_at: int
) -> None:
    """Data 6 is that of the seventh step; step-5 is what a rollback returns to."""
    settings = {"on_nan": policy, "bad": bad}
    whole = run(corpus, tmp_path / "whole", **settings)
    assert [x["step"] for x in events(whole.run_dir, "train")] == list(range(1, 13))
    why = [x["reason"].split(" at ")[0] for x in events(whole.run_dir, policy)]
    assert why == ["loss nan"] * len(bad)
    assert whole.progress.data_offset == moved
    assert whole.progress.lr_scale == (1 if policy == "skip" else 0.5 ** len(bad))
    assert all(torch.isfinite(p).all() for p in whole.model.parameters())
    run(corpus, tmp_path / "cut", killed_at=killed_at, **settings)
    assert_same(whole, run(corpus, tmp_path / "cut", resume=True, **settings))


def test_a_stop_is_resumed_as_if_skip_had_been_asked_for(corpus: Corpus, tmp_path: Path) -> None:
    whole = run(corpus, tmp_path / "whole", on_nan="skip", bad=(6,))
    for _ in range(2):
        with pytest.raises(TrainingDivergedError, match="loss nan at step 7"):
            run(corpus, tmp_path / "cut", resume=(tmp_path / "cut").exists(), bad=(6,))
        assert read_metadata(tmp_path / "cut" / "last.h5")[0] == 6
    assert_same(whole, run(corpus, tmp_path / "cut", resume=True, on_nan="skip", bad=(6,)))


def test_limits(corpus: Corpus, tmp_path: Path) -> None:
    bad = tuple(range(6, 500))
    with pytest.raises(
        TrainingDivergedError, match=f"after {MAX_CONSECUTIVE_SKIPS} skipped steps in a row"
    ):
        run(corpus, tmp_path / "a", on_nan="skip", bad=bad)
    with pytest.raises(TrainingDivergedError, match=f"after {MAX_ROLLBACKS} rollbacks"):
        run(corpus, tmp_path / "b", on_nan="rollback", bad=bad)
    assert len(events(tmp_path / "b", "rollback")) == MAX_ROLLBACKS
    with pytest.raises(TrainingDivergedError, match=f"after {MAX_ROLLBACKS} rollbacks"):
        run(corpus, tmp_path / "c", on_nan="rollback", bad=tuple(range(500)))  # back to step 0


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_weights_that_are_not_finite_are_never_saved(
    corpus: Corpus, tmp_path: Path, policy: str
) -> None:
    made = make_trainer(corpus, tmp_path, on_nan=policy)
    take = made.train_step

    def poisoned() -> tuple[float, float, float]:
        result = take()
        if made.progress.step == 9:
            made.model.norm.weight.data.fill_(float("inf"))
        return result

    made.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(WeightsDivergedError, match=r"weight norm.weight not finite at step 10"):
        made.fit()
    assert [p.name for p in manager.list_checkpoints(tmp_path)] == ["step-5.h5"]
