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
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from mmrec.kernels._jit import compiled_c_function, compiled_kernel, inline_jit


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


def _make_bind(body: Any) -> Any:
    """The intrinsic that makes a C function of (data, task) out of a compiled body."""

    @intrinsic
    def bind(typing: Any, args: Any) -> Any:
        """The addresses of that function and of its data, which are ``args``.

        The data lie on the stack of the function that calls this one. The C function returns 1 if
        the task failed, else 0.
        """
        task_types = (types.intp, *args.types)
        compiled = body.get_compile_result(types.none(*task_types))

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            context.active_code_library.add_linking_library(compiled.library)
            integer = context.get_value_type(types.intp)
            arguments = cgutils.unpack_tuple(builder, values[0])
            data_type = ir.LiteralStructType([value.type for value in arguments])
            data = cgutils.alloca_once(builder, data_type)
            for n, (value, value_type) in enumerate(zip(arguments, args.types, strict=True)):
                if isinstance(value_type, types.Array):
                    # tasks borrow the arrays: threads that count references to one would wait for
                    # each other
                    array = context.make_array(value_type)(context, builder, value)
                    array.meminfo = cgutils.get_null_value(array.meminfo.type)
                    array.parent = cgutils.get_null_value(array.parent.type)
                    value = array._getvalue()
                builder.store(value, cgutils.gep_inbounds(builder, data, 0, n))

            name = builder.module.get_unique_name("run_task")
            function = ir.Function(
                builder.module, ir.FunctionType(integer, [integer, integer]), name
            )
            function.linkage = "internal"
            inside = ir.IRBuilder(function.append_basic_block())
            there = inside.inttoptr(function.args[0], data_type.as_pointer())
            copies = [
                inside.load(cgutils.gep_inbounds(inside, there, 0, n))
                for n in range(len(arguments))
            ]
            status, _ = context.call_conv.call_function(
                inside,
                context.declare_function(builder.module, compiled.fndesc),
                types.none,
                task_types,
                [function.args[1], *copies],
            )
            inside.ret(inside.zext(status.is_error, integer))

            addresses = [builder.ptrtoint(pointer, integer) for pointer in (function, data)]
            return context.make_tuple(builder, signature.return_type, addresses)

        return types.UniTuple(types.intp, 2)(args), generate

    return bind


@intrinsic
def _call(typing: Any, function: Any, args: Any) -> Any:
    """Call the C function at an address. Its arguments, a tuple, and its result are integers."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        integer = context.get_value_type(types.intp)
        arguments = cgutils.unpack_tuple(builder, values[1])
        function_type = ir.FunctionType(integer, [integer] * len(arguments))
        return builder.call(builder.inttoptr(values[0], function_type.as_pointer()), arguments)

    return types.intp(types.intp, types.UniTuple(types.intp, len(args))), generate


def _run_on_threads(tasks, function, data):  # type: ignore[no-untyped-def]
    """Call the C function of ``bind`` for each task; returns how many of them failed."""
    failures = 0
    for task in prange(tasks):  # tasks are independent
        failures += _call(function, (data, task))  # type: ignore[call-arg]
    return failures


@functools.cache
def _address_of_run_on_threads() -> int:
    """The one loop that runs tasks in parallel, whatever they compute; 0 if nothing is compiled."""
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return 0
    integers = types.intp(types.intp, types.intp, types.intp)
    return int(compiled_c_function(_run_on_threads, integers).address)


def compile_parallel_loop() -> None:
    """Compile that loop, or load it."""
    _address_of_run_on_threads()


def _task_loop(tasks, run_on_threads, *args):  # type: ignore[no-untyped-def]
    """The loop of every kernel, on threads if the address of ``_run_on_threads`` is given.

    ``_compile`` supplies the globals.
    """
    if run_on_threads != 0:
        function, data = bind(args)  # type: ignore[name-defined]  # noqa: F821
        if call(run_on_threads, (tasks, function, data)) != 0:  # type: ignore[name-defined]  # noqa: F821
            raise MemoryError("a task of a kernel failed")
    else:
        for task in range(tasks):
            body(task, *args)  # type: ignore[name-defined]  # noqa: F821


def _compile(body: Callable[..., Any]) -> Callable[..., Any]:
    """Compile the task loop around a body.

    Numba's cache tells functions apart by their qualified names, so each loop gets its own.
    """
    compiled = inline_jit(body, allocates=True)
    scope = {"body": compiled, "bind": _make_bind(compiled), "call": _call}
    loop = FunctionType(_task_loop.__code__, scope, body.__name__)
    loop.__qualname__ = f"{body.__qualname__}_loop"
    loop.__module__, loop.__doc__ = body.__module__, body.__doc__
    return compiled_kernel(loop)


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
    """A loop over independent tasks, in two forms of one compiled body that give the same bits.

    The decorated body takes the number of its task, then the arguments. It is no part of a
    ``prange``: that would compile it several times, and Numba moves allocations out of the body of
    a ``prange``, which once broke one whose size depended on the task.

    The parallel form uses as many threads as torch does. The serial form runs small work, and
    replaces the parallel form on one thread, in a forked child (OpenMP does not survive a fork),
    and in a Python thread that finds another one inside a parallel kernel (not every threading
    layer of Numba can be entered twice).
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        self.loop = _compile(body)
        self.__doc__ = body.__doc__

    def run(self, on_threads: bool, tasks: int, *args: Any) -> None:
        """Run the tasks in the parallel or the serial form."""
        self.loop(tasks, _address_of_run_on_threads() if on_threads else 0, *args)

    def __call__(self, *args: Any, tasks: int, work: float) -> None:
        """Run the tasks.

        Args:
            *args: arguments of the body after the task's number.
            tasks: number of tasks.
            work: estimate of the nanoseconds that all tasks take on one thread.
        """
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        if threads == 1 or work < _gate.threshold or _gate.forked:
            self.run(False, tasks, *args)
        elif _gate.lock.acquire(blocking=False):
            try:
                _gate.pool_started = True
                if numba.get_num_threads() != threads:
                    numba.set_num_threads(threads)
                self.run(True, tasks, *args)
            finally:
                _gate.lock.release()
        else:
            self.run(False, tasks, *args)


parallel_kernel = ParallelKernel  # as a decorator
