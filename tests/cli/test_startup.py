"""The start of the process: the number of threads, how idle threads wait, what is imported."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmrec.cli.startup import (
    UNUSED_BLAS,
    available_cores,
    machine_is_busy,
    prepare_process,
    share_cores,
)

needs_proc = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc")


@needs_proc
def test_another_busy_process_is_noticed() -> None:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert machine_is_busy(0.5)
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("busy", [True, False])
def test_threads_sleep_beside_a_busy_process(busy: bool) -> None:
    environ: dict[str, str] = {}
    prepare_process(["train"], environ, lambda: busy)
    assert environ == ({"OMP_WAIT_POLICY": "passive"} if busy else {})
    for chosen in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1"}):
        environ = dict(chosen)
        prepare_process(["train"], environ, lambda: busy)
        assert environ == chosen
    environ = {}
    prepare_process(["bench"], environ, lambda: busy)
    assert environ == {}


@needs_proc
@pytest.mark.parametrize("chosen", [None, "1"])
def test_cores_are_shared_unless_the_user_chose_a_number(chosen: str | None) -> None:
    """torchrun sets OMP_NUM_THREADS=1. Its own environment shows whether the user set it."""
    parent_environ = {} if chosen is None else {"OMP_NUM_THREADS": chosen}
    parent = subprocess.Popen([str(shutil.which("sleep")), "60"], env=parent_environ)
    try:
        end = time.monotonic() + 60
        while Path(f"/proc/{parent.pid}/comm").read_text() != "sleep\n":
            assert time.monotonic() < end
        environ = {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}
        share_cores(environ, parent.pid, cores=12)
        assert environ["OMP_NUM_THREADS"] == (chosen or "3")
    finally:
        parent.kill()
        parent.wait()


def test_a_single_process_takes_all_cores() -> None:
    environ: dict[str, str] = {}
    share_cores(environ)
    assert environ == {}
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    "modules",
    [
        "mmrec.kernels, mmrec.kernels._simd, mmrec.kernels._math, mmrec.kernels._bf16",
        "mmrec.config, mmrec.data.tokenizer, mmrec.checkpoint.manager, mmrec.checkpoint.header, "
        "mmrec.checkpoint.hdf5, mmrec.checkpoint.outputs, mmrec.cli.main, mmrec.training.status, "
        "mmrec.training.report",
        "mmrec.inference.decoder, mmrec.inference.weights",
    ],
)
def test_what_reads_a_model_does_not_import_torch(modules: str) -> None:
    code = f"import sys, {modules}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in run.stdout.split()


@pytest.mark.parametrize(
    ("command", "blocked"),
    [("generate", True), ("train", False), ("generate --adapt=a.txt", False)],
)
def test_only_the_decoder_does_without_scipy(
    monkeypatch: pytest.MonkeyPatch, command: str, blocked: bool
) -> None:
    monkeypatch.delitem(sys.modules, UNUSED_BLAS, raising=False)
    prepare_process(command.split(), {}, lambda: False)
    assert (UNUSED_BLAS in sys.modules) == blocked
    sys.modules.pop(UNUSED_BLAS, None)
