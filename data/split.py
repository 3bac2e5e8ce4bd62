"""Splitting a source into training and validation text, so that no text stands in both."""

import hashlib
import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmrec.data.dedup import near_duplicate_clusters
from mmrec.data.readers import Document, ReadOptions
from mmrec.errors import InputError

MIN_WHOLE_DOCUMENTS = 20
"""With fewer documents than this, each one is cut instead of going to one split undivided."""
TRAIN, VAL, DROPPED = 0, 1, 2
EXCERPTS, EXCERPT_CHARS = 5, 160  # documents shown of each kind, and characters of each


@dataclass
class SourceScan:
    """What one reading of a source found.

    Attributes:
        keys: (documents,) uint64, the first eight bytes of the SHA-256 of each text.
        sizes: (documents,) int64, UTF-8 bytes.
        lengths: (documents,) int64, characters.
        fingerprint: SHA-256 of the SHA-256 of each text, in hexadecimal. Names do not matter.
        longest: name, bytes and beginning of the longest documents.
        sampled: the same of a few documents that are chosen by their hash.
    """

    keys: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray
    fingerprint: str
    longest: list[dict[str, Any]]
    sampled: list[dict[str, Any]]


def scan_documents(documents: Iterable[Document]) -> SourceScan:
    """Read a source once, and hash and measure its documents.

    Args:
        documents: the documents, long ones in pieces.
    """
    keys, sizes, lengths = array("Q"), array("q"), array("q")
    source_digest = hashlib.sha256()
    digest, size, length, beginning = hashlib.sha256(), 0, 0, ""
    longest: list[tuple[int, int, dict[str, Any]]] = []
    sampled: list[tuple[int, int, dict[str, Any]]] = []
    for document in documents:
        beginning = beginning or document.text[:EXCERPT_CHARS]
        data = document.text.encode()
        digest.update(data)
        size, length = size + len(data), length + len(document.text)
        if document.more:
            continue
        text_hash = digest.digest()
        source_digest.update(text_hash)
        keys.append(int.from_bytes(text_hash[:8], "big"))
        sizes.append(size)
        lengths.append(length)
        excerpt = {"name": document.name, "bytes": size, "text": beginning}
        for heap, rank in ((longest, size), (sampled, -keys[-1])):
            heapq.heappush(heap, (rank, -len(keys), excerpt))
            if len(heap) > EXCERPTS:
                heapq.heappop(heap)
        digest, size, length, beginning = hashlib.sha256(), 0, 0, ""
    excerpts = (
        [excerpt for _, _, excerpt in sorted(heap, reverse=True)] for heap in (longest, sampled)
    )
    return SourceScan(
        np.array(keys, np.uint64),
        np.array(sizes, np.int64),
        np.array(lengths, np.int64),
        source_digest.hexdigest(),
        *excerpts,
    )


@dataclass
class SplitPlan:
    """Which split every document of a source belongs to.

    Attributes:
        splits: (documents,) int8, TRAIN, VAL or DROPPED.
        cuts: (documents,) int64, the character at which validation text begins, where each
            document is cut; None where documents go to one split undivided.
        duplicates: exact copies that are left out.
        near_duplicates: documents that are in another split than their own hash chooses, or left
            out of the training text, because they are near-duplicates of others.
    """

    splits: np.ndarray
    cuts: np.ndarray | None
    duplicates: int = 0
    near_duplicates: int = 0

    def has_both_splits(self, scan: SourceScan) -> bool:
        """Whether there is both training and validation text."""
        if self.cuts is None:
            return bool((self.splits == TRAIN).any() and (self.splits == VAL).any())
        used = self.splits != DROPPED
        return bool((self.cuts[used] > 0).any() and (self.cuts < scan.lengths)[used].any())

    def training_documents(self, count: int) -> int:
        """Return how many of the first ``count`` documents have training text."""
        has_text = self.splits[:count] == TRAIN
        if self.cuts is not None:
            has_text = (self.splits[:count] != DROPPED) & (self.cuts[:count] > 0)
        return int(has_text.sum())

    def assign(self, documents: Iterable[Document]) -> Iterator[tuple[int, Document]]:
        """Read the source again, and give every piece its split.

        Args:
            documents: the documents that were scanned, in the same order, long ones in pieces.

        Yields:
            TRAIN or VAL, and a piece of a document; pieces that are left out do not come.

        Raises:
            InputError: the documents are more or fewer than those that were scanned.
        """
        index, document_chars = 0, 0
        for document in documents:
            if index >= len(self.splits):
                raise InputError(f"the text changed while it was read: {document.name} is new")
            split, text = int(self.splits[index]), document.text
            if split != DROPPED and self.cuts is None:
                yield split, document
            elif split != DROPPED and self.cuts is not None:
                cut = int(self.cuts[index]) - document_chars
                if cut > 0:
                    more = document.more and cut >= len(text)
                    yield TRAIN, Document(document.name, text[:cut], more)
                if cut < len(text):
                    yield VAL, Document(document.name, text[max(0, cut) :], document.more)
            if document.more:
                document_chars += len(text)
            else:
                index, document_chars = index + 1, 0
        if index != len(self.splits):
            raise InputError("the text changed while it was read: documents are missing")


def plan_split(
    scan: SourceScan,
    options: ReadOptions,
    signatures: Callable[[], np.ndarray],
    val_documents: int = 0,
) -> SplitPlan:
    """Drop exact copies, and hold out a share of the text for validation.

    If the validation text is given, documents of the training text that are near-duplicates of it
    are dropped. Otherwise:

    With fewer than 20 documents each one is cut by position: one long file gives its first 90 % to
    training and its last 10 % to validation. With more, a document goes to one split undivided. It
    is validation text if the first bytes of the SHA-256 of its text lie below ``val_fraction`` of
    their range, so adding documents moves no other. If that gives validation less than half or more
    than double its share of the bytes, because documents are few or of very different sizes, they
    are taken in the order of their SHA-256 until the share is reached; one that would exceed double
    the share is passed over. Near-duplicates go to the same split.

    Args:
        scan: what reading the source found.
        options: ``val_fraction``.
        signatures: returns the MinHash signatures, (documents, 16) uint64; called only if needed.
        val_documents: the first so many documents are the given validation text; 0 is none.

    Returns:
        The split of every document.
    """
    first = np.unique(scan.keys, return_index=True)[1]
    splits = np.full(len(scan.keys), DROPPED, np.int8)
    splits[first] = TRAIN
    duplicates = len(splits) - len(first)
    if not val_documents and len(first) < MIN_WHOLE_DOCUMENTS:
        # Python's own product of an int and a float: NumPy's could round another way
        cuts = [int(length * (1 - options.val_fraction)) for length in scan.lengths.tolist()]
        return SplitPlan(splits, np.array(cuts, np.int64), duplicates)
    clusters = near_duplicate_clusters(signatures(), scan.keys)
    if val_documents:
        splits[first[first < val_documents]] = VAL
        cluster_in_val = np.zeros(len(splits), bool)
        cluster_in_val[clusters[splits == VAL]] = True
        near = cluster_in_val[clusters] & (splits == TRAIN)
        splits[near] = DROPPED
        return SplitPlan(splits, None, duplicates, int(near.sum()))
    representatives, member = np.unique(clusters[first], return_inverse=True)
    cluster_sizes = np.bincount(member, scan.sizes[first]).astype(np.int64)
    chosen = _choose_by_hash(scan.keys[representatives], cluster_sizes, options.val_fraction)
    in_val = chosen[member]
    splits[first[in_val]] = VAL
    in_val_alone = _choose_by_hash(scan.keys[first], scan.sizes[first], options.val_fraction)
    return SplitPlan(splits, None, duplicates, int((in_val_alone != in_val).sum()))


def _choose_by_hash(keys: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Mask (n,) bool of the documents, or clusters, that are validation text."""
    chosen = keys < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    target = fraction * sizes.sum()
    if target / 2 <= sizes[chosen].sum() <= 2 * target:
        return chosen
    chosen, total = np.zeros(len(keys), bool), 0
    for i in np.argsort(keys):
        if total >= target:
            break
        if total + sizes[i] <= 2 * target:
            chosen[i], total = True, total + sizes[i]
    return chosen
