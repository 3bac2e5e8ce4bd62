"""A ``tokenizer.json`` does under Hugging Face ``tokenizers`` what our tokenizer does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer

from mmrec.data.tokenizer import EOT, Tokenizer
from mmrec.errors import InputError
from mmrec.export.tokenizer import tokenizer_from_json, tokenizer_to_json
from tests.export.conftest import KINDS

STRANGE = f"a{EOT}b\r\n\tcafé 日本\U0001f600  {EOT}{EOT}\0 ſ ≠ end "


def library(tokenizer: Tokenizer, folder: Path, **options: bool) -> Any:
    """The tokenizer as the library reads it from a file."""
    path = folder / "tokenizer.json"
    path.write_text(tokenizer_to_json(tokenizer, **options), encoding="utf-8")
    return LibraryTokenizer.from_file(str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_have_the_same_ids(
    kind: str, tokenizers: dict[str, Tokenizer], text_file: Path, tmp_path: Path
) -> None:
    """The letters of the end token are letters; a char tokenizer gets characters that it knows."""
    ours = tokenizers[kind]
    theirs = library(ours, tmp_path)
    text = text_file.read_text(encoding="utf-8")
    strange = [] if kind == "char" else [STRANGE]
    for other in (text, text[::-1], "", " ", EOT.replace("|", ""), *strange):
        assert theirs.encode(other).ids == ours.encode(other).tolist()
    assert theirs.get_vocab_size() == ours.vocab_size
    assert theirs.token_to_id(EOT) == ours.eot


def test_the_end_token_as_letters_of_a_char_tokenizer(tmp_path: Path) -> None:
    ours = Tokenizer("char", "".join(sorted(set(STRANGE))))
    theirs = library(ours, tmp_path)
    assert theirs.encode(STRANGE).ids == ours.encode(STRANGE).tolist()
    assert theirs.decode(ours.encode(STRANGE).tolist()) == STRANGE


@pytest.mark.parametrize("kind", KINDS)
def test_ids_have_the_same_text(
    kind: str, tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """Bytes that are no character among them, and the end token, which has no text."""
    ours = tokenizers[kind]
    theirs = library(ours, tmp_path)
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 5, 300):
        for _ in range(50):
            ids = rng.integers(0, ours.vocab_size, count).tolist()
            assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.decode([ours.eot, *ours.encode("def").tolist(), ours.eot]) == "def"


@given(text=st.text())
def test_any_text_in_bytes(text: str) -> None:
    ours = Tokenizer("byte", "")
    theirs = LibraryTokenizer.from_str(tokenizer_to_json(ours))
    assert theirs.encode(text).ids == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text).tolist()) == text


def test_an_unknown_character_is_an_error(tmp_path: Path) -> None:
    theirs = library(Tokenizer("char", "abc"), tmp_path)
    assert theirs.encode("cab").ids == [3, 1, 2]
    with pytest.raises(Exception, match="UNK"):
        theirs.encode("cabs")


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_end_token_begins_the_text(
    kind: str, tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    ours = tokenizers[kind]
    theirs = library(ours, tmp_path, declare_special=True)
    assert theirs.encode("def f").ids == [ours.eot, *ours.encode("def f").tolist()]
    assert theirs.encode("def f", add_special_tokens=False).ids == ours.encode("def f").tolist()
    assert theirs.decode([ours.eot, *ours.encode("def f").tolist(), ours.eot]) == "def f"


@pytest.mark.parametrize("declare_special", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_back(
    kind: str, declare_special: bool, tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """From our text, and from the library's text of it."""
    ours = tokenizers[kind]
    assert tokenizer_from_json(
        tokenizer_to_json(ours, declare_special=declare_special)
    ).to_json() == (ours.to_json())
    text = library(ours, tmp_path, declare_special=declare_special).to_str()
    assert tokenizer_from_json(text).to_json() == ours.to_json()


def changed(tokenizer: Tokenizer, **parts: Any) -> str:
    return json.dumps(json.loads(tokenizer_to_json(tokenizer)) | parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "its normalizer is not one that mmrec export writes"),
        ({"pre_tokenizer": None}, "its pre_tokenizer is not one"),
        ({"model": {"type": "Unigram", "vocab": {"a": 0}}}, "must be BPE or WordLevel; got 'Uni"),
        (
            {"model": {"type": "WordLevel", "vocab": {"ab": 0}}},
            "its special token 'ab' has the id 0",
        ),
        ({"model": {"type": "WordLevel", "vocab": {EOT: 0, "a": 2}}}, "its ids must be 0 to 1"),
        (
            {"model": {"type": "BPE", "vocab": {EOT: 0, "a": 1}, "merges": []}},
            "tokenizer is damaged",
        ),
        ({"model": 3}, "it is damaged: TypeError"),
        ({"added_tokens": [{"content": "<user>"}]}, "mmrec cannot keep its added token '<user>'"),
    ],
)
def test_another_tokenizer_is_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer_from_json(changed(Tokenizer("char", "abc"), **parts))


def test_a_changed_setting_of_the_model_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    stored = json.loads(tokenizer_to_json(tokenizers["bpe"]))
    stored["model"]["byte_fallback"] = True
    with pytest.raises(InputError, match="its model is not one that mmrec export writes"):
        tokenizer_from_json(json.dumps(stored))
