"""The corpus file: what goes in comes out, and it is made again only when it must be."""

from pathlib import Path

import numpy as np
import pytest

from mmrec.config import InputError
from mmrec.data.corpora import load_documents, split
from mmrec.data.corpus import Corpus, prepare


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_tokens_give_the_text_back(text_file: Path, kind: str) -> None:
    corpus = Corpus.open(prepare(str(text_file), kind, 400))
    parts = split(load_documents(str(text_file)))
    for made, documents in ((corpus.train, parts.train), (corpus.val, parts.val)):
        assert made.tokens.dtype == np.uint16
        assert made.tokens[-1] == corpus.tokenizer.eot
        assert corpus.tokenizer.decode(made.tokens) == "".join(d.text for d in documents)
        assert made.doc_offsets.tolist() == [0, made.n_tokens]
        assert made.n_bytes == sum(len(d.text.encode()) for d in documents)


def test_reused_until_the_text_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello world, " * 100)
    lines: list[str] = []
    first = prepare(str(path), "byte", progress=lines.append)
    stamp = first.stat().st_mtime_ns
    assert prepare(str(path), "byte", progress=lines.append) == first
    assert first.stat().st_mtime_ns == stamp
    assert "unchanged" in lines[-1]
    path.write_text("hello there, " * 100)
    assert prepare(str(path), "byte") != first
    first.write_bytes(first.read_bytes()[:500])  # a damaged cache is made again
    path.write_text("hello world, " * 100)
    assert Corpus.open(prepare(str(path), "byte")).train.n_tokens > 0


def test_a_prepared_file_is_a_source(corpus: Corpus) -> None:
    assert prepare(str(corpus.path)) == corpus.path


def test_too_small_to_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="too small to split"):
        prepare(str(tmp_path / "a.txt"), "byte")
