"""The one place that decides how kernels are compiled, kept, and spread over threads.

``torch.set_num_threads`` does not reach Numba, and Numba's own setting holds for one Python thread
only, so every launch follows torch. With torch's wheels for Linux, Numba's OpenMP layer binds to
the library that torch loaded before it (both ask for GOMP_parallel), and there is one pool of
threads. Where there are two, idle threads of one would spin while the other has no core to work on,
so Numba's are asked to sleep. A library reads that wish when it is loaded; the environment is
changed for that moment only, and torch's pool stays as it comes.
"""

import contextlib
import hashlib
import importlib
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import platformdirs
import torch
from numba import prange
from numba.core import event


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = before or value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


with _environment("OMP_WAIT_POLICY", "passive"), contextlib.suppress(ImportError):
    importlib.import_module("numba.np.ufunc.omppool")  # not there: Numba has other layers

# Exact but for fused multiply-adds: every sum keeps its order.
_EXACT: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

SMALL_WORK = 60_000  # nanoseconds: below this, waking a second thread costs more than it saves


def _cache_folder() -> Path | None:
    """Where compiled kernels are kept: one folder for each state of the sources and each Numba.

    Numba itself keys the files in it on the processor and the argument types, but it does not see
    a change in a helper of another file, hence the digest. None if no folder can be written.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    root = os.environ.get("NUMBA_CACHE_DIR") or platformdirs.user_cache_path("mmrec") / "kernels"
    folder = Path(root) / f"mmrec-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


CACHE = _cache_folder()


def _every_task(tasks: int, *args: Any) -> None:
    """The loop of every kernel; ``body`` is put in its place."""
    for task in prange(tasks):  # tasks are independent
        body(task, *args)  # type: ignore[name-defined]  # noqa: F821


def _compile(body: Callable[..., Any], form: str) -> Callable[..., Any]:
    """Compile the loop over the tasks of a body, under a name of its own: Numba's cache tells
    functions apart by name."""
    scope = {"prange": prange, "body": helper(body)}
    copy = types.FunctionType(_every_task.__code__, scope, body.__name__)
    copy.__qualname__ = f"{body.__qualname__}_{form}"
    copy.__module__, copy.__doc__ = body.__module__, body.__doc__
    before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = str(CACHE or "")  # type: ignore[attr-defined]
    try:
        options = {**_EXACT, "nogil": True, "cache": CACHE is not None}
        made: Callable[..., Any] = numba.njit(parallel=form == "parallel", **options)(copy)
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]
    return made


def helper(body: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that kernels call; its sums keep their order."""
    made: Callable[..., Any] = numba.njit(**_EXACT)(body)
    return made


class Kernel:
    """A loop over independent tasks, compiled in two forms that give the same bits.

    The body is given the number of its task, then the arguments. It is a function of its own, so
    that what it allocates is the task's: out of the body of a ``prange`` Numba moves allocations,
    and once moved one whose size depended on the task.

    The parallel form runs over as many threads as torch uses. The serial form serves small work, a
    machine of one thread, a forked child (OpenMP does not survive a fork) and a Python thread that
    finds another one inside a parallel kernel (not every threading layer lets two in).
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        self.serial, self.parallel = _compile(body, "serial"), _compile(body, "parallel")
        self.__doc__ = body.__doc__

    def __call__(self, *args: Any, tasks: int, work: float) -> None:
        """Run so many tasks on the arguments; one thread would take about ``work`` nanoseconds."""
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        if threads == 1 or work < SMALL_WORK or _gate.forked:
            self.serial(tasks, *args)
        elif _gate.lock.acquire(blocking=False):
            try:
                _gate.opened = True
                if numba.get_num_threads() != threads:
                    numba.set_num_threads(threads)
                self.parallel(tasks, *args)
            finally:
                _gate.lock.release()
        else:
            self.serial(tasks, *args)


kernel = Kernel  # as a decorator


class _Gate:
    """One Python thread at a time runs in parallel, and none in a child forked after that."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.opened = self.forked = False

    def after_fork(self) -> None:
        self.lock = threading.Lock()  # its owner may not exist in the child
        self.forked = self.opened


_gate = _Gate()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_gate.after_fork)


class _Announce(event.Listener):
    """Says once, on standard error, that kernels are being compiled, which takes seconds each."""

    said = False

    def on_start(self, event: Any) -> None:
        ours = str(event.data["dispatcher"].py_func.__module__).startswith("mmrec.")
        if ours and not self.said:
            self.said = True
            kept = f"; kept in {CACHE}" if CACHE else "; no cache folder can be written"
            line = f"mmrec: compiling kernels for this processor, once, up to a minute{kept}"
            print(line, file=sys.stderr, flush=True)

    def on_end(self, event: Any) -> None:
        """Nothing is said at the end."""


if not numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    event.register("numba:compile", _Announce())


def sequences(batch: int, time: int, cu_seqlens: torch.Tensor | None) -> np.ndarray:
    """The sequences that a kernel walks: (N, 3) int64 of batch row, first step, end.

    Without ``cu_seqlens`` they are the batch rows; with it, the pieces of the one packed row.
    """
    if cu_seqlens is None:
        made = np.empty((batch, 3), np.int64)
        made[:, 0], made[:, 1], made[:, 2] = np.arange(batch), 0, time
        return made
    edges = cu_seqlens.numpy().astype(np.int64)
    if edges[0] != 0 or edges[-1] != time or (np.diff(edges) < 0).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {time} without falling; got {edges.tolist()[:8]}"
        )
    made = np.zeros((len(edges) - 1, 3), np.int64)
    made[:, 1], made[:, 2] = edges[:-1], edges[1:]
    return made
