"""Files written all or not at all, and what to do where the system refuses."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mmrec.errors import StorageError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; put it in place if the block succeeds, else remove it.

    The folder must exist: one that vanished is not made again, since what was mounted there may
    only be away.

    Raises:
        StorageError: the system refused (disk full, no permission …); ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)  # or the new name may be lost with the power
    except OSError as error:
        kept = "the file that was there is intact" if path.exists() else "nothing was left behind"
        raise StorageError(f"could not write {path}: {error.strerror or error}; {kept}") from None
    finally:
        with contextlib.suppress(OSError):  # most often it has moved into place
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file all or not at all. Raises StorageError."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def append(file: io.FileIO, path: Path, data: bytes) -> None:
    """Append to an open unbuffered file, all or nothing. Raises StorageError."""
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) or 0 :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise StorageError(f"could not write {path}: {error.strerror}; it is as it was") from None


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the temporaries that processes now dead have left in a folder."""
    for path in folder.glob(".*.tmp"):
        owner = re.fullmatch(r"\..+\.(\d{1,9})\.tmp", path.name)
        if owner and not _alive(int(owner[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def keep_trying(write: Callable[[], None]) -> None:
    """Write; where the system refuses and a person is there, let them make room and try again.

    Raises StorageError if there is no terminal, or the person gives up.
    """
    while True:
        try:
            return write()
        except StorageError as error:
            if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
                raise
            print(
                f"\nerror: {error}\nThe training state is still in memory. Free some space and "
                "press Enter to try again, or q and Enter to give up: ",
                end="",
                file=sys.stderr,
                flush=True,
            )
            answer = sys.stdin.readline()
            if not answer or answer.strip().lower() == "q":
                raise
