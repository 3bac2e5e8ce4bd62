"""Who is training text and who validation text, so that nothing stands on both sides."""

import hashlib
import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmrec.data.readers import Document, Reading
from mmrec.errors import InputError

FEW = 20  # with fewer documents than this, each one is cut instead of being given to one side
TRAIN, VAL, DROPPED = 0, 1, 2
BANDS, ROWS, WORDS = 16, 8, 5  # of MinHash: 16 bands of 8 minima, over runs of five words
SKETCH_BATCH = 1 << 22  # characters
SHOWN, SHOWN_TEXT = 5, 160  # documents and characters in a report

Count = Callable[[int], Any]


@dataclass
class Scan:
    """What one reading of a source found; arrays have an element a document."""

    keys: np.ndarray
    """uint64, the first bytes of the SHA-256 of the text."""
    sizes: np.ndarray
    """int64, UTF-8 bytes."""
    lengths: np.ndarray
    """int64, characters."""
    fingerprint: str
    """SHA-256 of all names and texts."""
    longest: list[dict[str, Any]]
    """Name, bytes and start of the longest documents."""
    random: list[dict[str, Any]]
    """The same of documents chosen by their hash."""


def scan(documents: Iterable[Document]) -> Scan:
    """Read a source once."""
    keys, sizes, lengths, whole = array("Q"), array("q"), array("q"), hashlib.sha256()
    digest, size, length, start = hashlib.sha256(), 0, 0, ""
    longest: list[tuple[int, int, dict[str, Any]]] = []
    lowest: list[tuple[int, int, dict[str, Any]]] = []
    for d in documents:
        start = start or d.text[:SHOWN_TEXT]
        data = d.text.encode()
        digest.update(data)
        size, length = size + len(data), length + len(d.text)
        if d.more:
            continue
        made = digest.digest()
        whole.update(d.name.encode(errors="surrogateescape") + b"\0" + made)
        keys.append(int.from_bytes(made[:8], "big"))
        sizes.append(size)
        lengths.append(length)
        seen = {"name": d.name, "bytes": size, "text": start}
        for best, rank in ((longest, size), (lowest, -keys[-1])):
            heapq.heappush(best, (rank, -len(keys), seen))
            if len(best) > SHOWN:
                heapq.heappop(best)
        digest, size, length, start = hashlib.sha256(), 0, 0, ""
    shown = ([x for _, _, x in sorted(best, reverse=True)] for best in (longest, lowest))
    return Scan(
        np.array(keys, np.uint64),
        np.array(sizes, np.int64),
        np.array(lengths, np.int64),
        whole.hexdigest(),
        *shown,
    )


@dataclass
class Plan:
    """The side of every document of a source, and how many were alike."""

    sides: np.ndarray
    """int8 a document: TRAIN, VAL or DROPPED."""
    cuts: np.ndarray | None
    """int64 a document, the character at which validation begins, where documents are cut."""
    duplicates: int = 0
    """Exact copies left out."""
    near: int = 0
    """Documents that are not on the validation side, or not in the training text, because they are
    like one of the other side."""

    def has_both(self, found: Scan) -> bool:
        """Whether there is text on both sides."""
        if self.cuts is None:
            return bool((self.sides == TRAIN).any() and (self.sides == VAL).any())
        kept = self.sides != DROPPED
        return bool((self.cuts[kept] > 0).any() and (self.cuts < found.lengths)[kept].any())

    def training(self, count: int) -> int:
        """How many of the first ``count`` documents have training text."""
        has = self.sides[:count] == TRAIN
        if self.cuts is not None:
            has = (self.sides[:count] != DROPPED) & (self.cuts[:count] > 0)
        return int(has.sum())

    def deal(self, documents: Iterable[Document]) -> Iterator[tuple[int, Document]]:
        """Pieces of documents with their side, those that are left out not among them."""
        number, at = 0, 0
        for d in documents:
            if number >= len(self.sides):
                raise InputError(f"the text changed while it was read: {d.name} is new")
            side = int(self.sides[number])
            if side != DROPPED and self.cuts is None:
                yield side, d
            elif side != DROPPED and self.cuts is not None:
                cut = int(self.cuts[number]) - at
                if cut > 0:
                    yield TRAIN, Document(d.name, d.text[:cut], d.more and cut >= len(d.text))
                if cut < len(d.text):
                    yield VAL, Document(d.name, d.text[max(0, cut) :], d.more)
            number, at = (number, at + len(d.text)) if d.more else (number + 1, 0)
        if number != len(self.sides):
            raise InputError("the text changed while it was read: documents are missing")


def split(found: Scan, how: Reading, sketch: Callable[[], np.ndarray], given: int = 0) -> Plan:
    """Drop exact copies, and give a share of the text to validation.

    The first ``given`` documents are the validation text, if there are any; what is like one of
    them is left out of the rest. Without them:

    Fewer than 20 documents are each cut by position (one long file: first 90 %, last 10 %). More
    are taken whole, by the SHA-256 of their text: it is below ``val_share`` of its range, so what
    is added later moves nothing. Where that gives validation less than half or more than double its
    share of the bytes, because documents are few or of very different sizes, they are taken in the
    order of their SHA-256 until the share is reached, but for one that would pass twice the share.
    Documents that are alike (see ``sketches``) go together, where one of them goes.
    """
    first = np.unique(found.keys, return_index=True)[1]
    sides = np.full(len(found.keys), DROPPED, np.int8)
    sides[first] = TRAIN
    copies = len(sides) - len(first)
    if not given and len(first) < FEW:
        # what Python's own product of a whole number and a float gives, as ever
        cuts = [int(n * (1 - how.val_share)) for n in found.lengths.tolist()]
        return Plan(sides, np.array(cuts, np.int64), copies)
    alike = clusters(sketch(), found.keys)
    if given:
        sides[first[first < given]] = VAL
        held = np.zeros(len(sides), bool)
        held[alike[sides == VAL]] = True
        near = held[alike] & (sides == TRAIN)
        sides[near] = DROPPED
        return Plan(sides, None, copies, int(near.sum()))
    stands, member = np.unique(alike[first], return_inverse=True)
    sizes = np.bincount(member, found.sizes[first]).astype(np.int64)
    chosen = _by_hash(found.keys[stands], sizes, how.val_share)[member]
    sides[first[chosen]] = VAL
    alone = _by_hash(found.keys[first], found.sizes[first], how.val_share)
    return Plan(sides, None, copies, int((alone != chosen).sum()))


def _by_hash(keys: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """Mask of the documents that are validation text."""
    chosen = keys < np.uint64(min(int(share * 2.0**64), 2**64 - 1))
    wanted = share * sizes.sum()
    if wanted / 2 <= sizes[chosen].sum() <= 2 * wanted:
        return chosen
    chosen, held = np.zeros(len(keys), bool), 0
    for i in np.argsort(keys):
        if held >= wanted:
            break
        if held + sizes[i] <= 2 * wanted:
            chosen[i], held = True, held + sizes[i]
    return chosen


def sketches(documents: Iterable[Document], count: Count) -> np.ndarray:
    """What makes like documents meet: (documents, 16) uint64, equal in one column where alike.

    MinHash (Broder 1997) of the runs of five words of a document's first 65,536 characters, in
    sixteen bands of eight: two documents that share 90 % of their runs meet with probability
    0.9999, 80 %: 0.95, half: 0.06.
    """
    from rensa import RMinHash

    made: list[np.ndarray] = [np.empty((0, BANDS), np.uint64)]
    waiting: list[list[str]] = []
    size, goes_on = 0, False

    def flush() -> None:
        minima = np.array(RMinHash.digests_from_token_sets(waiting, BANDS * ROWS, 1), np.uint64)
        mixed, odd = np.zeros((len(waiting), BANDS), np.uint64), np.uint64(0x9E3779B97F4A7C15)
        for row in range(ROWS):
            mixed = (mixed ^ minima[:, row::ROWS]) * odd  # wraps round, as it should
            mixed ^= mixed >> np.uint64(29)
        made.append(mixed)
        waiting.clear()

    for d in documents:
        count(len(d.text.encode()))
        if not goes_on:
            words = d.text.split()
            runs = zip(*(words[i:] for i in range(WORDS)), strict=False)
            waiting.append(list(map(" ".join, runs)) or [d.text])
            size += len(d.text)
            if size >= SKETCH_BATCH:
                flush()
                size = 0
        goes_on = d.more
    if waiting:
        flush()
    return np.concatenate(made)


def clusters(bands: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """For every document the number of the one that stands for all those it is like, by chains of
    likeness: of the lowest hash, another hash than the one that chooses sides."""
    order = np.argsort(keys * np.uint64(0x9E3779B97F4A7C15), kind="stable")
    label = np.empty(len(keys), np.int64)
    label[order] = np.arange(len(keys))
    while True:
        before = label
        for column in bands.T:
            group = np.unique(column, return_inverse=True)[1]
            lowest = np.full(len(keys), len(keys))
            np.minimum.at(lowest, group, label)
            label = lowest[group]
        if np.array_equal(before, label):
            return order[label]
