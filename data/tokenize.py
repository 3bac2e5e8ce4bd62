"""Tokenising documents on all cores, in shards on disk that survive a killed process."""

import contextlib
import itertools
import json
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mmrec.checkpoint.hdf5 import (
    atomic_h5_file,
    open_h5_file,
    read_array,
    read_json,
    write_array,
    write_chunks,
    write_json,
)
from mmrec.data.corpus import SCHEMA, SPLITS, Split, token_dtype
from mmrec.data.readers import Document
from mmrec.data.split import VAL
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.runtime.atomic import atomic_write_text
from mmrec.runtime.names import extensible
from mmrec.runtime.progress import progress_bar

BATCH_CHARS = 1 << 20
"""Characters that are tokenised at once."""
SHARD_CHARS = 1 << 26
"""Characters of text in a shard, the most that a killed process loses."""
SHARD_KIND = "token_shard"
PIECE_ARRAYS = {"piece_tokens": np.int64, "piece_bytes": np.int64, "ends_document": np.uint8}

CountBytes = Callable[[int], Any]
"""Called with the UTF-8 bytes of each piece that is done."""
AssignedPiece = tuple[int, Document]
"""TRAIN or VAL, and a piece of a document."""


def tokenize_documents(
    tokenizer: Tokenizer, pieces: Iterable[AssignedPiece], batch_chars: int = BATCH_CHARS
) -> Iterator[tuple[int, Document, np.ndarray]]:
    """Tokenise pieces of documents, in order.

    Each batch is tokenised on all cores. Two more are under way while the tokens of one are used
    and the next is read, so the cores stay busy.

    Args:
        tokenizer: the tokenizer.
        pieces: the split and the text of each piece.
        batch_chars: characters of a batch.

    Yields:
        The split, the piece, and its token ids (n,) uint16 or uint32. The end token follows the
        last piece of each document.

    Raises:
        InputError: the text holds a character that a ``char`` tokenizer does not know.
    """

    def finish(batch: list[AssignedPiece], job: Future[list[np.ndarray]]) -> Iterator[Any]:
        for (split, document), ids in zip(batch, job.result(), strict=True):
            tokens = np.empty(len(ids) + (not document.more), token_dtype(tokenizer))
            tokens[: len(ids)], tokens[len(ids) :] = ids, tokenizer.eot
            yield split, document, tokens

    with ThreadPoolExecutor(2) as pool:
        under_way: deque[tuple[list[AssignedPiece], Future[list[np.ndarray]]]] = deque()
        for batch in _batches(pieces, batch_chars):
            texts = [document.text for _, document in batch]
            under_way.append((batch, pool.submit(tokenizer.encode_batch, texts)))
            if len(under_way) > 2:
                yield from finish(*under_way.popleft())
        while under_way:
            yield from finish(*under_way.popleft())


def _batches(pieces: Iterable[AssignedPiece], batch_chars: int) -> Iterator[list[AssignedPiece]]:
    batch: list[AssignedPiece] = []
    size = 0
    for split, document in pieces:
        batch.append((split, document))
        size += len(document.text)
        if size >= batch_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class SplitWriter:
    """Collects the pieces of one split: the size of each, and the tokens that are not on disk yet.

    Attributes:
        tokens: token ids of the pieces in memory.
        piece_tokens: tokens of each piece.
        piece_bytes: UTF-8 bytes of each piece.
        ends_document: 1 for the last piece of a document, else 0.
    """

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.piece_tokens, self.piece_bytes = array("q"), array("q")
        self.ends_document = array("B")

    def add(self, document: Document, tokens: np.ndarray) -> int:
        """Append a piece and its tokens (n,); return its UTF-8 bytes."""
        size = len(document.text.encode())
        self.tokens.append(tokens)
        self.piece_tokens.append(len(tokens))
        self.piece_bytes.append(size)
        self.ends_document.append(not document.more)
        return size

    def document_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Return doc_offsets (documents + 1,) and doc_bytes (documents,), both int64."""
        last_pieces = np.flatnonzero(np.array(self.ends_document, np.uint8))
        token_ends, byte_ends = (
            np.cumsum(np.array(sizes, np.int64))[last_pieces]
            for sizes in (self.piece_tokens, self.piece_bytes)
        )
        return np.concatenate([[0], token_ends]), np.diff(byte_ends, prepend=0)

    def pop_tokens(self, dtype: Any) -> np.ndarray:
        """Return the tokens in memory, (n,) of ``dtype``, and forget them."""
        tokens = np.concatenate([np.empty(0, dtype), *self.tokens])
        self.tokens.clear()
        return tokens


def check_characters(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[Document]:
    """Pass documents on, and check that a ``char`` tokenizer knows their characters.

    Args:
        tokenizer: the tokenizer; any other kind knows every character.
        documents: the documents, long ones in pieces.

    Raises:
        InputError: a character is unknown. The message names its document, line and column.
    """
    line = column = 1
    for document in documents:
        text = document.text
        if tokenizer.kind == "char":
            tokenizer.check_text(text, document.name, line, column)
        yield document
        if not document.more:
            line = column = 1
        else:
            end_of_line = text.rfind("\n")
            column = len(text) - end_of_line + (column - 1 if end_of_line < 0 else 0)
            line += text.count("\n")


def encode_documents(tokenizer: Tokenizer, documents: Iterable[Document]) -> Split:
    """Tokenise documents in memory, each followed by the end token.

    Args:
        tokenizer: the tokenizer.
        documents: the documents, long ones in pieces.

    Raises:
        InputError: the text holds a character that a ``char`` tokenizer does not know.
    """
    writer = SplitWriter()
    pieces = ((VAL, document) for document in check_characters(tokenizer, documents))
    with progress_bar(None, "tokenising") as bar:
        for _, document, tokens in tokenize_documents(tokenizer, pieces):
            bar.update(writer.add(document, tokens))
    return Split(writer.pop_tokens(token_dtype(tokenizer)), *writer.document_index())


class TokenShards:
    """The tokens of a corpus under way: shards in a folder beside its file, the newest in memory.

    Attributes:
        tokenizer: the corpus's tokenizer; None until it is known.
        pieces: pieces that are tokenised.
        bytes: UTF-8 bytes of them.
    """

    def __init__(self, path: Path, cache_key: list[Any], shard_chars: int = SHARD_CHARS) -> None:
        """Load the shards that another process left, if they are of the same text and settings.

        Args:
            path: the corpus file.
            cache_key: what identifies text and settings, as JSON.
            shard_chars: characters of text in a shard.
        """
        self._folder, self._cache_key = (
            path.with_name(f".{extensible(path.name)}.shards"),
            cache_key,
        )
        self._shard_chars = shard_chars
        self._files: list[Path] = []
        self._writers = SplitWriter(), SplitWriter()
        self._stored_pieces = [0, 0]
        self.pieces, self.bytes = 0, 0
        self.tokenizer: Tokenizer | None = None
        with contextlib.suppress(OSError, ValueError, LookupError):
            state = json.loads((self._folder / "tokenizer.json").read_text("utf-8"))
            if state["cache_key"] == cache_key:
                self.tokenizer = Tokenizer.from_json(json.dumps(state["tokenizer"]))
        if self.tokenizer is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        with contextlib.suppress(InputError):  # at the first shard that is missing or damaged
            while True:
                self._load_shard(self._next_path())

    def _next_path(self) -> Path:
        return self._folder / f"shard-{len(self._files):05}.h5"

    def _load_shard(self, path: Path) -> None:
        with open_h5_file(path, SHARD_KIND, SCHEMA, SCHEMA) as file:
            progress = read_json(file, "progress")
            arrays = [
                [
                    read_array(file, f"{split}/{name}", dtype).tolist()
                    for name, dtype in PIECE_ARRAYS.items()
                ]
                for split in SPLITS
            ]
        for writer, values in zip(self._writers, arrays, strict=True):
            for name, entries in zip(PIECE_ARRAYS, values, strict=True):
                getattr(writer, name).extend(entries)
        self._stored_pieces = [len(writer.piece_tokens) for writer in self._writers]
        self.pieces, self.bytes = progress["pieces"], progress["bytes"]
        self._files.append(path)

    def fill(
        self, tokenizer: Tokenizer, pieces: Iterator[AssignedPiece], count_bytes: CountBytes
    ) -> None:
        """Tokenise the pieces that are not done yet, and store each full shard.

        Args:
            tokenizer: the tokenizer.
            pieces: all pieces of the corpus, the ones that are done among them.
            count_bytes: called with the bytes of each piece that is done.

        Raises:
            InputError: the text holds a character that a ``char`` tokenizer does not know.
            StorageError: a shard cannot be written.
        """
        self.tokenizer, shard_chars = tokenizer, 0
        remaining = itertools.islice(pieces, self.pieces, None)
        batch_chars = min(BATCH_CHARS, self._shard_chars)
        for split, document, tokens in tokenize_documents(tokenizer, remaining, batch_chars):
            size = self._writers[split].add(document, tokens)
            count_bytes(size)
            self.bytes, self.pieces = self.bytes + size, self.pieces + 1
            shard_chars += len(document.text)
            if shard_chars >= self._shard_chars:
                self._store_shard()
                shard_chars = 0

    def _store_shard(self) -> None:
        assert self.tokenizer is not None
        if not self._files:
            self._folder.mkdir(exist_ok=True)
            tokenizer = json.loads(self.tokenizer.to_json())
            state = {"cache_key": self._cache_key, "tokenizer": tokenizer}
            atomic_write_text(self._folder / "tokenizer.json", json.dumps(state))
        path = self._next_path()
        with atomic_h5_file(path, SHARD_KIND, SCHEMA) as file:
            for i, (split, writer) in enumerate(zip(SPLITS, self._writers, strict=True)):
                tokens = writer.pop_tokens(token_dtype(self.tokenizer))
                write_array(file, f"{split}/tokens", tokens)
                for name, dtype in PIECE_ARRAYS.items():
                    entries = getattr(writer, name)[self._stored_pieces[i] :]
                    write_array(file, f"{split}/{name}", np.array(entries, dtype))
                self._stored_pieces[i] = len(writer.piece_tokens)
            write_json(file, "progress", {"pieces": self.pieces, "bytes": self.bytes})
        self._files.append(path)

    @property
    def n_tokens(self) -> int:
        """Tokens of both splits."""
        return sum(sum(writer.piece_tokens) for writer in self._writers)

    def document_index(self, split: int) -> tuple[np.ndarray, np.ndarray]:
        """Return doc_offsets (documents + 1,) and doc_bytes (documents,) of TRAIN or VAL."""
        return self._writers[split].document_index()

    def copy_into(self, file: h5py.File, *, compress: bool) -> None:
        """Write both splits into the corpus file, one shard at a time.

        Args:
            file: the corpus file.
            compress: whether to compress the tokens.
        """
        assert self.tokenizer is not None
        dtype = token_dtype(self.tokenizer)
        for split, writer in zip(SPLITS, self._writers, strict=True):
            in_memory = writer.pop_tokens(dtype)
            stored = (self._read_tokens(path, split, dtype) for path in self._files)
            chunks, count = itertools.chain(stored, [in_memory]), sum(writer.piece_tokens)
            write_chunks(file, f"{split}/tokens", dtype, count, chunks, compress=compress)
            offsets, sizes = writer.document_index()
            write_array(file, f"{split}/doc_offsets", offsets)
            write_array(file, f"{split}/doc_bytes", sizes)

    def _read_tokens(self, path: Path, split: str, dtype: Any) -> np.ndarray:
        with open_h5_file(path, SHARD_KIND, SCHEMA, SCHEMA) as file:
            return read_array(file, f"{split}/tokens", dtype)

    def remove(self) -> None:
        """Remove the shards, which are in the corpus file now."""
        shutil.rmtree(self._folder, ignore_errors=True)
