"""Documents to tokens, on all cores, in parts that outlive a kill."""

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
from mmrec.data.corpus import SCHEMA, SIDES, Split, token_dtype
from mmrec.data.readers import Document
from mmrec.data.split import VAL
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.runtime.atomic import atomic_write_text

BATCH = 1 << 20  # characters that are tokenised at once
PART = 1 << 26  # characters in a part, which is what a kill can cost

Count = Callable[[int], Any]


def encode(
    tokenizer: Tokenizer, dealt: Iterable[tuple[int, Document]]
) -> Iterator[tuple[int, Document, np.ndarray]]:
    """Every piece with its side and its ids, in order, the end token after the last of a document.

    Each batch is tokenised on all cores; two are under way while one is taken and another read, so
    that the cores have work while the ids of a batch become an array.
    """

    def finish(batch: list[tuple[int, Document]], job: Future[list[np.ndarray]]) -> Iterator[Any]:
        for (side, d), ids in zip(batch, job.result(), strict=True):
            whole = np.empty(len(ids) + (not d.more), token_dtype(tokenizer))
            whole[: len(ids)], whole[len(ids) :] = ids, tokenizer.eot
            yield side, d, whole

    with ThreadPoolExecutor(2) as pool:
        ahead: deque[tuple[list[tuple[int, Document]], Future[list[np.ndarray]]]] = deque()
        for batch in _batches(dealt):
            ahead.append((batch, pool.submit(tokenizer.encode_batch, [d.text for _, d in batch])))
            if len(ahead) > 2:
                yield from finish(*ahead.popleft())
        while ahead:
            yield from finish(*ahead.popleft())


def _batches(dealt: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    batch: list[tuple[int, Document]] = []
    size = 0
    for side, d in dealt:
        batch.append((side, d))
        size += len(d.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Side:
    """What is known of the pieces of one side, and the tokens of those not yet on the disk."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.lens, self.sizes, self.last = array("q"), array("q"), array("B")
        """Tokens and bytes of each piece, and whether a document ends with it."""

    def add(self, d: Document, ids: np.ndarray) -> int:
        """Take a piece in; return its bytes."""
        size = len(d.text.encode())
        self.ids.append(ids)
        self.lens.append(len(ids))
        self.sizes.append(size)
        self.last.append(not d.more)
        return size

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """doc_offsets (documents + 1,) and doc_bytes (documents,), both int64."""
        ends = np.flatnonzero(np.array(self.last, np.uint8))
        offsets, sizes = (np.cumsum(np.array(x, np.int64))[ends] for x in (self.lens, self.sizes))
        return np.concatenate([[0], offsets]), np.diff(sizes, prepend=0)

    def take(self, dtype: Any) -> np.ndarray:
        """The tokens in memory, which are then let go."""
        made = np.concatenate([np.empty(0, dtype), *self.ids])
        self.ids.clear()
        return made


def encode_documents(tokenizer: Tokenizer, source: Iterable[Document]) -> Split:
    """Tokenise documents, each followed by the end token."""
    side = Side()
    for _, d, ids in encode(tokenizer, ((VAL, d) for d in source)):
        side.add(d, ids)
    return Split(side.take(token_dtype(tokenizer)), *side.documents())


class Parts:
    """The tokens of a corpus under way: in files of a folder beside it, the newest in memory."""

    def __init__(self, path: Path, wanted: list[Any]) -> None:
        """Take up what another process left, if it is of the same text and settings."""
        self._folder, self._wanted = path.with_name(f".{path.name}.parts"), wanted
        self._files: list[Path] = []
        self._sides = Side(), Side()
        self._stored = [0, 0]
        self.pieces, self.bytes = 0, 0
        self.tokenizer: Tokenizer | None = None
        try:
            state = json.loads((self._folder / "tokenizer.json").read_text("utf-8"))
            if state["wanted"] == wanted:
                self.tokenizer = Tokenizer.from_json(json.dumps(state["tokenizer"]))
        except (OSError, ValueError, LookupError):
            pass
        if self.tokenizer is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        with contextlib.suppress(InputError):  # the first that is missing, or damaged
            while True:
                self._take_up(self._path())

    def _path(self) -> Path:
        return self._folder / f"part-{len(self._files):05}.h5"

    def _take_up(self, path: Path) -> None:
        with open_h5_file(path, "part", SCHEMA, SCHEMA) as file:
            at = read_json(file, "at")
            found = [
                [
                    read_array(file, f"{name}/{what}", kind).tolist()
                    for what, kind in (("lens", np.int64), ("sizes", np.int64), ("last", np.uint8))
                ]
                for name in SIDES
            ]
        for side, (lens, sizes, last) in zip(self._sides, found, strict=True):
            side.lens.extend(lens)
            side.sizes.extend(sizes)
            side.last.extend(last)
        self._stored = [len(side.lens) for side in self._sides]
        self.pieces, self.bytes = at["pieces"], at["bytes"]
        self._files.append(path)

    def fill(
        self, tokenizer: Tokenizer, dealt: Iterator[tuple[int, Document]], count: Count
    ) -> None:
        """Tokenise what is not done yet, and put each full part on the disk."""
        self.tokenizer, size = tokenizer, 0
        for number, d, ids in encode(tokenizer, itertools.islice(dealt, self.pieces, None)):
            done = self._sides[number].add(d, ids)
            count(done)
            size, self.bytes, self.pieces = size + len(d.text), self.bytes + done, self.pieces + 1
            if size >= PART:
                self._store()
                size = 0

    def _store(self) -> None:
        assert self.tokenizer is not None
        if not self._files:
            self._folder.mkdir(exist_ok=True)
            state = {"wanted": self._wanted, "tokenizer": json.loads(self.tokenizer.to_json())}
            atomic_write_text(self._folder / "tokenizer.json", json.dumps(state))
        path = self._path()
        with atomic_h5_file(path, "part", SCHEMA) as file:
            for i, (name, side) in enumerate(zip(SIDES, self._sides, strict=True)):
                write_array(file, f"{name}/tokens", side.take(token_dtype(self.tokenizer)))
                for what, kind in (("lens", np.int64), ("sizes", np.int64), ("last", np.uint8)):
                    new = getattr(side, what)[self._stored[i] :]
                    write_array(file, f"{name}/{what}", np.array(new, kind))
                self._stored[i] = len(side.lens)
            write_json(file, "at", {"pieces": self.pieces, "bytes": self.bytes})
        self._files.append(path)

    @property
    def n_tokens(self) -> int:
        """Tokens of both sides."""
        return sum(sum(side.lens) for side in self._sides)

    def documents(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """doc_offsets and doc_bytes of a side."""
        return self._sides[side].documents()

    def copy_into(self, file: h5py.File, *, pack: bool) -> None:
        """Write the splits of the corpus, a part at a time; ``pack`` compresses the tokens."""
        assert self.tokenizer is not None
        dtype = token_dtype(self.tokenizer)
        for name, side in zip(SIDES, self._sides, strict=True):
            rest = side.take(dtype)
            chunks = itertools.chain((self._read(p, name, dtype) for p in self._files), [rest])
            write_chunks(file, f"{name}/tokens", dtype, sum(side.lens), chunks, compress=pack)
            offsets, sizes = side.documents()
            write_array(file, f"{name}/doc_offsets", offsets)
            write_array(file, f"{name}/doc_bytes", sizes)

    def _read(self, path: Path, name: str, dtype: Any) -> np.ndarray:
        with open_h5_file(path, "part", SCHEMA, SCHEMA) as file:
            return read_array(file, f"{name}/tokens", dtype)

    def remove(self) -> None:
        """Remove what is now in the corpus file."""
        shutil.rmtree(self._folder, ignore_errors=True)
