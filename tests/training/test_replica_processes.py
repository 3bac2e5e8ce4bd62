"""Replicas in processes: the bits of threads, whatever happens to the processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrec.config import MAX_DENSE_ROWS
from mmrec.data.corpus import Corpus
from mmrec.lora import apply_lora
from mmrec.model import Model, State
from mmrec.training import trainer as trainer_module
from mmrec.training.callbacks import Callback
from mmrec.training.replica_processes import ReplicaProcesses, are_supported
from mmrec.training.replicas import Replicas, forward_backward
from mmrec.training.trainer import Trainer
from tests.conftest import SMALL, make_trainer, stop_by_signal
from tests.training.test_trainer import losses

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")


def make_model(**settings: Any) -> Model:
    torch.manual_seed(3)
    model = Model(replace(SMALL, vocab_size=64, **settings))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.train()


Batch = Callable[[Replicas], list[torch.Tensor]]


def batch_of(model: Model, rows: int = 5, **settings: Any) -> Batch:
    """A function that returns losses, gradients and states of two batches, the second continued."""
    tokens = torch.randint(64, (2, rows, 17), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, :, 1:].masked_fill(tokens[:, :, 1:] == 3, -1)

    def run(replicas: Replicas) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        state: State | None = None
        values: list[float] = []
        for x, y in zip(tokens[:, :, :-1], targets, strict=True):
            loss, state = forward_backward(model, replicas, x, y, 0.7, state=state, **settings)
            values.append(loss)
        assert state is not None
        layer_states = [x for layer in state.layers for x in layer if x is not None]
        gradients = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
        return [torch.tensor(values), state.recent_tokens, *layer_states, *gradients]

    return run


def assert_same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    assert all(map(torch.equal, a, b))


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    """Three replicas, without processes yet."""
    replicas = Replicas(3)
    yield replicas
    replicas.end_processes()


def pids_of(replicas: Replicas) -> list[int]:
    assert replicas.processes is not None
    return replicas.processes.pids


def exists(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_processes_compute_the_bits_of_threads(
    replicas: Replicas, precision: str, sparse: bool
) -> None:
    """With all types of layers, dropout, carried states, documents and ignored targets."""
    rows = MAX_DENSE_ROWS + sparse
    model = make_model(layer_types="nbsl", depth=4, dropout=0.2, ngram_buckets=rows)
    model.set_precision(precision)
    model.sparse_gradients = True
    run = batch_of(model, end_of_text=0)
    expected = run(replicas)
    replicas.start_processes(model, 5, 16, wait=True)
    assert replicas.processes is not None
    assert replicas.processes.are_ready()
    assert_same_bits(run(replicas), expected)
    assert_same_bits(run(replicas), expected)  # nothing is left over from the first batch


def test_processes_see_the_newest_weights_and_the_options_of_the_loss(replicas: Replicas) -> None:
    model = make_model()
    run = batch_of(model, loss_options={"sampled_softmax": 8})
    before = run(replicas)
    replicas.start_processes(model, 5, 16, wait=True)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    after = run(replicas)
    replicas.end_processes()
    assert_same_bits(run(replicas), after)
    assert not torch.equal(after[0], before[0])


def test_frozen_parameters_and_low_rank_factors_reach_the_processes(replicas: Replicas) -> None:
    model = make_model()
    apply_lora(model, 2, 4.0)
    run = batch_of(model)
    expected = run(replicas)
    assert len(expected) < len(list(model.parameters()))
    replicas.start_processes(model, 5, 16, wait=True)
    assert_same_bits(run(replicas), expected)


@pytest.mark.parametrize("moment", ["before a batch", "within a batch", "before it is ready"])
def test_threads_do_the_work_of_a_killed_process(
    replicas: Replicas, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lines = make_model(dropout=0.2), list[str]()
    run = batch_of(model)
    expected = run(replicas)
    replicas.start_processes(model, 5, 16, lines.append, wait=moment != "before it is ready")
    first, second = pids_of(replicas)
    if moment == "within a batch":
        os.kill(second, signal.SIGSTOP)  # so that it cannot answer first
        in_threads = replicas.run

        def kill(tasks: Any) -> Any:
            if exists(second):
                os.kill(second, signal.SIGKILL)
            return in_threads(tasks)

        monkeypatch.setattr(replicas, "run", kill)
    else:
        os.kill(second, signal.SIGKILL)
        while exists(second):
            time.sleep(0.01)
    assert_same_bits(run(replicas), expected)
    assert_same_bits(run(replicas), expected)
    assert [line for line in lines if "signal SIGKILL" in line] == lines
    assert len(lines) == 1
    assert not exists(first)
    assert not exists(second)


@pytest.mark.parametrize("row", [0, 4])
def test_an_error_is_raised_and_leaves_no_answer_behind(replicas: Replicas, row: int) -> None:
    """In the share of this process, while the others answer, or in that of another one."""
    model = make_model()
    run = batch_of(model)
    expected = run(replicas)
    replicas.start_processes(model, 5, 16, wait=True)
    pids = pids_of(replicas)
    bad = torch.zeros(5, 16, dtype=torch.int64)
    bad[row] = 64
    with pytest.raises(IndexError):
        forward_backward(model, replicas, bad, bad)
    assert not any(map(exists, pids))
    assert_same_bits(run(replicas), expected)


def test_a_model_with_hooks_keeps_its_threads(replicas: Replicas) -> None:
    model = make_model()
    assert are_supported(model)
    handle = model.norm.register_forward_hook(lambda *_: None)
    replicas.start_processes(model, 5, 16)
    assert replicas.processes is None
    handle.remove()
    model.norm.reason = lambda: None  # type: ignore[assignment]
    with pytest.raises(Exception, match="local"):
        replicas.start_processes(model, 5, 16)
    assert replicas.processes is None


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ReplicaProcesses]:
    """Collects what runs start."""
    found: list[ReplicaProcesses] = []
    start = ReplicaProcesses.__init__

    def record(self: ReplicaProcesses, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(ReplicaProcesses, "__init__", record)
    return found


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return list(trainer.model.parameters())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "settings", [{}, {"state": "carry", "gradient_accumulation_steps": 2, "ema_decay": 0.9}]
)
def test_a_run_with_processes_is_the_run_with_threads_and_resumes_as_it(
    corpus: Corpus, tmp_path: Path, settings: dict[str, Any], started: list[ReplicaProcesses]
) -> None:
    uninterrupted = make_trainer(corpus, tmp_path / "threads", replicas="threads", **settings)
    uninterrupted.fit()
    assert not started
    first = make_trainer(corpus, tmp_path / "resumed", replicas="processes", **settings)
    stop_by_signal(first, 6)
    assert first.fit()["ended"] == "signal"
    [of_first] = started
    assert not of_first.pids  # all have ended
    resumed = make_trainer(corpus, tmp_path / "resumed", replicas="processes", **settings)
    assert resumed.fit(resume=True)["ended"] == "done"
    assert losses(tmp_path / "resumed") == losses(tmp_path / "threads")
    assert_same_bits(weights(resumed), weights(uninterrupted))


class OwnCallback(Callback):
    """A user's: it might change the model."""


@pytest.mark.usefixtures("two_threads")
def test_auto_starts_processes_for_runs_that_last(
    corpus: Corpus,
    tmp_path: Path,
    started: list[ReplicaProcesses],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether they are ready before the run ends, or take over at any step: the same bits."""
    short = make_trainer(corpus, tmp_path / "short")
    short.fit()
    assert not started
    monkeypatch.setattr(trainer_module, "MIN_SECONDS_FOR_PROCESSES", 0.0)
    make_trainer(corpus, tmp_path / "own", callbacks=[OwnCallback()]).fit()
    monkeypatch.setattr(trainer_module, "memory_bytes", lambda: 1_000_000_000)
    make_trainer(corpus, tmp_path / "small memory").fit()
    assert not started
    monkeypatch.setattr(trainer_module, "memory_bytes", lambda: None)
    early = make_trainer(corpus, tmp_path / "early")
    early.fit()
    switched = make_trainer(corpus, tmp_path / "switched")
    train_step = switched.train_step

    def ready_at_step_5() -> tuple[float, float, float]:
        if switched.progress.step == 5:
            assert started[1].are_ready(wait=True)
        return train_step()

    switched.train_step = ready_at_step_5  # type: ignore[method-assign]
    switched.fit()
    assert len(started) == 2
    assert not started[0].pids
    for trainer in (early, switched):
        assert_same_bits(weights(trainer), weights(short))


@pytest.mark.usefixtures("two_threads")
def test_a_run_goes_on_with_threads_where_no_process_can_start(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_trainer(corpus, tmp_path / "threads", replicas="threads")
    expected.fit()

    def no_room(*args: Any, **kwargs: Any) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", no_room)
    trainer = make_trainer(corpus, tmp_path / "processes", replicas="processes")
    assert trainer.fit()["ended"] == "done"
    [line] = [x for x in trainer.lines if "no processes" in x]  # type: ignore[attr-defined]
    assert "Resource temporarily unavailable" in line
    assert_same_bits(weights(trainer), weights(expected))


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_processes_end_with_a_killed_run(text_file: Path, tmp_path: Path) -> None:
    """A real run, killed by SIGKILL while processes compute for it."""
    words = "tiny --tokenizer byte --batch-size 2 --seq-len 32 --steps 100000 --replicas processes"
    words += f" --data {text_file} --out {tmp_path / 'run'}"
    run = subprocess.Popen(
        [sys.executable, "-m", "mmrec", "train", *words.split()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert run.poll() is None
            time.sleep(0.1)
        workers = [
            pid
            for pid in children(run.pid)
            if "replica_processes" in Path(f"/proc/{pid}/cmdline").read_text()
        ]
        assert len(workers) == 1
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(workers[0], number)  # it is for the run to say when to stop
        size = metrics.stat().st_size
        while metrics.stat().st_size == size:
            assert run.poll() is None
            time.sleep(0.1)
        assert exists(workers[0])
    finally:
        run.kill()
        run.wait()
    end = time.monotonic() + 60
    while any(map(exists, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(exists, workers))
