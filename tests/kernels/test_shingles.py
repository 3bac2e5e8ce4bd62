"""The hashes of shingles are those that rensa makes of them as strings."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from rensa import RMinHash

from mmrec.kernels.shingles.kernel import shingle_hashes

SPACES = " \t\n\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000"
NO_SPACES = "\x1b\x08\u200b\u180e\ufeff\u3001\u2081\u16ff\xc2\xe2\xe3"


def hashes_of_strings(texts: list[str], words: int) -> list[list[int]]:
    """By ``str.split``, ``str.join`` and the hash of rensa."""
    shingles = []
    for text in texts:
        found = text.split()
        runs = [" ".join(found[i : i + words]) for i in range(len(found) - words + 1)]
        shingles.append(runs or [text])
    return [[int(h) for h in row] for row in RMinHash.hash_token_sets(shingles)]


@given(
    st.lists(st.text(f"ab日é😀{SPACES}{NO_SPACES}", max_size=60), min_size=1, max_size=5),
    st.integers(1, 6),
)
@example([SPACES.join("abcdefg"), NO_SPACES.join("abcdefg"), ""], 5)
@example([" ".join("x" * n for n in range(40))], 3)
def test_hashes_are_those_of_shingles_as_strings(texts: list[str], words: int) -> None:
    encoded = [text.encode() for text in texts]
    data = np.frombuffer(b"".join(encoded), np.uint8)
    text_ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    hashes = np.empty(len(data) + len(texts), np.uint64)
    ends = np.empty(len(texts), np.int64)
    shingle_hashes(data, text_ends, words, hashes, ends)
    found = [part.tolist() for part in np.split(hashes[: ends[-1]], ends[:-1])]
    assert found == hashes_of_strings(texts, words)
