"""HDF5 files, for corpora and checkpoints: opened with clear errors, written all or not at all."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mmrec.config import VERSION, InputError


class StorageError(InputError):
    """A file could not be written. What stood at its path before is untouched."""


class _Sink(io.RawIOBase):
    """A file for HDF5 to write to that remembers its first error and then swallows the rest.

    HDF5 cannot be stopped half-way: after a failed write it tries again at close, and fails again,
    and its file stays open. So it is let finish into nothing, and the error is raised afterwards.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while left and self.error is None:
            try:
                left = left[self._file.write(left) or 0 :]
            except OSError as error:
                self.error = error
        return size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        got = self._file.readinto(view) or 0
        view[got:] = bytes(len(view) - got)  # what was swallowed reads as zeros
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        if self.error is None:
            try:
                return self._file.truncate(size)
            except OSError as error:
                self.error = error
        return size or 0

    def finish(self) -> None:
        """Flush to the disk and close; raise the first error met."""
        try:
            if self.error is None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self.error = error
        finally:
            self._file.close()
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; put it in place if the block succeeds, else remove it.

    Raises:
        StorageError: the system refused (disk full, no permission …); ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the new name may be lost with the power
        finally:
            os.close(folder)
    except OSError as error:
        kept = "the file that was there is intact" if path.exists() else "nothing was left behind"
        raise StorageError(f"could not write {path}: {error.strerror or error}; {kept}") from None
    finally:
        with contextlib.suppress(OSError):  # most often it has moved into place
            temporary.unlink()


@contextlib.contextmanager
def atomic_write(path: Path, kind: str, schema: int) -> Iterator[h5py.File]:
    """Write an HDF5 file that appears at ``path`` complete and on disk, or not at all.

    Raises:
        StorageError: the system refused; ``path`` is as it was.
    """
    with atomic_file(path) as temporary:
        sink = _Sink(temporary)
        try:
            with h5py.File(sink, "w") as file:
                stamp = datetime.now(UTC).isoformat(timespec="seconds")
                file.attrs.update(kind=kind, schema=schema, mmrec_version=VERSION, created=stamp)
                yield file
        except (RuntimeError, OSError):
            if sink.error is None:
                raise
        finally:
            sink.finish()


@contextlib.contextmanager
def open_file(path: Path, kind: str, schema: int, oldest: int = 1) -> Iterator[h5py.File]:
    """Open an HDF5 file of ours for reading.

    Args:
        path: the file.
        kind: what it must be, ``corpus`` or ``checkpoint``.
        schema: the newest layout that this version reads.
        oldest: the oldest.

    Raises:
        InputError: missing, not a file, empty, unreadable, not HDF5, truncated, damaged, of
            another kind or of a schema out of reach.
    """
    if not path.exists():
        raise InputError(f"no {kind} at {path}: no such file")
    if not path.is_file():
        raise InputError(f"{kind} {path} must be a file; it is a folder")
    try:
        with path.open("rb") as start:
            magic = start.read(8)
    except OSError as error:
        raise InputError(f"cannot read {kind} {path}: {error.strerror}") from None
    if magic != b"\x89HDF\r\n\x1a\n":
        what = "empty" if not magic else "not an HDF5 file"
        raise InputError(f"{path} is {what}; expected a {kind} written by mmrec")
    damaged = InputError(f"{kind} {path} is damaged or truncated: {{}}")
    try:
        file = h5py.File(path, "r")
    except (OSError, RuntimeError) as error:
        raise InputError(str(damaged).format(_first_line(error))) from None
    with file:
        try:
            found, version = str(file.attrs.get("kind")), int(file.attrs.get("schema", -1))
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(str(damaged).format(_first_line(error))) from None
        if found != kind:
            found = (
                f"a {found}" if found in ("corpus", "checkpoint") else "not one of mmrec's files"
            )
            raise InputError(f"{path} must be a {kind}; it is {found}")
        if version > schema:
            raise InputError(
                f"{path} was written by a newer mmrec (schema {version}; this one reads up to "
                f"{schema}): upgrade mmrec"
            )
        if 0 <= version < oldest:
            raise InputError(
                f"{path} was written by an earlier mmrec (schema {version}; this one reads from "
                f"{oldest} on): make it again"
            )
        try:
            yield file
        except InputError:
            raise
        except (KeyError, OSError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(str(damaged).format(_first_line(error))) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip("'\"").splitlines() or [type(error).__name__])[0]


def write_json(group: h5py.Group, name: str, value: Any) -> None:
    """Store a JSON value as UTF-8 bytes in a dataset (an attribute holds at most 64 KiB)."""
    data = json.dumps(value, ensure_ascii=False).encode()
    group.create_dataset(name, data=np.frombuffer(data, np.uint8), compression="gzip")


def read_json(group: h5py.Group, name: str) -> Any:
    """Read what write_json stored. Raises KeyError or ValueError if it is not there or damaged."""
    return json.loads(bytes(group[name][:]).decode())
