"""How kernels are compiled, cached on disk and run on threads. All of that is decided here.

``torch.set_num_threads`` does not reach Numba, and Numba's own setting holds for one Python thread
only. Every launch therefore sets Numba's thread count to torch's.

With torch's wheels for Linux, Numba's OpenMP layer binds to the OpenMP library that torch loaded
before it (both ask for the symbol GOMP_parallel), so both share one pool of threads. Where there
are two pools, idle threads of one would spin on the core that the other needs. Numba's pool is
therefore asked to sleep while idle (OMP_WAIT_POLICY). An OpenMP library reads that variable once,
when it is loaded, so the environment is changed only for that moment and torch's pool is untouched.
"""

import contextlib
import hashlib
import importlib
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import platformdirs
import torch
from numba import prange
from numba.core import event


@contextlib.contextmanager
def _default_environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable, unless it is set already, while the context is entered."""
    before = os.environ.get(name)
    os.environ[name] = before or value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


with _default_environment("OMP_WAIT_POLICY", "passive"), contextlib.suppress(ImportError):
    importlib.import_module("numba.np.ufunc.omppool")  # absent where Numba has other layers only

# The one liberty that the compiler gets is to fuse a multiplication and an addition. It may not
# reorder a sum.
_EXACT: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

PARALLEL_THRESHOLD = 60_000
"""Nanoseconds of work below which waking a second thread costs more than it saves."""

NOTICE_AFTER = 3.0
"""Seconds of compiling in one process before the user is told of it."""


def _find_cache_folder() -> Path | None:
    """The folder for compiled kernels, or None if no folder can be written.

    Numba keys the files in it on the processor and on the argument types. It does not see a change
    in a helper function of another file, so the folder's name has a digest of Numba's version and
    of all files that hold compiled code: ``kernel.py`` of each op, and the helpers beside this one.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    here = Path(__file__).parent
    for path in sorted([*here.glob("_[a-z]*.py"), *here.rglob("kernel.py")]):
        digest.update(path.read_bytes())
    try:
        root = os.environ.get("NUMBA_CACHE_DIR") or platformdirs.user_cache_path("mmrec/kernels")
        folder = Path(root).expanduser() / f"mmrec-{digest.hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return None
    return folder if os.access(folder, os.W_OK) else None


CACHE_FOLDER = _find_cache_folder()


def _task_loop(tasks: int, *args: Any) -> None:
    """The loop of every kernel; ``_compile`` replaces the global ``body``."""
    for task in prange(tasks):  # tasks are independent
        body(task, *args)  # type: ignore[name-defined]  # noqa: F821


def _compile(body: Callable[..., Any], form: str) -> Callable[..., Any]:
    """Compile the task loop around a body, as ``form`` "serial" or "parallel".

    Numba's cache tells functions apart by their qualified names, so each loop gets its own.
    """
    scope = {"prange": prange, "body": inline_jit(body)}
    loop = types.FunctionType(_task_loop.__code__, scope, body.__name__)
    loop.__qualname__ = f"{body.__qualname__}_{form}"
    loop.__module__, loop.__doc__ = body.__module__, body.__doc__
    before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = str(CACHE_FOLDER or "")  # type: ignore[attr-defined]
    try:
        options = {**_EXACT, "nogil": True, "cache": CACHE_FOLDER is not None}
        compiled: Callable[..., Any] = numba.njit(parallel=form == "parallel", **options)(loop)
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]
    return compiled


def inline_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a function that kernels call. The order of its sums is kept."""
    compiled: Callable[..., Any] = numba.njit(**_EXACT)(function)
    return compiled


def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a function that NumPy code calls. It runs on the thread that calls it."""
    before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = str(CACHE_FOLDER or "")  # type: ignore[attr-defined]
    try:
        options = {**_EXACT, "nogil": True, "cache": CACHE_FOLDER is not None}
        compiled: Callable[..., Any] = numba.njit(**options)(function)
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]
    return compiled


class _ParallelGate:
    """Lets one Python thread at a time run in parallel, and none in a forked child.

    OpenMP's pool does not survive a fork, so a child of a process whose pool has started
    (``pool_started``) runs serial forms only (``forked``).
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool_started = self.forked = False
        self.threshold: float = PARALLEL_THRESHOLD

    def after_fork(self) -> None:
        self.lock = threading.Lock()  # the thread that held it may not exist in the child
        self.forked = self.pool_started


_gate = _ParallelGate()
if hasattr(os, "register_at_fork"):  # POSIX only
    os.register_at_fork(after_in_child=_gate.after_fork)


@contextlib.contextmanager
def parallel_threshold(nanoseconds: float) -> Iterator[None]:
    """Replace PARALLEL_THRESHOLD while the context is entered; 0 runs all work in parallel."""
    before, _gate.threshold = _gate.threshold, nanoseconds
    try:
        yield
    finally:
        _gate.threshold = before


class ParallelKernel:
    """A loop over independent tasks, compiled in two forms that give the same bits.

    The decorated body takes the number of its task, then the arguments. It is a function of its
    own so that what it allocates belongs to the task: Numba moves allocations out of the body of a
    ``prange``, which once broke one whose size depended on the task.

    The parallel form uses as many threads as torch does. The serial form runs small work, and
    replaces the parallel form on one thread, in a forked child (OpenMP does not survive a fork),
    and in a Python thread that finds another one inside a parallel kernel (not every threading
    layer of Numba can be entered twice).
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        self.serial, self.parallel = _compile(body, "serial"), _compile(body, "parallel")
        self.__doc__ = body.__doc__

    def __call__(self, *args: Any, tasks: int, work: float) -> None:
        """Run the tasks.

        Args:
            *args: arguments of the body after the task's number.
            tasks: number of tasks.
            work: estimate of the nanoseconds that all tasks take on one thread.
        """
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        if threads == 1 or work < _gate.threshold or _gate.forked:
            self.serial(tasks, *args)
        elif _gate.lock.acquire(blocking=False):
            try:
                _gate.pool_started = True
                if numba.get_num_threads() != threads:
                    numba.set_num_threads(threads)
                self.parallel(tasks, *args)
            finally:
                _gate.lock.release()
        else:
            self.serial(tasks, *args)


parallel_kernel = ParallelKernel  # as a decorator


class _CompileNotice(event.Listener):
    """Says once, on standard error, that kernels are being compiled, if that takes a while."""

    def __init__(self) -> None:
        self.depth, self.seconds, self.began, self.printed = 0, 0.0, 0.0, False
        self.timer: threading.Timer | None = None

    def on_start(self, event: Any) -> None:
        if not _is_ours(event):
            return
        self.depth += 1  # a kernel compiles the functions that it calls; Numba lets no two run
        if self.depth == 1 and not self.printed:
            self.began = time.monotonic()
            self.timer = threading.Timer(max(0.0, NOTICE_AFTER - self.seconds), self.print)
            self.timer.daemon = True
            self.timer.start()

    def on_end(self, event: Any) -> None:
        if not _is_ours(event):
            return
        self.depth -= 1
        if self.depth == 0 and self.timer is not None:
            self.timer.cancel()
            self.timer = None
            self.seconds += time.monotonic() - self.began

    def print(self) -> None:
        """Print the notice."""
        self.printed = True
        where = f"kept in {CACHE_FOLDER}"
        if CACHE_FOLDER is None:
            where = "in every process again, as no cache folder can be written; see NUMBA_CACHE_DIR"
        print(
            "mmrec: compiling kernels that this machine has not used before, which can take half "
            f"a minute; {where}",
            file=sys.stderr,
            flush=True,
        )


def _is_ours(event: Any) -> bool:
    return str(event.data["dispatcher"].py_func.__module__).startswith("mmrec.")


if not numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    event.register("numba:compile", _CompileNotice())
