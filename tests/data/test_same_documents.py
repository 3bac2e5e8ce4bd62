"""The law of sources: the same documents are the same corpus, whichever way they come in."""

import gzip
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mmrec.data.corpus import Corpus
from mmrec.data.formats import import_zstandard
from mmrec.data.prepare import prepare
from mmrec.data.readers import PIECE_CHARS, Document, ReadOptions
from mmrec.data.sources import Source
from mmrec.data.tokenizer import Tokenizer
from mmrec.evaluation.source import open_split

SEPARATOR = "<|endoftext|>"
SPECIAL = [
    "one of two lines\r\nas Windows ends them\r\n",
    "\ufeffa byte order mark before the text",
    "\ufeff\ufefftwo of them",
    " \ufeffone that is none, since white space stands before it",
    "a line separator \u2028 and a paragraph separator \u2029 inside",
    "a form feed\f and a vertical tab\v and a unit separator\x1f inside",
    "three empty lines follow\n\n\n\n",
    "\n\n  and some stand before this",
    "",
    " \n\t",
    "\ufeff",
    "\ufeff \n",
    " \n" * PIECE_CHARS,  # white space only, in several pieces
    f"before the mark{SEPARATOR}and behind it, in one record",
    SEPARATOR * 2,
    "an exact copy of another document",
    "an exact copy of another document",
    '{"text": "JSON syntax inside a text"}',
    '[{"text": "and an array"}]',
    "日本語 😀 é e\u0301",
    "\n" * (2 * PIECE_CHARS) + "text behind much white space",
]


@pytest.fixture(scope="module")
def documents(library_documents: list[Document]) -> list[str]:
    """Documents of every awkward kind, among ordinary and long ones."""
    ordinary = [d.text for d in library_documents if 500 < len(d.text) < 4_000][:25]
    words = " ".join(d.text for d in library_documents[100:140])
    long = [words[: 2 * PIECE_CHARS], words[-2 * PIECE_CHARS - 5000 :]]
    assert all(len(text) > 131_000 for text in long)
    return [ordinary[0], long[0], *SPECIAL, *ordinary[1:], long[1]]


def as_json_lines(texts: Iterable[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": t}) + "\n" for t in texts).encode()


def as_parquet(texts: list[str], kind: pyarrow.DataType, **options: int) -> bytes:
    file = io.BytesIO()
    column = pyarrow.array(texts, pyarrow.string()).cast(kind)
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": column}), file, **options)
    return file.getvalue()


def zst(data: bytes) -> bytes:
    compressed: bytes = import_zstandard().compress(data)
    return compressed


def folder(path: Path, texts: list[str]) -> Source:
    (path / "inner").mkdir()
    for number, text in enumerate(texts):
        place = path / ("inner" if number >= 40 else "") / f"{number:03}.txt"
        place.write_bytes(text.encode())
    return path


def pipe(content: bytes) -> Source:
    """Standard input, which holds bytes."""
    sys.stdin = io.TextIOWrapper(io.BytesIO(content))
    return "-"


def file(name: str, content: Callable[[list[str]], bytes]) -> Callable[[Path, list[str]], Source]:
    def write(path: Path, texts: list[str]) -> Source:
        (path / name).write_bytes(content(texts))
        return str(path / name)

    return write


def hugging_face(path: Path, texts: list[str]) -> Source:
    (path / "set").mkdir()
    (path / "set" / "train.jsonl").write_bytes(as_json_lines(texts))
    return f"hf:{path / 'set'}"


def joined(texts: Iterable[str]) -> bytes:
    return SEPARATOR.join(texts).encode()


STRING = pyarrow.string()
DOORS: dict[str, Callable[[Path, list[str]], Source]] = {
    "folder": folder,
    "text": file("all.txt", joined),
    "text.gz": file("all.txt.gz", lambda x: gzip.compress(joined(x))),
    "text.zst without a name": file("all", lambda x: zst(joined(x))),
    "JSON lines": file("all.jsonl", as_json_lines),
    "JSON lines with a mark": file("all.jsonl", lambda x: b"\xef\xbb\xbf" + as_json_lines(x)),
    "JSON lines not escaped": file(
        "all.ndjson",
        lambda x: "".join(
            json.dumps({"text": t}, ensure_ascii=False) + "\r\n\r\n" for t in x
        ).encode(),
    ),
    ".jsonl.gz": file("all.jsonl.gz", lambda x: gzip.compress(as_json_lines(x))),
    ".jsonl.zst": file("all.jsonl.zst", lambda x: zst(as_json_lines(x))),
    "C4": file("c4-train.00000-of-01024.json.gz", lambda x: gzip.compress(as_json_lines(x))),
    "gzip named .jsonl": file("all.jsonl", lambda x: gzip.compress(as_json_lines(x))),
    "JSON lines named .txt": file("all.txt", as_json_lines),
    "JSON lines named .gz": file("all.json.gz", as_json_lines),
    "array": file("all.json", lambda x: json.dumps([{"text": t} for t in x], indent=2).encode()),
    "Parquet": file("all.parquet", lambda x: as_parquet(x, STRING, row_group_size=7)),
    "Parquet without a name": file("all", lambda x: as_parquet(x, pyarrow.large_string())),
    "Parquet dictionary": file(
        "all.parquet", lambda x: as_parquet(x, pyarrow.dictionary(pyarrow.int32(), STRING))
    ),
    "Parquet view": file("all.parquet", lambda x: as_parquet(x, pyarrow.string_view())),
    "hf": hugging_face,
    "standard input": lambda path, texts: pipe(joined(texts)),
    "standard input, JSON lines": lambda path, texts: pipe(as_json_lines(texts)),
    "standard input, .gz": lambda path, texts: pipe(gzip.compress(as_json_lines(texts))),
    "standard input, Parquet": lambda path, texts: pipe(as_parquet(texts, STRING)),
    "list": lambda path, texts: texts,
    "iterator": lambda path, texts: iter(texts),
}


LOADED: Any = SimpleNamespace(tokenizer=Tokenizer("byte", ""))
"""A model, of which tokenising text needs no more."""


def contents(corpus: Corpus) -> list[object]:
    """Everything of a corpus that must not depend on where its text came from."""
    arrays = [
        getattr(split, name).tobytes()
        for split in (corpus.train, corpus.val)
        for name in ("tokens", "doc_offsets", "doc_bytes")
    ]
    counts = [corpus.info[key] for key in ("fingerprint", "duplicates", "near_duplicates")]
    return [*counts, corpus.tokenizer.to_json(), *arrays]


@pytest.fixture(scope="module")
def expected(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    out = tmp_path_factory.mktemp("expected") / "made.h5"
    return Corpus.open(prepare(documents, "char", out=out))


def test_the_documents_are_what_the_rules_say(expected: Corpus, documents: list[str]) -> None:
    """Marks at the start and blank documents are gone, copies are dropped, the rest is kept."""
    parts = [part.lstrip("\ufeff") for text in documents for part in text.split(SEPARATOR)]
    kept = list(dict.fromkeys(part for part in parts if part.strip()))
    found = [
        expected.tokenizer.decode(split.tokens[begin:end])
        for split in (expected.train, expected.val)
        for begin, end in zip(split.doc_offsets[:-1], split.doc_offsets[1:], strict=True)
    ]
    cut = set(kept).difference(found)  # long among short ones, so validation has their ends
    assert {a + b for a in found for b in found} >= cut
    assert len(cut) == expected.info["cut_documents"]
    assert len(found) == len(kept) + len(cut)
    assert expected.info["duplicates"] == 1
    assert len(expected.val.doc_bytes) > 1


@pytest.mark.parametrize("door", DOORS)
def test_the_same_documents_are_the_same_corpus(
    door: str,
    documents: list[str],
    expected: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One fingerprint, one split, one tokenizer, one set of tokens; and none but those."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", None)
    (tmp_path / "source").mkdir()
    source = DOORS[door](tmp_path / "source", documents)
    corpus = Corpus.open(prepare(source, "char", out=tmp_path / "made.h5"))
    assert contents(corpus) == contents(expected)


def test_a_limit_ends_every_source_at_the_same_place(
    documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the first long document, at the end of a piece."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", None)
    ends = {}
    for number, door in enumerate(DOORS):
        (tmp_path / f"{number}").mkdir()
        source = DOORS[door](tmp_path / f"{number}", documents[:3])
        options = ReadOptions(max_bytes=50_000)
        corpus = Corpus.open(prepare(source, "byte", out=tmp_path / "made.h5", options=options))
        sizes = (corpus.train.doc_bytes + corpus.val.doc_bytes).tolist()
        ends[door] = (corpus.info["fingerprint"], *sizes)
    assert len(set(ends.values())) == 1, ends
    assert 50_000 <= sum(sizes) < len(documents[1].encode())


@pytest.mark.parametrize("door", [door for door in DOORS if door not in ("list", "iterator")])
def test_the_same_documents_are_the_same_validation_text(
    door: str, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--val-file`` and ``mmrec eval --data`` pass through the same reader."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", None)
    (tmp_path / "source").mkdir()
    (tmp_path / "train.txt").write_text("other words to train on")
    source = DOORS[door](tmp_path / "source", documents)
    options = ReadOptions(val_file=str(source))
    corpus = Corpus.open(
        prepare(tmp_path / "train.txt", "byte", out=tmp_path / "made.h5", options=options)
    )
    parts = [part.lstrip("\ufeff") for text in documents for part in text.split(SEPARATOR)]
    kept = [part for part in parts if part.strip()]
    once = list(dict.fromkeys(kept))
    assert corpus.val.doc_bytes.tolist() == [len(part.encode()) for part in once]
    assert corpus.tokenizer.decode(corpus.val.tokens) == "".join(once)

    if source == "-":
        DOORS[door](tmp_path / "source", documents)
    split, _ = open_split(LOADED, str(source))
    assert split.doc_bytes.tolist() == [len(part.encode()) for part in kept]
    assert corpus.tokenizer.decode(split.tokens) == "".join(kept)
