"""Threads, forks, other Python threads, the disk cache and start-up, with real processes."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mmrec import kernels
from mmrec.kernels import _cache_folder, _jit, _launch, scan

BIG = (4, 256, 256)  # enough work for the parallel form


def big_scan(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(BIG, generator=generator), torch.randn(BIG, generator=generator)
    return scan(a, b)[0]


class Forms:
    """Counts which form of the scan runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mmrec.kernels.scan import kernel

        self.seen: list[str] = []
        run = kernel.scan_fwd.run

        def noted(on_threads: bool, *args: Any) -> None:
            self.seen.append("parallel" if on_threads else "serial")
            run(on_threads, *args)

        monkeypatch.setattr(kernel.scan_fwd, "run", noted)


@_launch.parallel_kernel
def _fill(task, sizes, out):  # type: ignore[no-untyped-def]
    scratch, other = np.empty(sizes[task]), np.empty(sizes[task])
    for i in range(sizes[task]):
        scratch[i], other[i] = task, sizes[task]
    out[task] = scratch.sum() * 1000 + other.sum()


def test_what_a_task_allocates_is_its_own() -> None:
    sizes = np.arange(1, 400) * 7919 % 401
    out = np.zeros(len(sizes))
    _fill(sizes, out, tasks=len(sizes), work=1e9)
    assert (out == np.arange(len(sizes)) * sizes * 1000 + sizes * sizes).all()


@_launch.parallel_kernel
def _fail(task, sizes):  # type: ignore[no-untyped-def]
    if task == sizes[0]:
        raise ValueError("no")


def test_a_task_that_fails_is_an_error() -> None:
    """In both forms; as when memory ends."""
    for work in (0, 1e9):
        _fail(np.array([7]), tasks=5, work=work)
        with pytest.raises((ValueError, MemoryError)):
            _fail(np.array([3]), tasks=5, work=work)


def test_numba_follows_torch_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    forms, before = Forms(monkeypatch), torch.get_num_threads()
    try:
        for count, form in ((1, "serial"), (2, "parallel"), (3, "parallel")):
            torch.set_num_threads(count)
            big_scan()
            assert forms.seen[-1] == form
            assert count == 1 or numba.get_num_threads() == count
        scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
        assert forms.seen[-1] == "serial"  # small work does not wake threads
    finally:
        torch.set_num_threads(before)


def test_python_threads_at_once_agree_with_one_after_another() -> None:
    want = [big_scan(n) for n in range(4)]
    got: dict[int, list[torch.Tensor]] = {}

    def run(n: int) -> None:
        got[n] = [big_scan(n) for _ in range(20)]

    workers = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert all(torch.equal(x, want[n]) for n in range(4) for x in got[n])
    assert len(got) == 4


def test_a_second_thread_takes_the_serial_form(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = Forms(monkeypatch)
    with _launch._gate.lock:  # as if another Python thread were inside a parallel kernel
        big_scan()
    assert forms.seen == ["serial"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX")
def test_a_forked_child_computes_the_same(tmp_path: Path) -> None:
    want = big_scan()  # the pool exists before the fork
    assert _launch._gate.pool_started
    child = os.fork()
    if child == 0:  # nothing of the test framework may run here
        code = 1
        try:
            with _launch._gate.lock:  # the parent's lock was left behind
                pass
            # compared by numpy: torch's own parallel ops, torch.equal too, hang in a forked child
            code = 0 if (big_scan().numpy() == want.numpy()).all() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(big_scan(), want)  # the parent goes on in parallel


class Scans(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, n: int) -> torch.Tensor:
        return big_scan(n)


def test_workers_of_a_data_loader() -> None:
    want = [big_scan(n) for n in range(4)]
    loader = DataLoader(Scans(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert all(torch.equal(x, y) for x, y in zip(loader, want, strict=True))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    dropped = ("NUMBA_CACHE_DIR", "OMP_WAIT_POLICY")
    inherited = {k: v for k, v in os.environ.items() if k not in dropped}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=inherited | environment,
        timeout=300,
    )


START = """
import os, time
import torch
begin = time.perf_counter()
import mmrec
from mmrec.kernels import _jit, scan
_jit._notice.patience = float(os.environ.get("NOTICE_AFTER", "0"))
imported = time.perf_counter() - begin
begin = time.perf_counter()
scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
print(imported, time.perf_counter() - begin, os.environ.get("OMP_WAIT_POLICY"))
"""


START_SMALL = """
import os
import numpy as np
from mmrec.kernels import _jit
from mmrec.kernels.shingles.kernel import shingle_hashes
_jit._notice.patience = float(os.environ.get("NOTICE_AFTER", "0"))
ends = np.zeros(1, np.int64)
shingle_hashes(np.frombuffer(b"a", np.uint8), ends, 3, np.empty(1, np.uint64), ends)
"""
"""A small kernel that needs no torch."""

COMPILED = pytest.mark.skipif(
    os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="nothing is compiled in this run"
)


@COMPILED
def test_first_use_says_that_it_compiles_and_later_processes_load(tmp_path: Path) -> None:
    first = python(START, NUMBA_CACHE_DIR=str(tmp_path))
    assert first.stderr.startswith("mmrec: compiling kernels (scan_fwd …), which can take")
    assert "once for this processor and version" in first.stderr
    assert first.stderr.count("\n") == 1
    assert str(tmp_path) in first.stderr
    assert list(tmp_path.rglob("*.nbc"))
    second = python(START, NUMBA_CACHE_DIR=str(tmp_path))
    assert second.stderr == ""
    compiled, loaded = (float(run.stdout.split()[1]) for run in (first, second))
    assert loaded < compiled / 2
    assert second.stdout.split()[2] == "None"  # the user's environment is as it was


@COMPILED
def test_a_short_compilation_is_not_worth_a_word(tmp_path: Path) -> None:
    run = python(START_SMALL, NUMBA_CACHE_DIR=str(tmp_path), NOTICE_AFTER="1000")
    assert run.stderr == ""
    assert list(tmp_path.rglob("*.nbc"))


@COMPILED
def test_a_cache_folder_that_cannot_be_made_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = python(START_SMALL, NUMBA_CACHE_DIR=str(tmp_path / "file"))
    assert "in every process again, as no cache folder can be written" in run.stderr
    assert "once" not in run.stderr


def test_a_user_without_a_home_has_no_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "~no-such-user/cache")
    assert _cache_folder._find_cache_folder() is None


def test_other_layers_than_openmp_work_and_posix_is_not_needed() -> None:
    """The workqueue layer, without what Windows and macOS lack: forks and huge pages."""
    code = (
        "import mmap, os, torch, numba\n"
        "for module, name in ((os, 'register_at_fork'), (mmap, 'MADV_HUGEPAGE')):\n"
        "    vars(module).pop(name, None)\n"
        "from mmrec.kernels import _tensors, scan\n"
        "assert _tensors._madvise is None\n"
        "scan(torch.ones(4, 256, 256), torch.ones(4, 256, 256))\n"
        "print(numba.threading_layer())"
    )
    assert python(code, NUMBA_THREADING_LAYER="workqueue").stdout.strip() == "workqueue"


def test_an_op_is_a_function_also_after_the_import_of_its_folder() -> None:
    vars(kernels).pop("scan", None)
    kernels.scan = sys.modules["mmrec.kernels.scan"]  # as the import system does
    assert kernels.scan is scan
    assert {name: callable(getattr(kernels, name)) for name in kernels.__all__} == dict.fromkeys(
        kernels.__all__, True
    )


def test_a_compiled_kernel_is_kept_on_disk() -> None:
    @_jit.compiled_kernel
    def total(x):  # type: ignore[no-untyped-def]
        return x.sum()

    assert total(np.arange(4.0)) == 6.0
    assert numba.config.DISABLE_JIT or total.stats.cache_path.startswith(str(_jit.CACHE_FOLDER))


def test_the_cache_folder_follows_the_imports_of_a_kernel() -> None:
    here = Path(_jit.__file__).parent
    names = {str(p.relative_to(here)) for p in _jit._sources(here / "decoder" / "kernel.py", set())}
    assert {"decoder/kernel.py", "sampling/kernel.py", "_simd.py", "_bf16.py"} <= names
    assert not names & {"scan/kernel.py", "_launch.py"}
