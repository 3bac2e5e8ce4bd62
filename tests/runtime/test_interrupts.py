"""Real processes and signals: stopped, hung up, killed, two at once. None loses what it learnt."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmrec.checkpoint.checkpoint import load_model
from mmrec.checkpoint.header import read_metadata
from mmrec.checkpoint.manager import find_checkpoint
from mmrec.cli.session import NOTHING_TO_SAVE
from mmrec.errors import InterruptedTrainingError, RunLockedError
from mmrec.runtime.interrupts import (
    NOTICE,
    STOP_SIGNALS,
    StopSignal,
    end_at_second_signal,
    exit_on_signal,
    tolerate_closed_output,
)
from mmrec.runtime.locking import FolderLock
from tests.conftest import ROOT

CONFIG = """preset = "tiny"
[model]
width = 32
depth = 2
heads = 2
ngram_buckets = 64
[data]
tokenizer = "byte"
batch_size = 2
seq_len = 32
[evaluation]
eval_every = 50
eval_tokens = 500
sample_tokens = 4
save_every = 50
"""
TRAIN = [sys.executable, "-m", "mmrec", "train"]
NEW_RUN = ["--config", "small.toml", "--data", "book.txt", "--steps"]

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signals")


@posix_only
def test_the_first_signal_is_recorded_and_the_second_is_the_systems() -> None:
    stop = StopSignal()
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    with stop:
        assert not stop.is_set()
        stop.raise_if_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.is_set(), stop.signal_number) == (True, signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        with pytest.raises(InterruptedTrainingError):
            stop.raise_if_set()
    assert {s: signal.getsignal(s) for s in STOP_SIGNALS} == before


@posix_only
def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop, exit_on_signal("not printed"):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


@posix_only
def test_several_processes_stop_for_the_largest_signal() -> None:
    """The handlers stay after the block, since torchrun may send more signals."""
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    try:
        with StopSignal(agree=lambda number: max(number, 2.0)) as stop:
            assert (stop.is_set(), stop.signal_number) == (True, 2)
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == 2
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_other_threads_leave_the_handlers_alone() -> None:
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    results: list[bool] = []

    def work() -> None:
        with StopSignal() as stop, exit_on_signal(""):
            results.append(stop.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [False]
    assert {s: signal.getsignal(s) for s in STOP_SIGNALS} == before


@posix_only
def test_a_signal_before_there_is_anything_to_save(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_signal("nothing to save"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "nothing to save\n"


@posix_only
def test_output_that_nobody_reads_is_dropped() -> None:
    code = (
        "import sys; from mmrec.runtime.interrupts import tolerate_closed_output\n"
        "sys.stdin.readline()\n"
        "with tolerate_closed_output():\n"
        "    for _ in range(3): print('x' * 100_000, flush=True)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        process.stdout.close()
        _, errors = process.communicate(b"\n", timeout=60)
    assert (process.returncode, errors) == (0, b"")
    with contextlib.redirect_stdout(None), tolerate_closed_output():
        pass  # a program without a console has no streams


@pytest.fixture
def folder(tmp_path: Path, text_file: Path) -> Iterator[Path]:
    """A folder with a text and settings. Processes start with the default signal handlers."""
    (tmp_path / "small.toml").write_text(CONFIG)
    (tmp_path / "book.txt").write_text(text_file.read_text()[:20_000])
    before = {s: signal.signal(s, lambda number, frame: None) for s in STOP_SIGNALS}
    yield tmp_path
    for s, handler in before.items():
        signal.signal(s, handler)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)


def lines(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_a_terminal_that_is_closed_and_a_folder_that_is_taken(
    folder: Path, run_command: Callable[..., tuple[str, str]]
) -> None:
    pty = pytest.importorskip("pty")
    terminal, child_terminal = pty.openpty()
    process = subprocess.Popen(
        [*TRAIN, *NEW_RUN, "1000000", "--out", "r"],
        cwd=folder,
        stdin=child_terminal,
        stdout=child_terminal,
        stderr=child_terminal,
        start_new_session=True,
    )
    os.close(child_terminal)
    run = folder / "r"
    wait_for(lambda: lines(run) > 3, process)
    with pytest.raises(RunLockedError, match=f"process {process.pid} on "):
        FolderLock(run)
    for options in (["--resume"], [*NEW_RUN, "9", "--force"]):
        _, errors = run_command(folder, "train", *options, "--out", "r", code=2)
        assert f"process {process.pid} on " in errors.splitlines()[-1]
    wait_for(lambda: list(run.glob("step-*.h5")), process)
    assert load_model(find_checkpoint(run)).step >= 50  # readers need no lock
    os.close(terminal)  # from now on writing to the terminal is an error
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    step = read_metadata(run / "last.h5").step
    assert lines(run) >= step > 50
    assert not [p.name for p in run.glob(".*")]


def test_two_at_once_find_two_folders_and_nobody_has_to_listen(folder: Path) -> None:
    both = [
        subprocess.Popen(
            [*TRAIN, *NEW_RUN, "60"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
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
        summary = json.loads((folder / "runs" / name / "summary.json").read_text())
        assert (summary["ended"], summary["steps"]) == ("done", 60)


def test_a_second_signal_does_not_wait(folder: Path) -> None:
    process = subprocess.Popen(
        [*TRAIN, *NEW_RUN, "1000000", "--out", "r"],
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
        load_model(path)
    with FolderLock(run):  # that of a dead process is free, and its temporaries are removed
        assert not list(run.glob(".*.tmp"))
    assert not list(run.glob(".*"))


# Commands that call a library for minutes, as the training of a tokenizer can. "prepare" has a
# handler of its own, which does not run during the call.
LONG_CALLS = """
import hashlib, threading
from mmrec.cli import main
from mmrec.runtime.interrupts import exit_on_signal

@main.app.command()
def work():
    threading.Timer(1, print, ("begin",), {"flush": True}).start()  # once the call has begun
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

@main.app.command()
def prepare():
    with exit_on_signal("not printed"):
        work()

main.run()
"""


@posix_only
@pytest.mark.parametrize(
    ("command", "signal_number", "code"),
    [("work", signal.SIGINT, 130), ("prepare", signal.SIGTERM, 143)],
)
def test_two_signals_end_a_library_call(
    folder: Path, command: str, signal_number: int, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_CALLS, command],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == "begin\n"
    process.send_signal(signal_number)
    assert process.stderr.readline() == f"{NOTICE}\n"
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal_number)
    assert process.wait(60) == code
    assert time.monotonic() - begin < 5
    assert process.communicate() == ("", "")


@posix_only
def test_the_end_of_a_block_ends_the_watch() -> None:
    """One signal, in or after a block, ends nothing; the descriptor of another program returns."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.fileno())
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    threads = threading.active_count()
    try:
        for _ in range(3):
            with end_at_second_signal():
                assert threading.active_count() == threads + 1
                os.kill(os.getpid(), signal.SIGTERM)
        assert threading.active_count() == threads
        assert signal.set_wakeup_fd(before) == sender.fileno()
    finally:
        signal.signal(signal.SIGTERM, handler)
        receiver.close()
        sender.close()


def test_a_signal_while_the_text_is_read(folder: Path) -> None:
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
    # a busy machine may be slow to end, and says so first
    assert errors.removeprefix(f"{NOTICE}\n") == f"{NOTHING_TO_SAVE}\n"
    assert not (folder / "r").exists()
    assert not list(folder.rglob(".*.tmp"))


def test_a_kill_while_a_chain_writes(tmp_path: Path) -> None:
    """The stress script itself: SIGKILL, resume, and equal bits; a chain has growth in it."""
    report = tmp_path / "report.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "kill_test.py")]
    words = ["--kills", "1", "--only", "chain", "--steps-per-kill", "20"]
    subprocess.run(
        [*script, *words, "--out", str(report)],
        check=True,
        timeout=400,
        stdout=subprocess.DEVNULL,
    )
    [result] = json.loads(report.read_text())["runs"]
    assert result["kills"] == 1
    scenario = result["scenarios"]["chain"]
    assert scenario["aimed"] == {"writing": 1}
    assert scenario["steps"] == 40
    assert scenario["arrays_equal"]["last.h5"] > 80
