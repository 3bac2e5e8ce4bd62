"""Text that was added to a known text: old tokens stay, each in its split and its order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec.data.added_text import KnownText
from mmrec.data.corpus import Corpus, Split
from mmrec.data.document_record import DocumentRecord
from mmrec.data.prepare import prepare
from mmrec.data.readers import Document, ReadOptions
from mmrec.data.split import DROPPED
from mmrec.errors import InputError


@pytest.fixture
def texts(library_documents: list[Document]) -> list[str]:
    """Documents of a few hundred characters, no two alike."""
    return [d.text[i : i + 400] for d in library_documents[:60] for i in (0, 2000) if len(d.text)][
        :100
    ]


def open_corpus(source: Any, tokenizer: str = "byte", **options: Any) -> Corpus:
    return Corpus.open(prepare(source, tokenizer, 300, options=ReadOptions(**options)))


def continue_corpus(
    before: Corpus, source: Any, *, takes_additions: bool = True, **options: Any
) -> Corpus:
    """The corpus of a text to which more was added since ``before``."""
    assert before.documents is not None
    known = KnownText(before.documents, before.tokenizer, Path("runs/a"), takes_additions)
    kind = before.tokenizer.kind
    return Corpus.open(prepare(source, kind, 300, options=ReadOptions(**options), known=known))


def documents_of(corpus: Corpus, split: Split) -> list[str]:
    bounds = zip(split.doc_offsets[:-1], split.doc_offsets[1:] - 1, strict=True)
    return [corpus.tokenizer.decode(split.tokens[a:b]) for a, b in bounds]


def assert_continues(after: Corpus, before: Corpus) -> None:
    """Check that every old token is where it was, and that both splits differ by what is new."""
    for a, b in ((after.train, before.train), (after.val, before.val)):
        assert np.array_equal(a.tokens[: b.n_tokens], b.tokens)
        assert np.array_equal(a.doc_offsets[: len(b.doc_offsets)], b.doc_offsets)
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    assert after.earlier == [*before.earlier, before.identity]
    assert after.continues(before.info["fingerprint"])
    assert not before.continues(after.info["fingerprint"])


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_one_file_grows_and_grows_again(kind: str, texts: list[str], tmp_path: Path) -> None:
    """What is added is cut by position as the file was, and old validation text stays it."""
    joined = "\n".join(texts)
    path, whole = tmp_path / "book.txt", "".join(sorted(set(joined))) + joined
    path.write_text(whole[:9000])
    corpora = [open_corpus(path, kind)]
    for end in (11_000, 15_000):
        path.write_text(whole[:end])
        corpora.append(continue_corpus(corpora[-1], path))
        assert_continues(corpora[-1], corpora[-2])
    last = corpora[-1]
    train, val = documents_of(last, last.train), documents_of(last, last.val)
    assert [len(text) for text in train] == [8100, 1800, 3600]
    assert [len(text) for text in val] == [900, 200, 400]
    assert "".join(a + b for a, b in zip(train, val, strict=True)) == whole[:15_000]
    again = continue_corpus(last, path, takes_additions=False)  # nothing is added any more
    assert again.identity == last.identity
    assert again.earlier == last.earlier
    assert np.array_equal(again.train.tokens, last.train.tokens)


def test_long_documents_grow_in_pieces(texts: list[str], tmp_path: Path) -> None:
    path, whole = tmp_path / "long.txt", "".join(texts) * 9
    path.write_text(whole[:200_000])
    before = open_corpus(path)
    path.write_text(whole)
    after = continue_corpus(before, path)
    assert_continues(after, before)
    assert documents_of(after, after.train)[1] == whole[200_000:][: int(0.9 * (len(whole) - 2e5))]


def test_a_folder_in_which_files_grow_and_appear(texts: list[str], tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(texts[i])
    (tmp_path / "copy.txt").write_text(texts[3])
    before = open_corpus(tmp_path)
    with (tmp_path / "07.txt").open("a") as file:
        file.write(texts[50])
    for i in range(30, 55):
        (tmp_path / f"{i - 30:02}-more.txt").write_text(texts[i])
    (tmp_path / "04-copy.txt").write_text(texts[4])
    after = continue_corpus(before, tmp_path)
    assert_continues(after, before)
    new = [
        text
        for split, old in ((after.train, before.train), (after.val, before.val))
        for text in documents_of(after, split)[len(old.doc_bytes) :]
    ]
    # the end of 07.txt is what 50.txt will hold: a copy, of which one is left out
    assert sorted("".join(new)) == sorted("".join(texts[30:55]))
    assert after.val.n_tokens > before.val.n_tokens


def test_near_duplicates_of_old_text_stay_on_its_side(texts: list[str], tmp_path: Path) -> None:
    """By their own hash, a tenth of them would be in the other split."""
    long = [" ".join(f"{text} {n}" for n in range(3)) for text in texts[:80]]
    path = tmp_path / "lines.jsonl"

    def write(documents: list[str]) -> None:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

    write(long)
    before = open_corpus(path)
    write([*long, *(f"{text} end" for text in long)])
    after = continue_corpus(before, path)
    assert_continues(after, before)
    for split, old in ((after.train, before.train), (after.val, before.val)):
        count = len(old.doc_bytes)
        found = documents_of(after, split)
        assert found[count:] == [f"{text} end" for text in found[:count]]


def test_validation_text_of_its_own_stays(texts: list[str], tmp_path: Path) -> None:
    path, val = tmp_path / "book.txt", tmp_path / "val.txt"
    path.write_text("".join(texts[:20]))
    val.write_text(texts[30])
    before = open_corpus(path, val_file=str(val))
    path.write_text("".join(texts[:25]))
    after = continue_corpus(before, path, val_file=str(val))
    assert_continues(after, before)
    assert documents_of(after, after.train) == ["".join(texts[:20]), "".join(texts[20:25])]
    assert np.array_equal(after.val.tokens, before.val.tokens)
    val.write_text(texts[30] + texts[31])
    with pytest.raises(InputError, match="text of .*book.txt is another one.*the validation text"):
        continue_corpus(before, path, val_file=str(val))


@pytest.mark.parametrize("change", ["shrinks", "changes inside", "loses a file", "not asked for"])
def test_other_changes_are_refused_before_the_work(
    change: str, texts: list[str], tmp_path: Path
) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(texts[i])
    before, second = open_corpus(tmp_path), tmp_path / "1.txt"
    words = r"documents that are not there as they were: 1 of 4; a run continues with the same text"
    if change == "shrinks":
        second.write_text(texts[1][:-1])
    elif change == "changes inside":
        second.write_text(texts[1].replace("e", "E", 1) + "more")
    elif change == "loses a file":
        second.unlink()
    else:
        second.write_text(texts[1] + "more")
        words = rf"has grown since runs/a was saved, by 4 bytes: .*runs/a --data {tmp_path} takes"
    said: list[str] = []
    known = KnownText(before.documents, before.tokenizer, Path("runs/a"), change != "not asked for")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words) as caught:
        prepare(tmp_path, "byte", 0, None, said.append, known=known)
    assert "\n" not in str(caught.value)
    assert not said


def test_a_new_character_is_refused_with_advice(texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(texts[:20]))
    before = open_corpus(path, "char")
    with path.open("a") as file:
        file.write("\nΩ")
    with pytest.raises(InputError, match=r"book.txt, line .*'Ω'.*mmrec finetune and mmrec grow"):
        continue_corpus(before, path)


def test_a_record_is_stored(texts: list[str], tmp_path: Path) -> None:
    record = open_corpus(texts[:30]).documents
    assert record is not None
    path = tmp_path / "documents.hdf5"
    record.save(path)
    stored, loaded = path.read_bytes(), DocumentRecord.load(path)
    for name in ("keys", "lengths", "cuts", "continues"):
        assert np.array_equal(getattr(loaded, name), getattr(record, name))
    assert (loaded.identity, loaded.earlier, loaded.val_documents) == (record.identity, [], 0)
    record.save(path)  # the same is not written again
    assert path.read_bytes() == stored


@given(
    st.lists(st.text("abcde \n", min_size=30, max_size=90), min_size=2, max_size=30, unique=True),
    st.data(),
)
def test_whatever_is_added_moves_no_old_token(documents: list[str], data: st.DataObject) -> None:
    """Documents grow, appear and change their places, three times in a row."""
    documents = [f"{i} {text}" for i, text in enumerate(documents)]  # not only white space
    corpus = open_corpus(documents)
    for _ in range(3):
        before, count = corpus, len(documents)
        for i in data.draw(st.sets(st.integers(0, count - 1), max_size=3)):
            documents[i] += data.draw(st.text("abc ", min_size=1, max_size=50))
        new = data.draw(st.lists(st.text("xyz ", min_size=30, max_size=90), max_size=3))
        documents += [f"{count + i} {text}" for i, text in enumerate(new)]
        corpus = continue_corpus(before, data.draw(st.permutations(documents)))
        for a, b in ((corpus.train, before.train), (corpus.val, before.val)):
            assert np.array_equal(a.tokens[: b.n_tokens], b.tokens)
        assert corpus.continues(before.info["fingerprint"])
        assert continue_corpus(corpus, documents).identity == corpus.identity
    assert corpus.documents is not None
    whole = sum(map(len, documents)) - int(
        corpus.documents.lengths[corpus.documents.cuts == DROPPED].sum()
    )
    assert corpus.train.n_bytes + corpus.val.n_bytes == whole
