"""What a stream of bytes holds, told by its content: compression, JSON, Parquet, or no text."""

import contextlib
import gzip
import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mmrec.errors import InputError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".zst")

HEAD_BYTES = 1 << 20
"""Bytes at the start of a stream that tell what it holds."""
BUFFER_BYTES = 1 << 16
PARQUET_MAGIC = b"PAR1"
SKIPPABLE_FRAMES = tuple(bytes([0x50 + i]) for i in range(16))
"""First bytes of a Zstandard frame that holds no data."""
ARRAY_OF_OBJECTS = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")
FIRST_OBJECT = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*)?(\{\s*")')
LINE_END = re.compile(r"[ \t\r]*(\n\s*|$)")
ITEM_END = re.compile(r"\s*([,\]]\s*|$)")
_EXTRACT = "extract its text first"
FOREIGN = [
    (257, rb"ustar", "a tar archive: extract it first, with tar -xf"),
    (0, rb"PK\x03\x04", f"a zip archive or an office document: {_EXTRACT}"),
    (0, rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", f"an office document: {_EXTRACT}"),
    (0, rb"%PDF-", f"a PDF document: {_EXTRACT}, for example with pdftotext"),
    (0, rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|II\*\0|MM\0\*", "a picture"),
    (0, rb"RIFF.{4}(WAVE|AVI )|OggS\0|fLaC\0|ID3[\2-\4]\0|\0\0..ftyp", "a sound or film"),
    (0, rb"\xfd7zXZ\0", "compressed with xz: decompress it first, with xz -d"),
    (0, rb"BZh[1-9]1AY&SY", "compressed with bzip2: decompress it first, with bzip2 -d"),
    (0, rb"\x04\x22\x4d\x18", "compressed with lz4: decompress it first, with lz4 -d"),
    (0, rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "an archive: extract it first"),
    (0, rb"\x89HDF\r\n\x1a\n", "HDF5: the name of a prepared corpus must end in .h5"),
    (0, rb"SQLite format 3\0", "an SQLite database: export its text as JSON lines"),
    (0, rb"ARROW1\0\0|ORC.{0,64}\0|Obj\x01|\x93NUMPY", "a table or array: write it as Parquet"),
    (0, rb"\x7fELF|MZ\x90\0", "a program"),
    (0, rb"\{\\rtf1", f"an RTF document: {_EXTRACT}"),
    (0, rb"\xff\xfe|\xfe\xff", "UTF-16: convert it first, with iconv -f UTF-16 -t UTF-8"),
]
"""Offset, pattern and description of what holds no text that can be read."""


def content_suffix(name: str | Path) -> str:
    """Return the lower-case suffix that tells a file's content, without that of compression."""
    file_name = Path(name).name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        file_name = file_name.removesuffix(suffix)
    return Path(file_name).suffix


def import_zstandard() -> Any:
    """Return the Zstandard module: Python's own from 3.14 on, else ``backports.zstd``.

    Raises:
        ImportError: the package is not installed.
    """
    own = sys.version_info >= (3, 14)
    return importlib.import_module("compression.zstd" if own else "backports.zstd")


class Opened(NamedTuple):
    """A stream whose compression is undone."""

    head: bytes
    """Its first megabyte."""
    stream: BinaryIO
    """The stream from its start."""
    is_compressed: bool


@contextlib.contextmanager
def decompressed(stream: BinaryIO, name: str) -> Iterator[Opened]:
    """Undo the compression of a stream, whatever its name says.

    Args:
        stream: the stream; it is not closed.
        name: what messages call it.

    Raises:
        InputError: it cannot be read, here or in the block, or its compression is damaged.
    """
    compressions: dict[str, tuple[type[Exception], ...]] = {}
    try:
        head, plain = _peek(stream)
        while compression := _find_compression(head):
            plain, compressions[compression] = _decompress(compression, plain, name)
            head, plain = _peek(plain)
        yield Opened(head, plain, bool(compressions))
    except tuple({error for errors in compressions.values() for error in errors}) as error:
        kind = " in ".join(reversed(compressions))
        raise InputError(f"{name} must be a whole {kind} file: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from None


def _peek(stream: BinaryIO) -> tuple[bytes, BinaryIO]:
    """The first bytes of a stream, and the stream from its start."""
    head = stream.read(HEAD_BYTES)
    return head, io.BufferedReader(_Rejoined(head, stream), BUFFER_BYTES)


class _Rejoined(io.RawIOBase):
    """A stream with the bytes before it that have been read already."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _find_compression(head: bytes) -> str:
    """``gzip``, ``Zstandard`` or nothing, by the first bytes."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    is_skippable = head[1:4] == b"\x2a\x4d\x18" and head[:1] in SKIPPABLE_FRAMES
    return "Zstandard" if head.startswith(b"\x28\xb5\x2f\xfd") or is_skippable else ""


def _decompress(
    compression: str, stream: BinaryIO, name: str
) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """A stream of the decompressed bytes, and the errors that damage to it raises."""
    if compression == "gzip":
        unzipped: Any = gzip.GzipFile(fileobj=stream)
        return unzipped, (EOFError, gzip.BadGzipFile, zlib.error)
    try:
        zstandard = import_zstandard()
    except ImportError:
        raise InputError(
            f"{name} is Zstandard, which needs a package: pip install 'mmrec[files]'"
        ) from None
    return zstandard.open(stream, "rb"), (EOFError, zstandard.ZstdError)


def find_foreign(head: bytes) -> str:
    """What a file is that holds no text of its own, and what to do; empty if it may be text."""
    for offset, magic, description in FOREIGN:
        if re.compile(magic, re.DOTALL).match(head, offset):
            return description
    return ""


def first_records(head: bytes) -> list[Any]:
    """Up to two JSON objects, or their keys, that begin a stream of lines or an array."""
    start = FIRST_OBJECT.match(head)
    if not start:
        return []
    text, end = head[start.start(1) :].decode("utf-8", "replace"), 0
    separator = ITEM_END if b"[" in start[0] else LINE_END
    records: list[Any] = []
    while len(records) < 2 and text.startswith("{", end):
        try:
            record, end = json.JSONDecoder().raw_decode(text, end)
        except (ValueError, RecursionError):
            if len(head) == HEAD_BYTES:  # the record may be longer than the head
                records.append(re.findall(r'"((?:[^"\\]|\\.)*)"\s*:', text[end:]))
            break
        following = separator.match(text, end)
        if not following:
            return []
        records.append(record)
        end = following.end()
    return records
