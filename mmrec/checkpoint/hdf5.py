"""HDF5 files, for corpora and checkpoints: written all or not at all, sealed, opened with care.

A file begins with a seal of 512 bytes, HDF5's user block: the length and the SHA-256 of all that
follows. It is compared before HDF5 looks at anything, because HDF5 can crash on damaged files.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from mmrec.checkpoint.structure import attribute, check_structure, read_whole
from mmrec.config import VERSION
from mmrec.errors import DamagedError, InputError
from mmrec.runtime.atomic import atomic_file

SEAL_BYTES = 512
SEAL = re.compile(rb"mmrec sealed (\d{1,18}) bytes, sha256 ([0-9a-f]{64})\n\0*")
CHUNK_BYTES = 1 << 18  # of packed arrays
PACKED = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
MAPPED_BYTES = 1 << 27  # and more are not read at once
JSON_BYTES = 1 << 24
"""Longest JSON value; the tokenizer of a vocabulary of 128,000 takes a third of it."""


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
        """Close; raise the first error met."""
        self._file.close()
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def atomic_write(path: Path, kind: str, schema: int) -> Iterator[h5py.File]:
    """Write an HDF5 file that appears at ``path`` complete, sealed and on disk, or not at all.

    Raises:
        StorageError: the system refused; ``path`` is as it was.
    """
    with atomic_file(path) as temporary:
        sink = _Sink(temporary)
        try:
            # from 1.10 on, HDF5's own structures carry checksums too
            format_110 = {"userblock_size": SEAL_BYTES, "libver": ("v110", "v110")}
            with h5py.File(sink, "w", **format_110) as file:
                stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                for name, text in (("kind", kind), ("mmrec_version", VERSION), ("created", stamp)):
                    file.attrs[name] = np.bytes_(text)
                file.attrs["schema"] = schema
                yield file
        except (RuntimeError, OSError):
            if sink.error is None:
                raise
        finally:
            sink.finish()
        seal(temporary)


def seal(path: Path) -> None:
    """Write the seal of an HDF5 file that was made with room for it."""
    with path.open("r+b") as file:
        file.seek(SEAL_BYTES)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        length = file.seek(0, os.SEEK_END) - SEAL_BYTES
        file.seek(0)
        text = f"mmrec sealed {length} bytes, sha256 {digest}\n".encode()
        file.write(text.ljust(SEAL_BYTES, b"\0"))


def _check_seal(file: BinaryIO, path: Path, kind: str) -> int:
    """Compare a file with its seal; return its length. Raises InputError."""
    start = file.read(SEAL_BYTES)
    found = SEAL.fullmatch(start) if len(start) == SEAL_BYTES else None
    if not found:
        if start.startswith(b"\x89HDF\r\n\x1a\n"):
            raise InputError(
                f"{path} has no seal: it was written by an earlier mmrec or by another program; "
                "make it again"
            )
        if start.startswith(b"mmrec sealed "):
            raise DamagedError(f"{kind} {path} is damaged or truncated: its seal is broken")
        what = "is empty" if not start else "is not an HDF5 file"
        raise DamagedError(f"{path} {what}; expected a {kind} written by mmrec")
    length = os.fstat(file.fileno()).st_size - SEAL_BYTES
    if length != int(found[1]):
        raise DamagedError(
            f"{kind} {path} is damaged or truncated: it was {int(found[1]) + SEAL_BYTES:,} bytes "
            f"long and is {length + SEAL_BYTES:,}"
        )
    if hashlib.file_digest(file, "sha256").hexdigest() != found[2].decode():  # type: ignore[arg-type]
        raise DamagedError(
            f"{kind} {path} is damaged or truncated: its bytes are not those that were written"
        )
    return length + SEAL_BYTES


@contextlib.contextmanager
def open_file(path: Path, kind: str, schema: int, oldest: int = 1) -> Iterator[h5py.File]:
    """Open an HDF5 file of ours for reading, after its seal and its structure were checked.

    What the block raises because of the contents is an InputError that names the file, too.

    Args:
        path: the file.
        kind: what it must be, ``corpus`` or ``checkpoint``.
        schema: the newest layout that this version reads.
        oldest: the oldest.

    Raises:
        DamagedError: empty, truncated, changed, not ours, or holding what it must not.
        InputError: missing, not a file, unreadable, of another kind or of a schema out of reach.
    """
    if not path.exists():
        raise InputError(f"no {kind} at {path}: no such file")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a device or pipe"
        raise InputError(f"{kind} {path} must be a file; it is {what}")
    try:
        with path.open("rb") as raw:
            size = _check_seal(raw, path, kind)
            with _content(path, kind), h5py.File(raw, "r") as file:
                check_structure(file, size)
                _check_kind(file, path, kind, schema, oldest)
                yield file
    except OSError as error:
        lost = DamagedError if error.errno == errno.EIO else InputError
        raise lost(f"cannot read {kind} {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def _content(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise DamagedError(f"{kind} {path} is not valid: {_one_line(error)}") from None
    except (
        LookupError,
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        ArithmeticError,
        AttributeError,
    ) as error:
        raise DamagedError(f"{kind} {path} is not valid: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """What it says, at most 300 characters of it, with nothing that moves a terminal's cursor."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = (text.splitlines() or [type(error).__name__])[0]
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def _check_kind(file: h5py.File, path: Path, kind: str, schema: int, oldest: int) -> None:
    found, version = attribute(file, "kind", str), attribute(file, "schema", int)
    if found != kind:
        found = f"a {found}" if found in ("corpus", "checkpoint") else "not one of mmrec's files"
        raise InputError(f"{path} must be a {kind}; it is {found}")
    if version > schema:
        raise InputError(
            f"{path} was written by a newer mmrec (schema {version}; this one reads up to "
            f"{schema}): upgrade mmrec"
        )
    if version < oldest:
        raise InputError(
            f"{path} was written by an earlier mmrec (schema {version}; this one reads from "
            f"{oldest} on): make it again"
        )


def write_array(file: h5py.File, name: str, data: np.ndarray, *, pack: bool = False) -> None:
    """Store an array with the CRC-32 of its bytes; ``pack`` compresses it.

    Bytes of equal weight side by side compress: exponents repeat, low bits do not.
    """
    data = np.ascontiguousarray(data)
    how: dict[str, Any] = {}
    if pack and data.size > 64:
        chunk, at = list(data.shape), 0
        while np.prod(chunk) * data.itemsize > CHUNK_BYTES:
            at = next(i for i, n in enumerate(chunk) if n > 1)  # whole rows stay together
            chunk[at] = -(-chunk[at] // 2)
        how = {"chunks": tuple(chunk), **PACKED}
    made = file.create_dataset(name, data=data, **how)
    made.attrs["crc32"] = np.uint32(zlib.crc32(data.data))


def write_chunks(
    file: h5py.File,
    name: str,
    dtype: Any,
    count: int,
    chunks: Iterable[np.ndarray],
    *,
    pack: bool = False,
) -> None:
    """Store an array (count,) that comes in pieces, as write_array would."""
    how: dict[str, Any] = {}
    if pack and count:
        size = min(count, CHUNK_BYTES // np.dtype(dtype).itemsize)
        how = {"chunks": (size,), **PACKED}
    made, at, crc = file.create_dataset(name, (count,), dtype, **how), 0, 0
    for chunk in chunks:
        made[at : at + len(chunk)] = chunk
        at, crc = at + len(chunk), zlib.crc32(chunk.data, crc)
    made.attrs["crc32"] = np.uint32(crc)


def map_array(file: h5py.File, path: Path, name: str, dtype: Any) -> np.ndarray:
    """Read what write_array stored; a long one of one axis is read from the disk as it is used.

    Raises as read_array does. A file of ours is replaced, never changed, so the mapping holds.
    """
    stored = file.get(name)
    small = not isinstance(stored, h5py.Dataset) or stored.nbytes < MAPPED_BYTES
    if small or stored.chunks or stored.dtype != dtype or stored.ndim != 1:
        return read_array(file, name, dtype)
    at = stored.id.get_offset()  # from the start of the file, its seal included
    made = np.memmap(path, dtype, "r", at, stored.shape)
    crc = 0
    for lo in range(0, len(made), CHUNK_BYTES):
        crc = zlib.crc32(made[lo : lo + CHUNK_BYTES].data, crc)
    if crc != attribute(stored, "crc32", int):
        raise ValueError(f"{name} is not what was stored: its checksum differs")
    return made


def read_array(
    file: h5py.File, name: str, dtype: Any, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Read what write_array stored.

    Raises KeyError if it is not there, ValueError if it is of another dtype or shape, or if its
    bytes are not those that were stored.
    """
    stored = file.get(name)
    if not isinstance(stored, h5py.Dataset):
        raise KeyError(f"{name} is missing")
    want = f"{np.dtype(dtype)} {shape or 'of one axis'}"
    if stored.dtype != dtype or (stored.ndim != 1 if shape is None else stored.shape != shape):
        raise ValueError(f"{name} must be {want}; it is {stored.dtype} {stored.shape}")
    data = read_whole(stored)
    if zlib.crc32(data.data) != attribute(stored, "crc32", int):
        raise ValueError(f"{name} is not what was stored: its checksum differs")
    return data


def write_json(file: h5py.File, name: str, value: Any) -> None:
    """Store a JSON value as UTF-8 bytes. Raises ValueError if it is longer than 16 MiB."""
    data = json.dumps(value, ensure_ascii=False).encode()
    if len(data) > JSON_BYTES:
        raise ValueError(f"{name} must be at most {JSON_BYTES:,} bytes of JSON; got {len(data):,}")
    write_array(file, name, np.frombuffer(data, np.uint8), pack=True)


def read_json(file: h5py.File, name: str) -> dict[str, Any]:
    """Read the JSON object that write_json stored. Raises KeyError or ValueError."""
    stored = file.get(name)
    if isinstance(stored, h5py.Dataset) and stored.size > JSON_BYTES:
        raise ValueError(f"{name} must be at most {JSON_BYTES:,} bytes; it has {stored.size:,}")
    value = json.loads(read_array(file, name, np.uint8).tobytes().decode())
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object")
    return value
