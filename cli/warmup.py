"""``mmrec warmup``."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer

from mmrec.errors import InputError, did_you_mean
from mmrec.runtime.cores import available_cores

PARTS = {
    "train": "train, finetune, chain, grow and tune",
    "eval": "eval and compare",
    "generate": "generate, chat, score and serve",
}
"""What can be compiled, and the commands that it serves."""
ALL = "all"
COMPILER = ["-m", "mmrec.training.warmup"]
"""What Python runs in a compiler."""
LAST_LINES = 3
"""Lines of a failed process that are shown."""


def warmup(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[train|eval|generate|all]...", help="Commands to compile for; default: all."
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Compilers side by side; by default one per core."),
    ] = None,
) -> None:
    """Compile the kernels that commands use, ahead of their first use.

    Compiled kernels are kept for each processor and version of mmrec and Numba, in the folder
    NUMBA_CACHE_DIR or that of the user. A container image or a CI job can be prepared so.
    """
    chosen = _check(parts or [ALL])
    from mmrec.kernels._jit import CACHE_FOLDER

    if CACHE_FOLDER is None:
        raise InputError(
            "no folder for compiled kernels can be written: set NUMBA_CACHE_DIR to one that can"
        )
    missing: list[str] = []
    begin, done = time.monotonic(), 0
    count = processes or min(available_cores(), 4)
    for line in _run(chosen, count):
        missing = max(missing, line.get("missing", []), key=len)
        if error := line.get("error"):
            raise InputError(f"compiled kernels cannot be kept in {CACHE_FOLDER}: {error}")
        if "kernel" in line:
            done += 1
            typer.echo(
                f"kernel  {line['kernel']}: {line['seconds']:.1f} s ({done} of {len(missing)})"
            )
    commands = "; ".join(PARTS[part] for part in chosen)
    took = f" after {time.monotonic() - begin:.0f} s, {done} compiled" if done else ""
    typer.echo(f"ready   kernels of {commands}{took}; kept in {CACHE_FOLDER}")


def _check(parts: list[str]) -> list[str]:
    for part in parts:
        if part not in (*PARTS, ALL):
            raise InputError(
                f"warmup takes {', '.join(PARTS)} or {ALL}; got {part!r}"
                f"{did_you_mean(part, [*PARTS, ALL])}"
            )
    return [part for part in PARTS if part in parts or ALL in parts]


class Compiler:
    """A process that compiles, and ends with this one; see ``mmrec.training.warmup``."""

    def __init__(
        self, parts: Iterable[str], report: Callable[[dict[str, Any] | None], None]
    ) -> None:
        """Start it.

        Args:
            parts: of ``PARTS``.
            report: called in a thread with each line that the process reports, and with None when
                it has ended.

        Raises:
            OSError: there is no room for a process.
        """
        self._report = report
        self._process = subprocess.Popen(
            [sys.executable, *COMPILER, *parts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, with which the other one ends
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._report(json.loads(line))
        self._report(None)

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            InputError: it failed.
        """
        assert self._process.stderr is not None
        errors = self._process.stderr.read().strip().splitlines()
        if self._process.wait():
            raise InputError(f"a compiler failed: {'; '.join(errors[-LAST_LINES:])}")

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()


def _run(parts: list[str], count: int) -> Iterator[dict[str, Any]]:
    """Run compilers side by side; yields what they report.

    Raises:
        InputError: one of them failed.
    """
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
    with contextlib.ExitStack() as stack:
        compilers = [Compiler(parts, lines.put) for _ in range(count)]
        for compiler in compilers:
            stack.callback(compiler.stop)
        running = count
        while running:
            line = lines.get()
            if line is None:
                running -= 1
            else:
                yield line
        for compiler in compilers:
            compiler.wait()


@contextlib.contextmanager
def compiling_side_by_side(*parts: str) -> Iterator[None]:
    """While it is entered, two processes compile kernels, also those of the next commands.

    A command that calls its kernels one after the other would compile them one after the other, and
    the next command would compile its own. So the first kernel that is missing starts a second
    process, which compiles all of them. It ends with the block at the latest.

    Args:
        parts: of ``PARTS``.
    """
    from mmrec.kernels._jit import CACHE_FOLDER, when_compiling

    if CACHE_FOLDER is None or available_cores() == 1 or "RANK" in os.environ:
        yield
        return
    with contextlib.ExitStack() as stack:

        def start() -> None:
            with contextlib.suppress(OSError):  # then this process compiles alone
                stack.callback(Compiler(parts, report).stop)

        def report(line: dict[str, Any] | None) -> None:
            if names := (line or {}).get("missing"):
                first = ", ".join(names[:3])
                announce(f"{len(names)} kernels of {', '.join(parts)} ({first} …)")

        announce = stack.enter_context(when_compiling(start))
        yield
