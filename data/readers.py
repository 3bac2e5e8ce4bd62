"""Text, JSON-lines and Parquet files, compressed or not, read as documents in bounded memory."""

import codecs
import contextlib
import gzip
import importlib
import json
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmrec.errors import InputError

SEPARATOR = "<|endoftext|>"
"""Separates the documents of one text."""
PIECE_CHARS = 1 << 16
"""Characters of a document that are held in memory, and given to one core, at once."""
MAX_LINE_BYTES = 1 << 28
"""Longest line of JSON, which has to be read as one."""
CHUNK_BYTES = 1 << 20
"""Bytes of a text file that are read at once."""
CUT_SEARCH_CHARS = 1 << 12
"""Characters at the end of a piece in which a place to cut is searched for."""
MAX_BYTES_LIMIT = 10**15
SAFE_CUT = re.compile(r"(?<=\S)[ \n](?=\S)")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".zst")


@dataclass(frozen=True)
class Document:
    """One text, or a piece of a long one.

    Attributes:
        name: where the text came from.
        text: the text of the piece.
        more: whether the next piece continues the same document.
    """

    name: str
    text: str
    more: bool = False


@dataclass
class ReadOptions:
    """How sources are read and split.

    Attributes:
        text_field: field or column of a record that holds the text; empty is ``text``.
        skip_bad: skip broken records and files that are not UTF-8 instead of raising.
        max_bytes: stop after the document that reaches this many bytes of text; 0 reads everything.
        val_fraction: share of the text that is held out for validation, in (0, 0.5].
        val_file: source of the validation text; empty holds out a share of the source.
        piece_chars: characters of a document that are held in memory at once.
        chunk_bytes: bytes of a text file that are read at once.
        max_line_bytes: longest line of a JSON-lines file, in bytes.
        skipped_records: how many records and files have been skipped so far.

    Raises:
        InputError: a limit or a share is out of its range.
    """

    text_field: str = ""
    skip_bad: bool = False
    max_bytes: int = 0
    val_fraction: float = 0.1
    val_file: str = ""
    piece_chars: int = PIECE_CHARS
    chunk_bytes: int = CHUNK_BYTES
    max_line_bytes: int = MAX_LINE_BYTES
    skipped_records: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.max_bytes <= MAX_BYTES_LIMIT:
            raise InputError(f"max_bytes must lie in 0 to 10^15; got {self.max_bytes}")
        if not 0 < self.val_fraction <= 0.5:  # false for NaN, too
            raise InputError(f"val_fraction must lie in (0, 0.5]; got {self.val_fraction}")
        for name in ("piece_chars", "chunk_bytes", "max_line_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")

    @property
    def field(self) -> str:
        """Name of the field that holds the text."""
        return self.text_field or "text"

    def reject(self, message: str) -> None:
        """Count a broken record if those are skipped.

        Raises:
            InputError: broken records are not skipped; its text is ``message``.
        """
        if not self.skip_bad:
            raise InputError(message)
        self.skipped_records += 1


def content_suffix(path: Path) -> str:
    """Return the lower-case suffix that tells a file's content, without that of compression."""
    name = path.name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def read_file(
    path: Path, options: ReadOptions, *, name: str = "", json_lines: bool = False
) -> Iterator[Document]:
    """Read the documents of a file; its name tells the format and the compression.

    Args:
        path: the file.
        options: how to read.
        name: what documents and messages call the file; empty is its path.
        json_lines: read JSON lines whatever the file is called.

    Yields:
        The documents, long ones in pieces.

    Raises:
        InputError: the file cannot be read, or holds what it must not and nothing is skipped.
    """
    name = name or str(path)
    suffix = content_suffix(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, name, options)
            return
        with _open_file(path, name) as stream:
            if json_lines or suffix in RECORD_SUFFIXES:
                yield from _read_json_lines(name, stream, options)
            else:
                yield from _read_text(name, stream, options)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from None


def read_stream(
    stream: BinaryIO, name: str, options: ReadOptions, *, json_lines: bool = False
) -> Iterator[Document]:
    """Read the documents of an open binary stream of text, or of JSON lines.

    Args:
        stream: the stream; it is read to its end and not closed.
        name: what documents and messages call it.
        options: how to read.
        json_lines: whether it holds JSON lines.

    Yields:
        The documents, long ones in pieces.

    Raises:
        InputError: the stream cannot be read, or holds what it must not and nothing is skipped.
    """
    read = _read_json_lines if json_lines else _read_text
    try:
        yield from read(name, stream, options)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from None


def import_zstandard() -> Any:
    """Return the Zstandard module: Python's own from 3.14 on, else ``backports.zstd``.

    Raises:
        ImportError: the package is not installed.
    """
    own = sys.version_info >= (3, 14)
    return importlib.import_module("compression.zstd" if own else "backports.zstd")


@contextlib.contextmanager
def _open_file(path: Path, name: str) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed; damaged compression is an InputError."""
    opener: Any = open
    kind = ""
    errors: tuple[type[Exception], ...] = ()
    file_name = path.name.lower()
    if file_name.endswith(".gz"):
        opener, kind, errors = gzip.open, "gzip", (EOFError, gzip.BadGzipFile, zlib.error)
    elif file_name.endswith(".zst"):
        try:
            zstandard = import_zstandard()
        except ImportError:
            raise InputError(
                f"{name} is Zstandard, which needs a package: pip install 'mmrec[files]'"
            ) from None
        opener, kind, errors = zstandard.open, "Zstandard", (EOFError, zstandard.ZstdError)
    with opener(path, "rb") as stream:
        try:
            yield stream
        except errors as error:
            raise InputError(f"{name} must be a whole {kind} file: {error}") from None


def _read_text(name: str, stream: BinaryIO, options: ReadOptions) -> Iterator[Document]:
    splitter = DocumentSplitter(name, options.piece_chars)
    try:
        for text in _decode_utf8(stream, options.chunk_bytes):
            yield from splitter.feed(text)
        yield from splitter.finish()
    except UnicodeDecodeError as error:
        options.reject(
            f"{name} must be UTF-8 text; byte 0x{error.object[error.start]:02x} at offset "
            f"{error.reason} is not: convert it first, for example with iconv"
        )
        yield from splitter.abandon()


def _decode_utf8(stream: BinaryIO, chunk_bytes: int) -> Iterator[str]:
    """Decode UTF-8 chunk by chunk, without a byte order mark at the start.

    The ``reason`` of a UnicodeDecodeError is the offset of the byte in the stream.
    """
    decoder, bytes_read = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        chunk = stream.read(chunk_bytes)
        chunk_start = bytes_read - len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            error.reason = str(chunk_start + error.start)
            raise
        yield text if bytes_read else text.removeprefix("\ufeff")
        bytes_read += len(chunk)
        if not chunk:
            return


class DocumentSplitter:
    """Splits a text that comes in parts at ``<|endoftext|>``, and long documents into pieces.

    A piece ends before a single space or after a single line end. There, every tokenizer of mmrec
    makes the same tokens as of the undivided text. Where there is no such place, a piece ends
    anywhere. Documents that hold only white space are left out.

    Args:
        name: the first document's name; the others add ``#1``, ``#2`` …
        piece_chars: characters of a piece; a document's last piece may have almost twice as many.
    """

    def __init__(self, name: str, piece_chars: int = PIECE_CHARS) -> None:
        self._name, self._piece_chars = name, piece_chars
        self._document_count = 0
        self._pending = ""
        self._inside_document = False

    def feed(self, text: str) -> Iterator[Document]:
        """Yield the pieces that are complete with this part of the text."""
        self._pending += text
        *complete, self._pending = self._pending.split(SEPARATOR)
        for document in complete:
            yield from self._finish_document(document)
        while len(self._pending) >= 2 * self._piece_chars:
            cut = _find_safe_cut(self._pending, self._piece_chars)
            yield self._document(self._pending[:cut], more=True)
            self._pending, self._inside_document = self._pending[cut:], True

    def finish(self) -> Iterator[Document]:
        """Yield what is left at the end of the text."""
        pending, self._pending = self._pending, ""
        yield from self._finish_document(pending)

    def abandon(self) -> Iterator[Document]:
        """Drop what is pending; end the document of which pieces have been yielded."""
        self._pending = ""
        if self._inside_document:
            yield from self._finish_document("")

    def _finish_document(self, text: str) -> Iterator[Document]:
        while len(text) >= 2 * self._piece_chars:
            cut = _find_safe_cut(text, self._piece_chars)
            yield self._document(text[:cut], more=True)
            text, self._inside_document = text[cut:], True
        if self._inside_document or text.strip():
            yield self._document(text, more=False)
            self._document_count, self._inside_document = self._document_count + 1, False

    def _document(self, text: str, *, more: bool) -> Document:
        name = f"{self._name}#{self._document_count}" if self._document_count else self._name
        return Document(name, text, more)


def _find_safe_cut(text: str, size: int) -> int:
    """Last place in ``text[:size]`` before a single space or after a single line end."""
    base = max(0, size - CUT_SEARCH_CHARS)
    places = list(SAFE_CUT.finditer(text[base : size + 1]))
    return base + places[-1].start() + (places[-1][0] == "\n") if places else size


def _read_json_lines(name: str, stream: BinaryIO, options: ReadOptions) -> Iterator[Document]:
    number, limit = 0, options.max_line_bytes
    while line := stream.readline(limit + 1):
        number += 1
        location = f"{name} line {number}"
        if len(line) > limit:
            raise InputError(f"{location} must be at most {limit:,} bytes of JSON; it is longer")
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            options.reject(f"{location} must be UTF-8")
        except (ValueError, RecursionError) as error:
            options.reject(f"{location} must be JSON: {error}")
        else:
            yield from documents_from_record(record, f"{name}:{number}", location, options)


def documents_from_record(
    record: Any, name: str, location: str, options: ReadOptions
) -> Iterator[Document]:
    """Read the documents of one record: the text of its field, split at ``<|endoftext|>``.

    Args:
        record: a JSON object; anything else is a broken record.
        name: name of the documents.
        location: what messages call the record.
        options: the field, and whether broken records are skipped.

    Yields:
        The documents, long ones in pieces.

    Raises:
        InputError: the record is broken and is not skipped.
    """
    if not isinstance(record, dict):
        options.reject(f"{location} must be a JSON object; it is a {type(record).__name__}")
        return
    text = record.get(options.field)
    if not isinstance(text, str):
        fields = ", ".join(map(str, list(record)[:8])) or "none"
        options.reject(
            f"{location} must have a field {options.field!r} that holds text; its fields are: "
            f"{fields} (--text-field names another)"
        )
        return
    if any("\ud800" <= c <= "\udfff" for c in text):
        options.reject(f"{location} must hold text; half of a surrogate pair is none")
        return
    splitter = DocumentSplitter(name, options.piece_chars)
    yield from splitter.feed(text)
    yield from splitter.finish()


def _read_parquet(path: Path, name: str, options: ReadOptions) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{name} is Parquet, which needs a package: pip install 'mmrec[files]'"
        ) from None
    field = options.field
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            column_type = file.schema_arrow.field(field).type if field in columns else None
            if column_type is None or not (
                pyarrow.types.is_string(column_type) or pyarrow.types.is_large_string(column_type)
            ):
                raise InputError(
                    f"{name} must have a column {field!r} that holds text; its columns are: "
                    f"{', '.join(columns[:8])} (--text-field names another)"
                )
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text:
                        yield from documents_from_record(
                            {field: text}, f"{name}:{number}", f"{name} row {number}", options
                        )
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name} must be a whole Parquet file: {reason}") from None
