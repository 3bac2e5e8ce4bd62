"""Text that was added to the text of a run: what is known of the old, what is new, and their order.

The tokens of the known documents stay as they are, in their split and their order. What was added
comes after them, split by the same rule.
"""

import bisect
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmrec.data.document_record import DocumentRecord
from mmrec.data.documents import StoredDocuments
from mmrec.data.readers import Document, ReadOptions
from mmrec.data.split import SourceScan, SplitPlan, plan_added_split, scan_documents
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError

MAX_LONGER = 1000
"""Most documents that are looked for as the beginning of a longer one."""


@dataclass(frozen=True)
class KnownText:
    """The text of a run that is resumed.

    Attributes:
        record: its documents.
        tokenizer: the run's tokenizer, which what was added gets too.
        run: the run folder, for messages.
        takes_additions: whether the user asked for what was added.
    """

    record: DocumentRecord
    tokenizer: Tokenizer
    run: Path
    takes_additions: bool

    def changed(self, source: str, what: str) -> InputError:
        """The error of a text that is not the known one with more at its end."""
        return InputError(
            f"the text of {source} is another one, or changed since {self.run} was saved: {what}; "
            "a run continues with the same text only, under any name, or with text added to it; a "
            "new run takes up its model with --initialize-from"
        )


@dataclass(frozen=True)
class ContinuedText:
    """The documents of a text that was added to: the known ones, then what is new.

    Attributes:
        plan: the cut of every document.
        record: all documents.
        fingerprint: what identifies the text.
        added: number of documents that are new; what was added to the end of one counts as one.
    """

    plan: SplitPlan
    record: DocumentRecord
    fingerprint: str
    added: int
    _stored: StoredDocuments
    _parts: list[tuple[int, int, int]]
    """Document of the source, and the characters between which it is read."""

    def __iter__(self) -> Iterator[Document]:
        """Read the documents in order, long ones in pieces."""
        return _read_parts(self._stored, self._parts)


def continue_text(
    known: KnownText,
    source: str,
    stored: StoredDocuments,
    val_documents: int,
    options: ReadOptions,
) -> ContinuedText:
    """Find the known documents in a text, and split what was added to them.

    Every known document must be there: as it was, at any place, or as the beginning of a document
    to whose end text was added.

    Args:
        known: the text as it was.
        source: its name, for messages.
        stored: the text as it is.
        val_documents: the first so many documents are validation text that is given.
        options: ``val_fraction``.

    Raises:
        InputError: a document is not there, or text was added and the user did not ask for it.
    """
    record, scan = known.record, stored.scan
    is_same_val = val_documents == record.val_documents and np.array_equal(
        scan.keys[:val_documents], record.keys[:val_documents]
    )
    if not is_same_val:
        raise known.changed(source, "the validation text is another one")
    parts, ends = _find_known(record, stored)
    if missing := sum(part is None for part in parts):
        raise known.changed(
            source, f"documents that are not there as they were: {missing:,} of {len(parts):,}"
        )
    found = [part for part in parts if part is not None]
    added = [
        (i, ends.get(i, 0), length)
        for i, length in enumerate(scan.lengths.tolist())
        if i >= val_documents and ends.get(i, 0) < length
    ]
    if not added:
        plan = SplitPlan(record.cuts, record.lengths)
        return ContinuedText(plan, record, record.identity["fingerprint"], 0, stored, found)
    new = scan_documents(_read_parts(stored, added))
    if not known.takes_additions:
        raise InputError(
            f"the text of {source} has grown since {known.run} was saved, by "
            f"{int(new.sizes.sum()):,} bytes: mmrec train --resume {known.run} --data {source} "
            "takes up what was added"
        )
    new_plan = _plan_added(record, scan, new, [i for i, _, _ in found], options)
    last_known = {i: k for k, (i, _, _) in enumerate(found)}
    whole = DocumentRecord(
        np.concatenate([record.keys, new.keys]),
        np.concatenate([record.lengths, new.lengths]),
        np.concatenate([record.cuts, new_plan.cuts]),
        np.concatenate(
            [record.continues, [last_known[i] if begin else -1 for i, begin, _ in added]]
        ).astype(np.int64),
        val_documents,
        earlier=[*record.earlier, record.identity],
    )
    chain = f"{record.identity['fingerprint']} {new.fingerprint}"
    plan = SplitPlan(
        whole.cuts, whole.lengths, new_plan.duplicates, new_plan.near_duplicates, new_plan.alike
    )
    return ContinuedText(
        plan,
        whole,
        hashlib.sha256(chain.encode()).hexdigest(),
        len(added),
        stored,
        found + added,
    )


def _plan_added(
    record: DocumentRecord,
    scan: SourceScan,
    new: SourceScan,
    places: list[int],
    options: ReadOptions,
) -> SplitPlan:
    """Split what was added; ``places`` are the documents of the source that hold the known ones."""
    return plan_added_split(
        new,
        options,
        known_keys=record.keys,
        known_signatures=scan.signatures[places],
        known_plan=SplitPlan(record.cuts, record.lengths),
        val_documents=record.val_documents,
    )


def _find_known(
    record: DocumentRecord, stored: StoredDocuments
) -> tuple[list[tuple[int, int, int] | None], dict[int, int]]:
    """Find every known document in a text.

    Returns:
        For each one the document of the text that holds it, and the characters between which it
        stands, or None; and for each document of the text that holds known ones, where they end.
    """
    followers = {int(k): i for i, k in enumerate(record.continues) if k >= 0}
    keys, lengths = stored.scan.keys.tolist(), stored.scan.lengths.tolist()
    first_of, place_of = _first_places(record.keys.tolist()), _first_places(keys)
    parts: list[tuple[int, int, int] | None] = [None] * len(record.keys)
    ends: dict[int, int] = {}
    longer: list[list[int]] = []
    for k in np.flatnonzero(record.continues < 0).tolist():
        key = int(record.keys[k])
        if first_of[key] != k:  # a copy, which is in neither split
            continue
        if k not in followers and key in place_of:
            place = place_of[key]
            parts[k], ends[place] = (place, 0, lengths[place]), lengths[place]
            continue
        chain = [k]
        while chain[-1] in followers:
            chain.append(followers[chain[-1]])
        longer.append(chain)
    if longer and len(longer) <= MAX_LONGER:
        candidates = [i for i, key in enumerate(keys) if i not in ends and place_of[key] == i]
        _find_beginnings(record, stored, longer, candidates, parts, ends)
    for i, key in enumerate(keys):  # copies add nothing
        if place_of[key] in ends or key in first_of:
            ends.setdefault(i, lengths[i])
    for k, key in enumerate(record.keys.tolist()):
        if record.continues[k] < 0:
            parts[k] = parts[first_of[key]]
    return parts, ends


def _first_places(keys: list[int]) -> dict[int, int]:
    """Index of the first document with each key."""
    return {key: len(keys) - 1 - i for i, key in enumerate(reversed(keys))}


def _find_beginnings(
    record: DocumentRecord,
    stored: StoredDocuments,
    chains: list[list[int]],
    candidates: list[int],
    parts: list[tuple[int, int, int] | None],
    ends: dict[int, int],
) -> None:
    """Find known documents, and those that continue them, at the beginning of longer documents."""
    by_beginning = {
        (int(record.lengths[chain[0]]), int(record.keys[chain[0]])): chain for chain in chains
    }
    all_lengths = sorted({length for length, _ in by_beginning})
    for i in candidates:
        wanted = all_lengths[: bisect.bisect(all_lengths, stored.scan.lengths[i])]
        if not wanted:
            continue
        for beginning in reversed(_beginning_keys(stored.read(i, 0, wanted[-1]), wanted)):
            chain = by_beginning.get(beginning, [])
            if chain and _continues_so(record, stored, chain, i):
                end = 0
                for k in chain:
                    begin, end = end, end + int(record.lengths[k])
                    parts[k] = (i, begin, end)
                ends[i] = end
                del by_beginning[beginning]
                break


def _continues_so(
    record: DocumentRecord, stored: StoredDocuments, chain: list[int], place: int
) -> bool:
    """Whether the documents of a chain but the first follow it in a document of the text."""
    begin = int(record.lengths[chain[0]])
    for k in chain[1:]:
        end = begin + int(record.lengths[k])
        if end > stored.scan.lengths[place]:
            return False
        [(_, key)] = _beginning_keys(stored.read(place, begin, end), [end - begin])
        if key != int(record.keys[k]):
            return False
        begin = end
    return True


def _beginning_keys(pieces: Iterable[Document], lengths: list[int]) -> list[tuple[int, int]]:
    """Keys of the first so many characters of a document, for each of some ascending lengths."""
    digest, chars, remaining = hashlib.sha256(), 0, list(lengths)
    keys: list[tuple[int, int]] = []
    for piece in pieces:
        text = piece.text
        while remaining and remaining[0] <= chars + len(text):
            n = remaining.pop(0)
            beginning = digest.copy()
            beginning.update(text[: n - chars].encode())
            keys.append((n, int.from_bytes(beginning.digest()[:8], "big")))
        digest.update(text.encode())
        chars += len(text)
    return keys


def _read_parts(
    stored: StoredDocuments, parts: Iterable[tuple[int, int, int]]
) -> Iterator[Document]:
    for document, begin, end in parts:
        yield from stored.read(document, begin, end)
