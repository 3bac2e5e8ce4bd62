"""Real processes and signals: stopped, hung up, killed, two at once; none loses what it learnt."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmrec.checkpoint import checkpoint
from mmrec.checkpoint import manager as saved
from mmrec.errors import RunLockedError
from mmrec.training.run_dir import Lock
from tests.conftest import ROOT

SETTINGS = """preset = "tiny"
[model]
width = 32
depth = 2
heads = 2
ngrams = 64
[train]
tokenizer = "byte"
batch = 2
seq_len = 32
eval_every = 50
eval_tokens = 500
save_every = 50
"""
TRAIN = [sys.executable, "-m", "mmrec", "train"]
PLAN = ["--config", "small.toml", "--data", "book.txt", "--steps"]


@pytest.fixture
def folder(tmp_path: Path, text_file: Path) -> Iterator[Path]:
    """Where processes run. They start with the signals' usual meaning, whatever the tests' is."""
    (tmp_path / "small.toml").write_text(SETTINGS)
    (tmp_path / "book.txt").write_text(text_file.read_text()[:20_000])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {s: signal.signal(s, lambda number, frame: None) for s in numbers}
    yield tmp_path
    for s, handler in before.items():
        signal.signal(s, handler)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)


def lines(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_a_terminal_that_is_closed_and_a_folder_that_is_taken(folder: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*TRAIN, *PLAN, "1000000", "--out", "r"],
        cwd=folder,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    run = folder / "r"
    wait_for(lambda: lines(run) > 3, process)
    with pytest.raises(RunLockedError, match=f"is being written by process {process.pid} on "):
        Lock(run)
    for wish in (["--resume"], [*PLAN, "9", "--force"]):
        second = subprocess.run(
            [*TRAIN, *wish, "--out", "r"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert second.returncode == 2
        assert second.stderr.splitlines()[-1].startswith(
            f"error: r is being written by process {process.pid} on "
        )
    wait_for(lambda: list(run.glob("step-*.h5")), process)
    assert checkpoint.load_model(saved.find_checkpoint(run)).step >= 50  # readers ask nobody
    os.close(master)  # from now on writing to the terminal is an error
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    step = checkpoint.read_metadata(run / "last.h5")[0]
    assert lines(run) >= step > 50
    assert not [p.name for p in run.glob(".*")]


def test_two_at_once_find_two_folders_and_nobody_has_to_listen(folder: Path) -> None:
    both = [
        subprocess.Popen(
            [*TRAIN, *PLAN, "60"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout
        assert process.stderr
        process.stdout.close()  # as '| head' does once it has what it wants
        process.stderr.close()
    assert [process.wait(120) for process in both] == [0, 0]
    for name in ("tiny-book", "tiny-book-2"):
        made = json.loads((folder / "runs" / name / "summary.json").read_text())
        assert (made["ended"], made["steps"]) == ("done", 60)


def test_a_second_signal_does_not_wait(folder: Path) -> None:
    process = subprocess.Popen(
        [*TRAIN, *PLAN, "1000000", "--out", "r"],
        cwd=folder,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    run = folder / "r"
    wait_for(lambda: list(run.glob("step-*.h5")), process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (-signal.SIGINT, 130)  # 130: it was quicker
    for path in run.glob("*.h5"):
        checkpoint.load_model(path)
    with Lock(run):  # a dead process holds nothing, and what it was writing is cleared away
        assert [p.name for p in run.glob(".*")] == [".lock"]


def test_a_signal_before_there_is_anything_to_save(folder: Path) -> None:
    process = subprocess.Popen(
        [*TRAIN, "tiny", "--data", "stdlib", "--out", "r"],
        cwd=folder,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "MMREC_CACHE": str(folder / "cache")},
    )
    assert process.stdout
    assert "training the bpe tokenizer" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert errors == "stopped before training began: there was nothing to save\n"
    assert not (folder / "r").exists()
    assert not list(folder.rglob(".*.tmp"))


def test_kills_while_it_trains_and_while_it_writes(tmp_path: Path) -> None:
    """The stress script itself: SIGKILL, resume, and equal bits in the end."""
    made = tmp_path / "made.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "kill_test.py")]
    subprocess.run(
        [*script, "--kills", "3", "--steps", "50", "--out", str(made)],
        check=True,
        timeout=400,
        stdout=subprocess.DEVNULL,
    )
    result = json.loads(made.read_text())
    assert result["kills"] == 3
    assert result["aimed"]["writing"] == 2
    assert result["arrays_equal"]["last.h5"] > 40
