"""Distributed training in real processes: the results of one process, and a common end."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmrec.checkpoint.checkpoint import load_model, open_moments
from mmrec.checkpoint.header import read_metadata
from mmrec.checkpoint.manager import list_checkpoints
from mmrec.cli.torchrun import check_launch
from mmrec.data.corpus import Corpus
from mmrec.errors import InputError
from mmrec.runtime.distributed import STRATEGIES, ProcessGroup
from mmrec.runtime.locking import FolderLock
from tests.conftest import make_trainer

CONFIG = """preset = "tiny"
[model]
width = 32
depth = 2
heads = 2
ngram_buckets = 65_537
layer_types = "nb"
[data]
tokenizer = "byte"
batch_size = 4
seq_len = 32
[optimizer]
lr = 1e-3
matrix_lr = 1e-3
precision = "float32"
schedule = "constant"
warmup = 0.0
ema_decay = 0.5
[evaluation]
eval_every = 6
eval_tokens = 300
sample_tokens = 4
save_every = 6
"""
TRAIN = ["-m", "mmrec", "train"]
NEW_RUN = ["--config", "small.toml", "--data", "book.txt"]

OPERATIONS = """
import os, sys
import torch
from torch import nn
from mmrec.runtime.distributed import SINGLE_PROCESS, STRATEGIES, TorchrunGroup
from mmrec.training.weight_average import WeightAverage

class Net(nn.Module):
    # 7 rows do not divide by 3 processes; of 2 rows the last process holds none
    def __init__(self, group):
        super().__init__()
        sizes = ((4, 7), (7, 4))
        self.layers = nn.ModuleList(
            group.shard_layer(nn.Linear(*size, bias=False)) for size in sizes
        )
        self.embedding = nn.Parameter(torch.ones(2, 4))
        group.shard_model(self)

    def hidden_states(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x @ self.embedding.mT

for strategy, os.environ["MASTER_PORT"] in zip(STRATEGIES, sys.argv[1:], strict=True):
    torch.manual_seed(0)
    single = Net(SINGLE_PROCESS)
    x = torch.randn(3, 5, 4)
    single_loss = single.hidden_states(x).square().sum()
    single_loss.backward()
    torch.manual_seed(1)
    with TorchrunGroup(strategy) as group:
        rank = int(os.environ["RANK"])
        assert (group.rank, group.size, group.sharded) == (rank, 3, strategy == "fsdp")
        assert group.broadcast_object(rank + 5) == 5
        assert group.all_gather_object(str(rank)) == ["0", "1", "2"]
        assert group.all_reduce_max(-1.0 - rank) == -1.0
        assert group.local_rank_zero_first(lambda: rank + 1) == rank + 1
        if not group.sharded:  # each rank has other rows, and another number of them
            gradient = torch.sparse_coo_tensor(
                torch.arange(rank + 1)[None] % 2, torch.ones(rank + 1, 3), (4, 3),
                check_invariants=False,
            )
            group.all_reduce_gradients(0.0, [gradient, torch.ones(1)])
            assert gradient.to_dense().tolist() == [[4.0] * 3, [2.0] * 3, [0.0] * 3, [0.0] * 3]
        net = Net(group)
        pairs = list(zip(net.parameters(), single.parameters(), strict=True))
        for p, q in pairs:
            group.scatter_tensor_(p.data, q.detach() if rank == 0 else None)
            assert torch.equal(group.full_tensor(p.detach()), q)
        with torch.no_grad():
            net.hidden_states(x)
        group.reshard(net)
        loss = net.hidden_states(x[rank : rank + 1]).square().sum()
        loss.backward()
        total = group.all_reduce_gradients(loss.item(), [p.grad for p in net.parameters()])
        torch.testing.assert_close(total, single_loss.item())
        for p, q in pairs:
            torch.testing.assert_close(group.full_tensor(p.grad), q.grad)
            q.grad.copy_(torch.arange(q.numel()).view_as(q))  # exact in bfloat16
            group.scatter_tensor_(p.grad, q.grad if rank == 0 else None)
        calls = []
        def double(tensors):
            calls.append([t.shape for t in tensors])
            return [2 * t for t in tensors]
        shards = [group.local_shard(p.grad) for p, _ in pairs]
        shapes = [q.shape for _, q in pairs]
        thirds = [x / 3 for x in shards]  # not exact in bfloat16
        for dtype in (torch.float32, torch.bfloat16):
            results = group.map_sharded(lambda full: full, thirds, shapes, dtype)
            for got, want in zip(results, thirds, strict=True):
                assert torch.equal(got, want.to(dtype).float())
        results = group.map_sharded(double, shards, shapes, torch.bfloat16)
        for (p, q), result in zip(pairs, results, strict=True):
            assert result.dtype == torch.float32
            group.local_shard(p.grad).copy_(result)
            assert torch.equal(group.full_tensor(p.grad), 2 * q.grad)
        assert calls == [[pairs[rank][1].shape]]  # each process computed one full tensor
        average = WeightAverage(net, 0.5, group)
        for step in range(2):
            for p, q in pairs:
                q.data.add_(step)
                group.scatter_tensor_(p.data, q.detach() if rank == 0 else None)
            for task in average.update_tasks(step, 2):
                task()
        with average.swapped():  # after one step the decay is 2 / 11
            for p, q in pairs:
                torch.testing.assert_close(group.full_tensor(p.detach()), q.detach() - 2 / 11)
        for p, q in pairs:
            assert torch.equal(group.full_tensor(p.detach()), q)
"""


def test_operations_give_what_one_process_computes() -> None:
    """By every strategy, one after another in the same processes, each with a port of its own."""
    with contextlib.ExitStack() as probes:
        ports = []
        for _ in STRATEGIES:
            probe = probes.enter_context(socket.socket())
            probe.bind(("localhost", 0))
            ports.append(str(probe.getsockname()[1]))
    address = {"MASTER_ADDR": "localhost", "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPERATIONS, *ports],
            env=os.environ | address | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(errors)


@pytest.fixture
def folder(tmp_path: Path, text_file: Path) -> Iterator[Path]:
    """A folder with a text and settings. Processes start with the default signal handlers."""
    (tmp_path / "small.toml").write_text(CONFIG)
    (tmp_path / "book.txt").write_text(text_file.read_text()[:12_000])
    before = {s: signal.signal(s, lambda number, frame: None) for s in (2, 15)}
    yield tmp_path
    for s, handler in before.items():
        signal.signal(s, handler)


def start(folder: Path, count: int, *arguments: str) -> subprocess.Popen[str]:
    """Start processes that train together, or a single one without torchrun."""
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
    """Return standard output and errors of a job that must end with a certain code."""
    process = start(folder, count, *arguments)
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, errors
    return out, errors


def messages(errors: str) -> list[str]:
    """Return the lines of mmrec itself, without torchrun's report and the progress bar."""
    return [x for x in errors.splitlines() if x.startswith(("error: ", "stopped "))]


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [x["loss"] for x in lines if x["kind"] == "train"]


def children(process: subprocess.Popen[Any]) -> list[int]:
    """Return the processes that torchrun started."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(x) for x in text.split() if b"mmrec" in Path(f"/proc/{x}/cmdline").read_bytes()]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)


def test_runs_continue_with_another_number_of_processes(
    folder: Path, run_command: Callable[..., tuple[str, str]]
) -> None:
    """With carried states and accumulated gradients, they take the steps of one process."""
    options = ["--state", "carry", "--gradient-accumulation-steps", "2", "--keep-checkpoints", "9"]
    run_command(folder, "train", *NEW_RUN, *options, "--steps", "18", "--out", "single")
    (folder / "r").mkdir()
    for name in ("step-6.h5", "config.toml", "metrics.jsonl"):
        shutil.copy(folder / "single" / name, folder / "r")
    out, _ = run(folder, 2, "--resume", "--out", "r", "--steps", "12", "--parallel", "ddp")
    assert "r/step-6.h5, step 6\n" in out
    assert "processes 1, now 2" in out
    out, _ = run(folder, 4, "--resume", "--out", "r", "--steps", "18", "--parallel", "fsdp")
    assert "processes 2, now 4" in out
    assert out.count("\ntrained ") == 1  # one process prints for all
    assert losses(folder / "r") == pytest.approx(losses(folder / "single"), abs=1e-4)
    single, distributed = (load_model(folder / x / "last.h5") for x in ("single", "r"))
    parameters = distributed.model.parameters()
    for (name, p), q in zip(single.model.named_parameters(), parameters, strict=True):
        assert float((p - q).detach().abs().max()) < 2e-3, name
    moment_names = []
    for loaded in (single, distributed):
        with open_moments(loaded.path, loaded.model) as (moments, steps):
            assert steps == 18
            moment_names.append({name: set(x) for name, x in moments.items()})
    assert moment_names[0] == moment_names[1]
    options = ["--initialize-from", "single/last.h5", "--data", "book.txt", "--steps", "3"]
    options += ["--batch-size", "4", "--seq-len", "32", "--parallel", "ddp", "--out", "more"]
    run(folder, 2, *options)
    assert losses(folder / "more")[0] < losses(folder / "single")[-1] + 0.3
    with open_moments(folder / "more/last.h5", single.model) as (_, steps):
        assert steps == 21


@pytest.mark.parametrize(
    ("strategy", "rank", "number"), [("fsdp", 1, signal.SIGTERM), ("ddp", None, signal.SIGINT)]
)
def test_a_signal_stops_all_of_them(
    folder: Path, strategy: str, rank: int | None, number: signal.Signals
) -> None:
    """It goes to one process, or to torchrun, which forwards it."""
    process = start(folder, 2, *NEW_RUN, "--steps", "1000000", "--out", "r", "--parallel", strategy)
    r = folder / "r"
    wait_for(lambda: (r / "metrics.jsonl").exists() and len(losses(r)) > 3, process)
    both = children(process)
    assert len(both) == 2
    os.kill(process.pid if rank is None else both[rank], number)
    _, errors = process.communicate(timeout=60)
    step = read_metadata(r / "last.h5").step
    [line] = messages(errors)
    assert line.startswith(f"stopped at step {step:,} ")
    assert line.endswith(f"train --resume r --parallel {strategy}")
    assert len(losses(r)) == step > 3
    assert json.loads((r / "summary.json").read_text())["ended"] == "signal"
    if rank is not None:
        assert f"exitcode  : {128 + number}" in errors
    assert not any(Path(f"/proc/{x}").exists() for x in both)
    with FolderLock(r):
        pass


@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 0), ("fsdp", 1)])
def test_a_killed_process_ends_the_job(
    folder: Path, strategy: str, rank: int, run_command: Callable[..., tuple[str, str]]
) -> None:
    process = start(folder, 2, *NEW_RUN, "--steps", "1000000", "--out", "r", "--parallel", strategy)
    r = folder / "r"
    wait_for(lambda: list(r.glob("step-*.h5")), process)
    both = children(process)
    os.kill(both[rank], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    [line] = messages(errors)
    assert "a process of this job has ended" in line
    assert not any(Path(f"/proc/{x}").exists() for x in both)
    step = read_metadata(list_checkpoints(r)[-1]).step
    out, _ = run_command(folder, "train", "--resume", "--out", "r", "--steps", str(step + 2))
    assert f"step {step:,}\n" in out
    assert read_metadata(r / "last.h5").step == step + 2


def test_all_processes_diverge_and_roll_back_together(folder: Path) -> None:
    out, errors = run(
        folder,
        2,
        *NEW_RUN,
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
    [line] = messages(errors)
    assert "after 3 rollbacks" in line
    assert list_checkpoints(folder / "r")


def test_a_mistake_is_reported_once(folder: Path) -> None:
    options = [*NEW_RUN, "--steps", "3", "--out", "r", "--batch-size", "3", "--parallel", "ddp"]
    _, errors = run(folder, 2, *options, code=1)  # torchrun's own code
    [line] = messages(errors)
    assert line.startswith("error: batch_size must be a multiple of the 2 processes")
    assert errors.count("exitcode  : 2 ") >= 1
    assert not (folder / "r").exists()


def test_what_cannot_be_sharded_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    class ShardedGroup(ProcessGroup):
        sharded = True

    trainer = make_trainer(corpus, tmp_path, initialize_from="x")
    with pytest.raises(InputError, match="--initialize-from"):
        type(trainer)(
            tmp_path,
            corpus,
            trainer.model.config,
            trainer.config,
            "tiny",
            process_group=ShardedGroup(),
        )


def test_how_a_process_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launch(None)
    for name, value in (("RANK", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="--parallel needs"):
            check_launch("ddp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch("fsdp")
    with pytest.raises(InputError, match="torchrun started 2 processes"):
        check_launch(None)
