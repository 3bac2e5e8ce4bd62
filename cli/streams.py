"""Standard input, output and error: their encoding, and what happens if they are closed or full.

* Text that is read is UTF-8: prompts, like texts to train on.
* Text that is printed is UTF-8 where Python would print ASCII, which it does if nobody chose an
  encoding (``LANG=C``). Any other encoding is kept. A character that it lacks is printed as an
  escape, such as ``\\u65e5``. JSON is printed in ASCII, so it is valid in every encoding.
* A closed stream is an empty one. What cannot be printed on standard error is dropped. A command
  ends if its standard output cannot be written, except that training goes on.
"""

import codecs
import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from mmrec.errors import InputError
from mmrec.runtime.interrupts import TolerantStream, discard_output
from mmrec.runtime.names import printable


class OutputError(OSError):
    """Standard output cannot be written; the cause says why."""


class _Output:
    """Standard output. A failure is told apart from that of any other file by its exception."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if text == "":  # Typer tries this, and ignores what is raised
            return 0
        with _failures(self._stream):
            return self._stream.write(text)

    def flush(self) -> None:
        with _failures(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _failures(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        discard_output(stream)
        raise OutputError(error.strerror or str(error)) from error  # without errno, see Typer


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """While the block runs, the standard streams are as the module says."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            encoding = "utf-8" if is_ascii else stream.encoding
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    output: Any = _Output(sys.stdout)
    errors: Any = TolerantStream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            yield
        finally:  # here and not at the interpreter's exit, which reports a failure by itself
            with contextlib.suppress(OutputError):
                output.flush()
            errors.flush()


def _open_closed_streams() -> None:
    """Open streams that the process was started without: ``<&-``, or a program without a console.

    Otherwise a file that is opened later takes the number of a closed stream, and what a library
    prints is written into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(nowhere, True)
            setattr(sys, name, os.fdopen(nowhere, mode, encoding="utf-8", closefd=False))


def read_standard_input() -> str:
    """Read all of standard input, with line ends as ``\\n``.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"cannot read standard input: {error.strerror or error}") from None
    text = decode_utf8(data, "standard input").removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def argument_text(text: str, option: str) -> str:
    """Return the text that an argument holds, which the locale may not have been able to decode.

    Args:
        text: the argument; Python writes bytes that it cannot decode as halves of surrogate pairs.
        option: name of the option.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return decode_utf8(os.fsencode(text), option)
    return text


def decode_utf8(data: bytes, name: str) -> str:
    """Decode text in UTF-8.

    Args:
        data: the bytes.
        name: what an error calls them.

    Raises:
        InputError: they are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} must be UTF-8 text; byte 0x{data[error.start]:02x} at offset {error.start} "
            "is not"
        ) from None


def print_note(line: str) -> None:
    """Say something beside the result, on standard error."""
    print(f"note    {printable(line)}", file=sys.stderr, flush=True)


def print_json(
    value: Any, default: Callable[[Any], Any] | None = None, *, indent: int | None = 1
) -> None:
    """Print a value as JSON, in ASCII.

    Args:
        value: of dictionaries, lists and scalars. JSON has no NaN and infinity: they become null.
        default: gives JSON's types for other objects.
        indent: spaces per level; None prints one line.
    """
    print(json.dumps(_finite(value), indent=indent, allow_nan=False, default=default), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
