"""How compiled code is compiled and cached on disk. All of that is decided here.

Nothing here imports torch, so that compiled code which reads and writes NumPy arrays only can be
used without it.
"""

import contextlib
import functools
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import platformdirs
from numba import extending
from numba.core import event

# The one liberty that the compiler gets is to fuse a multiplication and an addition. It may not
# reorder a sum.
_EXACT: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

NOTICE_AFTER = 3.0
"""Seconds of compiling in one process before the user is told of it."""


def _find_cache_folder() -> Path | None:
    """The folder for compiled kernels, or None if no folder can be written."""
    try:
        root = os.environ.get("NUMBA_CACHE_DIR") or platformdirs.user_cache_path("mmrec/kernels")
        folder = Path(root).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return None
    return folder if os.access(folder, os.W_OK) else None


CACHE_FOLDER = _find_cache_folder()
_KERNELS = Path(__file__).parent
_IMPORT = re.compile(rb"^from mmrec\.kernels\.([\w.]+) import", re.MULTILINE)


def _sources(path: Path, found: set[Path]) -> set[Path]:
    """Add a file of this package, and all files of this package that it imports, to ``found``."""
    if path not in found:
        found.add(path)
        for name in _IMPORT.findall(path.read_bytes()):
            _sources(_KERNELS.joinpath(*name.decode().split(".")).with_suffix(".py"), found)
    return found


@functools.cache
def _cache_folder_of(file: str) -> str:
    """The folder for the compiled functions of one source file; empty if there is none.

    Numba keys the files in it on the processor and on the argument types. It does not see a change
    in a helper function of another file. The folder's name therefore has a digest of Numba's
    version, of the source file and of every file that it imports, and an edit compiles only the
    kernels that it reaches.
    """
    if CACHE_FOLDER is None:
        return ""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(_sources(Path(file), set())):
        digest.update(path.read_bytes())
    return str(CACHE_FOLDER / f"mmrec-{digest.hexdigest()[:16]}")


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


def inline_jit(function: Callable[..., Any], variant: str = "") -> Callable[..., Any]:
    """Decorator for a function that kernels call. The order of its sums is kept.

    Args:
        function: takes and returns what Numba can compile.
        variant: tells functions apart that the same factory makes; see ``_claim``.

    Raises:
        ValueError: another function has the same name and variant.
    """
    if variant:
        function.__qualname__ += f"[{variant}]"
    _claim(f"{function.__module__}.{function.__qualname__}", function)
    compiled: Callable[..., Any] = numba.njit(**_EXACT)(function)
    return compiled


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


@contextlib.contextmanager
def _cached_in_its_folder(function: Callable[..., Any]) -> Iterator[bool]:
    """While it is entered, what Numba decorates is cached in the folder of the function's file.

    Yields whether there is such a folder.
    """
    before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    folder = _cache_folder_of(sys.modules[function.__module__].__file__ or "")
    numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]
    try:
        yield folder != ""
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]


def compiled_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a function that Python calls: compiled code, kept in CACHE_FOLDER.

    Other Python threads run while it runs. The order of its sums is kept.

    Args:
        function: takes and returns what Numba can compile. Numba's cache knows it by its file and
            its qualified name, and its file decides the folder.
    """
    with _cached_in_its_folder(function) as cache:
        compiled: Callable[..., Any] = numba.njit(nogil=True, cache=cache, **_EXACT)(function)
    return compiled


@functools.cache  # whoever has its address needs it as long as the process lives
def compiled_c_function(function: Callable[..., Any], signature: Any) -> Any:
    """A function that compiled code calls by its ``address``, compiled now and kept likewise.

    Each ``prange`` in it runs on Numba's threads.

    Args:
        function: takes and returns numbers.
        signature: their types in Numba.
    """
    with _cached_in_its_folder(function) as cache:
        options: dict[str, Any] = {"cache": cache, "parallel": True, "nopython": True}
        return numba.cfunc(signature, **options)(function)


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
