"""``mmrec distill``: real processes, stopped and killed, and what they leave."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mmrec
from mmrec.checkpoint.checkpoint import load_model
from mmrec.checkpoint.manager import find_checkpoint
from mmrec.config import read_config_file
from mmrec.errors import InputError
from mmrec.runtime.locking import lock_owner
from mmrec.training.ensemble import Ensemble
from mmrec.training.status import read_json
from tests.runtime.test_interrupts import lines, wait_for

RunCommand = Callable[..., tuple[str, str]]
SETTINGS = """[data]
tokenizer = "byte"
batch_size = 2
seq_len = 32
[evaluation]
eval_every = 50
eval_tokens = 500
save_every = 20
[model]
width = 16
depth = 1
heads = 2
ngram_buckets = 64
layer_types = "n"
"""
DISTILL = ["distill", "--data", "book.txt", "--config", "small.toml", "--out", "runs/d"]


@pytest.fixture
def folder(tmp_path: Path, text_file: Path) -> Iterator[Path]:
    """A working folder for processes, which get the default signal handlers."""
    (tmp_path / "book.txt").write_text(text_file.read_text()[:20_000])
    (tmp_path / "small.toml").write_text(SETTINGS)
    before = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for s, handler in before.items():
        signal.signal(s, handler)


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-m", "mmrec", *DISTILL, *words]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: "subprocess.Popen[str]", code: int) -> tuple[str, str]:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    return out, errors


def settings_of(run: Path) -> dict[str, Any]:
    file = read_config_file(run / "config.toml")
    return file.train | file.model


def test_members_then_a_student(folder: Path, run_command: RunCommand) -> None:
    words = ["--members", "3", "--minutes", "0.1", "--member-share", "0.6", "--seed", "7"]
    out, _ = run_command(folder, *DISTILL, *words)
    runs = folder / "runs/d"
    names = ["1-member", "2-member", "3-member", "4-student"]
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == names
    *members, student = (settings_of(runs / name) for name in names)
    assert [m["seed"] for m in members] == [7001, 7002, 7003]
    assert {m["dropout"] for m in members} == {0.1}
    assert (student["seed"], student["dropout"]) == (7, 0.0)
    assert student["teachers"] == ",".join(str(runs / name) for name in names[:3])
    rounds = math.ceil(3 / torch.get_num_threads())
    for name, own, minutes in zip(
        names, [*members, student], [*[0.06 / rounds] * 3, 0.04], strict=True
    ):
        assert own["minutes"] == pytest.approx(minutes)
        assert own["width"] == 16
        summary = json.loads((runs / name / "summary.json").read_text())
        assert summary["ended"] == "done"
        assert summary["seconds"] >= 60 * minutes - 0.06
        [line] = [x for x in out.splitlines() if x.startswith(f"{name} ") and "bits" in x][-1:]
        assert f"{summary['epochs'][-1]['bits_per_byte']:.4f} bits per byte" in line
    first, second = (load_model(runs / name / "last.h5").model for name in names[:2])
    assert not (first.embedding == second.embedding).all()
    # the folder stands for its student
    assert find_checkpoint(runs) == runs / "4-student" / "best.h5"
    assert mmrec.generate(runs, "def", max_tokens=5, seed=1)
    out, _ = run_command(folder, *DISTILL, *words)
    assert "student runs/d/4-student: finished before" in out
    _, errors = run_command(folder, *DISTILL, *words[:-1], "8", code=2)
    assert "holds an ensemble with other settings (seed was 7, now 8): choose another" in errors
    run_command(folder, *DISTILL, "--members", "2", "--minutes", "0.02", "--force")
    assert find_checkpoint(runs) == runs / "3-student" / "best.h5"
    assert not list((runs / "4-student").glob("*.h5"))


def test_a_file_that_says_auto_is_refused(folder: Path, run_command: RunCommand) -> None:
    (folder / "auto.toml").write_text('preset = "auto"\n' + SETTINGS)
    words = ["distill", "--data", "book.txt", "--config", "auto.toml"]
    _, errors = run_command(folder, *words, code=2)
    assert "the members need a preset; got auto: name one, such as tiny" in errors


def test_what_is_stopped_or_killed_continues(folder: Path) -> None:
    """Ctrl-C while members train, a killed member, a killed student."""
    words = ("--members", "2", "--minutes", "0.3")
    runs = folder / "runs/d"
    one, two, student = (runs / name for name in ("1-member", "2-member", "3-student"))

    process = start(folder, *words)
    wait_for(lambda: lines(one) > 5, process)
    process.send_signal(signal.SIGINT)
    _, errors = finish(process, 130)
    last = errors.splitlines()[-1]
    assert last == f"stopped; continue with: mmrec {' '.join([*DISTILL, *words])}"
    assert read_json(one / "summary.json")["ended"] == "signal"
    assert lock_owner(one) is None
    stopped = load_model(one / "last.h5").step
    assert stopped > 0

    process = start(folder, *words)
    wait_for(lambda: lines(one) > stopped + 5, process)
    owner = lock_owner(one)
    assert owner is not None
    os.kill(int(owner.split()[1]), signal.SIGKILL)  # "process N on HOST"
    _, errors = finish(process, 2)
    assert errors.splitlines()[-1].endswith("1-member: it ended without a message")
    assert lock_owner(two) is None  # and no member runs on

    process = start(folder, *words)
    wait_for(lambda: lines(student) > 25, process)
    process.kill()
    process.communicate()
    for member in (one, two):
        assert read_json(member / "summary.json")["ended"] == "done"
    assert json.loads((one / "summary.json").read_text())["steps"] > stopped

    out, _ = finish(start(folder, *words), 0)
    assert f"resume  {student.relative_to(folder)}/step-" in out
    assert read_json(student / "summary.json")["ended"] == "done"


def test_a_folder_of_something_else_is_left_alone(folder: Path, run_command: RunCommand) -> None:
    book = folder / "runs/d/1-member/book.txt"
    book.parent.mkdir(parents=True)
    book.write_text("mine")
    words = ["--minutes", "0.02", "--members", "2"]
    _, errors = run_command(folder, *DISTILL, *words, code=2)
    assert "runs/d/1-member exists, and no mmrec distill made it: choose another --out" in errors
    run_command(folder, *DISTILL, *words, "--force")
    assert book.read_text() == "mine"


def test_a_member_that_fails_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    given = {"data": "book.txt", "seq_len": 32, "batch_size": 2, "tokenizer": "byte"}
    with Ensemble("tiny", given, minutes=1, members=2, config_path=Path("small.toml")) as ensemble:
        ensemble._given["teacher_weight"] = 0.5  # members do not take it
        assert "teacher_weight" not in ensemble._member_settings(ensemble.members[0])
        Path("book.txt").unlink()
        with pytest.raises(InputError, match=r"^runs/distill-tiny-book/\d-member: .*book.txt"):
            ensemble.train_members()
    assert lock_owner(ensemble.folder) is None
