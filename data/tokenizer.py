"""Tokenizers by name: byte-level BPE (Hugging Face ``tokenizers``), characters, bytes.

Every tokenizer has one special token, ``<|endoftext|>``, that ends a document. Those of models that
chat have further ones, which their chat template writes. Encoding never produces a special token:
the letters ``<|endoftext|>`` in a text are encoded as letters.
"""

import functools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np

from mmrec.errors import InputError
from mmrec.runtime.progress import progress_bar, ticking_bar

KINDS = ("bpe", "char", "byte")
EOT = "<|endoftext|>"
MAX_VOCAB = 1 << 32
"""Most tokens of a tokenizer."""
MAX_WORD_BYTES = 256
"""Bytes of a word from which BPE training learns. Longer ones are cut there: the time of training
grows with the length of the words, and a text without spaces is one word."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        kind: ``bpe``, ``char`` or ``byte``.
        vocab_size: number of ids.
        eot: id of the end of a document.
        special_tokens: ids of the special tokens by name, ``<|endoftext|>`` among them.
        chat_template: how messages become a text, in Jinja as transformers uses it; empty if the
            model does not chat.
    """

    def __init__(
        self,
        kind: str,
        vocabulary: str,
        special_tokens: Mapping[str, int] | None = None,
        chat_template: str = "",
    ) -> None:
        """Build a tokenizer from its vocabulary.

        Args:
            kind: ``bpe``, ``char`` or ``byte``.
            vocabulary: for ``bpe`` JSON of ``tokens``, the words in order of their ids, and
                ``merges``, pairs of words; for ``char`` the characters in order; for ``byte``
                the empty string.
            special_tokens: ids of further special tokens by name. The vocabulary has the other
                ids, in order.
            chat_template: see the attribute.

        Raises:
            InputError: there is no such kind.
            ValueError: the vocabulary or the special tokens are damaged.
        """
        self.kind, self._vocabulary, self.chat_template = kind, vocabulary, chat_template
        self.eot = 256 if kind == "byte" else 0
        self._added = dict(special_tokens or {})
        if kind == "bpe":
            stored = json.loads(vocabulary)
            token_bytes = _byte_table(stored["tokens"], stored["merges"])
        elif kind == "char":
            vocabulary.encode()  # halves of a surrogate pair are no characters
            token_bytes = [b"", *(character.encode() for character in vocabulary)]
        elif kind == "byte":
            token_bytes = [*(bytes([i]) for i in range(256)), b""]
        else:
            raise InputError(f"tokenizer must be one of {', '.join(KINDS)}; got {kind!r}")
        self._bytes = _insert_special_tokens(token_bytes, self._added, self.eot)
        self.vocab_size = len(self._bytes)
        self.special_tokens = {EOT: self.eot, **self._added}
        self._word_ids = np.delete(np.arange(self.vocab_size), list(self._added.values()))
        """Id of each entry of the vocabulary."""
        if kind == "bpe":
            self._bpe = _build_bpe(stored["tokens"], stored["merges"], self._word_ids.tolist())
        elif kind == "char":
            code_points = _code_points(vocabulary)
            # id of each code point; 0, which no character has, if it is unknown
            self._ids = np.zeros(int(code_points.max(initial=0)) + 2, np.uint32)
            self._ids[code_points] = self._word_ids[1:]
            if np.count_nonzero(self._ids) != len(vocabulary):
                raise ValueError("its vocabulary holds a character twice")

    def encode(self, text: str, name: str = "the text") -> np.ndarray:
        """Return the token ids (n,) int64 of a text.

        Args:
            text: the text.
            name: what an error calls it.

        Raises:
            InputError: the text holds a character that a ``char`` tokenizer does not know, or half
                of a surrogate pair, which is no character.
        """
        self.check_text(text, name)
        if self.kind == "bpe":
            return np.array(self._bpe.encode(text, add_special_tokens=False).ids, np.int64)
        return self.encode_batch([text])[0].astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokenise texts on all cores.

        Returns:
            The token ids of each text, (n,) of an integer dtype that depends on the kind.

        Raises:
            InputError: as for ``encode``.
        """
        if self.kind == "bpe":
            ids, bounds = self._batch_bpe.encode_batch_flat(list(texts), split_special_tokens=True)
            tokens, ends = np.frombuffer(ids, np.uint32), np.frombuffer(bounds, np.uint64).tolist()
            return [tokens[begin:end] for begin, end in pairwise(ends[: len(texts) + 1])]
        if self.kind == "byte":
            return [np.frombuffer(t.encode(), np.uint8) for t in texts]
        batch = [self._char_ids(text) for text in texts]
        for text, ids in zip(texts, batch, strict=True):
            if not ids.all():
                self.check_text(text)
        return batch

    @functools.cached_property
    def _batch_bpe(self) -> Any:
        """The same BPE in ``fastokens``, which remembers the tokens of words: for much text."""
        from fastokens import Tokenizer as BatchTokenizer

        return BatchTokenizer.from_json_str(self._bpe.to_str())

    def _char_ids(self, text: str) -> np.ndarray:
        """Ids (n,) of characters, 0 for those that a ``char`` tokenizer does not know."""
        return np.take(self._ids, _code_points(text), mode="clip")

    def check_text(self, text: str, name: str = "the text", line: int = 1, column: int = 1) -> None:
        """Check that every character of a text can be tokenised.

        Args:
            text: the text, or a piece of one.
            name: what an error calls it.
            line: line of the text, from 1, in which the piece begins.
            column: character of that line, from 1, with which the piece begins.

        Raises:
            InputError: as for ``encode``.
        """
        bad = _find_surrogate(text)
        if bad is None and self.kind == "char":
            ids = self._char_ids(text)
            bad = None if ids.all() else int(np.argmin(ids))
        if bad is None:
            return
        start_of_line = text.rfind("\n", 0, bad) + 1
        line += text.count("\n", 0, bad)
        column = bad - start_of_line + (1 if start_of_line else column)
        place = f"{name}, line {line:,}, character {column:,}"
        character, code_point = text[bad], f"U+{ord(text[bad]):04X}"
        if "\ud800" <= character <= "\udfff":
            raise InputError(f"{place}: {code_point} is half of a surrogate pair, not a character")
        raise InputError(
            f"{place}: the character {character!r} ({code_point}) is not among the "
            f"{len(self._vocabulary):,} that this char tokenizer knows; bpe and byte know every "
            "character, and mmrec finetune and mmrec grow --data add characters to a model"
        )

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token; those of a special token are empty."""
        return self._bytes[token]

    def special_name(self, token: int) -> str | None:
        """Return the name of a special token; None of any other."""
        return next((name for name, i in self.special_tokens.items() if i == token), None)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", "replace")

    def extends(self, other: "Tokenizer") -> bool:
        """Whether this tokenizer makes the same tokens as another one of all that the other knows.

        Equal tokenizers do, a ``char`` tokenizer to which characters were added, and any to which
        special tokens were added.
        """
        if self.kind == other.kind == "char":
            is_same_text = self._vocabulary.startswith(other._vocabulary)
        else:
            is_same_text = (self.kind, self._vocabulary) == (other.kind, other._vocabulary)
        new = self._added.items() - other._added.items()
        return (
            is_same_text
            and other._added.items() <= self._added.items()
            and all(token >= other.vocab_size for _, token in new)
        )

    def with_chat_template(self, template: str, special_tokens: Iterable[str]) -> "Tokenizer":
        """Return this tokenizer with a chat template.

        Args:
            template: see the attribute ``chat_template``.
            special_tokens: names of the special tokens that it writes. New ones get ids after those
                that there are.

        Raises:
            InputError: there is no room for them.
        """
        new = [name for name in special_tokens if name not in self.special_tokens]
        size = self.vocab_size + len(new)
        if size > MAX_VOCAB:
            raise InputError(
                f"a tokenizer may have {MAX_VOCAB:,} tokens; with the {len(new)} special tokens of "
                f"the chat template this one would have {size:,}"
            )
        added = self._added | {name: self.vocab_size + i for i, name in enumerate(new)}
        return Tokenizer(self.kind, self._vocabulary, added, template)

    def _with_vocabulary(self, vocabulary: str) -> "Tokenizer":
        """This tokenizer with entries added to the end of its vocabulary."""
        return Tokenizer(self.kind, vocabulary, self._added, self.chat_template)

    def to_json(self) -> str:
        """Return all that is needed to build the tokenizer again, as JSON."""
        values: dict[str, Any] = {"kind": self.kind, "vocabulary": self._vocabulary}
        if self._added:
            values["special_tokens"] = self._added
        if self.chat_template:
            values["chat_template"] = self.chat_template
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Build a tokenizer from the text of ``to_json``.

        Raises:
            InputError: the text is damaged.
        """
        try:
            stored = json.loads(text)
            special_tokens, template = stored.get("special_tokens"), stored.get("chat_template", "")
            if not isinstance(template, str):
                raise ValueError("its chat template must be text")
            tokenizer = cls(
                str(stored["kind"]), str(stored["vocabulary"]), special_tokens, template
            )
            tokenizer.to_json().encode()  # halves of a surrogate pair are no text, in no field
            return tokenizer
        except InputError:
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            raise InputError(f"the stored tokenizer is damaged: {error!r}") from None


def _insert_special_tokens(
    token_bytes: list[bytes], ids: Mapping[str, int], eot: int
) -> list[bytes]:
    """Bytes of every id, those of special tokens empty.

    Their ids must come after the end token's and leave no gap; a ValueError says so.
    """
    for name, token in sorted(ids.items(), key=lambda item: item[1]):
        is_id = type(token) is int and eot < token <= len(token_bytes)
        if not is_id or not name or name == EOT:
            raise ValueError(f"its special token {name!r} has the id {token!r}")
        token_bytes.insert(token, b"")
    if len(set(ids.values())) != len(ids):
        raise ValueError("two special tokens have one id")
    return token_bytes


def _code_points(text: str) -> np.ndarray:
    """Code points (n,) uint32 of a text. Half of a surrogate pair has one, too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _find_surrogate(text: str) -> int | None:
    """Index of the first half of a surrogate pair; None if the text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def byte_characters() -> dict[str, int]:
    """The bytes by the printable characters that a byte-level BPE writes for them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_table(tokens: list[str], merges: list[list[str]]) -> list[bytes]:
    """Bytes of every token id of a byte-level BPE, which writes each byte as a printable character.

    The library does not check words and merges, so they are checked here, by a ValueError.
    """
    table = byte_characters()
    known = set(tokens)
    if tokens[:1] != [EOT] or len(known) != len(tokens) or not known >= table.keys():
        raise ValueError(f"its words must be distinct, and be {EOT}, the 256 bytes, and others")
    if not all(len(m) == 2 and {*m, m[0] + m[1]} <= known for m in merges):
        raise ValueError("its merges must be pairs of its words that join to a word")
    return [b"", *(bytes(table[c] for c in word) for word in tokens[1:])]


def _pre_tokenizer(*, cut_long_words: bool = False) -> Any:
    """Build what divides a text into words, each a string of characters that stand for bytes.

    Args:
        cut_long_words: cut words at ``MAX_WORD_BYTES``, for training.
    """
    from tokenizers import Regex, pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not cut_long_words:
        return words
    pieces = pre_tokenizers.Split(Regex(f".{{{MAX_WORD_BYTES}}}"), "isolated")
    return pre_tokenizers.Sequence([words, pieces])


def _build_bpe(tokens: list[str], merges: list[list[str]], ids: list[int]) -> Any:
    """Build the ``tokenizers`` object of a byte-level BPE, whose words have these ids."""
    # encode_batch uses threads of its own; without this a later fork prints a warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as LibraryTokenizer

    vocabulary = dict(zip(tokens, ids, strict=True))
    bpe = LibraryTokenizer(models.BPE(vocabulary, [(a, b) for a, b in merges]))
    bpe.pre_tokenizer = _pre_tokenizer()
    bpe.add_special_tokens([AddedToken(EOT, normalized=False, special=True)])
    bpe.encode_special_tokens = True  # the letters of EOT stay letters
    return bpe


def check_tokenizer_settings(kind: str, vocab_size: int) -> None:
    """Check the settings of a tokenizer, before any text is read.

    Args:
        kind: ``bpe``, ``char`` or ``byte``.
        vocab_size: vocabulary of ``bpe``.

    Raises:
        InputError: there is no such kind, or the vocabulary is too small or too large.
    """
    if kind not in KINDS:
        raise InputError(f"tokenizer must be one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "bpe" and not 257 <= vocab_size <= MAX_VOCAB:
        raise InputError(
            f"a bpe vocabulary must hold at least 257 tokens, the bytes and {EOT}, and at most "
            f"2^32; got {vocab_size}"
        )


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int = 5000) -> Tokenizer:
    """Train a tokenizer.

    Args:
        kind: ``bpe``, ``char`` or ``byte``; the last needs no training.
        texts: the text to train on.
        vocab_size: vocabulary of ``bpe``; the text may be too short to fill it.

    Raises:
        InputError: there is no such kind, or a ``bpe`` vocabulary is too small for the 256 bytes
            and the end token, or too large.
    """
    check_tokenizer_settings(kind, vocab_size)
    if kind == "char":
        return Tokenizer("char", "".join(sorted(_characters(texts))))
    if kind != "bpe":
        return Tokenizer(kind, "")
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    bpe = LibraryTokenizer(models.BPE())
    bpe.pre_tokenizer = _pre_tokenizer(cut_long_words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with ticking_bar("training the tokenizer") as bar:
        bpe.train_from_iterator(_counted(texts, bar), trainer)
    model = json.loads(bpe.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocabulary = {"tokens": words, "merges": model["merges"]}
    return Tokenizer("bpe", json.dumps(vocabulary, ensure_ascii=False))


def _characters(texts: Iterable[str]) -> set[str]:
    """The characters of texts, of which one at a time is in memory."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    return characters


def _counted(texts: Iterable[str], bar: Any) -> Iterator[str]:
    """Pass texts on, and add the size of each to a progress bar."""
    for text in texts:
        bar.update(len(text.encode()))
        yield text


def extend_characters(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokenizer:
    """Add to a ``char`` tokenizer the characters of texts that it does not know.

    Args:
        tokenizer: of kind ``char``.
        texts: the texts, of which one at a time is in memory.

    Returns:
        A tokenizer with the new characters after the old ones, in the order of their code points.
    """
    assert tokenizer.kind == "char"
    known = tokenizer._vocabulary
    new = "".join(sorted(_characters(texts).difference(known)))
    return tokenizer._with_vocabulary(known + new)


def extend_tokenizer(
    tokenizer: Tokenizer, texts: Iterable[str], vocab_size: int
) -> tuple[Tokenizer, list[list[int]]]:
    """Continue the training of a byte-level BPE: old tokens keep their ids, new ones join old ones.

    Args:
        tokenizer: of kind ``bpe``.
        texts: the text in which pairs of tokens are counted.
        vocab_size: tokens to have in the end; there are fewer if no pair occurs twice any more.

    Returns:
        The tokenizer, and for each new token, in order, the ids of the old ones that it joins.

    Raises:
        InputError: the tokenizer is of another kind, or has as many tokens already.
    """
    if tokenizer.kind != "bpe":
        hint = ": grow --data without --vocab adds characters" if tokenizer.kind == "char" else ""
        raise InputError(
            f"only a bpe vocabulary can grow; this tokenizer is {tokenizer.kind!r}{hint}"
        )
    if not tokenizer.vocab_size < vocab_size <= MAX_VOCAB:
        raise InputError(
            f"a grown vocabulary must hold more than the {tokenizer.vocab_size:,} "
            f"tokens that there are, and at most 2^32; got {vocab_size}"
        )
    stored = json.loads(tokenizer._vocabulary)
    tokens, merges = list(stored["tokens"]), list(stored["merges"])
    joined_ids = {token: [i] for token, i in zip(tokens, tokenizer._word_ids.tolist(), strict=True)}
    old_count, new_count = len(tokens), vocab_size - tokenizer.vocab_size
    pre_tokenizer = _pre_tokenizer(cut_long_words=True)
    with progress_bar(None, "reading") as bar:
        word_counts = Counter(
            word for t in _counted(texts, bar) for word, _ in pre_tokenizer.pre_tokenize_str(t)
        )
    words = [[t.value for t in tokenizer._bpe.model.tokenize(word)] for word in word_counts]
    bar = progress_bar(new_count, "adding tokens", "tok")
    frequencies = list(word_counts.values())
    pair_counts: Counter[tuple[str, str]] = Counter()
    words_with_pair: dict[tuple[str, str], set[int]] = defaultdict(set)

    def count_pairs(word: int, sign: int) -> None:
        for pair in pairwise(words[word]):
            pair_counts[pair] += sign * frequencies[word]
            words_with_pair[pair].add(word)

    for word in range(len(words)):
        count_pairs(word, 1)
    queue = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(queue)
    while queue and len(tokens) < old_count + new_count:
        negative_count, pair = heappop(queue)
        if -negative_count != pair_counts[pair]:  # outdated; the queue holds the new count, too
            continue
        if -negative_count < 2:
            break
        token = "".join(pair)
        merges.append(list(pair))
        if token not in joined_ids:
            tokens.append(token)
            joined_ids[token] = joined_ids[pair[0]] + joined_ids[pair[1]]
            bar.update()
        changed_pairs = set()
        for word in sorted(words_with_pair.pop(pair)):
            count_pairs(word, -1)
            changed_pairs |= set(pairwise(words[word]))
            words[word] = _merge_pair(words[word], pair)
            count_pairs(word, 1)
            changed_pairs |= set(pairwise(words[word]))
        for changed in changed_pairs:
            heappush(queue, (-pair_counts[changed], changed))
    bar.close()
    vocabulary = json.dumps({"tokens": tokens, "merges": merges}, ensure_ascii=False)
    return tokenizer._with_vocabulary(vocabulary), [joined_ids[t] for t in tokens[old_count:]]


def _merge_pair(word: list[str], pair: tuple[str, str]) -> list[str]:
    """A word's tokens, each such pair of them, from the left, replaced by their join."""
    merged: list[str] = []
    position = 0
    while position < len(word):
        size = 2 if tuple(word[position : position + 2]) == pair else 1
        merged.append("".join(word[position : position + size]))
        position += size
    return merged
