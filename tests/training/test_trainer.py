"""Training: what a run writes, how it ends, how it resumes, and its callbacks."""

import dataclasses
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmrec.checkpoint import manager
from mmrec.checkpoint.checkpoint import load_model, restore_training_state
from mmrec.checkpoint.header import read_metadata
from mmrec.config import DEFAULT_TOKENS, MAX_DENSE_ROWS
from mmrec.data.corpus import Corpus, Split
from mmrec.errors import InputError, StorageError, TrainingDivergedError
from mmrec.evaluation.evaluate import Evaluation
from mmrec.training.callbacks import Callback
from mmrec.training.lr_schedule import lr_factor
from mmrec.training.metrics import MetricsLog, Progress
from mmrec.training.trainer import Trainer
from tests.conftest import make_trainer, stop_by_signal


def losses(folder: Path) -> list[float]:
    """The training losses in the log of a run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [x["loss"] for x in lines if x["kind"] == "train"]


def test_a_run_writes_its_files(corpus: Corpus, tmp_path: Path) -> None:
    trainer = make_trainer(corpus, tmp_path / "run", draw_curve=True)
    summary = trainer.fit()
    names = {p.name for p in trainer.run_dir.iterdir()}
    assert names == {
        "config.toml",
        "metrics.jsonl",
        "samples.jsonl",
        "loss.png",
        "status.json",
        "summary.json",
        "best.h5",
        "documents.hdf5",
        "last.h5",
        "step-5.h5",
        "step-10.h5",
    }
    assert summary["ended"] == "done"
    assert len(losses(trainer.run_dir)) == summary["steps"] == 12
    assert losses(trainer.run_dir)[0] == pytest.approx(math.log(257), abs=0.1)
    assert losses(trainer.run_dir)[-1] < losses(trainer.run_dir)[0] - 0.5
    assert (trainer.run_dir / "loss.png").read_bytes()[:4] == b"\x89PNG"
    text = "\n".join(trainer.lines)  # type: ignore[attr-defined]
    assert "12 steps of 64 tokens" in text
    best = load_model(trainer.run_dir / "best.h5")
    assert best.step == summary["best_step"]
    assert best.metadata["val"]["loss"] == pytest.approx(summary["best_val_loss"])
    tokens = torch.tensor([[1, 2, 3]])
    last = load_model(trainer.run_dir / "last.h5").model
    trainer.model.eval()
    assert torch.equal(last(tokens)[0], trainer.model(tokens)[0])
    assert summary["epochs"][0]["epoch"] == pytest.approx(
        12 / trainer.loader.batches_per_epoch, abs=0.01
    )


@pytest.mark.parametrize(
    ("epochs", "dropout", "advice"),
    [
        (4, 0.0, ""),
        (5, 0.0, "--dropout 0.1"),
        (5, 0.1, ""),
        (17, 0.0, "--dropout 0.2 and --weight-decay 1"),
    ],
)
def test_a_run_of_many_epochs_warns_that_the_model_will_memorise_its_text(
    corpus: Corpus, tmp_path: Path, epochs: float, dropout: float, advice: str
) -> None:
    trainer = make_trainer(corpus, tmp_path, steps=None, epochs=epochs)
    trainer.model.config = dataclasses.replace(trainer.model.config, dropout=dropout)
    trainer.log_run_summary()
    text = "\n".join(trainer.lines)  # type: ignore[attr-defined]
    assert text.count("memorises") == bool(advice)
    assert advice in text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"sampled_softmax": 16},
        {"ngram_buckets": MAX_DENSE_ROWS + 1, "gradient_accumulation_steps": 2},
    ],
)
def test_a_run_that_a_signal_stopped_resumes_bit_for_bit(
    corpus: Corpus, tmp_path: Path, settings: dict[str, int]
) -> None:
    uninterrupted = make_trainer(corpus, tmp_path / "uninterrupted", **settings)
    uninterrupted.fit()
    first = make_trainer(corpus, tmp_path / "resumed", **settings)
    stop_by_signal(first, 6)
    assert first.fit()["ended"] == "signal"
    assert first.stop_signal.signal_number == signal.SIGTERM
    resumed = make_trainer(corpus, tmp_path / "resumed", **settings)
    torch.manual_seed(99)  # a resume takes the random state of the checkpoint instead
    assert resumed.fit(resume=True)["ended"] == "done"
    assert losses(tmp_path / "resumed") == losses(tmp_path / "uninterrupted")
    for a, b in zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.progress.epochs[0]["mean_loss"] == uninterrupted.progress.epochs[0]["mean_loss"]


def test_each_epoch_has_a_row_in_the_table(corpus: Corpus, tmp_path: Path) -> None:
    trainer = make_trainer(corpus, tmp_path, steps=None, epochs=2.0, batch_size=64, eval_tokens=300)
    summary = trainer.fit()
    rows = summary["epochs"]
    assert [r["epoch"] for r in rows] == [1, 2]
    assert rows[1]["mean_loss"] < rows[0]["mean_loss"]
    assert rows[1]["perplexity"] == pytest.approx(math.exp(rows[1]["val_loss"]))
    text = "\n".join(trainer.lines)  # type: ignore[attr-defined]
    assert "bits/byte" in text


def test_minutes_set_the_length_of_a_run(corpus: Corpus, tmp_path: Path) -> None:
    trainer = make_trainer(corpus, tmp_path, steps=None, minutes=0.02)
    summary = trainer.fit()
    assert summary["steps"] > 1
    assert 1.2 <= summary["seconds"] < 6


def test_early_stopping_keeps_the_best(corpus: Corpus, tmp_path: Path) -> None:
    trainer = make_trainer(
        corpus,
        tmp_path,
        lr=1.0,
        schedule="constant",
        warmup=0.0,
        max_grad_norm=1e9,
        patience=2,
        eval_every=1,
        steps=40,
    )
    summary = trainer.fit()
    assert summary["ended"] == "early"
    assert summary["steps"] == summary["best_step"] + 2
    assert load_model(tmp_path / "best.h5").step == summary["best_step"]


def test_a_loss_that_is_not_finite_changes_no_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    trainer = make_trainer(corpus, tmp_path)
    train_step = trainer.train_step

    def corrupt_a_weight() -> tuple[float, float, float]:
        if trainer.progress.step == 7:
            trainer.model.norm.weight.data.fill_(float("inf"))
        return train_step()

    trainer.train_step = corrupt_a_weight  # type: ignore[method-assign]
    with pytest.raises(TrainingDivergedError, match=r"loss (nan|inf) at step 8"):
        trainer.fit()
    assert manager.list_checkpoints(tmp_path)[-1].name == "step-5.h5"
    saved_model = load_model(tmp_path / "step-5.h5").model
    assert all(torch.isfinite(p).all() for p in saved_model.parameters())


def test_a_full_disk_leaves_earlier_checkpoints_intact(corpus: Corpus, tmp_path: Path) -> None:
    import resource

    trainer = make_trainer(corpus, tmp_path)
    trainer.fit()
    before = (tmp_path / "last.h5").read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        with pytest.raises(StorageError, match="File too large; the file that was there is intact"):
            trainer.save("last.h5", resumable=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "last.h5").read_bytes() == before


def test_a_process_saves_at_sigint_and_resumes(
    text_file: Path, tmp_path: Path, run_command: Callable[..., tuple[str, str]]
) -> None:
    command = [
        sys.executable,
        "-m",
        "mmrec",
        "train",
        "tiny",
        "--data",
        str(text_file),
        "--steps",
        "100000",
        "--tokenizer",
        "byte",
        "--batch-size",
        "1",
        "--seq-len",
        "16",
        "--out",
        "r",
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        metrics, end = tmp_path / "r" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < end
            assert run.poll() is None
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "continue with: mmrec train --resume r" in errors
    assert "Traceback" not in errors
    step = read_metadata(tmp_path / "r" / "last.h5")[0]
    run_command(tmp_path, "train", "--resume", "--steps", str(step + 3), "--out", "r")
    assert read_metadata(tmp_path / "r" / "last.h5")[0] == step + 3


def start_on_a_terminal(arguments: list[str], cwd: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start a training process on a pseudo-terminal; return it and our end of the terminal."""
    import pty

    terminal, child_terminal = pty.openpty()
    command = [sys.executable, "-m", "mmrec", "train", *arguments]
    run = subprocess.Popen(
        command, cwd=cwd, stdin=child_terminal, stderr=child_terminal, stdout=child_terminal
    )
    os.close(child_terminal)
    return run, terminal


def read_until(terminal: int, text: str, seconds: float = 120) -> str:
    """Read what a terminal shows until it shows a text or the process ends."""
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, seen[-2000:]
        if select.select([terminal], [], [], 1)[0]:
            try:
                seen += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the process has ended
                break
    return seen


def test_a_full_disk_asks_the_user_and_continues(text_file: Path, tmp_path: Path) -> None:
    """The size of a process's files is limited, and the limit lifted when the process asks."""
    import resource

    run, terminal = start_on_a_terminal(
        [
            "tiny",
            "--data",
            str(text_file),
            "--tokenizer",
            "byte",
            "--steps",
            "12",
            "--batch-size",
            "1",
            "--seq-len",
            "16",
            "--save-every",
            "4",
            "--eval-every",
            "100",
            "--out",
            "r",
        ],
        tmp_path,
    )
    try:
        read_until(terminal, "run folder r")
        before = resource.prlimit(run.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (100_000, before[1]))
        shown = read_until(terminal, "or q and Enter to give up: ")
        assert "could not write r/" in shown
        assert "File too large" in shown
        assert "The training state is still in memory. Free some space" in shown
        assert run.poll() is None
        os.write(terminal, b"\n")  # no space was freed: it asks again
        read_until(terminal, "or q and Enter to give up: ")
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, before)
        os.write(terminal, b"\n")
        read_until(terminal, "curve ")
        assert run.wait(60) == 0
    finally:
        run.kill()
        run.wait()
        os.close(terminal)
    assert read_metadata(tmp_path / "r" / "last.h5")[0] == 12
    assert len(losses(tmp_path / "r")) == 12
    assert not list((tmp_path / "r").glob(".*.tmp"))


def test_a_run_folder_that_vanishes_is_not_created_again(corpus: Corpus, tmp_path: Path) -> None:
    """Without a terminal nobody is asked: training ends with an error."""
    trainer = make_trainer(corpus, tmp_path / "run")
    train_step = trainer.train_step

    def vanish() -> tuple[float, float, float]:
        if trainer.progress.step == 3:
            (tmp_path / "run").rename(tmp_path / "away")
        return train_step()

    trainer.train_step = vanish  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="could not write .*best.h5: No such file or directory"):
        trainer.fit()
    assert not (tmp_path / "run").exists()
    assert len(losses(tmp_path / "away")) == 4
    (tmp_path / "away").rename(tmp_path / "run")  # the state is still in memory
    trainer.save("last.h5", resumable=True)
    assert read_metadata(tmp_path / "run" / "last.h5")[0] == 4


def test_runs_that_cannot_be_resumed(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint to resume from"):
        make_trainer(corpus, tmp_path / "a").fit(resume=True)
    trainer = make_trainer(corpus, tmp_path / "b")
    trainer.fit()
    fingerprint, trainer.corpus.info["fingerprint"] = trainer.corpus.info["fingerprint"], "other"
    try:
        with pytest.raises(InputError, match="changed since .* was saved"):
            make_trainer(corpus, tmp_path / "b").fit(resume=True)
    finally:
        trainer.corpus.info["fingerprint"] = fingerprint
    (tmp_path / "b" / "last.h5").unlink()
    best = tmp_path / "b" / "best.h5"
    with pytest.raises(InputError, match="holds a model but no training state"):
        restore_training_state(best, trainer.model, trainer.optimizer)


def test_a_validation_split_shorter_than_a_window_is_refused(
    corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="validation split must hold one window of"):
        make_trainer(corpus, tmp_path, batch_size=1, seq_len=corpus.val.n_tokens)


def test_learning_rate_schedules() -> None:
    assert lr_factor(0.05, 0.1, "cosine", 0.0) == pytest.approx(0.5)
    assert lr_factor(0.1, 0.1, "cosine", 0.0) == pytest.approx(1.0)
    assert lr_factor(0.55, 0.1, "cosine", 0.1) == pytest.approx(0.55)
    assert lr_factor(0.55, 0.1, "linear", 0.0) == pytest.approx(0.5)
    assert lr_factor(1.0, 0.1, "linear", 0.2) == pytest.approx(0.2)
    assert lr_factor(0.9, 0.0, "constant", 0.0) == 1.0
    assert lr_factor(1.0, 1.0, "cosine", 0.0) == 0.0
    for fraction, factor in ((0.05, 0.5), (0.1, 1.0), (0.6, 1.0), (0.8, 0.6), (0.9, 0.4), (1, 0.2)):
        assert lr_factor(fraction, 0.1, "wsd", 0.2, 0.4) == pytest.approx(factor)


def test_a_resumed_log_drops_the_lines_after_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, loss=1.0 / step)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    log = MetricsLog(tmp_path, Progress(step=2))
    log.close()
    assert losses(tmp_path) == [1.0, 0.5]


def test_a_small_text_gets_a_short_run(corpus: Corpus, tmp_path: Path) -> None:
    """The default length is four epochs, at least 100 steps and at most DEFAULT_TOKENS tokens."""
    trainer = make_trainer(corpus, tmp_path / "a", steps=None)
    assert trainer.total_steps == 4 * trainer.loader.batches_per_epoch
    trainer = make_trainer(corpus, tmp_path / "b", steps=None, batch_size=256)
    assert trainer.loader.batches_per_epoch < 25
    assert trainer.total_steps == 100
    repeated = Split(np.tile(corpus.train.tokens, 40), np.array([0, 1]), np.array([1]))
    long_text = dataclasses.replace(corpus, train=repeated)
    long_text.info["mixture"][0]["end"] = repeated.n_tokens
    for accumulation in (1, 4):
        trainer = make_trainer(
            long_text,
            tmp_path / f"c{accumulation}",
            steps=None,
            batch_size=16,
            gradient_accumulation_steps=accumulation,
        )
        assert trainer.total_steps == DEFAULT_TOKENS // (16 * 32) // accumulation


class Recorder(Callback):
    """Records each call, adds a metric, and stops the run at a step."""

    def __init__(self, stop_at: int = 0) -> None:
        self.events: list[tuple[str, int]] = []
        self.stop_at = stop_at

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.events.append(("step", int(metrics["step"])))
        trainer.log_metrics(doubled=2 * metrics["loss"])
        if metrics["step"] == self.stop_at:
            trainer.request_stop()

    def on_validation(self, trainer: Trainer, scores: Evaluation) -> None:
        self.events.append(("validation", trainer.progress.step))
        assert scores.bits_per_byte > 0

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        assert path.exists()
        self.events.append((path.name, trainer.progress.step))

    def on_end(self, trainer: Trainer, summary: dict[str, Any]) -> None:
        self.events.append((summary["ended"], summary["steps"]))


def test_callbacks_see_steps_validations_checkpoints_and_the_end(
    corpus: Corpus, tmp_path: Path
) -> None:
    callback = Recorder()
    trainer = make_trainer(corpus, tmp_path, steps=5, callbacks=[callback])
    trainer.fit()
    assert [step for name, step in callback.events if name == "step"] == [1, 2, 3, 4, 5]
    assert [step for name, step in callback.events if name == "validation"] == [4, 5]
    assert ("step-5.h5", 5) in callback.events
    assert callback.events[-2:] == [("last.h5", 5), ("done", 5)]
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    doubled = [x["doubled"] for x in lines if x["kind"] == "callback"]
    assert doubled == [2 * loss for loss in losses(tmp_path)]
    for values in ({"step": 1}, {"kind": "train"}, {"x": torch.ones(1)}, {"x": None}):
        with pytest.raises(InputError, match="metric"):
            trainer.log_metrics(**values)  # type: ignore[arg-type]


def test_a_callback_stops_a_run_that_can_be_resumed(corpus: Corpus, tmp_path: Path) -> None:
    uninterrupted = make_trainer(corpus, tmp_path / "uninterrupted")
    uninterrupted.fit()
    summary = make_trainer(corpus, tmp_path / "resumed", callbacks=[Recorder(stop_at=6)]).fit()
    assert (summary["ended"], summary["steps"]) == ("stopped", 6)
    resumed = make_trainer(corpus, tmp_path / "resumed")
    assert resumed.fit(resume=True)["ended"] == "done"
    assert losses(tmp_path / "resumed") == losses(tmp_path / "uninterrupted")
    numbers = [[row["epoch"] for row in t.progress.epochs] for t in (uninterrupted, resumed)]
    assert numbers[0] == numbers[1]
    for a, b in zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_folder_with_a_dollar_sign_is_drawn(corpus: Corpus, tmp_path: Path) -> None:
    """matplotlib reads text between dollar signs as mathematics, and fails on a broken formula."""
    trainer = make_trainer(corpus, tmp_path / "$HOME_$USER", steps=2, draw_curve=True)
    assert trainer.fit()["ended"] == "done"
    assert (trainer.run_dir / "loss.png").read_bytes()[:4] == b"\x89PNG"
