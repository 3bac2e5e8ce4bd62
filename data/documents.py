"""The documents of a text that has been read, in one file from which every later stage reads them.

A text is read from its source once. Its documents are hashed and compared on the way, and written
here as plain UTF-8. Those of a large text are kept, so the next preparation of the same files
neither reads nor hashes them again, whatever its vocabulary.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrec.checkpoint.hdf5 import (
    atomic_h5_file,
    open_h5_file,
    read_array,
    read_json,
    write_array,
    write_json,
)
from mmrec.data.corpus import cache_folder
from mmrec.data.dedup import BANDS
from mmrec.data.readers import Document, ReadOptions
from mmrec.data.sources import Source, file_state, file_states, read_documents
from mmrec.data.split import SourceScan, scan_documents
from mmrec.errors import InputError, StorageError
from mmrec.runtime.atomic import remove_stale_temporaries, temporary_path
from mmrec.runtime.progress import progress_bar

KIND, SCHEMA = "documents", 1
KEEP_FROM_BYTES = 1 << 24
"""Smaller texts are not kept, since they are read again in a moment."""
KEEP_BYTES = 1 << 32
"""All texts that are kept take at most so many bytes. The ones used last stay."""
SETTLED_NANOSECONDS = 2 * 10**9
"""A file that changed less than so long ago could change again and show the same time."""
BUFFER_BYTES = 1 << 20
NAME = re.compile("[0-9a-f]{32}")
"""Names of kept texts. Other files in their folder are not ours."""
SCAN_ARRAYS = {"keys": np.uint64, "sizes": np.int64, "lengths": np.int64, "signatures": np.uint64}


Inspect = Callable[[Iterator[Document]], Iterator[Document]]
"""Passes documents on, and looks at them."""


@dataclass
class StoredDocuments:
    """Documents in a file.

    Attributes:
        path: the file: the pieces of all documents as UTF-8, one behind the other.
        piece_bytes: bytes of each piece.
        ends_document: 1 for the last piece of a document, else 0.
        scan: hashes, sizes and signatures of the documents.
        details: what else is known of the reading, as JSON.
    """

    path: Path
    piece_bytes: "array[int]"
    ends_document: "array[int]"
    scan: SourceScan
    details: dict[str, Any]

    def __enter__(self) -> "StoredDocuments":
        self._file = self.path.open("rb", buffering=BUFFER_BYTES)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Document]:
        """Read the documents in order, without names, long ones in pieces; once at a time."""
        self._file.seek(0)
        for size, ends in zip(self.piece_bytes, self.ends_document, strict=True):
            yield Document("", self._file.read(size).decode(), not ends)

    @functools.cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Byte at which each piece begins (pieces + 1,), and first piece of each document."""
        begins = np.concatenate([[0], np.cumsum(np.array(self.piece_bytes, np.int64))])
        last_pieces = np.flatnonzero(np.array(self.ends_document, np.uint8))
        return begins, np.concatenate([[0], last_pieces + 1])

    def read(self, document: int, begin: int, end: int) -> Iterator[Document]:
        """Read the characters of a document from ``begin`` to ``end``, in pieces if it is long."""
        byte, first_piece = self._places
        for piece in range(first_piece[document], first_piece[document + 1]):
            if end <= 0:
                return
            self._file.seek(int(byte[piece]))
            text = self._file.read(self.piece_bytes[piece]).decode()
            if begin < len(text):
                is_last = end <= len(text) or piece + 1 == first_piece[document + 1]
                yield Document("", text[begin:end], not is_last)
            begin, end = max(0, begin - len(text)), end - len(text)

    def keep(self, path: Path) -> None:
        """Move the text to ``path``, and write beside it what ``open_documents`` needs.

        Raises:
            StorageError: a file cannot be written.
        """
        try:
            self.path = self.path.replace(path)
        except OSError as error:
            raise StorageError(f"could not write {path}: {error.strerror}") from None
        with atomic_h5_file(path.with_suffix(".h5"), KIND, SCHEMA) as file:
            write_array(file, "piece_bytes", np.array(self.piece_bytes, np.uint32))
            write_array(file, "ends_document", np.array(self.ends_document, np.uint8))
            for name in SCAN_ARRAYS:  # HDF5 files of mmrec hold no uint64
                write_array(file, name, getattr(self.scan, name).view(np.int64).ravel())
            excerpts = {name: getattr(self.scan, name) for name in ("longest", "sampled")}
            scan = {"fingerprint": self.scan.fingerprint, **excerpts}
            write_json(file, "info", {"scan": scan, "details": self.details})


@contextlib.contextmanager
def read_once(
    sources: Sequence[tuple[Source, ReadOptions]], folder: Path, inspect: Inspect | None = None
) -> Iterator[StoredDocuments]:
    """Read the documents of sources, or find them if the same files were read before.

    Args:
        sources: the sources in order, none of them a mixture, and how each is read.
        folder: where the documents are written if they are not kept; they are removed in the end.
        inspect: looks at the documents while they are read, so they are read in any case.

    Yields:
        The documents. Their ``details`` are ``ends``, the number of documents up to the end of each
        source, and ``counts``, what was counted in the options of each.

    Raises:
        InputError: a source cannot be read or changes meanwhile, or there is no room for the text.
        StorageError: the text cannot be written.
    """
    states = file_states(source for source, _ in sources)
    size = _expected_bytes(states, sources)
    kept = _kept_path(states, sources, size)
    if kept and not inspect and (stored := open_documents(kept)):
        for (_, options), counts in zip(sources, stored.details["counts"], strict=True):
            options.skipped_records, options.skip_reason, options.has_records = counts
        with stored:
            yield stored
        return
    place = kept.parent if kept else folder
    place.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(place)
    check_room(place, size, "a copy of the text")
    path = temporary_path(place / secrets.token_hex(4))
    try:
        stored = _store(sources, path, inspect or iter, size)
        _check_unchanged(states)
        if kept:
            stored.keep(kept)
        with stored:
            yield stored
    finally:
        path.unlink(missing_ok=True)
        if kept:
            remove_unused_documents(place)


def _expected_bytes(states: list[list[Any]], sources: Sequence[tuple[Source, ReadOptions]]) -> int:
    """About how much text files hold of which the states are known."""
    sizes = [sum(size for _, size, _, _ in files) for _, files in states]
    limits = [options.max_bytes for _, options in sources]
    return sum(min(n, limit or n) for n, limit in zip(sizes, limits, strict=False))


def _check_unchanged(states: list[list[Any]]) -> None:
    """Raise InputError if a file is not as it was when its state was taken."""
    for path, *before in (file for _, files in states for file in files):
        try:
            unchanged = file_state(Path(path)) == before
        except OSError:
            unchanged = False
        if not unchanged:
            raise InputError(
                f"{path} changed while it was read: prepare it again when nothing writes to it"
            )


def _kept_path(
    states: list[list[Any]], sources: Sequence[tuple[Source, ReadOptions]], size: int
) -> Path | None:
    """Where the documents of files are kept, or None if they are not."""
    changes = [change for _, files in states for _, _, change, _ in files]
    if size < KEEP_FROM_BYTES or max(changes) > time.time_ns() - SETTLED_NANOSECONDS:
        return None
    settings = [
        [o.field, o.skip_bad, o.max_bytes, o.piece_chars, o.max_line_bytes] for _, o in sources
    ]
    key = hashlib.sha256(json.dumps([SCHEMA, states, settings]).encode()).hexdigest()
    try:
        folder = cache_folder().with_name("texts")
        folder.mkdir(parents=True, exist_ok=True)
        has_room = shutil.disk_usage(folder).free > size
    except (InputError, OSError):
        return None
    return folder / f"{key[:32]}.txt" if has_room and os.access(folder, os.W_OK) else None


def check_room(folder: Path, size: int, what: str) -> None:
    """Check that a disk has room for a file.

    Args:
        folder: where the file is to be.
        size: bytes that it will take, about.
        what: what messages call it.

    Raises:
        InputError: there is less room.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"{folder} must have room for {what}, about {size / 1e6:,.0f} MB; it has "
            f"{free / 1e6:,.0f} MB: free some, or name a corpus file on another disk with --out"
        )


def _store(
    sources: Sequence[tuple[Source, ReadOptions]], path: Path, inspect: Inspect, size: int
) -> StoredDocuments:
    """Read documents, hash and compare them, and write them into a file.

    Args:
        sources, inspect: as for ``read_once``.
        path: the file.
        size: bytes of text to expect; 0 if that is not known.
    """
    piece_bytes, ends_document = array("I"), array("B")
    ends: list[int] = []
    counts: list[list[Any]] = []

    def documents() -> Iterator[Document]:
        for source, options in sources:
            yield from read_documents(source, options)
            ends.append(sum(ends_document))
            counts.append([options.skipped_records, options.skip_reason, options.has_records])

    with progress_bar(size or None, "reading") as bar, _writing(path) as write:

        def store(document: Document, data: bytes) -> None:
            write(data)
            bar.update(len(data))
            piece_bytes.append(len(data))
            ends_document.append(not document.more)

        scan = scan_documents(inspect(documents()), store)
    details = {"ends": ends, "counts": counts}
    return StoredDocuments(path, piece_bytes, ends_document, scan, details)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Callable[[bytes], Any]]:
    """Open a file for writing, and make an error of it a StorageError."""
    try:
        with path.open("wb", buffering=BUFFER_BYTES) as file:
            yield file.write
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"could not write a copy of the text to {path.parent}: {error.strerror or error}; "
            "nothing was left behind"
        ) from None


def open_documents(path: Path) -> StoredDocuments | None:
    """Open documents that were kept, or return None if they are not there or damaged."""
    try:
        with open_h5_file(path.with_suffix(".h5"), KIND, SCHEMA, SCHEMA) as index:
            piece_bytes = read_array(index, "piece_bytes", np.uint32)
            ends_document = read_array(index, "ends_document", np.uint8)
            arrays = [read_array(index, n, np.int64).view(t) for n, t in SCAN_ARRAYS.items()]
            info = read_json(index, "info")
        if path.stat().st_size != int(piece_bytes.sum(dtype=np.int64)):
            return None
        os.utime(path)  # so that it is among the texts used last
    except (InputError, OSError):
        return None
    keys, sizes, lengths, signatures = arrays
    scan = SourceScan(keys, sizes, lengths, signatures.reshape(-1, BANDS), **info["scan"])
    pieces = array("I", piece_bytes.tobytes()), array("B", ends_document.tobytes())
    return StoredDocuments(path, *pieces, scan, info["details"])


def remove_unused_documents(folder: Path, limit: int = KEEP_BYTES) -> None:
    """Remove the texts that were kept in a folder, but for those used last, up to a limit.

    Args:
        folder: the folder.
        limit: bytes that may stay.
    """
    with contextlib.suppress(OSError):
        texts = [path for path in folder.glob("*.txt") if NAME.fullmatch(path.stem)]
        for path in sorted(texts, key=lambda path: path.stat().st_mtime, reverse=True):
            limit -= path.stat().st_size
            if limit < 0:
                path.unlink()
                path.with_suffix(".h5").unlink(missing_ok=True)
