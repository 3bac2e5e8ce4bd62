"""Splitting a source into training and validation text, so that no text stands in both."""

import hashlib
import heapq
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mmrec.data.dedup import SignatureBuilder, near_duplicate_clusters
from mmrec.data.readers import Document, ReadOptions

MIN_WHOLE_DOCUMENTS = 20
"""With fewer documents than this, each one is cut instead of going to one split undivided."""
TRAIN, VAL = 0, 1
DROPPED = -1
"""In place of a cut: the document is in neither split."""
MAX_SHARE = 0.5
"""Validation takes at most this share of the documents that it is chosen from."""
MIN_TAIL_CHARS = 256
"""A document that is cut gives validation as much as this, or half of itself. If a few words of
each document were enough, fewer of them are cut."""
EXCERPTS, EXCERPT_CHARS = 5, 160  # documents shown of each kind, and characters of each


@dataclass
class SourceScan:
    """What one reading of a source found.

    Attributes:
        keys: (documents,) uint64, the first eight bytes of the SHA-256 of each text.
        sizes: (documents,) int64, UTF-8 bytes.
        lengths: (documents,) int64, characters.
        signatures: (documents, 16) uint64, the MinHash signature of each document's beginning.
        fingerprint: SHA-256 of the SHA-256 of each text, in hexadecimal. Names do not matter.
        longest: name, bytes and beginning of the longest documents.
        sampled: the same of a few documents that are chosen by their hash.
    """

    keys: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray
    signatures: np.ndarray
    fingerprint: str
    longest: list[dict[str, Any]]
    sampled: list[dict[str, Any]]


def scan_documents(
    documents: Iterable[Document], store: Callable[[Document, bytes], Any] = lambda *piece: None
) -> SourceScan:
    """Read documents once: hash, measure and compare them.

    Args:
        documents: the documents, long ones in pieces. A signature is that of the first piece.
        store: called with each piece and its text in UTF-8.
    """
    keys, sizes, lengths = array("Q"), array("q"), array("q")
    source_digest = hashlib.sha256()
    digest, size, length, beginning = hashlib.sha256(), 0, 0, ""
    longest: list[tuple[int, int, dict[str, Any]]] = []
    sampled: list[tuple[int, int, dict[str, Any]]] = []
    with SignatureBuilder() as signatures:
        for document in documents:
            data = document.text.encode()
            store(document, data)
            if not size:
                beginning = document.text[:EXCERPT_CHARS]
                signatures.add(data)
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
            digest, size, length = hashlib.sha256(), 0, 0
        return SourceScan(
            np.array(keys, np.uint64),
            np.array(sizes, np.int64),
            np.array(lengths, np.int64),
            signatures.finish(),
            source_digest.hexdigest(),
            *([excerpt for _, _, excerpt in sorted(h, reverse=True)] for h in (longest, sampled)),
        )


@dataclass
class SplitPlan:
    """Which part of every document of a source belongs to which split.

    Attributes:
        cuts: (documents,) int64, the character at which validation text begins. It is 0 if the
            whole document is validation text, its length if the whole is training text, and DROPPED
            if it is in neither split.
        lengths: (documents,) int64, characters.
        duplicates: exact copies that are left out.
        near_duplicates: documents that are in another split than their own hash chooses, or left
            out of the training text, because they are near-duplicates of others.
        alike: documents that have a near-duplicate among the others.
        uneven: whether documents are so uneven that whole ones cannot give the share.
    """

    cuts: np.ndarray
    lengths: np.ndarray
    duplicates: int = 0
    near_duplicates: int = 0
    alike: int = 0
    uneven: bool = False

    @cached_property
    def in_train(self) -> np.ndarray:
        """Mask (documents,) bool of those with training text."""
        return self.cuts > 0

    @cached_property
    def in_val(self) -> np.ndarray:
        """Mask (documents,) bool of those with validation text."""
        return (self.cuts != DROPPED) & (self.cuts < self.lengths)

    @property
    def cut_documents(self) -> int:
        """Number of documents that are cut, with text in both splits."""
        return int((self.in_train & self.in_val).sum())

    @property
    def has_both_splits(self) -> bool:
        """Whether there is both training and validation text."""
        return bool(self.in_train.any() and self.in_val.any())

    def assign(self, documents: Iterable[Document]) -> Iterator[tuple[int, Document]]:
        """Give every piece of the documents its split.

        Args:
            documents: the documents that were scanned, in the same order, long ones in pieces.

        Yields:
            TRAIN or VAL, and a piece of a document; pieces that are left out do not come.
        """
        index, document_chars = 0, 0
        for document in documents:
            cut, text = int(self.cuts[index]), document.text
            if cut == 0:
                yield VAL, document
            elif cut >= self.lengths[index]:
                yield TRAIN, document
            elif cut != DROPPED:
                cut -= document_chars
                if cut > 0:
                    more = document.more and cut > len(text)
                    yield TRAIN, Document(document.name, text[:cut], more)
                if cut < len(text):
                    yield VAL, Document(document.name, text[max(0, cut) :], document.more)
            if document.more:
                document_chars += len(text)
            else:
                index, document_chars = index + 1, 0


def plan_split(
    scan: SourceScan,
    options: ReadOptions,
    val_documents: int = 0,
    source_ends: Sequence[int] = (),
) -> SplitPlan:
    """Drop exact copies, and hold out a share of the text for validation.

    If the validation text is given, documents of the training text that are near-duplicates of it
    are dropped. Otherwise:

    With fewer than 20 documents each one is cut by position: one long file gives its first 90 % to
    training and its last 10 % to validation. With more, a document goes to one split undivided. It
    is validation text if the first bytes of the SHA-256 of its text lie below ``val_fraction`` of
    their range, so adding documents moves no other. If that gives validation less than half or more
    than double its share of the bytes, documents are taken in the order of their SHA-256 until the
    share is reached; one that would exceed double the share is passed over. Near-duplicates go to
    the same split.

    Some documents may be too long for that: longer than the share of all that are not longer. If
    the long ones keep the splits from their share, or the other documents from theirs, the long
    ones are cut by position. A cluster of near-duplicates that is too long is training text. A
    source of a mixture that would have validation text only is cut by position, too.

    Args:
        scan: what reading the source found.
        options: ``val_fraction``.
        val_documents: the first so many documents are the given validation text; 0 is none.
        source_ends: of a mixture, the number of documents up to the end of each source.

    Returns:
        The cut of every document.
    """
    first = np.unique(scan.keys, return_index=True)[1]
    duplicates, fraction = len(scan.keys) - len(first), options.val_fraction
    cuts = np.full(len(scan.keys), DROPPED, np.int64)
    cuts[first] = scan.lengths[first]
    if not val_documents and len(first) < MIN_WHOLE_DOCUMENTS:
        cuts[first] = _cut_positions(scan.lengths[first], fraction)
        return SplitPlan(cuts, scan.lengths, duplicates)
    clusters = near_duplicate_clusters(scan.signatures, scan.keys)
    if val_documents:
        cuts[first[first < val_documents]] = 0
        cluster_in_val = np.zeros(len(cuts), bool)
        cluster_in_val[clusters[cuts == 0]] = True
        near = cluster_in_val[clusters] & (cuts > 0)
        cuts[near] = DROPPED
        return SplitPlan(cuts, scan.lengths, duplicates, int(near.sum()))
    representatives, member = np.unique(clusters[first], return_inverse=True)
    sizes, chars = (
        np.bincount(member, of[first]).astype(np.int64) for of in (scan.sizes, scan.lengths)
    )
    single = np.bincount(member) == 1
    in_val, tails, uneven = _choose_clusters(
        scan.keys[representatives], sizes, chars, single, fraction
    )
    cuts[first] -= tails[member]
    cuts[first[in_val[member]]] = 0
    for begin, end in itertools.pairwise((0, *source_ends)):
        own = np.flatnonzero((first >= begin) & (first < end))
        if not (cuts[first[own]] > 0).any():
            alone = first[own[single[member[own]]]]
            cuts[alone] = _cut_positions(scan.lengths[alone], fraction)
            alike = first[np.isin(member, member[own]) & ~single[member]]
            cuts[alike] = scan.lengths[alike]
    has_alike = ~single[member]
    in_val_alone = _choose_by_hash(scan.keys[first], scan.sizes[first], fraction)
    moved = has_alike & (in_val_alone != (cuts[first] == 0))
    return SplitPlan(cuts, scan.lengths, duplicates, int(moved.sum()), int(has_alike.sum()), uneven)


def plan_added_split(
    new: SourceScan,
    options: ReadOptions,
    *,
    known_keys: np.ndarray,
    known_signatures: np.ndarray,
    known_plan: SplitPlan,
    val_documents: int = 0,
) -> SplitPlan:
    """Split what was added to a text that is split already, as a text of its own.

    Copies of known documents are dropped. If the known text is not cut by position, a
    near-duplicate of a known document goes to its split, so that no text stands in both; where that
    document is cut, the near-duplicate is dropped. If the validation text is given, all that was
    added is training text, but for near-duplicates of it.

    Args:
        new: what was added.
        options: ``val_fraction``.
        known_keys: (documents,) uint64, of the known text.
        known_signatures: (documents, 16) uint64.
        known_plan: how it is split.
        val_documents: the first so many known documents are validation text that is given.

    Returns:
        The cut of every document that was added.
    """
    if val_documents:
        cuts = np.full(len(new.keys), DROPPED, np.int64)
        first = np.unique(new.keys, return_index=True)[1]
        cuts[first] = new.lengths[first]
        plan = SplitPlan(cuts, new.lengths, len(new.keys) - len(first))
    else:
        plan = plan_split(new, options)
    copies = np.isin(new.keys, known_keys) & (plan.cuts != DROPPED)
    plan.cuts[copies] = DROPPED
    plan.duplicates += int(copies.sum())
    if len(known_keys) < MIN_WHOLE_DOCUMENTS and not val_documents:
        return plan
    clusters = near_duplicate_clusters(
        np.concatenate([known_signatures, new.signatures]), np.concatenate([known_keys, new.keys])
    )
    members = [np.zeros(len(clusters), bool) for _ in range(2)]
    for mask, is_member in zip((known_plan.in_train, known_plan.in_val), members, strict=True):
        is_member[clusters[: len(known_keys)][mask]] = True
    in_train, in_val = (is_member[clusters[len(known_keys) :]] for is_member in members)
    is_alike = (in_train | in_val) & (plan.cuts != DROPPED)
    before = plan.cuts.copy()
    plan.cuts[is_alike & in_train] = new.lengths[is_alike & in_train]
    plan.cuts[is_alike & in_val] = DROPPED if val_documents else 0
    plan.cuts[is_alike & in_train & in_val] = DROPPED
    plan.near_duplicates += int((plan.cuts != before).sum())
    plan.alike += int(is_alike.sum())
    return plan


def _cut_positions(lengths: np.ndarray, fraction: float) -> np.ndarray:
    """Characters (n,) int64 at which documents of ``lengths`` (n,) are cut by position."""
    # Python's own product of an int and a float: NumPy's could round another way
    return np.array([int(length * (1 - fraction)) for length in lengths.tolist()], np.int64)


def _choose_clusters(
    keys: np.ndarray, sizes: np.ndarray, chars: np.ndarray, single: np.ndarray, fraction: float
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Choose which clusters of near-duplicates are validation text, and which documents are cut.

    Args:
        keys: (clusters,) uint64.
        sizes: (clusters,) int64, bytes.
        chars: (clusters,) int64, characters.
        single: (clusters,) bool, whether a cluster is a single document, which may be cut.
        fraction: the share of validation.

    Returns:
        Mask (clusters,) bool of those that are validation text as a whole; (clusters,) int64, the
        characters at the end of each other one that are validation text; and whether there are
        clusters that are too long.
    """
    chosen, tails = _choose_by_hash(keys, sizes, fraction), np.zeros(len(keys), np.int64)
    ascending = np.sort(sizes)
    fitting = ascending[ascending <= fraction * np.cumsum(ascending)]
    small = sizes <= (fitting[-1] if len(fitting) else 0)
    if _gives_share(sizes, chosen, fraction) and _gives_share(
        sizes[small], chosen[small], fraction
    ):
        return chosen, tails, False
    cut = ~small & single
    share = fraction * sizes.sum() / max(1, sizes[small | cut].sum())
    share = min(MAX_SHARE, float(share))
    chosen[:] = False
    chosen[small] = _choose_by_hash(keys[small], sizes[small], share)
    order = np.flatnonzero(cut)[np.argsort(keys[cut])]
    wanted = np.rint(share * chars[order]).astype(np.int64)
    wanted = np.maximum(wanted, np.minimum(MIN_TAIL_CHARS, chars[order] // 2))
    before = np.cumsum(wanted) - wanted
    tails[order] = np.clip(round(share * int(chars[order].sum())) - before, 0, wanted)
    return chosen, tails, True


def _gives_share(sizes: np.ndarray, chosen: np.ndarray, fraction: float) -> bool:
    """Whether the chosen documents have between half of the share of the bytes and double."""
    target = fraction * sizes.sum()
    return bool(target / 2 <= sizes[chosen].sum() <= 2 * target)


def _choose_by_hash(keys: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Mask (n,) bool of the documents, or clusters, that are validation text."""
    chosen = keys < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    if _gives_share(sizes, chosen, fraction):
        return chosen
    target = fraction * sizes.sum()
    chosen, total = np.zeros(len(keys), bool), 0
    for i in np.argsort(keys):
        if total >= target:
            break
        if total + sizes[i] <= 2 * target:
            chosen[i], total = True, total + sizes[i]
    return chosen
