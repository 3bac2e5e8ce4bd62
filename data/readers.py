"""Files of text, JSON lines and Parquet, compressed or not, to documents, in bounded memory."""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmrec.errors import InputError

SEPARATOR = "<|endoftext|>"  # cuts one text into documents
PIECE = 1 << 16  # characters of a document that are held, and given to one core, at once
LONGEST_LINE = 1 << 28  # bytes of a line of JSON, which has to be read whole
CHUNK = 1 << 20
LONE = re.compile(r"(?<=\S)[ \n](?=\S)")
SEARCHED = 1 << 12  # characters in which a place to cut is looked for
RECORDS = (".jsonl", ".ndjson", ".parquet")
PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Document:
    """One text, or a piece of a long one, and where it came from."""

    name: str
    text: str
    more: bool = False
    """Whether the next one goes on with the same text."""


@dataclass
class Reading:
    """How sources are read and split; ``bad`` counts what was passed over."""

    text_field: str = ""
    """Field or column that holds the text; empty is ``text``."""
    skip_bad: bool = False
    """Pass over broken records and undecodable files instead of ending."""
    max_bytes: int = 0
    """Stop after the document that reaches so many bytes of text; 0 reads everything."""
    val_share: float = 0.1
    """Share of the text that is validation text."""
    val_file: str = ""
    """Source that is the whole of the validation text; empty takes it from the source."""
    bad: int = 0

    @property
    def field(self) -> str:
        """Name of the field that holds the text."""
        return self.text_field or "text"

    def refuse(self, message: str) -> None:
        """Count a broken record, or raise InputError."""
        if not self.skip_bad:
            raise InputError(message)
        self.bad += 1


def stem_suffix(path: Path) -> str:
    """The suffix that says what a file holds, that of its compression taken off."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def read_file(path: Path, how: Reading, *, records: bool = False) -> Iterator[Document]:
    """Documents of a file; ``records`` reads JSON lines whatever its name is.

    Raises InputError if it cannot be read, or holds what it must not and ``how`` skips nothing.
    """
    kind = stem_suffix(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path, how)
            return
        with _open(path) as stream:
            if records or kind in RECORDS:
                yield from _json_lines(path, stream, how)
            else:
                yield from _text(path, stream, how)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} must be a whole gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _open(path: Path) -> BinaryIO:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    return io.BufferedReader(_Zstandard(path), CHUNK) if name.endswith(".zst") else path.open("rb")


class _Zstandard(io.RawIOBase):
    """Bytes of a Zstandard file, frame after frame; one that is cut off is an InputError."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise InputError(
                f"{path} is Zstandard, which needs a package: pip install 'mmrec[files]'"
            ) from None
        self._path, self._error = path, zstandard.ZstdError
        self._start = zstandard.ZstdDecompressor().decompressobj
        self._file, self._frame, self._left = path.open("rb"), self._start(), b""
        self._within = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._left:
                if self._frame.eof:
                    data, self._frame = self._frame.unused_data, self._start()
                    self._within = False
                else:
                    data = b""
                data = data or self._file.read(CHUNK >> 3)
                if not data:
                    if self._within:
                        raise self._error("it is cut off")
                    return 0
                self._left, self._within = self._frame.decompress(data), True
        except self._error as error:
            raise InputError(f"{self._path} must be a whole Zstandard file: {error}") from None
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _text(path: Path, stream: BinaryIO, how: Reading) -> Iterator[Document]:
    texts = Cutter(str(path))
    try:
        for part in _decoded(path, stream):
            yield from texts.feed(part)
        yield from texts.end()
    except UnicodeDecodeError as error:
        how.refuse(
            f"{path} must be UTF-8 text; byte 0x{error.object[error.start]:02x} at offset "
            f"{error.reason} is not: convert it first, for example with iconv"
        )
        yield from texts.abandon()


def _decoded(path: Path, stream: BinaryIO) -> Iterator[str]:
    """UTF-8 text part by part, a byte order mark left out. An error's reason is its offset."""
    decoder, fed = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        chunk = stream.read(CHUNK)
        before = fed - len(decoder.getstate()[0])
        try:
            part = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            error.reason = str(before + error.start)
            raise
        yield part if fed else part.removeprefix("\ufeff")
        fed += len(chunk)
        if not chunk:
            return


class Cutter:
    """Cuts a text that comes in parts at ``<|endoftext|>``, and long documents into pieces.

    A piece ends before a lone space or after a lone end of line, where every tokenizer of ours
    makes the tokens that it would make of the whole; where there is none, anywhere. Empty documents
    are left out.
    """

    def __init__(self, name: str) -> None:
        self._name, self._count, self._held, self._going = name, 0, "", False

    def feed(self, part: str) -> Iterator[Document]:
        """Pieces that are complete with this part."""
        self._held += part
        *whole, self._held = self._held.split(SEPARATOR)
        for text in whole:
            yield from self._finish(text)
        while len(self._held) >= 2 * PIECE:
            at = _safe_cut(self._held, PIECE)
            yield self._document(self._held[:at], more=True)
            self._held, self._going = self._held[at:], True

    def end(self) -> Iterator[Document]:
        """What is left of the text."""
        held, self._held = self._held, ""
        yield from self._finish(held)

    def abandon(self) -> Iterator[Document]:
        """Drop what is held; end the document of which pieces are out."""
        self._held = ""
        if self._going:
            yield from self._finish("")

    def _finish(self, text: str) -> Iterator[Document]:
        while len(text) >= 2 * PIECE:
            at = _safe_cut(text, PIECE)
            yield self._document(text[:at], more=True)
            text, self._going = text[at:], True
        if self._going or text.strip():
            yield self._document(text, more=False)
            self._count, self._going = self._count + 1, False

    def _document(self, text: str, *, more: bool) -> Document:
        return Document(f"{self._name}#{self._count}" if self._count else self._name, text, more)


def _safe_cut(text: str, size: int) -> int:
    """Last place in text[:size] before a lone space, or after a lone end of line."""
    base = max(0, size - SEARCHED)
    found = list(LONE.finditer(text[base : size + 1]))
    return base + found[-1].start() + (found[-1][0] == "\n") if found else size


def _json_lines(path: Path, stream: BinaryIO, how: Reading) -> Iterator[Document]:
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        where = f"{path} line {number}"
        if len(line) > LONGEST_LINE:
            raise InputError(
                f"{where} must be at most {LONGEST_LINE:,} bytes of JSON; it is longer"
            )
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            how.refuse(f"{where} must be UTF-8")
        except (ValueError, RecursionError) as error:
            how.refuse(f"{where} must be JSON: {error}")
        else:
            yield from from_record(where, record, how, f"{path}:{number}")


def from_record(where: str, record: Any, how: Reading, name: str) -> Iterator[Document]:
    """Documents of one record: the text of its field, cut at ``<|endoftext|>``."""
    if not isinstance(record, dict):
        how.refuse(f"{where} must be a JSON object; it is a {type(record).__name__}")
        return
    text = record.get(how.field)
    if not isinstance(text, str):
        fields = ", ".join(map(str, list(record)[:8])) or "none"
        how.refuse(
            f"{where} must have a field {how.field!r} that holds text; its fields are: "
            f"{fields} (--text-field names another)"
        )
        return
    if any("\ud800" <= c <= "\udfff" for c in text):
        how.refuse(f"{where} must hold text; half of a surrogate pair is none")
        return
    cutter = Cutter(name)
    yield from cutter.feed(text)
    yield from cutter.end()


def _parquet(path: Path, how: Reading) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path} is Parquet, which needs a package: pip install 'mmrec[files]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            kind = file.schema_arrow.field(how.field).type if how.field in fields else None
            if kind is None or not (
                pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            ):
                raise InputError(
                    f"{path} must have a column {how.field!r} that holds text; its columns are: "
                    f"{', '.join(fields[:8])} (--text-field names another)"
                )
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[how.field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text:
                        record = {how.field: text}
                        where = f"{path} row {number}"
                        yield from from_record(where, record, how, f"{path}:{number}")
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} must be a whole Parquet file: {reason}") from None
