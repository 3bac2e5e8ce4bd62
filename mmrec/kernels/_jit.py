"""How compiled code is compiled and cached on disk. All of that is decided here.

Nothing here imports torch, so that compiled code which reads and writes NumPy arrays only can be
used without it.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import extending
from numba.core import caching, ccallback, event, sigutils
from numba.core.registry import cpu_target

from mmrec.kernels._cache_folder import CACHE_FOLDER

# The one liberty that the compiler gets is to fuse a multiplication and an addition. It may not
# reorder a sum.
_EXACT: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

# What Python and C would call. For a function of many arrays that takes as long to compile as the
# function itself.
_NO_WRAPPERS: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

CACHE_LINE = 64
"""Bytes. Arrays that compiled code makes begin at a multiple of it.

With Numba's 32, each vector of 64 bytes (AVX-512) in them would lie on two cache lines.
"""
cpu_target.target_context.get_preferred_array_alignment = lambda array_type: CACHE_LINE

NOTICE_AFTER = 3.0
"""Seconds of compiling in one process before the user is told of it."""
HELPER_SECONDS = 6.0
"""Seconds more that it may take a second process to find out what there is to compile."""


UNUSED_DAYS = 60
"""Days after which compiled kernels that nothing has used are removed, when others are kept."""
_DAY = 86_400.0

_KERNELS = Path(__file__).parent
_IMPORT = re.compile(rb"^from mmrec\.kernels\.([\w.]+) import", re.MULTILINE)


def _sources(path: Path, found: set[Path]) -> set[Path]:
    """Add a file of this package, and all files of this package that it imports, to ``found``."""
    if path not in found:
        found.add(path)
        for name in _IMPORT.findall(path.read_bytes()):
            source = _KERNELS.joinpath(*name.decode().split("."))
            for file in source.glob("*.py") if source.is_dir() else [source.with_suffix(".py")]:
                _sources(file, found)
    return found


@functools.cache
def _cache_folder_of(file: str) -> str:
    """The folder for the compiled functions of one source file; empty if there is none.

    Numba keys the files in it on the processor and on the argument types. It does not see a change
    in a helper function of another file. The folder's name therefore has a digest of the versions
    of Numba and llvmlite, of the source file and of every file that it imports. So an edit compiles
    only the kernels that it reaches, and all installations share what is compiled.
    """
    if CACHE_FOLDER is None:
        return ""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(_sources(Path(file), set())):
        digest.update(path.read_bytes())
    folder = CACHE_FOLDER / f"mmrec-{digest.hexdigest()[:16]}"
    with contextlib.suppress(OSError):  # nothing is in it yet, or it is someone else's
        if time.time() - folder.stat().st_mtime > _DAY:
            os.utime(folder)  # it is in use
    return str(folder)


@functools.cache  # once in a process
def _remove_unused_folders(root: Path) -> None:
    """Remove the folders of kernels that no process has used for UNUSED_DAYS: older versions'."""
    for folder in root.glob("mmrec-*"):
        with contextlib.suppress(OSError):
            unused = time.time() - folder.stat().st_mtime > UNUSED_DAYS * _DAY
            if unused and re.fullmatch("mmrec-[0-9a-f]{16}", folder.name):
                shutil.rmtree(folder, ignore_errors=True)


_names: dict[str, Callable[..., Any]] = {}
"""Functions that are compiled into others, by module and qualified name; see ``_claim``."""


def _claim(name: str, function: Callable[..., Any]) -> None:
    """Note that a function has a name, under which the linker will know its code.

    The linker knows compiled code by module, qualified name, types of the arguments, and a number
    that Numba counts in each process. Two functions of one name can therefore change places: where
    the kernels in the cache were compiled by different processes, the number of one function in
    one kernel can be that of the other function in another kernel, and whichever code is loaded
    first serves both. So every name must stand for one function.

    Raises:
        ValueError: another function has the name.
    """
    before = _names.setdefault(name, function)
    if before is not function and before.__code__ != function.__code__:
        raise ValueError(f"functions that are compiled need names of their own; two have {name}")
    if before is not function and function.__closure__:
        raise ValueError(f"each function that a factory makes needs a variant; two are {name}")


def inline_jit(
    function: Callable[..., Any],
    variant: str = "",
    *,
    allocates: bool = False,
    always: bool = False,
) -> Callable[..., Any]:
    """Decorator for a function that kernels call, and not Python. The order of its sums is kept.

    Its caller keeps the arrays alive that it gets. So it need not count references to them, which
    took longer than the work on a row of 128 numbers: two atomic instructions for each array of
    each call.

    Args:
        function: takes and returns what Numba can compile.
        variant: tells functions apart that the same factory makes; see ``_claim``.
        allocates: whether it makes arrays. Only then does it count references.
        always: whether it becomes part of its callers in any case; see ``always_inline_jit``.

    Raises:
        ValueError: another function has the same name and variant.
        TypeError: when it is compiled, if it returns an array.
    """
    if variant:
        function.__qualname__ += f"[{variant}]"
    _claim(f"{function.__module__}.{function.__qualname__}", function)
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return function
    options: dict[str, Any] = {"_nrt": allocates, "forceinline": always}
    compiled: Any = numba.njit(**options, **_EXACT, **_NO_WRAPPERS)(function)
    add_overload = compiled.add_overload

    def check_and_add(result: Any) -> None:
        returned = compiled.targetctx.data_model_manager[result.signature.return_type]
        if returned.contains_nrt_meminfo():
            raise TypeError(f"{function.__qualname__} may not return an array")
        add_overload(result)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{function.__qualname__} is for kernels; Python cannot call it")

    compiled.add_overload = check_and_add
    compiled._insert = lambda *args: None  # there is no code that Python could call
    compiled._compile_for_args = refuse
    inline: Callable[..., Any] = compiled
    return inline


def always_inline_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator as ``inline_jit``, for a short loop that a kernel runs for each row.

    LLVM may leave a function on its own. A call passes seven numbers for each array, which takes
    as long as the work on a row of 128 numbers. Longer functions gain nothing, and take longer to
    compile.
    """
    return inline_jit(function, always=True)


def overload(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Decorator: what compiled code calls in place of a plain function.

    As ``numba.extending.overload``, but what the decorated function returns is named after the
    plain function; see ``_claim``.

    Args:
        function: the plain function.
        options: further options of Numba's decorator.

    Raises:
        ValueError: the module has an overload of this function already.
    """

    def decorate(choose: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{function.__module__}.{function.__qualname__}"
        _claim(f"{choose.__module__} overload {name}", choose)

        @functools.wraps(choose)
        def choose_and_name(*types: Any) -> Any:
            chosen = choose(*types)
            if chosen is not None and "<locals>" in chosen.__qualname__:
                chosen.__qualname__ = f"overload[{name}]"
            return chosen

        extending.overload(function, **options)(choose_and_name)
        return choose

    return decorate


class _ContentLocator(caching._CacheLocator):
    """Where Numba keeps the code of a function: only the content of its sources decides.

    Numba's own locators ask for the path of the file, too, so that each new installation would
    compile again.
    """

    def __init__(self, folder: str, line: int) -> None:
        self._folder, self._line = folder, line

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> "_ContentLocator | None":
        """Return the place of a function; None if it cannot be written.

        Its module decides, and not the file of its code: the loop of every parallel kernel has its
        code in ``_launch.py``, and what it runs is in the kernel's module.
        """
        module = sys.modules.get(function.__module__)
        file = getattr(module, "__file__", None) or file
        locator = cls(_cache_folder_of(file), function.__code__.co_firstlineno)
        try:
            locator.ensure_cache_path()
        except OSError:
            return None
        return locator

    def get_cache_path(self) -> str:
        """Return the folder."""
        return self._folder

    def get_source_stamp(self) -> str:
        """Return what must stay equal beside the folder's name, which has the digest: nothing."""
        return ""

    def get_disambiguator(self) -> str:
        """Return what tells functions of one name apart: their lines."""
        return str(self._line)


class _ContentCache(caching.CompileResultCacheImpl):
    _locator_classes = [_ContentLocator]  # noqa: RUF012


class SharedCache(caching.FunctionCache):
    """Numba's cache of one kernel, for processes that compile at the same time.

    One of them compiles the kernel, and the others wait for its code. Where the code cannot be
    kept, for instance on a full disk, it serves this process only.
    """

    _impl_class = _ContentCache

    PATIENCE = 120.0
    """Seconds after which a process no longer waits, and compiles the kernel itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Create the cache of a function; see ``caching.FunctionCache``."""
        super().__init__(function)
        self.error: OSError | None = None
        """Why code could not be kept."""
        self._lock: Any = None

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the code for a signature, or None for the caller to compile it.

        In the second case this process holds the kernel's lock until ``save_overload``.
        """
        if (found := super().load_overload(sig, target_context)) is not None:
            return found
        self._acquire(self.PATIENCE)
        if (found := super().load_overload(sig, target_context)) is not None:
            self._release()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep code, and let other processes have it."""
        try:
            super().save_overload(sig, data)
            _remove_unused_folders(Path(self._cache_path).parent)
        except OSError as error:
            self.error = error
            _notice.say_that_nothing_is_kept(error)
        finally:
            self._release()

    def holds(self, sig: Any, target_context: Any) -> bool:
        """Whether there is code for a signature. It is not loaded."""
        key = self._index_key(sig, target_context.codegen())
        return key in self._cache_file._load_index()

    def is_being_compiled(self) -> bool:
        """Whether another process compiles the kernel now."""
        if not self._acquire(0.0):
            return True
        self._release()
        return False

    def _acquire(self, timeout: float) -> bool:
        """Lock the kernel; False after the timeout. Without a folder for locks there are none."""
        from filelock import FileLock, Timeout  # not needed where nothing is compiled

        try:
            if self._lock is None:
                folder = Path(self._cache_path)
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{self._impl.filename_base}.lock"
                self._lock = FileLock(path, thread_local=False)
            self._lock.acquire(timeout=timeout)
        except Timeout:
            return False
        except (OSError, NotImplementedError):
            self._lock = None
        return True

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release(force=True)


@dataclass(frozen=True)
class KernelCall:
    """A kernel and the types of the arguments of a call."""

    name: str
    """Such as ``gated_delta_rule_fwd``."""
    dispatcher: Any
    types: tuple[Any, ...]

    @property
    def size(self) -> int:
        """Bytes of the sources that it is compiled from: the more, the longer it takes."""
        file = sys.modules[self.dispatcher.py_func.__module__].__file__ or ""
        return sum(path.stat().st_size for path in _sources(Path(file), set()))

    def is_ready(self) -> bool:
        """Whether its code is in the cache."""
        cache = self.dispatcher._cache
        return isinstance(cache, SharedCache) and cache.holds(self.types, self.dispatcher.targetctx)

    def is_being_compiled(self) -> bool:
        """Whether another process compiles the kernel now."""
        cache = self.dispatcher._cache
        return isinstance(cache, SharedCache) and cache.is_being_compiled()

    def compile(self) -> OSError | None:
        """Compile it into the cache; returns why it could not be kept there."""
        self.dispatcher.compile(self.types)
        return getattr(self.dispatcher._cache, "error", None)


_recorded: dict[tuple[Any, ...], KernelCall] | None = None
_dispatchers: list[Any] = []
"""All kernels, as Numba has them."""


@contextlib.contextmanager
def record_calls() -> Iterator[dict[tuple[Any, ...], KernelCall]]:
    """While it is entered, calls of kernels that are not loaded are noted, and compute nothing.

    Yields:
        The calls, one for each kernel and types of arguments.
    """
    global _recorded
    _recorded = {}
    try:
        yield _recorded
    finally:
        _recorded = None


def _note_calls(dispatcher: Any, name: str) -> None:
    """Let a kernel take part in ``record_calls``.

    Numba looks this method up when a call has types for which nothing is loaded, and calls what it
    returns. Other calls do not come here.
    """
    compile_for_args = dispatcher._compile_for_args

    def compile_or_note(*args: Any, **kwargs: Any) -> Any:
        if _recorded is None:
            return compile_for_args(*args, **kwargs)
        types = tuple(dispatcher.typeof_pyval(x) for x in args)
        _recorded[dispatcher, types] = KernelCall(name, dispatcher, types)
        return lambda *args: None

    dispatcher._compile_for_args = compile_or_note


def _cache_on_disk(compiled: Any, function: Callable[..., Any]) -> None:
    """Let Numba keep the code of a function on disk, if there is a folder for it."""
    if CACHE_FOLDER is not None:
        with contextlib.suppress(RuntimeError):  # the folder cannot be written after all
            compiled._cache = SharedCache(function)


def compiled_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a function that Python calls: compiled code, kept in CACHE_FOLDER.

    Other Python threads run while it runs. The order of its sums is kept.

    Args:
        function: takes what Numba can compile, and returns nothing. Numba's cache knows it by its
            file and its qualified name; its module decides the folder.
    """
    options: dict[str, Any] = {"nogil": True, "no_cfunc_wrapper": True}
    compiled: Any = numba.njit(**options, **_EXACT)(function)
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return function
    _cache_on_disk(compiled, function)
    _note_calls(compiled, display_name(function))
    _dispatchers.append(compiled)
    kernel: Callable[..., Any] = compiled
    return kernel


@functools.cache  # whoever has its address needs it as long as the process lives
def compiled_c_function(function: Callable[..., Any], signature: Any) -> Any:
    """A function that compiled code calls by its ``address``, compiled now and kept likewise.

    Each ``prange`` in it runs on Numba's threads.

    Args:
        function: takes and returns numbers.
        signature: their types in Numba.
    """
    options = {"parallel": True, "nopython": True}
    compiled: Any = ccallback.CFunc(function, sigutils.normalize_signature(signature), {}, options)
    _cache_on_disk(compiled, function)
    compiled.compile()
    return compiled


def display_name(function: Callable[..., Any]) -> str:
    """What messages call a kernel: its name, after that of its folder where it does not say it."""
    folder, name = f"mmrec.{function.__module__}".split(".")[-2], function.__name__
    return name if folder in name else f"{folder} {name}"


class _CompileNotice(event.Listener):
    """Says once, on standard error, which kernels are being compiled, if that takes a while."""

    def __init__(self) -> None:
        self.depth, self.seconds, self.began, self.patience = 0, 0.0, 0.0, NOTICE_AFTER
        self.printed = self.warned = False
        self.names: list[str] = []
        self.helper: Callable[[], None] | None = None
        self.timer: threading.Timer | None = None

    def on_start(self, event: Any) -> None:
        if not _is_ours(event):
            return
        self.depth += 1  # a kernel compiles the functions that it calls; Numba lets no two run
        if self.depth > 1:
            return
        self.names.append(display_name(event.data["dispatcher"].py_func))
        if self.helper is not None:
            helper, self.helper = self.helper, None
            self.patience += HELPER_SECONDS
            helper()
        if not self.printed:
            self.began = time.monotonic()
            self.timer = threading.Timer(max(0.0, self.patience - self.seconds), self.print)
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

    def print(self, names: str = "") -> None:
        """Print the notice.

        Args:
            names: what is compiled; by default the first kernels.
        """
        if self.printed:
            return
        self.printed = True
        how_often = f"once for this processor and version; kept in {CACHE_FOLDER}"
        if CACHE_FOLDER is None:
            how_often = "in every process again, as no cache folder can be written; "
            how_often += "see NUMBA_CACHE_DIR"
        what = names or f"kernels ({', '.join(self.names)} …)"
        print(
            f"mmrec: compiling {what}, which can take half a minute, {how_often}",
            file=sys.stderr,
            flush=True,
        )

    def say_that_nothing_is_kept(self, error: OSError) -> None:
        """Warn once that compiled code could not be written."""
        if not self.warned:
            self.warned = True
            print(
                f"mmrec: compiled kernels cannot be kept in {CACHE_FOLDER} "
                f"({error.strerror or error}), so the next command compiles them again",
                file=sys.stderr,
                flush=True,
            )


def _is_ours(event: Any) -> bool:
    return str(event.data["dispatcher"].py_func.__module__).startswith("mmrec.")


_notice = _CompileNotice()
if not numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    event.register("numba:compile", _notice)


@contextlib.contextmanager
def when_compiling(helper: Callable[[], None]) -> Iterator[Callable[[str], None]]:
    """While it is entered, the first kernel that must be compiled calls a function before.

    Yields:
        A function that prints the notice, with what is compiled, in place of the usual one.
    """
    _notice.helper = helper
    try:
        yield _notice.print
    finally:
        _notice.helper = None
