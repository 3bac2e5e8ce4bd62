"""Files that are written completely or not at all."""

import contextlib
import ctypes
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mmrec.errors import StorageError
from mmrec.runtime.names import extensible

Retry = Callable[[StorageError], bool]
"""Decides whether to write again after an error, for instance once a person has freed space."""


def never_retry(error: StorageError) -> bool:
    """Give up at the first error."""
    return False


def write_with_retry(write: Callable[[], None], retry: Retry = never_retry) -> None:
    """Call ``write`` until it succeeds or ``retry`` returns False.

    Args:
        write: Writes a file, completely or not at all.
        retry: Called with each error. It may wait, or ask a person to free space.

    Raises:
        StorageError: ``write`` failed and ``retry`` returned False.
    """
    while True:
        try:
            return write()
        except StorageError as error:
            if not retry(error):
                raise


def temporary_path(path: Path) -> Path:
    """Return the name under which this process writes a file before it is complete."""
    return path.with_name(f".{extensible(path.name)}.{os.getpid()}.mmrec.tmp")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Provide a temporary path, and rename it to ``path`` if the block succeeds.

    The folder must exist. A folder that vanished is not created again, because the disk that holds
    it may only be disconnected.

    Args:
        path: The file to create or replace.

    Yields:
        A path in the same folder. The block must create a file there.

    Raises:
        StorageError: The system refused (disk full, no permission …). ``path`` is unchanged.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        _flush_file(temporary)
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        state = "the file that was there is intact" if path.exists() else "nothing was left behind"
        raise StorageError(f"could not write {path}: {error.strerror or error}; {state}") from None
    finally:
        with contextlib.suppress(OSError):  # usually it has been renamed
            temporary.unlink()


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file completely or not at all.

    Raises:
        StorageError: The system refused. ``path`` is unchanged.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


def append_all_or_nothing(file: io.FileIO, path: Path, data: bytes) -> None:
    """Append bytes to an open file. After an error the file has its earlier length.

    Args:
        file: Open for appending, unbuffered.
        path: Its path, for the error message.
        data: The bytes.

    Raises:
        StorageError: The system refused.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) or 0 :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise StorageError(f"could not write {path}: {error.strerror}; it is as it was") from None


def remove_stale_temporaries(folder: Path) -> None:
    """Remove mmrec's temporary files in a folder whose writers are no longer running."""
    for path in folder.glob(".*.mmrec.tmp"):
        writer = re.fullmatch(r"\..+\.(\d{1,9})\.mmrec\.tmp", path.name)
        if writer and not process_is_alive(int(writer[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def process_is_alive(pid: int) -> bool:
    """Return whether a process with this number runs on this machine, no matter whose it is."""
    if sys.platform == "win32":
        return _windows_process_is_alive(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def _windows_process_is_alive(pid: int) -> bool:
    """Ask Windows, where ``os.kill(pid, 0)`` would send Ctrl-C to the process."""
    if sys.platform != "win32":  # the type checker reads no further on another platform
        raise NotImplementedError
    query_limited_information, access_denied, still_active = 0x1000, 5, 259
    kernel: ctypes.CDLL = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(kernel.OpenProcess(query_limited_information, False, pid))
    if not handle.value:
        denied: bool = ctypes.get_last_error() == access_denied
        return denied
    try:
        code = ctypes.c_ulong()
        known = kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        return not known or code.value == still_active
    finally:
        kernel.CloseHandle(handle)


def _flush_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    # Windows flushes only what is open for writing
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can do that.

    Without it, a power failure may undo a rename.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # no such operation here
            raise
    finally:
        os.close(handle)
