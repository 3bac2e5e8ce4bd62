"""Text, JSON and Parquet, compressed or not, read as documents in bounded memory.

What a stream holds is told by its content, whether it is a file, standard input or a pipe.
"""

import codecs
import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mmrec.data.formats import (
    ARRAY_OF_OBJECTS,
    JSON_SUFFIXES,
    PARQUET_MAGIC,
    content_suffix,
    decompressed,
    find_foreign,
    first_records,
)
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
SURROGATE = re.compile("[\ud800-\udfff]")
BYTE_ORDER_MARK = "\ufeff"
JSON_SPACE = re.compile(r"[ \t\r\n]*")


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
        text_field: field or column of a record that holds the text; empty is ``default_field``.
        skip_bad: skip broken records, and files that are not text, instead of raising.
        max_bytes: stop after the document that reaches this many bytes of text; 0 reads everything.
        val_fraction: share of the text that is held out for validation, in (0, 0.5].
        val_file: source of the validation text; empty holds out a share of the source.
        piece_chars: characters of a document that are held in memory at once.
        chunk_bytes: bytes of a text file that are read at once.
        max_line_bytes: longest line, or item of an array, of JSON, in bytes.
        default_field: the field or column if ``text_field`` is empty.
        skipped_records: how many records and files have been skipped so far.
        skip_reason: what was wrong with the first of them.
        has_records: whether records have been read so far, so that ``text_field`` has an effect.

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
    default_field: str = "text"
    skipped_records: int = field(default=0, init=False)
    skip_reason: str = field(default="", init=False)
    has_records: bool = field(default=False, init=False)

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
        return self.text_field or self.default_field

    def reject(self, message: str) -> None:
        """Count a broken record if those are skipped.

        Raises:
            InputError: broken records are not skipped; its text is ``message``.
        """
        if not self.skip_bad:
            raise InputError(message)
        self.skipped_records += 1
        self.skip_reason = self.skip_reason or message

    def check_text_field(self, source: str) -> None:
        """Check that ``text_field`` had an effect on a source that has been read.

        Raises:
            InputError: the source holds no records.
        """
        if self.text_field and not self.has_records:
            raise InputError(
                f"--text-field names a field of records; {source} holds text without fields: leave "
                f"it out; got {self.text_field!r}"
            )

    def no_text(self, source: str) -> InputError:
        """The error of a source without documents, which says what was skipped."""
        if not self.skipped_records:
            return InputError(f"{source} is empty: expected text; got only white space or nothing")
        return InputError(
            f"{source} holds no text that can be read; records and files that were skipped: "
            f"{self.skipped_records:,}, the first because {self.skip_reason}"
        )


def read_file(path: Path, options: ReadOptions, *, name: str = "") -> Iterator[Document]:
    """Read the documents of a file; see ``read_stream``.

    Args:
        path: the file.
        options: how to read.
        name: what documents and messages call the file; empty is its path.

    Yields:
        The documents, long ones in pieces.

    Raises:
        InputError: the file cannot be read, or holds what it must not and nothing is skipped.
    """
    name = name or str(path)
    with open_file(path, name) as stream:
        yield from read_stream(stream, name, options)


def read_stream(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[Document]:
    """Read the documents of an open binary stream.

    Compression and format are told by the content: gzip, Zstandard and Parquet by their first
    bytes, JSON by its first record. A name that ends in ``.jsonl``, ``.ndjson``, ``.json`` or
    ``.parquet`` must hold such records.

    Args:
        stream: the stream; it is read to its end and not closed.
        name: what documents and messages call it.
        options: how to read.

    Yields:
        The documents, long ones in pieces.

    Raises:
        InputError: the stream cannot be read, or holds what it must not and nothing is skipped.
    """
    with _open_content(stream, name, options) as content:
        if content.records is None:
            yield from _read_text(content, options)
            return
        for record in content.records:
            yield from split_documents(record.text, record.name, options)


def read_lines(stream: BinaryIO, name: str, options: ReadOptions) -> list[str]:
    """Read short texts, such as prompts: one per line of a text, or one per record.

    They are read by the rules of documents, but nothing is split or left out except blank lines.

    Args:
        stream: the stream; it is read to its end and not closed.
        name: what messages call it.
        options: how to read.

    Returns:
        The texts in order.

    Raises:
        InputError: the stream cannot be read, or holds what it must not and nothing is skipped.
    """
    with _open_content(stream, name, options) as content:
        if content.records is not None:
            return [record.text for record in content.records]
        try:
            text = "".join(_decode_text(content, options.chunk_bytes)).lstrip(BYTE_ORDER_MARK)
        except _NotTextError as error:
            options.reject(str(error))
            return []
        return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def holds_text_records(path: Path) -> bool:
    """Whether a file begins with a JSON object, on a line or in an array, with a field ``text``.

    Raises:
        InputError: the file cannot be read.
    """
    name = str(path)
    with open_file(path, name) as stream, decompressed(stream, name) as opened:
        records = first_records(opened.head)
        return bool(records) and ReadOptions().field in records[0]


def split_documents(text: str, name: str, options: ReadOptions) -> Iterator[Document]:
    """Split a text into documents at ``<|endoftext|>``, and long documents into pieces."""
    splitter = DocumentSplitter(name, options.piece_chars)
    yield from splitter.feed(text)
    yield from splitter.finish()


@contextlib.contextmanager
def open_file(path: Path, name: str) -> Iterator[BinaryIO]:
    """Open a file for reading; an InputError says under which name it cannot be read."""
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from None


# ---- what a stream holds


class Record(NamedTuple):
    """The text of one record, which may hold several documents."""

    name: str
    """Name of its documents."""
    text: str


class _Content(NamedTuple):
    """A stream whose compression is undone."""

    name: str
    stream: BinaryIO
    records: Iterator[Record] | None
    """None if it is text."""


@contextlib.contextmanager
def _open_content(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[_Content]:
    """Find out what a stream holds. Damage, of its compression too, is an InputError."""
    with contextlib.ExitStack() as stack:
        head, plain, is_compressed = stack.enter_context(decompressed(stream, name))
        records: Iterator[Record] | None = None
        if foreign := find_foreign(head):
            options.reject(f"{name} must be text or records; it is {foreign}")
            records = iter(())
        elif head.startswith(PARQUET_MAGIC) or content_suffix(name) == ".parquet":
            file: Any = stream
            if is_compressed or not stream.seekable():  # its index lies at the end
                file = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(plain, file)
            file.seek(0)
            records = _parquet_records(file, name, options)
        elif _holds_json(head, name, options):
            read = _json_array_records if ARRAY_OF_OBJECTS.match(head) else _json_line_records
            records = read(plain, name, options)
        yield _Content(name, plain, records)


def _holds_json(head: bytes, name: str, options: ReadOptions) -> bool:
    """Whether a stream holds JSON records.

    The name decides if it is that of JSON, else the first record. Where a name such as ``log.txt``
    says that it is text, two records must have the field, or one if the user names a field.
    """
    suffix = content_suffix(name)
    if suffix in JSON_SUFFIXES:
        return True
    records = first_records(head)
    if not suffix or options.text_field:
        return bool(records) or (not suffix and bool(options.text_field))
    return len(records) == 2 and all(options.field in record for record in records)


# ---- text


class _NotTextError(Exception):
    """A text holds bytes that it must not."""


def _read_text(content: _Content, options: ReadOptions) -> Iterator[Document]:
    splitter = DocumentSplitter(content.name, options.piece_chars)
    try:
        for text in _decode_text(content, options.chunk_bytes):
            yield from splitter.feed(text)
        yield from splitter.finish()
    except _NotTextError as error:
        options.reject(str(error))
        yield from splitter.abandon()


def _decode_text(content: _Content, chunk_bytes: int) -> Iterator[str]:
    """Decode UTF-8 chunk by chunk. Raises _NotTextError at other bytes, and at NUL."""
    decoder, bytes_read = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        chunk = content.stream.read(chunk_bytes)
        chunk_start = bytes_read - len(decoder.getstate()[0])
        if (position := chunk.find(0)) >= 0:
            raise _NotTextError(
                f"{content.name} must be text; it has a NUL byte at offset "
                f"{bytes_read + position}: it is binary, or UTF-16, which iconv -f UTF-16 -t UTF-8 "
                "converts"
            )
        try:
            yield decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _NotTextError(
                f"{content.name} must be UTF-8 text; byte 0x{error.object[error.start]:02x} at "
                f"offset {chunk_start + error.start} is not: convert it first, for example with "
                "iconv"
            ) from None
        bytes_read += len(chunk)
        if not chunk:
            return


class DocumentSplitter:
    """Splits a text that comes in parts at ``<|endoftext|>``, and long documents into pieces.

    Every document of every source passes through it, so these rules hold everywhere: byte order
    marks at the start of a document are dropped, and a document that holds only white space is
    left out. Nothing else is changed.

    A piece ends before a single space or after a single line end. There, every tokenizer of mmrec
    makes the same tokens as of the undivided text. Where there is no such place, a piece ends
    anywhere.

    Args:
        name: the first document's name; the others add ``#1``, ``#2`` …
        piece_chars: characters of a piece; a document's last piece may have almost twice as many.
    """

    def __init__(self, name: str, piece_chars: int = PIECE_CHARS) -> None:
        self._name, self._piece_chars = name, piece_chars
        self._document_count = 0
        self._pending = ""
        self._is_inside = False
        """Whether the document of ``_pending`` has earlier pieces."""
        self._blank_pieces: list[Document] = []
        """Those earlier pieces while they hold only white space, which are not yielded yet."""

    def feed(self, text: str) -> Iterator[Document]:
        """Yield the pieces that are complete with this part of the text."""
        *complete, self._pending = (self._pending + text).split(SEPARATOR)
        for document in complete:
            yield from self._finish_document(document)
        self._pending = yield from self._cut_pieces(self._pending)

    def finish(self) -> Iterator[Document]:
        """Yield what is left at the end of the text."""
        pending, self._pending = self._pending, ""
        yield from self._finish_document(pending)

    def abandon(self) -> Iterator[Document]:
        """Drop what is pending; end the document of which pieces have been yielded."""
        self._pending = ""
        yield from self._finish_document("")

    def _cut_pieces(self, text: str) -> Generator[Document, None, str]:
        """Yield the pieces of a document but for the last; return what is left."""
        if not self._is_inside:
            text = text.lstrip(BYTE_ORDER_MARK)
        begin = 0
        while len(text) - begin >= 2 * self._piece_chars:
            cut = _find_safe_cut(text, begin, self._piece_chars)
            yield from self._piece(text[begin:cut], more=True)
            begin = cut
        return text[begin:]

    def _finish_document(self, text: str) -> Iterator[Document]:
        rest = yield from self._cut_pieces(text)
        yield from self._piece(rest, more=False)

    def _piece(self, text: str, *, more: bool) -> Iterator[Document]:
        name = f"{self._name}#{self._document_count}" if self._document_count else self._name
        has_text = self._is_inside and not self._blank_pieces
        self._is_inside = more
        self._blank_pieces.append(Document(name, text, more))
        if has_text or text.strip():
            yield from self._blank_pieces
            self._document_count += not more
        elif more:
            return
        self._blank_pieces.clear()


def _find_safe_cut(text: str, begin: int, size: int) -> int:
    """Last place in ``size`` characters before a single space or after a single line end."""
    base = begin + max(0, size - CUT_SEARCH_CHARS)
    places = list(SAFE_CUT.finditer(text[base : begin + size + 1]))
    return base + places[-1].start() + (places[-1][0] == "\n") if places else begin + size


# ---- records


def record_text(record: Any, location: str, options: ReadOptions) -> str | None:
    """Return the text of a record: a string without NUL and halves of surrogate pairs.

    Args:
        record: a JSON object; anything else is a broken record.
        location: what messages call the record.
        options: the field, and whether broken records are skipped.

    Returns:
        The text; None if the record is broken and is skipped.

    Raises:
        InputError: the record is broken and is not skipped.
    """
    options.has_records = True
    if not isinstance(record, dict):
        problem = f"must be a JSON object; it is {_json_kind(record)}"
    elif not isinstance(text := record.get(options.field), str):
        fields = ", ".join(map(str, list(record)[:8])) or "none"
        problem = f"must have a field {options.field!r} that holds text; "
        if options.field in record:
            problem += f"it holds {_json_kind(text)} (--skip-bad skips such records)"
        elif "messages" in record or {"prompt", "completion"} <= record.keys():
            problem += f"its fields are: {fields} (mmrec finetune RUN --chat takes conversations)"
        else:
            problem += f"its fields are: {fields} (--text-field names another)"
    else:
        problem = text_problem(text)
        if not problem:
            return text
    options.reject(f"{location} {problem}")
    return None


def _json_kind(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else kinds.get(type(value), "a number")


def text_problem(text: str) -> str:
    """Return why a string is no text, or an empty string."""
    if "\0" in text:
        return "must hold text; it has a NUL character"
    if not text.isascii() and SURROGATE.search(text):
        return "must hold text; half of a surrogate pair is none"
    return ""


def _json_line_records(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[Record]:
    number, limit, key = 0, options.max_line_bytes, f'"{options.field}"'.encode()
    while line := stream.readline(limit + 1):
        number += 1
        location = f"{name} line {number}"
        if len(line) > limit:
            raise InputError(f"{location} must be at most {limit:,} bytes of JSON; it is longer")
        if not line.strip():
            continue
        try:
            source = line.decode("utf-8-sig")
            record = json.loads(source)
        except UnicodeDecodeError:
            options.reject(f"{location} must be UTF-8")
        except (ValueError, RecursionError) as error:
            options.reject(f"{location} must be JSON, one object per line: {error}")
        else:
            if line.count(key) > 1 and _has_twice(source, options.field):
                options.reject(f"{location} must have one field {options.field!r}; it has several")
            elif (text := record_text(record, location, options)) is not None:
                yield Record(f"{name}:{number}", text)


def _has_twice(source: str, field: str) -> bool:
    """Whether a JSON object has a key more than once, of which ``json.loads`` keeps the last."""
    pairs = json.loads(source, object_pairs_hook=list)
    return [pair[0] for pair in pairs if isinstance(pair, tuple)].count(field) > 1


def _json_array_records(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[Record]:
    """Read an array of objects, one object at a time; one may be as long as a line."""
    decoder, reader = json.JSONDecoder(), io.TextIOWrapper(stream, "utf-8-sig", newline="")
    number, location = 0, name
    try:
        pending = reader.read(CHUNK_BYTES)
        end = pending.index("[")
        while pending[end] != "]":
            pending, number = pending[end + 1 :], number + 1
            location = f"{name} item {number}"
            while True:
                try:
                    value, end = decoder.raw_decode(pending, _skip_space(pending, 0))
                    end = _skip_space(pending, end)
                    if end < len(pending):
                        break
                    problem = "the array does not end"
                except (ValueError, RecursionError) as error:
                    problem = str(error)
                further = reader.read(max(CHUNK_BYTES, len(pending)))
                if not further or len(pending) > options.max_line_bytes:
                    options.reject(f"{location} must be JSON: {problem}")
                    return
                pending += further
            if pending[end] not in ",]":
                options.reject(f"{location} must be followed by ',' or ']'")
                return
            if (text := record_text(value, location, options)) is not None:
                yield Record(f"{name}:{number}", text)
        if (pending[end + 1 :] + reader.read(CHUNK_BYTES)).strip():
            options.reject(f"{name} must hold one array; more follows it")
    except UnicodeDecodeError:
        options.reject(f"{name} must be UTF-8; what follows item {number} is not")


def _skip_space(text: str, begin: int) -> int:
    match = JSON_SPACE.match(text, begin)
    return match.end() if match else begin


def _parquet_records(file: BinaryIO, name: str, options: ReadOptions) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{name} is Parquet, which needs a package: pip install 'mmrec[files]'"
        ) from None
    field, number = options.field, 0
    options.has_records = True
    try:
        with parquet.ParquetFile(file) as parquet_file:
            _check_column(parquet_file.schema_arrow, name, field)
            for batch in parquet_file.iter_batches(batch_size=256, columns=[field]):
                # as bytes, so that one that is not UTF-8 ends no more than its row
                for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    number += 1
                    location = f"{name} row {number}"
                    try:
                        text = None if value is None else value.decode("utf-8")
                    except UnicodeDecodeError:
                        options.reject(f"{location} must be UTF-8")
                        continue
                    if (text := record_text({field: text}, location, options)) is not None:
                        yield Record(f"{name}:{number}", text)
    except pyarrow.ArrowException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name} must be a whole Parquet file: {reason}") from None


def _check_column(schema: Any, name: str, field: str) -> None:
    """Raise InputError unless a Parquet schema has one column of that name, which holds text."""
    found = [column.type for column in schema if column.name == field]
    if not found:
        raise InputError(
            f"{name} must have a column {field!r} that holds text; its columns are: "
            f"{', '.join(schema.names[:8]) or 'none'} (--text-field names another)"
        )
    if len(found) > 1:
        raise InputError(f"{name} must have one column {field!r}; it has {len(found)}: rename one")
    is_dictionary = hasattr(found[0], "index_type")
    if str(found[0].value_type if is_dictionary else found[0]) not in (
        "string",
        "large_string",
        "string_view",
    ):
        raise InputError(
            f"{name} must have a column {field!r} that holds text; it holds {found[0]} "
            "(--text-field names another)"
        )
