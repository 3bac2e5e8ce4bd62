"""Several processes, real ones under torchrun: the losses of one, checkpoints that all of them can
go on from, and ends that all of them agree on."""

import json
import os
import shutil
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
from mmrec.cli import ranks, startup
from mmrec.data.corpus import Corpus
from mmrec.errors import InputError
from mmrec.runtime.distributed import ProcessGroup
from mmrec.training.run_dir import Lock
from tests.conftest import make_trainer

SETTINGS = """preset = "tiny"
[model]
width = 32
depth = 2
heads = 2
ngrams = 64
layers = "nb"
[train]
tokenizer = "byte"
batch = 4
seq_len = 32
eval_every = 10
eval_tokens = 500
save_every = 10
precision = "float32"
schedule = "constant"
warmup = 0.0
lr = 1e-3
muon_lr = 1e-3
"""
TRAIN = ["-m", "mmrec", "train"]
NEW = ["--config", "small.toml", "--data", "book.txt"]


@pytest.fixture
def folder(tmp_path: Path, text_file: Path) -> Iterator[Path]:
    """Where processes run. They start with the signals' usual meaning, whatever the tests' is."""
    (tmp_path / "small.toml").write_text(SETTINGS)
    (tmp_path / "book.txt").write_text(text_file.read_text()[:20_000])
    before = {s: signal.signal(s, lambda number, frame: None) for s in (2, 15)}
    yield tmp_path
    for s, handler in before.items():
        signal.signal(s, handler)


def start(folder: Path, count: int, *arguments: str) -> subprocess.Popen[str]:
    """So many processes that train together; a single one without torchrun."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), f"--nproc-per-node={count}"]
    command = [sys.executable] if count == 1 else torchrun
    return subprocess.Popen(
        [*command, *TRAIN, *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(folder: Path, count: int, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Standard output and errors of a job that must end with that code."""
    process = start(folder, count, *arguments)
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, errors
    return out, errors


def said(errors: str) -> list[str]:
    """What mmrec said, without torchrun's own report and the bar."""
    return [x for x in errors.splitlines() if x.startswith(("error: ", "stopped "))]


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [x["loss"] for x in lines if x["kind"] == "train"]


def children(process: subprocess.Popen[Any]) -> list[int]:
    """The processes that torchrun started."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(x) for x in text.split() if b"mmrec" in Path(f"/proc/{x}/cmdline").read_bytes()]


def wait_for(what: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)


def test_two_four_and_one_go_on_from_each_other(folder: Path) -> None:
    """Rows carried on, two batches a step: each takes the steps that one process takes alone."""
    way = ["--state", "carry", "--accumulate", "2"]
    run(folder, 1, *NEW, *way, "--keep", "9", "--steps", "30", "--out", "whole")
    (folder / "r").mkdir()
    for name in ("step-10.h5", "config.toml", "metrics.jsonl"):
        shutil.copy(folder / "whole" / name, folder / "r")
    out, _ = run(folder, 2, "--resume", "--out", "r", "--steps", "20", "--parallel", "ddp")
    assert "resume  r/step-10.h5, step 10\n" in out
    assert "processes 1, now 2" in out
    out, _ = run(folder, 4, "--resume", "--out", "r", "--steps", "30", "--parallel", "fsdp")
    assert "processes 2, now 4" in out
    assert out.count("\ntrained ") == 1  # one process speaks for all
    assert losses(folder / "r") == pytest.approx(losses(folder / "whole"), abs=1e-4)
    a, b = (checkpoint.load_model(folder / x / "last.h5") for x in ("whole", "r"))
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) < 2e-3, name
    grown = ["--grow-from", "whole/last.h5", "--data", "book.txt", "--steps", "3", "--out", "more"]
    out, _ = run(folder, 2, *grown, "--batch", "4", "--seq-len", "32", "--parallel", "ddp")
    assert "start   whole/last.h5, step 30, with its moments" in out
    assert losses(folder / "more")[0] < losses(folder / "whole")[-1] + 0.3
    with checkpoint.open_moments(folder / "more/last.h5", a.model) as (_, age):
        assert age == 33
    kept = []
    for x in (a, b):
        with checkpoint.open_moments(x.path, x.model) as (moments, age):
            assert age == 30
            kept.append({n: set(m) for n, m in moments.items()})
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("kind", "whom", "number"), [("fsdp", 1, signal.SIGTERM), ("ddp", None, signal.SIGINT)]
)
def test_a_signal_stops_all_of_them(
    folder: Path, kind: str, whom: int | None, number: signal.Signals
) -> None:
    """To one of them, or to torchrun, which hands it on."""
    process = start(folder, 2, *NEW, "--steps", "1000000", "--out", "r", "--parallel", kind)
    r = folder / "r"
    wait_for(lambda: (r / "metrics.jsonl").exists() and len(losses(r)) > 3, process)
    both = children(process)
    assert len(both) == 2
    os.kill(process.pid if whom is None else both[whom], number)
    _, errors = process.communicate(timeout=60)
    step = checkpoint.read_metadata(r / "last.h5")[0]
    assert said(errors) == [
        f"stopped at step {step:,} and saved; continue with: torchrun --nproc-per-node 2 -m mmrec "
        f"train --resume --out r --parallel {kind}"
    ]
    assert len(losses(r)) == step > 3
    assert json.loads((r / "summary.json").read_text())["ended"] == "signal"
    if whom is not None:
        assert f"exitcode  : {128 + number}" in errors
    assert not any(Path(f"/proc/{x}").exists() for x in both)
    with Lock(r):
        pass


@pytest.mark.parametrize(("kind", "whom"), [("ddp", 0), ("fsdp", 1)])
def test_a_killed_process_ends_the_job(folder: Path, kind: str, whom: int) -> None:
    process = start(folder, 2, *NEW, "--steps", "1000000", "--out", "r", "--parallel", kind)
    r = folder / "r"
    wait_for(lambda: list(r.glob("step-*.h5")), process)
    both = children(process)
    os.kill(both[whom], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said(errors) == [
        "error: a process of this job has ended; the checkpoints are whole: go "
        "on from them with --resume"
    ]
    assert not any(Path(f"/proc/{x}").exists() for x in both)
    step = checkpoint.read_metadata(saved.list_checkpoints(r)[-1])[0]
    out, _ = run(folder, 1, "--resume", "--out", "r", "--steps", str(step + 2))
    assert f"step {step:,}\n" in out
    assert checkpoint.read_metadata(r / "last.h5")[0] == step + 2


def test_they_diverge_and_roll_back_together(folder: Path) -> None:
    out, errors = run(
        folder,
        2,
        *NEW,
        "--steps",
        "40",
        "--out",
        "r",
        "--lr",
        "1e30",
        "--on-nan",
        "rollback",
        "--parallel",
        "fsdp",
        code=1,
    )
    assert out.count("rollback: ") == 3
    [line] = said(errors)
    assert "after 3 rollbacks" in line
    assert saved.list_checkpoints(folder / "r")


def test_a_mistake_is_said_once(folder: Path) -> None:
    wish = [*NEW, "--steps", "3", "--out", "r", "--batch", "3"]
    _, errors = run(folder, 2, *wish, "--parallel", "ddp", code=1)  # torchrun's own
    assert said(errors) == [
        "error: batch must be a multiple of the 2 processes that share its rows; got 3"
    ]
    assert errors.count("exitcode  : 2 ") >= 1
    assert not (folder / "r").exists()
    _, errors = run(folder, 2, *wish, code=1)
    [line] = said(errors)
    assert line.startswith("error: torchrun started 2 processes, which would all write the same")


def test_what_cannot_be_sharded_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    class Sharded(ProcessGroup):
        sharded = True

    made = make_trainer(corpus, tmp_path, grow_from="x")
    with pytest.raises(InputError, match="--grow-from begins with --parallel ddp or in one"):
        type(made)(tmp_path, corpus, made.model.config, made.config, "tiny", world=Sharded())


def test_how_a_process_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.check_launch(None)
    for name, value in (("RANK", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="--parallel needs the processes that torchrun starts"):
            ranks.check_launch("ddp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks.check_launch("fsdp")
    with pytest.raises(InputError, match="torchrun started 2 processes, .*: train takes --p"):
        ranks.check_launch(None)


@pytest.mark.parametrize("given", [None, "1"])
def test_the_cores_are_shared_unless_the_user_said_otherwise(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torchrun was started with tells its own choice from the user's."""
    said = {} if given is None else {"OMP_NUM_THREADS": given}
    parent = subprocess.Popen([str(shutil.which("sleep")), "60"], env=said)
    try:
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(12)))
        monkeypatch.setattr(os, "environ", {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"})
        wait_for(lambda: Path(f"/proc/{parent.pid}/comm").read_text() == "sleep\n", parent)
        startup.share_cores()
        assert os.environ["OMP_NUM_THREADS"] == ("3" if given is None else given)
    finally:
        parent.kill()
        parent.wait()
