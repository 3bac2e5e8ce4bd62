"""A resumed run equals an uninterrupted one bit for bit, whatever ended it before."""

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
from mmrec.checkpoint.checkpoint import load_model
from mmrec.checkpoint.header import read_metadata
from mmrec.data.corpus import Corpus, Split
from mmrec.errors import TrainingDivergedError, WeightsDivergedError
from mmrec.evaluation.evaluate import Evaluation
from mmrec.runtime.distributed import ProcessGroup
from mmrec.training.divergence import MAX_CONSECUTIVE_SKIPS, MAX_ROLLBACKS
from mmrec.training.trainer import Trainer
from tests.conftest import make_trainer


class Killed(BaseException):
    """Ends a run as SIGKILL does: no code of the run catches it."""


@pytest.fixture
def corpus(corpus: Corpus) -> Corpus:
    """A few thousand bytes, so that runs of a few steps have epochs."""

    def shorten(split: Split, n: int) -> Split:
        return Split(split.tokens[:n], np.array([0, n]), np.array([n]))

    return dataclasses.replace(
        corpus, train=shorten(corpus.train, 2000), val=shorten(corpus.val, 600)
    )


def run(
    corpus: Corpus,
    folder: Path,
    *,
    killed_at: int | None = None,
    resume: bool = False,
    bad: tuple[int, ...] = (),
    **settings: Any,
) -> Trainer:
    """Train, or resume a run.

    Args:
        corpus: the text.
        folder: the run folder.
        killed_at: the run is killed before this step, counted from 1.
        resume: continue the run of the folder.
        bad: data steps, counted from 0, whose loss is NaN.
        settings: see ``make_trainer``.
    """
    trainer = make_trainer(corpus, folder, **settings)
    torch.manual_seed(99)  # the run must not depend on the random state at this point
    compute_gradients = trainer.compute_gradients

    def compute_or_fail(data_step: int) -> float:
        if trainer.progress.step + 1 == killed_at:
            raise Killed
        return math.nan if data_step in bad else compute_gradients(data_step)

    trainer.compute_gradients = compute_or_fail  # type: ignore[method-assign]
    try:
        trainer.fit(resume=resume)
    except Killed:
        assert killed_at is not None
    return trainer


def progress_without_times(trainer: Trainer) -> dict[str, Any]:
    """The progress of a run, without the seconds that it took."""
    p = dataclasses.asdict(trainer.progress) | {"seconds": 0}
    p["epochs"] = [row | {"seconds": 0} for row in p["epochs"]]
    return p


def texts(folder: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl, without the seconds that the run had taken."""
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return [line | {"seconds": 0} for line in lines]


def assert_same(a: Trainer, b: Trainer) -> None:
    """Check that two runs have equal logs, progress, random state, weights and best model."""
    assert texts(a.run_dir) == texts(b.run_dir)
    assert (a.run_dir / "metrics.jsonl").read_text() == (b.run_dir / "metrics.jsonl").read_text()
    assert progress_without_times(a) == progress_without_times(b)
    random_states = [
        m.restore(m.run_dir / "last.h5") and torch.get_rng_state()  # the averages, too
        for m in (a, b)
    ]
    assert a.average.values.keys() == b.average.values.keys()
    for name, average in a.average.values.items():
        assert torch.equal(average, b.average.values[name])
    assert torch.equal(*random_states)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert a.optimizer.state[p].keys() == b.optimizer.state[q].keys()
        for key, moment in a.optimizer.state[p].items():
            assert torch.equal(moment, b.optimizer.state[q][key])
    best_a, best_b = (load_model(m.run_dir / "best.h5") for m in (a, b))
    assert best_a.step == best_b.step
    for p, q in zip(best_a.model.parameters(), best_b.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"precision": "bfloat16"},
        {"batch_size": 10, "steps": 16, "eval_every": 7},  # an epoch is six steps
        {"schedule": "cosine", "save_every": 1},
        {"state": "document"},
        {"state": "carry", "gradient_accumulation_steps": 2},
        {"state": "carry", "batch_size": 10, "steps": 16, "eval_every": 7},
        {"ema_decay": 0.9, "state": "carry", "gradient_accumulation_steps": 2, "eval_every": 3},
    ],
    ids=str,
)
def test_a_killed_run_resumes_bit_for_bit(
    corpus: Corpus, tmp_path: Path, settings: dict[str, Any]
) -> None:
    uninterrupted = run(corpus, tmp_path / "uninterrupted", **settings)
    run(corpus, tmp_path / "resumed", killed_at=3, **settings)  # before the first checkpoint
    run(corpus, tmp_path / "resumed", killed_at=8, resume=True, **settings)
    run(corpus, tmp_path / "resumed", killed_at=12, resume=True, **settings)
    assert_same(uninterrupted, run(corpus, tmp_path / "resumed", resume=True, **settings))


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
@pytest.mark.parametrize("killed_at", [13, 19])
def test_a_longer_run_resumes_bit_for_bit(
    corpus: Corpus, tmp_path: Path, schedule: str, killed_at: int
) -> None:
    """A run that ended is given a longer length, and killed before and after a checkpoint of it."""
    settings = {"schedule": schedule, "eval_every": 3, "ema_decay": 0.5}
    for name in ("uninterrupted", "resumed"):
        run(corpus, tmp_path / name, steps=12, **settings)
    uninterrupted = run(corpus, tmp_path / "uninterrupted", resume=True, steps=21, **settings)
    told = uninterrupted.lines  # type: ignore[attr-defined]
    share = {"linear": "42%", "wsd": "100%"}[schedule]
    assert f"length  12 steps before, now 21 steps: the learning rate goes on at {share} of" in (
        "\n".join(told)
    )
    run(corpus, tmp_path / "resumed", killed_at=killed_at, resume=True, steps=21, **settings)
    assert_same(uninterrupted, run(corpus, tmp_path / "resumed", resume=True, steps=21, **settings))


def test_a_stable_rate_does_not_depend_on_the_length(corpus: Corpus, tmp_path: Path) -> None:
    """A wsd run that is given a longer length before its decay is a run of that length."""
    settings = {"schedule": "wsd", "warmup": 0.0, "decay_fraction": 0.25}
    long = run(corpus, tmp_path / "long", steps=20, **settings)
    run(corpus, tmp_path / "short", steps=12, killed_at=10, **settings)
    run(corpus, tmp_path / "short", steps=12, killed_at=9, resume=True, **settings)
    trainer = run(corpus, tmp_path / "short", steps=20, resume=True, **settings)
    assert_same(long, trainer)
    rates = [x["lr"] for x in events(tmp_path / "long", "train")]
    assert rates == pytest.approx([0.01] * 15 + [0.009, 0.007, 0.005, 0.003, 0.001])


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_validation_that_a_signal_interrupts_is_repeated_on_resume(
    corpus: Corpus, tmp_path: Path, at: int
) -> None:
    """Each validation of a run in turn: on the subset, of an epoch, and at the end of the run."""
    settings = {"batch_size": 16, "steps": 4, "eval_every": 2, "ema_decay": 0.9}
    uninterrupted = run(corpus, tmp_path / "uninterrupted", **settings)
    trainer = make_trainer(corpus, tmp_path / "resumed", **settings)
    score, calls = trainer._score, []

    def interrupted(*arguments: Any) -> Evaluation:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*arguments)

    trainer._score = interrupted  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.stop_signal.signal_number == signal.SIGTERM
    assert json.loads((trainer.run_dir / "summary.json").read_text())["ended"] == "signal"
    assert_same(uninterrupted, run(corpus, tmp_path / "resumed", resume=True, **settings))


def test_a_signal_while_steps_are_timed_saves_the_start(corpus: Corpus, tmp_path: Path) -> None:
    uninterrupted = run(corpus, tmp_path / "uninterrupted")
    trainer = make_trainer(corpus, tmp_path / "resumed")
    time_steps = trainer._time_steps

    def interrupted() -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGHUP)
        return time_steps()

    trainer._time_steps = interrupted  # type: ignore[method-assign]
    assert trainer.fit()["steps"] == 0
    assert trainer.stop_signal.signal_number == signal.SIGHUP
    assert_same(uninterrupted, run(corpus, tmp_path / "resumed", resume=True))


def test_a_run_that_stopped_early_stops_at_the_same_step_when_resumed(
    corpus: Corpus, tmp_path: Path
) -> None:
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
    uninterrupted = run(corpus, tmp_path / "uninterrupted", **settings)
    end = uninterrupted.progress.step
    assert end == uninterrupted.progress.best_step + 2 < 40
    run(corpus, tmp_path / "resumed", killed_at=end, **settings)
    trainer = make_trainer(corpus, tmp_path / "resumed", **settings)
    save = trainer.save

    def killed(name: str, *, resumable: bool) -> None:
        if name == "last.h5":
            raise Killed
        save(name, resumable=resumable)

    trainer.save = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.fit(resume=True)
    assert_same(uninterrupted, run(corpus, tmp_path / "resumed", resume=True, **settings))


def test_a_best_model_of_a_later_step_is_not_replaced_by_a_worse_one(
    corpus: Corpus, tmp_path: Path
) -> None:
    settings = {"eval_every": 2, "save_every": 5}
    uninterrupted = run(corpus, tmp_path / "uninterrupted", **settings)
    run(corpus, tmp_path / "resumed", killed_at=10, **settings)
    assert read_metadata(tmp_path / "resumed" / "best.h5")[0] == 8
    trainer = run(corpus, tmp_path / "resumed", killed_at=8, resume=True, **settings)
    assert trainer.progress.best_step == 6
    assert read_metadata(tmp_path / "resumed" / "best.h5")[0] == 8
    stopped = make_trainer(corpus, tmp_path / "resumed", **settings)
    stopped.stop_signal.signal_number = signal.SIGTERM  # ends before the first step
    assert stopped.fit(resume=True)["best_step"] == 8  # the step of best.h5
    assert_same(uninterrupted, run(corpus, tmp_path / "resumed", resume=True, **settings))


def test_auto_precision_is_resolved_once(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume keeps the precision of the run, whatever the processor has now."""
    for precision in ("bfloat16", "float32"):
        folder = tmp_path / precision
        make_trainer(corpus, folder, precision=precision, steps=2).fit()
        assert f'precision = "{precision}"' in (folder / "config.toml").read_text()
        monkeypatch.setattr("mmrec.runtime.distributed.bfloat16_instructions", lambda: "")
        again = make_trainer(corpus, folder, precision="auto", steps=3)
        again.fit(resume=True)
        assert again.config.optimizer.precision == precision
        assert again.precision_reason == (
            "as the run began"
            if precision == "bfloat16"
            else "auto: the processor has no bfloat16 instructions"
        )


def test_a_resume_in_another_environment_prints_a_note(corpus: Corpus, tmp_path: Path) -> None:
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
    assert "newton_schulz" not in text


@pytest.mark.parametrize(
    ("instructions", "precision", "reason"),
    [
        ("", "float32", "auto: the processor has no bfloat16 instructions"),
        ("AMX", "bfloat16", "auto: the processor has AMX"),
    ],
)
def test_the_processor_decides_and_the_run_says_so(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    instructions: str,
    precision: str,
    reason: str,
) -> None:
    """Printed, in the summary and in the checkpoint; a resume on another machine says so."""
    use = "mmrec.runtime.distributed.bfloat16_instructions"
    monkeypatch.setattr(use, lambda: instructions)
    trainer = make_trainer(corpus, tmp_path, precision="auto", steps=2)
    trainer.fit()
    text = "\n".join(trainer.lines)  # type: ignore[attr-defined]
    assert f"M parameters, {precision} ({reason})" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["precision"] == summary["newton_schulz"] == precision
    assert summary["precision_reason"] == reason
    assert trainer.optimizer.newton_schulz_dtype == getattr(torch, precision)
    assert read_metadata(tmp_path / "last.h5")[1]["environment"]["newton_schulz"] == precision
    monkeypatch.setattr(use, lambda: "" if instructions else "AMX")
    again = make_trainer(corpus, tmp_path, precision="auto", steps=3)
    again.fit(resume=True)
    other = "bfloat16" if precision == "float32" else "float32"
    text = "\n".join(again.lines)  # type: ignore[attr-defined]
    assert f"trained with newton_schulz {precision}, now {other}: the resumed run is clo" in text
    assert f"M parameters, {precision} (as the run began), Muon in {other}" in text


def test_one_process_without_the_instructions_decides_for_all(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrec.runtime.distributed.bfloat16_instructions", lambda: "AMX")
    monkeypatch.setattr(ProcessGroup, "all_gather_object", lambda self, value: [value, ""])
    trainer = make_trainer(corpus, tmp_path, precision="auto")
    assert trainer.config.optimizer.precision == "float32"
    assert trainer.optimizer.newton_schulz_dtype == torch.float32


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [x for x in lines if x["kind"] == kind]


@pytest.mark.parametrize("killed_at", [7, 10])
@pytest.mark.parametrize(
    ("policy", "bad", "data_offset"), [("skip", (6, 7), 2), ("rollback", (6, 9), 5)]
)
def test_a_run_continues_after_a_nan(
    corpus: Corpus,
    tmp_path: Path,
    policy: str,
    bad: tuple[int, ...],
    data_offset: int,
    killed_at: int,
) -> None:
    """The seventh step uses the data of index 6. A rollback returns to step-5.h5."""
    settings = {"on_nan": policy, "bad": bad, "ema_decay": 0.9}
    uninterrupted = run(corpus, tmp_path / "uninterrupted", **settings)
    assert [x["step"] for x in events(uninterrupted.run_dir, "train")] == list(range(1, 13))
    reasons = [x["reason"].split(" at ")[0] for x in events(uninterrupted.run_dir, policy)]
    assert reasons == ["loss nan"] * len(bad)
    assert uninterrupted.progress.data_offset == data_offset
    assert uninterrupted.progress.lr_scale == (1 if policy == "skip" else 0.5 ** len(bad))
    assert all(torch.isfinite(p).all() for p in uninterrupted.model.parameters())
    run(corpus, tmp_path / "resumed", killed_at=killed_at, **settings)
    assert_same(uninterrupted, run(corpus, tmp_path / "resumed", resume=True, **settings))


def test_a_run_that_a_nan_stopped_can_be_resumed_with_skip(corpus: Corpus, tmp_path: Path) -> None:
    uninterrupted = run(corpus, tmp_path / "uninterrupted", on_nan="skip", bad=(6,))
    for _ in range(2):
        with pytest.raises(TrainingDivergedError, match="loss nan at step 7"):
            run(corpus, tmp_path / "resumed", resume=(tmp_path / "resumed").exists(), bad=(6,))
        assert read_metadata(tmp_path / "resumed" / "last.h5")[0] == 6
    assert_same(
        uninterrupted, run(corpus, tmp_path / "resumed", resume=True, on_nan="skip", bad=(6,))
    )


def test_too_many_skips_or_rollbacks_end_a_run(corpus: Corpus, tmp_path: Path) -> None:
    bad = tuple(range(6, 500))
    with pytest.raises(
        TrainingDivergedError, match=f"after {MAX_CONSECUTIVE_SKIPS} skipped steps in a row"
    ):
        run(corpus, tmp_path / "a", on_nan="skip", bad=bad)
    with pytest.raises(TrainingDivergedError, match=f"after {MAX_ROLLBACKS} rollbacks"):
        run(corpus, tmp_path / "b", on_nan="rollback", bad=bad)
    assert len(events(tmp_path / "b", "rollback")) == MAX_ROLLBACKS
    with pytest.raises(TrainingDivergedError, match=f"after {MAX_ROLLBACKS} rollbacks"):
        run(corpus, tmp_path / "c", on_nan="rollback", bad=tuple(range(500)))  # from step 0


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_weights_that_are_not_finite_are_never_saved(
    corpus: Corpus, tmp_path: Path, policy: str
) -> None:
    trainer = make_trainer(corpus, tmp_path, on_nan=policy)
    train_step = trainer.train_step

    def corrupt_a_weight() -> tuple[float, float, float]:
        result = train_step()
        if trainer.progress.step == 9:
            trainer.model.norm.weight.data.fill_(float("inf"))
        return result

    trainer.train_step = corrupt_a_weight  # type: ignore[method-assign]
    with pytest.raises(WeightsDivergedError, match=r"weight norm.weight not finite at step 10"):
        trainer.fit()
    assert [p.name for p in manager.list_checkpoints(tmp_path)] == ["step-5.h5"]
