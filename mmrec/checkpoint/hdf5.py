"""HDF5 files of mmrec, such as checkpoints: written atomically, sealed, and read safely.

A file begins with a seal of 512 bytes in HDF5's user block: the length and the SHA-256 of all bytes
that follow. The seal is verified before HDF5 reads anything, because HDF5 can crash on damaged
files.

A seal does not prove where a file comes from, since anyone can seal a forged file. HDF5 files can
refer to other files (external and soft links, virtual datasets, external storage), run filters that
load code, and claim any size. mmrec writes none of that, so the structure of a file is checked
before any array is read. A file may hold groups and plain arrays of numbers, each stored completely
inside it, and all arrays together may take at most ``MAX_RATIO`` times its size.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t, h5z

from mmrec.config import VERSION
from mmrec.errors import DamagedError, InputError
from mmrec.runtime.atomic import atomic_path
from mmrec.runtime.numeric import cdiv

REMEDIES = {
    "corpus": "prepare the text again",
    "checkpoint": "train it again",
    "session": "read its text again",
}
"""Kinds of files that users have, and what to do with one that an earlier mmrec wrote."""

SEAL_BYTES = 512
SEAL = re.compile(rb"mmrec sealed (\d{1,18}) bytes, sha256 ([0-9a-f]{64})\n\0*")

CHUNK_BYTES = 1 << 18
"""Largest chunk of a compressed array."""
COMPRESSION = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
MAPPED_BYTES = 1 << 27
"""Arrays of at least this size are mapped into memory, and read as they are used."""
JSON_BYTES = 1 << 24
"""Longest JSON value. The tokenizer of a vocabulary of 128,000 takes a third of it."""

MAX_OBJECTS = 20_000  # a checkpoint of the preset 7b has about a thousand
MAX_DEPTH = 4
MAX_NAME_BYTES = 256
MAX_COMPRESSED_BYTES = 1 << 25
"""Size of the largest array that is compressed: gzip takes seconds for 100 MB, and weights shrink
little."""
MAX_RATIO, MAX_EXTRA_BYTES = 32, 1 << 20
"""All arrays together may take this many times the size of the file, and this much more."""
MAX_TEXT_BYTES = 64
"""Longest text attribute."""
DTYPES = tuple(map(np.dtype, ("<i1", "<u1", "<u2", "<u4", "<i8", "<f4")))
FILTERS = [h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE]
GZIP_SKIPPED = 2
"""Bit of a chunk's filter mask. HDF5 omits gzip where it would not make the chunk smaller."""

# ---- writing


class _ErrorRecordingFile(io.RawIOBase):
    """A file for HDF5 to write to that records its first error and ignores all later writes.

    HDF5 cannot be stopped in the middle. After a failed write it tries again at close, fails again,
    and leaves its file open. So it finishes without effect, and the error is raised afterwards.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        remaining = memoryview(data).cast("B")
        size = len(remaining)
        while remaining and self.error is None:
            try:
                remaining = remaining[self._file.write(remaining) or 0 :]
            except OSError as error:
                self.error = error
        return size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view) or 0
        view[count:] = bytes(len(view) - count)  # what was not written reads as zeros
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
        """Close the file. Raise the first error."""
        self._file.close()
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def atomic_h5_file(path: Path, kind: str, schema: int) -> Iterator[h5py.File]:
    """Write an HDF5 file that appears at ``path`` complete, sealed and on disk, or not at all.

    Args:
        path: The file to create or replace.
        kind: ``corpus``, ``checkpoint`` or ``session``.
        schema: Number of the layout.

    Yields:
        The open file.

    Raises:
        StorageError: The system refused. ``path`` is unchanged.
    """
    with atomic_path(path) as temporary:
        sink = _ErrorRecordingFile(temporary)
        try:
            # the structures of HDF5 1.10 have checksums of their own
            options = {"userblock_size": SEAL_BYTES, "libver": ("v110", "v110")}
            with h5py.File(sink, "w", **options) as file:
                created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                for name, text in (
                    ("kind", kind),
                    ("mmrec_version", VERSION),
                    ("created", created),
                ):
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
    """Write the seal of an HDF5 file whose user block has ``SEAL_BYTES``."""
    with path.open("r+b") as file:
        file.seek(SEAL_BYTES)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        length = file.seek(0, os.SEEK_END) - SEAL_BYTES
        file.seek(0)
        text = f"mmrec sealed {length} bytes, sha256 {digest}\n".encode()
        file.write(text.ljust(SEAL_BYTES, b"\0"))


def write_array(file: h5py.File, name: str, data: np.ndarray, *, compress: bool = False) -> None:
    """Store an array with the CRC-32 of its bytes.

    Args:
        file: Open for writing.
        name: Path of the dataset.
        data: Any shape, with a dtype of ``DTYPES``.
        compress: Whether to compress with gzip after a byte shuffle. The shuffle helps because the
            exponents of floats repeat, while their low bits do not. Arrays of more than
            ``MAX_COMPRESSED_BYTES`` are stored as they are, and so are those that are almost all
            zeros: a reader takes an array that shrinks by more than ``MAX_RATIO`` for an attack.
    """
    data = np.ascontiguousarray(data)
    options: dict[str, Any] = {}
    compress = compress and data.size > 64 and data.nbytes <= MAX_COMPRESSED_BYTES
    if compress and np.count_nonzero(data) > 2 * data.size // MAX_RATIO:
        chunk, axis = list(data.shape), 0
        while np.prod(chunk) * data.itemsize > CHUNK_BYTES:
            axis = next(i for i, n in enumerate(chunk) if n > 1)  # so that rows stay whole
            chunk[axis] = cdiv(chunk[axis], 2)
        options = {"chunks": tuple(chunk), **COMPRESSION}
    dataset = file.create_dataset(name, data=data, **options)
    dataset.attrs["crc32"] = np.uint32(zlib.crc32(data.data))


def write_chunks(
    file: h5py.File,
    name: str,
    dtype: Any,
    count: int,
    chunks: Iterable[np.ndarray],
    *,
    compress: bool = False,
) -> None:
    """Store an array of shape (count,) that arrives in chunks, as ``write_array`` would.

    Args:
        file: Open for writing.
        name: Path of the dataset.
        dtype: One of ``DTYPES``.
        count: Total number of elements.
        chunks: Arrays of shape (n,) with that dtype.
        compress: As in ``write_array``.
    """
    options: dict[str, Any] = {}
    if compress and count:
        size = min(count, CHUNK_BYTES // np.dtype(dtype).itemsize)
        options = {"chunks": (size,), **COMPRESSION}
    dataset = file.create_dataset(name, (count,), dtype, **options)
    start = crc = 0
    for chunk in chunks:
        dataset[start : start + len(chunk)] = chunk
        start, crc = start + len(chunk), zlib.crc32(chunk.data, crc)
    dataset.attrs["crc32"] = np.uint32(crc)


def write_json(file: h5py.File, name: str, value: Any) -> None:
    """Store a JSON value as UTF-8 bytes.

    Raises:
        ValueError: It is longer than ``JSON_BYTES``.
    """
    # a file name that is not UTF-8 holds half surrogates, which stay JSON escapes
    data = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")
    if len(data) > JSON_BYTES:
        raise ValueError(f"{name} must be at most {JSON_BYTES:,} bytes of JSON; got {len(data):,}")
    write_array(file, name, np.frombuffer(data, np.uint8), compress=True)


# ---- reading


@contextlib.contextmanager
def open_h5_file(path: Path, kind: str, schema: int, oldest: int = 1) -> Iterator[h5py.File]:
    """Open an HDF5 file of mmrec for reading, after verifying its seal and its structure.

    Errors that the block raises because of the contents become a DamagedError that names the file.

    Args:
        path: The file.
        kind: What it must be: ``corpus``, ``checkpoint`` or ``session``.
        schema: The newest layout that this version reads.
        oldest: The oldest layout that this version reads.

    Yields:
        The open file.

    Raises:
        DamagedError: The file is empty, truncated, changed, not of mmrec, or forged.
        InputError: It is missing, not a file, unreadable, of another kind, or of another schema.
    """
    if not path.exists():
        raise InputError(f"no {kind} at {path}: no such file")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a device or pipe"
        raise InputError(f"{kind} {path} must be a file; it is {found}")
    try:
        with path.open("rb") as raw:
            size = _verify_seal(raw, path, kind)
            with _content_errors(path, kind), h5py.File(raw, "r") as file:
                check_structure(file, size)
                _check_kind(file, path, kind, schema, oldest)
                yield file
    except OSError as error:
        error_type = DamagedError if error.errno == errno.EIO else InputError
        raise error_type(f"cannot read {kind} {path}: {error.strerror or error}") from None


def file_kind(path: Path) -> str:
    """Return the kind of an intact HDF5 file that mmrec wrote; an empty string for any other."""
    try:
        with path.open("rb") as raw:
            size = _verify_seal(raw, path, "file")
            with _content_errors(path, "file"), h5py.File(raw, "r") as file:
                check_structure(file, size)
                return str(read_attribute(file, "kind", str))
    except (InputError, OSError):
        return ""


def is_sealed(path: Path) -> bool:
    """Whether a file begins with a seal, so that mmrec wrote it. It may be damaged."""
    try:
        with path.open("rb") as file:
            return SEAL.fullmatch(file.read(SEAL_BYTES)) is not None
    except OSError:
        return False


def _verify_seal(file: BinaryIO, path: Path, kind: str) -> int:
    """Compare a file with its seal. Return its length in bytes. Raise InputError."""
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
def _content_errors(path: Path, kind: str) -> Iterator[None]:
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
    """Return at most 300 printable characters of the message, so that no terminal is garbled."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = (text.splitlines() or [type(error).__name__])[0]
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def _check_kind(file: h5py.File, path: Path, kind: str, schema: int, oldest: int) -> None:
    found, version = read_attribute(file, "kind", str), read_attribute(file, "schema", int)
    if found != kind:
        found = f"a {found}" if found in REMEDIES else "not one of mmrec's files"
        raise InputError(f"{path} must be a {kind}; it is {found}")
    if version > schema:
        raise InputError(
            f"{path} was written by a newer mmrec (schema {version}; this one reads up to "
            f"{schema}): upgrade mmrec"
        )
    if version < oldest:
        raise InputError(
            f"{path} was written by an earlier mmrec (schema {version}; this one reads from "
            f"{oldest} on): {REMEDIES.get(kind, 'make it again')}"
        )


def read_array(
    file: h5py.File, name: str, dtype: Any, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Read what ``write_array`` stored.

    Args:
        file: Open for reading.
        name: Path of the dataset.
        dtype: What it must have.
        shape: What it must have; None for any array with one axis.

    Raises:
        KeyError: There is no such array.
        ValueError: The dtype or shape differs, or the bytes are not those that were stored.
    """
    stored = file.get(name)
    if not isinstance(stored, h5py.Dataset):
        raise KeyError(f"{name} is missing")
    if stored.dtype != dtype or (stored.ndim != 1 if shape is None else stored.shape != shape):
        expected = f"{np.dtype(dtype)} {shape or 'of one axis'}"
        raise ValueError(f"{name} must be {expected}; it is {stored.dtype} {stored.shape}")
    data = _read_dataset(stored)
    if zlib.crc32(data.data) != read_attribute(stored, "crc32", int):
        raise ValueError(f"{name} is not what was stored: its checksum differs")
    return data


def map_array(file: h5py.File, path: Path, name: str, dtype: Any) -> np.ndarray:
    """Read an array of shape (n,); if it is large and not compressed, map it into memory.

    The mapping stays valid because files of mmrec are replaced, never changed.

    Args:
        file: Open for reading.
        path: Its path.
        name: Path of the dataset.
        dtype: What it must have.

    Raises:
        KeyError: As in ``read_array``.
        ValueError: As in ``read_array``.
    """
    stored = file.get(name)
    small = not isinstance(stored, h5py.Dataset) or stored.nbytes < MAPPED_BYTES
    if small or stored.chunks or stored.dtype != dtype or stored.ndim != 1:
        return read_array(file, name, dtype)
    offset = stored.id.get_offset()  # from the start of the file, its seal included
    data = np.memmap(path, dtype, "r", offset, stored.shape)
    crc = 0
    for lo in range(0, len(data), CHUNK_BYTES):
        crc = zlib.crc32(data[lo : lo + CHUNK_BYTES].data, crc)
    if crc != read_attribute(stored, "crc32", int):
        raise ValueError(f"{name} is not what was stored: its checksum differs")
    return data


def read_json(file: h5py.File, name: str) -> dict[str, Any]:
    """Read the JSON object that ``write_json`` stored.

    Raises:
        KeyError: There is none.
        ValueError: It is too long, damaged, or not a JSON object.
    """
    stored = file.get(name)
    if isinstance(stored, h5py.Dataset) and stored.size > JSON_BYTES:
        raise ValueError(f"{name} must be at most {JSON_BYTES:,} bytes; it has {stored.size:,}")
    value = json.loads(read_array(file, name, np.uint8).tobytes().decode())
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object")
    return value


def read_attribute(owner: h5py.HLObject, name: str, kind: type) -> Any:
    """Read an attribute of a file or an array.

    Args:
        owner: The file or array.
        name: The attribute.
        kind: ``int`` for a whole number, ``str`` for a text of at most ``MAX_TEXT_BYTES``.

    Raises:
        KeyError: There is none.
        ValueError: It is of another type, or too long.
    """
    if not h5a.exists(owner.id, name.encode()):
        raise KeyError(f"the attribute {name} is missing")
    found = h5a.open(owner.id, name.encode())
    stored, scalar = found.get_type(), found.get_space().get_simple_extent_type() == h5s.SCALAR
    if kind is int:
        valid = isinstance(stored, h5t.TypeIntegerID) and stored.get_size() <= 8
    else:
        valid = isinstance(stored, h5t.TypeStringID) and not stored.is_variable_str()
        valid = valid and stored.get_size() <= MAX_TEXT_BYTES
    if not (valid and scalar):
        raise ValueError(f"the attribute {name} must be one {kind.__name__}")
    value = np.zeros((), stored.dtype)
    found.read(value)
    return int(value) if kind is int else value.item().decode("ascii", "replace")


# ---- checking what a file may hold


def check_structure(file: h5py.File, size: int) -> None:
    """Refuse a file that holds anything but groups and plain arrays that fit its size.

    Args:
        file: Open for reading.
        size: Its length in bytes.

    Raises:
        ValueError: It holds something else. The message says what.
    """
    seen: set[Any] = set()
    claimed_bytes = 0

    def visit(group: h5g.GroupID, prefix: str, depth: int) -> None:
        nonlocal claimed_bytes
        if depth > MAX_DEPTH:
            raise ValueError(f"groups are nested deeper than {MAX_DEPTH}")
        for name in _link_names(group, MAX_OBJECTS - len(seen)):
            label = f"{prefix}{name.decode('utf-8', 'backslashreplace')}"
            if group.links.get_info(name).type != h5l.TYPE_HARD:
                raise ValueError(f"{label!r} is a link to elsewhere")
            found = h5o.open(group, name)
            address = h5o.get_info(found).addr
            if address in seen:
                raise ValueError(f"{label!r} is a second name of another object")
            seen.add(address)
            if isinstance(found, h5g.GroupID):
                visit(found, f"{label}/", depth + 1)
            elif isinstance(found, h5d.DatasetID):
                claimed_bytes += _check_dataset(found, repr(label), size)
                if claimed_bytes > MAX_RATIO * size + MAX_EXTRA_BYTES:
                    raise ValueError(
                        f"its arrays claim {claimed_bytes:,} bytes; a file of {size:,} may hold at "
                        f"most {MAX_RATIO} times its size"
                    )
            else:
                raise ValueError(f"{label!r} is neither a group nor an array")

    root = h5g.open(file.id, b"/")
    seen.add(h5o.get_info(root).addr)
    visit(root, "", 1)


def _link_names(group: h5g.GroupID, limit: int) -> list[bytes]:
    names: list[bytes] = []

    def collect(name: bytes) -> bool | None:
        names.append(name)
        return True if len(names) > limit or len(name) > MAX_NAME_BYTES else None

    group.links.iterate(collect)
    if len(names) > limit or len(names[-1:] or b"") > MAX_NAME_BYTES:
        raise ValueError(f"it holds more than {MAX_OBJECTS:,} objects, or a name too long")
    return names


def _check_dataset(dataset: h5d.DatasetID, label: str, size: int) -> int:
    """Check one dataset. Return the bytes that reading it takes."""
    kind, space = dataset.get_type(), dataset.get_space()
    properties = dataset.get_create_plist()
    if not isinstance(kind, h5t.TypeIntegerID | h5t.TypeFloatID) or kind.dtype not in DTYPES:
        raise ValueError(f"{label} is not of a type that mmrec stores")
    if space.get_simple_extent_type() != h5s.SIMPLE or space.get_simple_extent_ndims() > 4:
        raise ValueError(f"{label} is not an array of up to 4 axes")
    shape = space.get_simple_extent_dims()
    if shape != space.get_simple_extent_dims(True):
        raise ValueError(f"{label} can grow")
    layout, itemsize = properties.get_layout(), kind.get_size()
    if layout not in (h5d.CONTIGUOUS, h5d.CHUNKED) or properties.get_external_count():
        raise ValueError(f"{label} is not stored as plain bytes inside the file")
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if filters != (FILTERS if layout == h5d.CHUNKED else []):
        raise ValueError(f"{label} is compressed in another way than by shuffle and gzip")
    total = math.prod(shape) * itemsize
    if total > MAX_RATIO * size + MAX_EXTRA_BYTES:
        raise ValueError(f"{label} claims {total:,} bytes in a file of {size:,}")
    if layout == h5d.CHUNKED:
        _check_chunks(dataset, label, shape, properties.get_chunk(), itemsize)
    elif total and dataset.get_storage_size() != total:
        raise ValueError(f"{label} is not stored in full")
    return total


def _check_chunks(
    dataset: h5d.DatasetID,
    label: str,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    itemsize: int,
) -> None:
    """Require that every chunk is there, and that none is larger compressed than not."""
    chunk_bytes, sizes = math.prod(chunk) * itemsize, []
    if any(c > n for c, n in zip(chunk, shape, strict=True)):
        raise ValueError(f"{label} has chunks of {chunk}, larger than itself")
    dataset.chunk_iter(lambda info: sizes.append(info.size))
    if max(sizes, default=0) > chunk_bytes + 1024:
        raise ValueError(f"{label} has a chunk that is larger compressed than not")
    if len(sizes) != math.prod(cdiv(n, c) for n, c in zip(shape, chunk, strict=True)):
        raise ValueError(f"{label} is not stored in full")


def _read_dataset(stored: h5py.Dataset) -> np.ndarray:
    """Read an array whose structure was checked. Raise ValueError for a bad chunk.

    Chunks are decompressed here and not by HDF5. HDF5 decompresses a chunk to any size, and fills
    one that is too short with whatever lay in memory.
    """
    if stored.chunks is None:
        return np.asarray(stored[()])
    data = np.empty(stored.shape, stored.dtype)
    chunk, itemsize = stored.chunks, stored.dtype.itemsize
    chunk_bytes = math.prod(chunk) * itemsize
    starts = (range(0, n, c) for n, c in zip(stored.shape, chunk, strict=True))
    for start in itertools.product(*starts):
        filter_mask, raw = stored.id.read_direct_chunk(start)
        if not filter_mask & GZIP_SKIPPED:
            try:
                raw = zlib.decompressobj().decompress(raw, chunk_bytes)
            except zlib.error as error:
                raise ValueError(f"{stored.name[1:]!r} does not decompress: {error}") from None
        if len(raw) != chunk_bytes or filter_mask & ~GZIP_SKIPPED:
            raise ValueError(f"{stored.name[1:]!r} has a chunk that decompresses to another size")
        shuffled = np.frombuffer(raw, np.uint8).reshape(itemsize, -1)
        values = np.ascontiguousarray(shuffled.T).view(stored.dtype).reshape(chunk)
        target = data[tuple(slice(s, s + c) for s, c in zip(start, chunk, strict=True))]
        target[...] = values[tuple(slice(n) for n in target.shape)]
    return data
