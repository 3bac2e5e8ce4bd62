"""Signals and closed terminals: neither loses what was trained."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

from mmrec.errors import InterruptedTrainingError

STOP_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # SIGBREAK is that of Windows
    if name in signal.Signals.__members__
)
NOTICE_SECONDS = 0.5
"""After a first signal the user is told that work is still going on, if it is after this time."""
GRACE_SECONDS = 0.7
"""Time that the main thread has to end tidily after a second signal."""
NOTICE = "stopping after the work in progress; again to stop at once"


class StopSignal:
    """A context in which the first stop signal is recorded and the second ends the process.

    Stop signals are SIGINT, SIGTERM and, where the platform has it, SIGHUP or SIGBREAK. A signal
    that the process was started to ignore (``nohup``, ``&`` in a script) stays ignored. Python
    handles signals in its main thread only. In any other thread this context does nothing.
    """

    def __init__(self, agree: Callable[[float], float] | None = None) -> None:
        """Create the context. Handlers are installed on entry.

        Args:
            agree: In a distributed run, returns the largest value of all processes, so that all
                stop at the same step. torchrun sends signals of its own as soon as one process
                ends, and kills those that take long. With ``agree`` a second signal is therefore
                only recorded, and the handlers stay installed after the block.
        """
        self.signal_number = 0
        """The signal that all processes stop for, or 0."""
        self._agree, self._received = agree, 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._previous = _install(self._record)
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if self._agree is None:
            self.signal_number = number
            for s in self._previous:
                signal.signal(s, signal.SIG_DFL)

    def is_set(self) -> bool:
        """Return whether to stop. In a distributed run, all processes must call this together."""
        if self._agree is not None and not self.signal_number:
            self.signal_number = int(self._agree(self._received))
        return self.signal_number > 0

    def raise_if_set(self) -> None:
        """Raise InterruptedTrainingError if a signal came."""
        if self.is_set():
            raise InterruptedTrainingError

    def __exit__(self, *error: object) -> None:
        if self._agree is None:
            _restore(self._previous)


def _install(handler: Any) -> dict[signal.Signals, Any]:
    """Handle the stop signals that are not ignored. Return the handlers they had."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    previous = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    previous = {s: old for s, old in previous.items() if old not in (signal.SIG_IGN, None)}
    for s in previous:
        signal.signal(s, handler)
    return previous


def _restore(previous: dict[signal.Signals, Any]) -> None:
    for s, handler in previous.items():
        signal.signal(s, handler)


@contextlib.contextmanager
def exit_on_signal(message: str) -> Iterator[None]:
    """While there is nothing to save, end the process tidily at the first stop signal.

    A second signal ends it at once. Outside the main thread this does nothing.

    Args:
        message: Printed to standard error.

    Raises:
        SystemExit: A signal came. The code is 128 plus its number.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        for s in previous:
            signal.signal(s, signal.SIG_DFL)
        print(message, file=sys.stderr)
        raise SystemExit(128 + number)

    previous = _install(leave)
    try:
        yield
    finally:
        _restore(previous)


def discard_output(stream: TextIO) -> None:
    """Let the descriptor of a stream that cannot be written lead nowhere.

    It then accepts what is buffered, and the interpreter's last flush.
    """
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def end_at_second_signal() -> Iterator[None]:
    """End the process within a second of the second stop signal, whatever the main thread does.

    Python runs signal handlers in its main thread, between two of its instructions. A handler
    therefore waits for a library call, such as the training of a tokenizer, that may take minutes.
    The system's own handler does not wait: it writes the number of each signal to a socket, which a
    thread reads. The library must let other threads run, as tokenizers, HDF5 and LLVM do.

    Outside the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    block_ended = threading.Event()
    thread = threading.Thread(
        target=_watch_signals, args=(receiver, block_ended), name="mmrec-signals", daemon=True
    )
    previous = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        block_ended.set()
        sender.close()
        thread.join()
        receiver.close()


def _watch_signals(receiver: socket.socket, block_ended: threading.Event) -> None:
    """Read signal numbers; end the process after the second stop signal, unless it ends itself."""
    count = number = 0
    while count < 2:
        try:
            received = receiver.recv(1)
        except TimeoutError:
            receiver.settimeout(None)
            with contextlib.suppress(OSError, ValueError, AttributeError):
                begin = "\n" if sys.stderr.isatty() else ""  # after ^C or a progress bar
                print(f"{begin}{NOTICE}", file=sys.stderr, flush=True)
            continue
        if not received:
            return
        if received[0] in STOP_SIGNALS:
            count, number = count + 1, received[0]
            receiver.settimeout(NOTICE_SECONDS)
    if not block_ended.wait(GRACE_SECONDS):
        os._exit(128 + number)  # every file is written under another name first


@contextlib.contextmanager
def repeated_interrupts() -> Iterator[None]:
    """In a program where Ctrl-C is an everyday key, ``end_at_second_signal`` counts no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous, warn_on_full_buffer=False)


@contextlib.contextmanager
def note_interrupts() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C interrupt nothing in the block, so that work ends only where it may.

    Outside the main thread this does nothing.

    Yields:
        A function that tells whether Ctrl-C was pressed.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


class TolerantStream:
    """A text stream whose reader may go away (closed terminal, ``| head``). Later text is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError:
            discard_output(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def tolerate_closed_output() -> Iterator[None]:
    """Let the block finish even if nobody reads standard output and error any more."""
    with contextlib.ExitStack() as stack:
        streams: list[Any] = []
        if sys.stdout is not None:  # a program without a console has no streams
            streams.append(TolerantStream(sys.stdout))
            stack.enter_context(contextlib.redirect_stdout(streams[-1]))
        if sys.stderr is not None:
            streams.append(TolerantStream(sys.stderr))
            stack.enter_context(contextlib.redirect_stderr(streams[-1]))
        yield
        for stream in streams:
            stream.flush()
