"""How the kernels of torch's ops run on threads. ``_jit.py`` compiles them.

``torch.set_num_threads`` does not reach Numba, and Numba's own setting holds for one Python thread
only. Every launch therefore sets Numba's thread count to torch's.

With torch's wheels for Linux, Numba's OpenMP layer binds to the OpenMP library that torch loaded
before it (both ask for the symbol GOMP_parallel), so both share one pool of threads. Where there
are two pools, idle threads of one would spin on the core that the other needs. Numba's pool is
therefore asked to sleep while idle (OMP_WAIT_POLICY). An OpenMP library reads that variable once,
when it is loaded, so the environment is changed only for that moment and torch's pool is untouched.
"""

import contextlib
import importlib
import os
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numba
import torch
from numba import prange

from mmrec.kernels._jit import compiled_kernel, inline_jit


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

PARALLEL_THRESHOLD = 60_000
"""Nanoseconds of work below which waking a second thread costs more than it saves."""


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
    return compiled_kernel(loop, parallel=form == "parallel")


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
