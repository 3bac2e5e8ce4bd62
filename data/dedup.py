"""Near-duplicate search: MinHash signatures, and clusters of documents that share a band."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mmrec.data.readers import Document

BANDS = 16
"""Bands of a signature. Two documents are near-duplicates if they agree in one band."""
ROWS = 8
"""MinHash values that are hashed into one band."""
SHINGLE_WORDS = 5
"""Consecutive words of one shingle, the element of the sets that are compared."""
BATCH_CHARS = 1 << 22
"""Characters of text whose shingles are hashed at once."""
BAND_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio

CountBytes = Callable[[int], Any]
"""Called with the bytes of each piece of text that has been read."""


def minhash_signatures(documents: Iterable[Document], count_bytes: CountBytes) -> np.ndarray:
    """Compute the banded MinHash signature of every document.

    The elements are the shingles of five words in a document's first 65,536 characters. Two
    documents whose shingles overlap by 90 % (Jaccard similarity) agree in at least one of the 16
    bands with probability 0.9999; by 80 %: 0.95; by 50 %: 0.06.

    Args:
        documents: documents, long ones in pieces; only the first piece of each is used.
        count_bytes: called with the UTF-8 bytes of each piece.

    Returns:
        (documents, 16) uint64: one hash per band, of eight MinHash values.

    Source:
        Broder 1997, "On the resemblance and containment of documents"; computed by the ``rensa``
        package.
    """
    from rensa import RMinHash

    signatures: list[np.ndarray] = [np.empty((0, BANDS), np.uint64)]
    shingle_sets: list[list[str]] = []
    batch_chars, is_continuation = 0, False

    def hash_batch() -> None:
        minima = np.array(
            RMinHash.digests_from_token_sets(shingle_sets, BANDS * ROWS, 1), np.uint64
        )
        bands = np.zeros((len(shingle_sets), BANDS), np.uint64)
        for row in range(ROWS):
            # the product wraps round modulo 2^64, as it should
            bands = (bands ^ minima[:, row::ROWS]) * np.uint64(BAND_MULTIPLIER)
            bands ^= bands >> np.uint64(29)
        signatures.append(bands)
        shingle_sets.clear()

    for document in documents:
        count_bytes(len(document.text.encode()))
        if not is_continuation:
            words = document.text.split()
            shingles = zip(*(words[i:] for i in range(SHINGLE_WORDS)), strict=False)
            shingle_sets.append(list(map(" ".join, shingles)) or [document.text])
            batch_chars += len(document.text)
            if batch_chars >= BATCH_CHARS:
                hash_batch()
                batch_chars = 0
        is_continuation = document.more
    if shingle_sets:
        hash_batch()
    return np.concatenate(signatures)


def near_duplicate_clusters(signatures: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Group documents that are connected by a chain of near-duplicates.

    Args:
        signatures: (documents, bands) uint64, see ``minhash_signatures``.
        keys: (documents,) uint64, a hash of each text.

    Returns:
        (documents,) int64: for each document the index of the one that represents its cluster.
        That is the one with the lowest hash of its key, another hash than the one by which a
        document's split is chosen.
    """
    order = np.argsort(keys * np.uint64(BAND_MULTIPLIER), kind="stable")
    label = np.empty(len(keys), np.int64)
    label[order] = np.arange(len(keys))
    while True:
        previous = label
        for band in signatures.T:
            group = np.unique(band, return_inverse=True)[1]
            lowest = np.full(len(keys), len(keys))
            np.minimum.at(lowest, group, label)
            label = lowest[group]
        if np.array_equal(previous, label):
            return order[label]
