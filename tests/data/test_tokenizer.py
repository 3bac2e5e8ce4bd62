"""Tokenizers give back the text that they encoded, at once and as a stream."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmrec.data import tokenizer as tokenizer_module
from mmrec.data.readers import Document
from mmrec.data.tokenize import check_characters, encode_documents
from mmrec.data.tokenizer import (
    EOT,
    MAX_WORD_BYTES,
    Tokenizer,
    extend_characters,
    extend_tokenizer,
    train_tokenizer,
)
from mmrec.errors import InputError

TEXT = "the cat sat on the mat; the thé was thin. 漢字 🙂\n" * 20
KINDS = [train_tokenizer(kind, [TEXT], 300) for kind in ("bpe", "char", "byte")]


@pytest.mark.parametrize("tokenizer", KINDS, ids=lambda t: t.kind)
def test_round_trip_and_storage(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.eot not in ids
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode(TEXT).tolist() == ids.tolist()
    assert (again.vocab_size, again.eot) == (tokenizer.vocab_size, tokenizer.eot)
    assert sum(len(tokenizer.token_bytes(i)) for i in ids) == len(TEXT.encode())


@given(st.text())
def test_every_text_survives_bpe_and_bytes(text: str) -> None:
    for tokenizer in (KINDS[0], KINDS[2]):
        ids = tokenizer.encode(text + EOT)
        assert tokenizer.eot not in ids  # the letters are letters
        assert tokenizer.decode(ids) == text + EOT


AWKWARD = [
    "",
    EOT * 3,
    "a" * 70_000 + " " + "b" * 65_536,
    "\n" * 70_000 + "x",
    "   indented\n\n\n   by spaces   \n\t\ttabs \u00a0\u2003 of other kinds",
    "it's we'll THEY'RE 'sdon't ''ll 's's",
    "１２３ ٣٤ ⅷ x² 3rd e\u0301 \u0301 ǅ ʰ 한국어 日本語 ไทย हिन्दी \U0001f600\u200d\U0001f680",
    "\u180e\u200b\ufeff\u0085\u2028 and\x1c\x1d\x1e\x1f controls\x7f\x01",
]


@given(st.lists(st.text() | st.text("ab '\u2019stl1\n\t\u00a0é日"), max_size=8))
@example(AWKWARD)
def test_a_batch_has_the_tokens_of_the_tokenizers_library(texts: list[str]) -> None:
    """Each text alone is encoded by ``tokenizers``, a batch by ``fastokens``."""
    batch = KINDS[0].encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [KINDS[0].encode(t).tolist() for t in texts]


@pytest.mark.parametrize("vocab_size", [300, 2_000])
def test_a_batch_of_real_text_has_the_tokens_of_the_tokenizers_library(
    vocab_size: int, library_documents: list[Document]
) -> None:
    tokenizer = train_tokenizer("bpe", [d.text for d in library_documents[:20]], vocab_size)
    texts = [d.text for d in library_documents[10:60]]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))


def test_bytes_that_are_no_character() -> None:
    assert KINDS[2].decode([0xF0, 0x9F]) == "\ufffd"
    assert KINDS[2].decode([104, 105, 256]) == "hi"


def test_bpe_learns_merges() -> None:
    assert len(KINDS[0].encode(TEXT)) < 0.7 * len(TEXT.encode())
    assert KINDS[0].vocab_size <= 300


def test_a_text_without_spaces_is_learned_in_pieces() -> None:
    """The time of a merge grows with the length of the words that it is searched in."""
    text = "ab" * 40_000
    trained = train_tokenizer("bpe", [text], 300)
    longest = max(len(trained.token_bytes(i)) for i in range(trained.vocab_size))
    assert longest == MAX_WORD_BYTES
    assert len(trained.encode(text)) == -(-len(text) // MAX_WORD_BYTES)
    grown, _ = extend_tokenizer(KINDS[0], ["漢" * 40_000], 400)
    longest = max(len(grown.token_bytes(i)) for i in range(grown.vocab_size))
    assert 128 < longest <= MAX_WORD_BYTES
    assert grown.decode(grown.encode("漢" * 1000)) == "漢" * 1000


def test_cutting_long_words_changes_nothing_for_ordinary_text(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_file.read_text()
    cut = train_tokenizer("bpe", [text], 500)
    monkeypatch.setattr(tokenizer_module, "MAX_WORD_BYTES", 1 << 14)
    assert train_tokenizer("bpe", [text], 500).to_json() == cut.to_json()


def test_the_characters_are_collected_text_by_text() -> None:
    texts = (chr(97 + i) * 1_000_000 for i in range(20))
    tracemalloc.start()
    try:
        tokenizer = train_tokenizer("char", texts)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert tokenizer.vocab_size == 21


def test_characters_are_added_at_the_end() -> None:
    old = KINDS[1]
    new = extend_characters(old, ["the $", "é漢ß$"])
    assert new.vocab_size == old.vocab_size + 2
    assert new.encode(TEXT).tolist() == old.encode(TEXT).tolist()
    assert new.encode("$ß").tolist() == [old.vocab_size, old.vocab_size + 1]
    assert new.decode(new.encode("the $ß")) == "the $ß"
    assert new.extends(old)
    assert new.extends(new)
    assert not old.extends(new)
    assert not new.extends(KINDS[2])


def test_an_unknown_character_is_named_with_its_place() -> None:
    """In the lines of the document, whose pieces may end anywhere."""
    known = train_tokenizer("char", ["ab\n"])
    pieces = ["ab\nab", "ab", "b\n", "ab$\U0001f642"]
    documents = [
        Document("x.txt", "ab"),
        *(Document("x.txt#1", piece, more=True) for piece in pieces),
    ]
    place = r"x\.txt#1, line 3, character 3: the character '\$' \(U\+0024\) is not among the 3 "
    for read in (list, lambda checked: encode_documents(known, checked)):
        with pytest.raises(InputError, match=place):
            read(check_characters(known, documents))
    documents[2] = Document("x.txt#1", "ab\udc80", more=True)
    with pytest.raises(InputError, match=r"x\.txt#1, line 2, character 5: U\+DC80 is half of a"):
        list(check_characters(known, documents))
    assert len(list(check_characters(KINDS[2], documents))) == len(documents)
    with pytest.raises(InputError, match=r"the prompt, line 1, character 2: .*U\+1F642"):
        known.encode("a\U0001f642", "the prompt")
    for tokenizer in KINDS:
        with pytest.raises(InputError, match=r"line 2, character 1: U\+D83D is half of a surr"):
            tokenizer.encode("a\n\ud83d")


def test_bad_input() -> None:
    with pytest.raises(
        InputError,
        match=r"the text, line 1, character 1: the character .Q. \(U\+0051\) is not among the 19",
    ):
        KINDS[1].encode("Q")
    with pytest.raises(InputError, match="at least 257 tokens, .*; got 100"):
        train_tokenizer("bpe", [TEXT], 100)
    with pytest.raises(InputError, match="one of bpe, char, byte; got 'word'"):
        train_tokenizer("word", [TEXT])
    for damaged in ("", "{}", '{"kind": "bpe", "vocabulary": "x"}', "[1]"):
        with pytest.raises(InputError, match="stored tokenizer is damaged"):
            Tokenizer.from_json(damaged)
    # half of a surrogate pair is no text in any field
    for tokenizer in KINDS:
        special = {"\ud800": tokenizer.vocab_size}
        for change in ({"chat_template": "a\ud800"}, {"special_tokens": special}):
            stored = json.loads(tokenizer.to_json()) | change
            with pytest.raises(InputError, match="stored tokenizer is damaged"):
                Tokenizer.from_json(json.dumps(stored))


def test_the_training_of_a_bpe_is_continued(text_file: Path) -> None:
    """As good as one trained at once; old tokens keep their ids, and new ones join old ones."""
    text = text_file.read_text()
    old = train_tokenizer("bpe", [text], 300)
    grown, pieces = extend_tokenizer(old, [text], 420)
    assert grown.vocab_size == 420
    assert len(pieces) == 120
    for token in range(300):
        assert grown.token_bytes(token) == old.token_bytes(token)
    for token, joined in enumerate(pieces, 300):
        assert len(joined) > 1
        assert max(joined) < 300
        assert b"".join(map(old.token_bytes, joined)) == grown.token_bytes(token)
    ids = grown.encode(text)
    assert grown.decode(ids) == text
    assert Tokenizer.from_json(grown.to_json()).encode(text).tolist() == ids.tolist()
    at_once = len(train_tokenizer("bpe", [text], 420).encode(text))
    assert len(ids) == pytest.approx(at_once, rel=0.005)
    used = {int(i) for i in ids}
    assert len(used & set(range(300, 420))) > 90


def test_a_text_may_have_too_little_for_more_tokens() -> None:
    grown, pieces = extend_tokenizer(KINDS[0], ["aab aab xy aaaa aaaa"], 10_000)
    assert grown.vocab_size == KINDS[0].vocab_size + len(pieces) < 310
    assert grown.decode(grown.encode("aab xy aaaa")) == "aab xy aaaa"


@pytest.mark.parametrize("tokenizer", KINDS[1:], ids=lambda t: t.kind)
def test_only_a_bpe_grows(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="only a bpe vocabulary can grow"):
        extend_tokenizer(tokenizer, [TEXT], 1000)


def test_a_vocabulary_grows_after_special_tokens() -> None:
    """They keep their ids, and so does every old token."""
    trained = train_tokenizer("bpe", [TEXT], 300)
    old = trained.with_chat_template("", ["<|a|>", "<|b|>"])
    size, text = old.vocab_size, "newer words in a newer text " * 9
    assert list(old.special_tokens.values()) == [0, size - 2, size - 1]
    grown, pieces = extend_tokenizer(old, [text], size + 3)
    assert grown.special_tokens == old.special_tokens
    assert grown.vocab_size == size + 3
    for token in range(size):
        assert grown.token_bytes(token) == old.token_bytes(token)
    for token, joined in zip(range(size, size + 3), pieces, strict=True):
        assert grown.token_bytes(token) == b"".join(map(old.token_bytes, joined))
    ids = grown.encode(text).tolist()
    assert grown.decode(ids) == text
    assert max(ids) >= size
    assert not {size - 2, size - 1} & {*ids}
