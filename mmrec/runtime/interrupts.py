"""Signals and terminals that go away: nothing that was trained is lost to either."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

from mmrec.errors import InterruptedTrainingError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """While entered, the first SIGINT, SIGTERM or SIGHUP is noted; a second ends the process.

    A signal that the process was started to ignore (``nohup``, a script's ``&``) stays ignored.
    Python hears signals in its main thread only; elsewhere this does nothing.
    """

    def __init__(self, agree: Callable[[float], float] | None = None) -> None:
        """``agree``: of several processes, the largest of what each has; they stop together. They
        are torchrun's, which sends signals of its own once one of them ends and kills those that
        take too long: a second signal is noted only, also when this is left, to the very end."""
        self.number = 0
        """The signal that this process, or all of them, stop for; 0 while there is none."""
        self._agree, self._came = agree, 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = _replace(self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = number
        if self._agree is None:
            self.number = number
            for s in self._before:
                signal.signal(s, signal.SIG_DFL)

    def came(self) -> bool:
        """Whether to stop; several processes must ask at the same points."""
        if self._agree is not None and not self.number:
            self.number = int(self._agree(self._came))
        return self.number > 0

    def __exit__(self, *error: object) -> None:
        for s, handler in self._before.items() if self._agree is None else ():
            signal.signal(s, handler)

    def check(self, *_: object) -> None:
        """Raise InterruptedTrainingError if a signal came."""
        if self.came():
            raise InterruptedTrainingError


def _replace(handler: Any) -> dict[signal.Signals, Any]:
    before = {s: signal.getsignal(s) for s in STOPPING}
    before = {s: old for s, old in before.items() if old not in (signal.SIG_IGN, None)}
    for s in before:
        signal.signal(s, handler)
    return before


@contextlib.contextmanager
def leaving(line: str) -> Iterator[None]:
    """While there is nothing to save: the first signal prints a line and exits, tidily, with 128 +
    its number; a second one does not wait for that."""

    def leave(number: int, frame: FrameType | None) -> None:
        for s in before:
            signal.signal(s, signal.SIG_DFL)
        print(line, file=sys.stderr)
        raise SystemExit(128 + number)

    before = _replace(leave)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class _Unbreakable:
    """A text stream whose other end may go away (a closed terminal, ``| head``): what can no longer
    be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Any, *args: str) -> None:
        try:
            action(*args)
        except OSError:
            # also for what is buffered, and for the interpreter's own last flush
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """Let work go on when nobody reads its standard output and error any more."""
    out: Any = _Unbreakable(sys.stdout)
    err: Any = _Unbreakable(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
        out.flush()
        err.flush()
