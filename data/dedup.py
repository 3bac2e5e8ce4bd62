"""Near-duplicate search: MinHash signatures, and clusters of documents that share a band."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

BANDS = 16
"""Bands of a signature. Two documents are near-duplicates if they agree in one band."""
ROWS = 8
"""MinHash values that are hashed into one band."""
SHINGLE_WORDS = 5
"""Consecutive words of one shingle, the element of the sets that are compared."""
BATCH_BYTES = 1 << 20
"""Bytes of text whose shingles are hashed at once."""
BAND_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio


class SignatureBuilder:
    """Computes the banded MinHash signature of each text that is added, beside the reading.

    The elements are the shingles of five words. Two texts whose shingles overlap by 90 % (Jaccard
    similarity) agree in at least one of the 16 bands with probability 0.9999; by 80 %: 0.95; by
    50 %: 0.06.

    Source:
        Broder 1997, "On the resemblance and containment of documents"; computed by the ``rensa``
        package.
    """

    def __init__(self) -> None:
        self._texts: list[bytes] = []
        self._size = 0
        self._signatures = [np.empty((0, BANDS), np.uint64)]
        self._under_way: deque[Future[np.ndarray]] = deque()
        self._pool = ThreadPoolExecutor(1, "mmrec-signatures")

    def __enter__(self) -> "SignatureBuilder":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, text: bytes) -> None:
        """Add a text in UTF-8."""
        self._texts.append(text)
        self._size += len(text)
        if self._size >= BATCH_BYTES:
            self._submit()

    def _submit(self) -> None:
        self._under_way.append(self._pool.submit(_signatures, self._texts))
        self._texts, self._size = [], 0
        if len(self._under_way) > 2:  # so that memory stays bounded
            self._signatures.append(self._under_way.popleft().result())

    def finish(self) -> np.ndarray:
        """Return (texts, 16) uint64: one hash per band, of eight MinHash values."""
        if self._texts:
            self._submit()
        self._signatures += [job.result() for job in self._under_way]
        return np.concatenate(self._signatures)


def _signatures(texts: list[bytes]) -> np.ndarray:
    """The signatures (texts, 16) uint64 of a batch."""
    from rensa import RMinHash

    from mmrec.kernels.shingles.kernel import shingle_hashes

    data = np.frombuffer(b"".join(texts), np.uint8)
    text_ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    hashes = np.empty(len(data) + len(texts), np.uint64)
    ends = np.zeros(len(texts) + 1, np.int64)
    shingle_hashes(data, text_ends, SHINGLE_WORDS, hashes, ends[1:])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        hashes[: ends[-1]], ends.astype(np.uint64), BANDS * ROWS, 1
    )
    minima = np.array(matrix.to_rows(), np.uint64)
    bands = np.zeros((len(texts), BANDS), np.uint64)
    for row in range(ROWS):
        # the product wraps round modulo 2^64, as it should
        bands = (bands ^ minima[:, row::ROWS]) * np.uint64(BAND_MULTIPLIER)
        bands ^= bands >> np.uint64(29)
    return bands


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
