"""Where a run stands: the line a minute, status.json, and what a reader makes of them."""

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmrec.config import VERSION, LengthConfig
from mmrec.data.corpus import Corpus
from mmrec.errors import InputError
from mmrec.runtime import machine
from mmrec.runtime.locking import FolderLock, lock_owner
from mmrec.training import status as status_module
from mmrec.training.status import Curve, StatusReporter, find_run, read_status, text_curve
from mmrec.training.trainer import Trainer
from tests.conftest import make_trainer


class Clock:
    """A clock that a test moves; that of other threads, such as a server's, goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        clocks = SimpleNamespace(monotonic=lambda: self.now, time=time.time)
        monkeypatch.setattr(status_module, "time", clocks)


def terminal(monkeypatch: pytest.MonkeyPatch, *descriptors: int) -> None:
    """These file descriptors are terminals, and no others."""
    monkeypatch.setattr(status_module.os, "isatty", lambda fd: fd in descriptors)


def report(lines: list[str], folder: Path | None = None, **options: Any) -> StatusReporter:
    left = options.pop("seconds_left", lambda speed: 100 / speed)
    return StatusReporter(folder, 300, 100, left, echo=lines.append, **options)


def test_a_line_a_minute_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says the mean loss and the speed of the minute. Ten seconds are enough for the file."""
    clock, lines = Clock(monkeypatch), list[str]()
    terminal(monkeypatch)
    written = []
    with report(lines, tmp_path) as reporter:
        for step in range(101, 201):  # two seconds each
            clock.now += 2
            loss = 4.0 if step <= 130 else 2.0
            reporter.step(step, 1.5 * step, loss=loss, lr=0.1, tokens=64, rate=43.0)
            if (tmp_path / "status.json").exists():
                written.append((tmp_path / "status.json").read_text())
    assert lines == [
        f"step    {step} of 300, loss {loss}, 32 tokens/s, 3:20 left"
        for step, loss in ((130, "4.000"), (160, "2.000"), (190, "2.000"))
    ]
    assert len(written) == 96  # from the fifth step on
    assert len(set(written)) == 20
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "step": 200,
        "total_steps": 300,
        "tokens_per_second": 32,
        "seconds": 300.0,
        "seconds_left": 200.0,
        "machine": machine.describe(),
        "mmrec_version": VERSION,
    }
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("terminals", "show", "has_lines", "has_bar"),
    [
        ((), True, True, False),  # nohup, systemd
        ((2,), True, True, True),  # mmrec train | tee log
        ((1, 2), True, False, True),
        ((1, 2), False, False, False),
        ((), False, False, False),
    ],
)
def test_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminals: tuple[int, ...],
    show: bool,
    has_lines: bool,
    has_bar: bool,
) -> None:
    clock, lines = Clock(monkeypatch), list[str]()
    terminal(monkeypatch, *terminals)
    with report(lines, show=show) as reporter:
        clock.now += 61
        reporter.step(101, 1.0, loss=2.0, lr=0.1, tokens=64, rate=64.0)
        reporter.step(90, 1.0, loss=2.0, lr=0.1, tokens=64, rate=64.0)  # after a rollback
    assert bool(lines) == has_lines
    assert ("90/300" in capsys.readouterr().err) == has_bar


def test_long_scoring_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line a minute without a terminal, and a bar that moves on one."""
    clock, lines = Clock(monkeypatch), list[str]()
    terminal(monkeypatch, 2)
    with report(lines) as reporter:
        for scored in range(0, 1000, 10):
            clock.now += 2
            reporter.score(scored, 1000)
    assert lines == [
        f"step    100, scoring the validation text, {percent}%" for percent in (29, 59, 89)
    ]
    bar = capsys.readouterr().err
    assert "scoring the validation text, 1%" in bar
    assert "scoring the validation text, 99%" in bar


def test_a_run_that_ended(corpus: Corpus, tmp_path: Path) -> None:
    trainer = make_trainer(corpus, tmp_path / "run")
    summary = trainer.fit()
    now, log = read_status(tmp_path / "run")
    curve = log.curve
    assert (now.state, now.writer, now.step, now.total_steps) == ("done", None, 12, 12)
    assert (now.fraction_done, now.seconds_left, now.checkpoint) == (1.0, None, "last.h5")
    assert (now.best_step, now.best_val_loss) == (summary["best_step"], summary["best_val_loss"])
    assert now.tokens_per_second == summary["tokens_per_second"]
    assert now.seconds == summary["seconds"]
    newest = trainer.progress.validations[-1]
    assert (now.val_step, now.val_loss) == (newest["step"], newest["val"])
    assert [step for step, _ in curve.train] == list(range(1, 13))
    assert now.train_loss == pytest.approx(sum(x for _, x in curve.train) / 12)
    assert curve.val == [(v["step"], v["val"]) for v in trainer.progress.validations]
    assert now.length == "12 steps"


def test_the_command_prints_what_was_read(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As lines for people, in plain characters of the terminal's width, or as JSON."""
    from tests.cli.test_cli import call

    make_trainer(corpus, tmp_path / "runs/one").fit()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    now, log = read_status(Path("runs/one"))
    assert call(monkeypatch, "status") == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[:2] == ["run     runs/one", "state   ended: its length was reached"]
    assert lines[2].startswith("step    12 of 12, 100.0% of the run; ")
    assert f"best    {now.best_val_loss:.4f} at step {now.best_step}" in lines
    assert f"speed   {now.tokens_per_second:,} tokens/s" in lines
    assert lines[-15:] == text_curve(log.curve, 39)
    assert call(monkeypatch, "status runs/one --json") == 0
    read = json.loads(capsys.readouterr().out)
    ages = {"checkpoint_age", "last_step_age"}
    assert {k: v for k, v in read.items() if k not in ages} == {
        k: v for k, v in dataclasses.asdict(now).items() if k not in ages
    }
    assert all(0 <= read[age] < 60 for age in ages)


def test_a_run_in_progress_and_one_that_was_killed(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from within, at a step: the lock is held, and an earlier summary counts no more."""
    monkeypatch.setattr(status_module, "SECONDS_BETWEEN_FILES", 0.0)
    run = tmp_path / "run"
    make_trainer(corpus, run, steps=2).fit()
    seen = []
    trainer = make_trainer(corpus, run, minutes=1000, steps=None)
    train_step = trainer.train_step

    def look() -> tuple[float, float, float]:
        seen.append(read_status(run)[0])
        if trainer.progress.step == 4:
            trainer.request_stop()
        return train_step()

    trainer.train_step = look  # type: ignore[method-assign]
    trainer.fit(resume=True)
    now = seen[-1]
    assert (now.state, now.step) == ("running", 4)
    assert now.writer == f"process {os.getpid()} on {platform.node()}"
    assert (now.length, now.total_steps) == ("1000 minutes", None)
    assert now.seconds_left == pytest.approx(60_000, abs=60)
    assert now.seconds is not None
    assert now.fraction_done == pytest.approx(now.seconds / 60_000)
    assert now.tokens_per_second is not None
    assert now.tokens_per_second > 0
    assert read_status(run)[0].state == "stopped"
    (run / "summary.json").write_text('{"ended": "stopped", "steps": 2}')
    now = read_status(run)[0]
    assert (now.state, now.writer, now.seconds_left) == ("killed", None, None)


def test_a_lock_is_seen_without_being_taken(tmp_path: Path) -> None:
    """That of a real process, until it is killed. Its files stay behind, and say nothing."""
    assert lock_owner(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    code = (
        "import sys, time; from pathlib import Path; from mmrec.runtime.locking import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert lock_owner(tmp_path) == f"process {child.pid} on {platform.node()}"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert (tmp_path / ".mmrec.lock").exists()
    assert lock_owner(tmp_path) is None
    with FolderLock(tmp_path):
        assert lock_owner(tmp_path) == f"process {os.getpid()} on {platform.node()}"
    assert lock_owner(tmp_path) is None


def test_a_log_that_is_being_written(tmp_path: Path) -> None:
    """The last line may be cut; a long log is thinned out, and its newest lines are all read."""
    lines = [{"kind": "train", "step": n, "loss": 1 + 1 / n} for n in range(1, 20_001)]
    lines.insert(150, {"kind": "val", "step": 150, "loss": 1.5, "bits_per_byte": 2.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(f'{text}{{"kind": "train", "st')
    began = time.perf_counter()
    now, log = read_status(tmp_path)
    assert time.perf_counter() - began < 2
    assert (now.step, now.val_step, now.state, now.length) == (20_000, 150, "killed", None)
    assert now.train_loss == pytest.approx(1 + sum(1 / n for n in range(19_981, 20_001)) / 20)
    assert len(log.curve.train) < 6000
    for text in ("[1]\n", '{"a": 1}\n', "text\n", '{"kind": "val", "step": 1}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(InputError, match=r"metrics.jsonl is not the log of a run"):
            read_status(tmp_path)


def test_the_newest_run_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no run in runs: .*mmrec train tiny"):
        find_run(None)
    for age, name in ((30, "runs/a"), (10, "runs/chain/1-tiny"), (20, "runs/b"), (5, "other/c")):
        Path(name).mkdir(parents=True)
        Path(name, "metrics.jsonl").touch()
        os.utime(f"{name}/metrics.jsonl", (time.time() - age,) * 2)
    assert find_run(None) == Path("runs/chain/1-tiny")
    assert find_run(Path("runs/b")) == Path("runs/b")
    assert find_run(Path("runs/chain")) == Path("runs/chain/1-tiny")
    with pytest.raises(InputError, match="no run in runs/none"):
        find_run(Path("runs/none"))


def test_a_curve_in_plain_characters() -> None:
    """Every width holds; the picture shows where the losses are."""
    curve = Curve([(n, 4.0 - n / 500) for n in range(1, 1001)], [(500, 3.5), (1000, 3.0)])
    for width in range(1, 140):
        lines = text_curve(curve, width)
        assert all(len(line) <= width for line in lines)
        assert "".join(lines).isascii()
    lines = text_curve(curve, 60)
    picture = [line[9:].ljust(51) for line in lines[:12]]
    for x in range(6, 50):  # a straight line falls by a row in every four columns
        [y] = [y for y, row in enumerate(picture) if row[x] == "*"]
        assert y == pytest.approx((x - 5) * 11 / 45, abs=1.1)
    assert [row.index("o") for row in picture if "o" in row] == [25, 50]
    assert lines[-2].split() == ["0", "1,000"]
    assert text_curve(Curve([], []), 60) == []


def test_the_time_left(trainer: Trainer) -> None:
    trainer.progress.step, trainer.progress.seconds = 4, 30.0
    assert trainer.seconds_left(2.0) == 4.0
    trainer.config = trainer.config.replace(steps=None, minutes=1)
    assert trainer.seconds_left(2.0) == 30.0
    until = LengthConfig(until="2099-01-01 00:00").until
    trainer.config = trainer.config.replace(minutes=None, until=until)
    trainer._read_clock()
    assert trainer.seconds_left(2.0) > 1e9
