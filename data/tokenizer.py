"""Tokenizers by name: byte-level BPE (Hugging Face ``tokenizers``), characters, bytes.

Every tokenizer has one special token, ``<|endoftext|>``, that ends a document. It never comes out
of text: the letters ``<|endoftext|>`` in a text are encoded as letters.
"""

import codecs
import json
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np

from mmrec.errors import InputError

KINDS = ("bpe", "char", "byte")
EOT = "<|endoftext|>"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        kind: ``bpe``, ``char`` or ``byte``.
        vocab_size: number of ids.
        eot: id of the end of a document.
    """

    def __init__(self, kind: str, vocabulary: str) -> None:
        """``vocabulary``: for bpe JSON of ``tokens``, the words in order of their ids, and
        ``merges``, pairs of words; for char the characters in order; for byte nothing.

        Raises ValueError or InputError if it is not that.
        """
        self.kind, self._vocabulary = kind, vocabulary
        self.eot = 256 if kind == "byte" else 0
        if kind == "bpe":
            stored = json.loads(vocabulary)
            self._bytes = _byte_table(stored["tokens"], stored["merges"])
            self._bpe = _library(stored["tokens"], stored["merges"])
            self.vocab_size = len(self._bytes)
        elif kind == "char":
            vocabulary.encode()  # halves of a surrogate pair are no characters
            self.vocab_size = len(vocabulary) + 1
            self._ids = {c: i + 1 for i, c in enumerate(vocabulary)}
            if len(self._ids) != len(vocabulary):
                raise ValueError("a character stands in it twice")
        elif kind == "byte":
            self.vocab_size = 257
        else:
            raise InputError(f"tokenizer must be one of {', '.join(KINDS)}; got {kind!r}")

    def encode(self, text: str) -> np.ndarray:
        """Ids (n,) int64 of a text. Raises InputError at a character unknown to ``char``."""
        return self.encode_batch([text])[0].astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (n,) of each text, whole numbers of some dtype, on all cores."""
        if self.kind == "bpe":
            made = self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.frombuffer(array("I", e.ids), np.uint32) for e in made]  # the fastest way
        if self.kind == "byte":
            return [np.frombuffer(t.encode(), np.uint8) for t in texts]
        try:
            return [np.array([self._ids[c] for c in t], np.int64) for t in texts]
        except KeyError as error:
            raise InputError(
                f"the character {error.args[0]!r} is not among the {self.vocab_size - 1} that this "
                "char tokenizer knows; bpe and byte know every character"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; none for the end of a document."""
        if token == self.eot:
            return b""
        if self.kind == "byte":
            return bytes([token])
        return self._vocabulary[token - 1].encode() if self.kind == "char" else self._bytes[token]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 (a character cut short) become U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", "replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece as tokens come, a character only when all its bytes are there."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            yield decoder.decode(self.token_bytes(int(token)))
        yield decoder.decode(b"", final=True)

    def to_json(self) -> str:
        """Everything needed to build the tokenizer again."""
        return json.dumps({"kind": self.kind, "vocabulary": self._vocabulary}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Build from what to_json gave. Raises InputError if the text is damaged."""
        try:
            stored = json.loads(text)
            return cls(str(stored["kind"]), str(stored["vocabulary"]))
        except InputError:
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            raise InputError(f"the stored tokenizer is damaged: {error!r}") from None


def _byte_table(tokens: list[str], merges: list[list[str]]) -> list[bytes]:
    """Bytes of every id: byte-level BPE writes byte b as a printable character.

    The library trusts what it is given, so words and merges are checked here.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    known = set(tokens)
    if tokens[:1] != [EOT] or len(known) != len(tokens) or not known >= table.keys():
        raise ValueError(f"its words must be distinct: {EOT}, the 256 bytes, and more")
    if not all(len(m) == 2 and {*m, m[0] + m[1]} <= known for m in merges):
        raise ValueError("its merges must be pairs of its words that make a word")
    return [b"", *(bytes(table[c] for c in word) for word in tokens[1:])]


def _library(tokens: list[str], merges: list[list[str]]) -> Any:
    """The ``tokenizers`` object of a byte-level BPE."""
    # encode_batch uses threads of its own; without this a later fork prints a warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    ids = {word: i for i, word in enumerate(tokens)}
    made = Library(models.BPE(ids, [(a, b) for a, b in merges]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken(EOT, normalized=False, special=True)])
    made.encode_special_tokens = True  # the letters of EOT stay letters
    return made


def check_wish(kind: str, vocab_size: int) -> None:
    """Raise InputError if there is no such tokenizer: asked before the work of reading text."""
    if kind not in KINDS:
        raise InputError(f"tokenizer must be one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "bpe" and not 257 <= vocab_size <= 1 << 32:
        raise InputError(
            f"a bpe vocabulary must hold at least 257 tokens, the bytes and {EOT}, and at most "
            f"2^32; got {vocab_size}"
        )


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int = 5000) -> Tokenizer:
    """Train a tokenizer of that kind; ``vocab_size`` counts only for ``bpe``.

    Raises:
        InputError: unknown kind, or a BPE vocabulary too small for the 256 bytes and the end token.
    """
    check_wish(kind, vocab_size)
    if kind == "char":
        return Tokenizer("char", "".join(sorted(set().union(*texts))))
    if kind != "bpe":
        return Tokenizer(kind, "")
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    model = json.loads(library.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    made = {"tokens": words, "merges": model["merges"]}
    return Tokenizer("bpe", json.dumps(made, ensure_ascii=False))


def extend_tokenizer(
    tokenizer: Tokenizer, texts: Iterable[str], vocab_size: int
) -> tuple[Tokenizer, list[list[int]]]:
    """Train a byte-level BPE on from its merges: old tokens keep their ids, new ones join old ones.

    Args:
        tokenizer: of kind ``bpe``.
        texts: what pairs are counted in.
        vocab_size: tokens wanted; fewer are made where no pair is left that comes twice.

    Returns:
        The tokenizer, and for each new token, in order, the ids of the old ones that it joins.

    Raises:
        InputError: another kind of tokenizer, or not more tokens than it has.
    """
    if tokenizer.kind != "bpe":
        raise InputError(f"only a bpe vocabulary can grow; this tokenizer is {tokenizer.kind!r}")
    if not tokenizer.vocab_size < vocab_size <= 1 << 32:
        raise InputError(
            f"a grown vocabulary must hold more than the {tokenizer.vocab_size:,} "
            f"tokens that there are, and at most 2^32; got {vocab_size}"
        )
    from tokenizers import pre_tokenizers

    stored = json.loads(tokenizer._vocabulary)
    tokens, merges = list(stored["tokens"]), list(stored["merges"])
    joins: dict[str, list[int]] = {word: [i] for i, word in enumerate(tokens)}
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts = Counter(piece for t in texts for piece, _ in splitter.pre_tokenize_str(t))
    words = [[t.value for t in tokenizer._bpe.model.tokenize(word)] for word in counts]
    times = list(counts.values())
    total: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], set[int]] = defaultdict(set)

    def count(i: int, sign: int) -> None:
        for pair in pairwise(words[i]):
            total[pair] += sign * times[i]
            places[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    queue = [(-n, pair) for pair, n in total.items()]
    heapify(queue)
    while queue and len(tokens) < vocab_size:
        n, pair = heappop(queue)
        if -n != total[pair]:  # counted anew since; a pair that still counts stands there again
            continue
        if -n < 2:
            break
        new = "".join(pair)
        merges.append(list(pair))
        if new not in joins:
            tokens.append(new)
            joins[new] = joins[pair[0]] + joins[pair[1]]
        changed = set()
        for i in sorted(places.pop(pair)):
            count(i, -1)
            changed |= set(pairwise(words[i]))
            words[i] = _join(words[i], pair)
            count(i, 1)
            changed |= set(pairwise(words[i]))
        for other in changed:
            heappush(queue, (-total[other], other))
    made = Tokenizer("bpe", json.dumps({"tokens": tokens, "merges": merges}, ensure_ascii=False))
    return made, [joins[word] for word in tokens[tokenizer.vocab_size :]]


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    """A word in which each such pair of pieces, from the left, is one piece."""
    made: list[str] = []
    at = 0
    while at < len(word):
        size = 2 if tuple(word[at : at + 2]) == pair else 1
        made.append("".join(word[at : at + size]))
        at += size
    return made
