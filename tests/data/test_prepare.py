"""The corpus file: its tokens give the text back, it is prepared again only when it must be, and a
kill loses no more than a shard."""

import io
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from mmrec.checkpoint import hdf5
from mmrec.data.corpus import KIND, SCHEMA, Corpus, cache_folder
from mmrec.data.prepare import (
    corpus_tokenizer_kind,
    exclusive_preparation,
    open_corpus,
    prepare,
    read_options,
    sample_training_text,
    training_texts,
)
from mmrec.data.readers import Document, ReadOptions
from mmrec.data.split import TRAIN, VAL
from mmrec.data.tokenizer import Tokenizer, train_tokenizer
from mmrec.errors import InputError

Library = Callable[[int, int, int], list[Document]]


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_tokens_give_the_text_back(text_file: Path, kind: str) -> None:
    corpus = Corpus.open(prepare(text_file, kind, 400))
    text = text_file.read_text()
    cut = int(len(text) * 0.9)
    for split, expected in ((corpus.train, text[:cut]), (corpus.val, text[cut:])):
        assert split.tokens.dtype == np.uint16
        assert split.tokens[-1] == corpus.tokenizer.eot
        assert corpus.tokenizer.decode(split.tokens) == expected
        assert split.doc_offsets.tolist() == [0, split.n_tokens]
        assert split.n_bytes == len(expected.encode())


def test_reused_until_the_text_or_a_setting_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello world, " * 100)
    lines: list[str] = []
    first = prepare(str(path), "byte", progress=lines.append)
    stamp = first.stat().st_mtime_ns
    assert prepare(str(path), "byte", progress=lines.append) == first
    assert first.stat().st_mtime_ns == stamp
    assert "unchanged" in lines[-1]
    assert prepare(str(path), "byte", options=ReadOptions(val_fraction=0.2)) != first
    path.write_text("hello there, " * 100)
    assert prepare(str(path), "byte") != first
    first.write_bytes(first.read_bytes()[:500])  # a damaged file in the cache is replaced
    path.write_text("hello world, " * 100)
    assert Corpus.open(prepare(str(path), "byte")).train.n_tokens > 0


def test_a_prepared_file_is_a_source(corpus: Corpus) -> None:
    assert prepare(str(corpus.path)) == corpus.path
    assert prepare(corpus.path) == corpus.path
    assert corpus_tokenizer_kind(corpus.path, "bpe") == "byte"
    assert corpus_tokenizer_kind("stdlib", "bpe") == "bpe"
    assert open_corpus(corpus.path, corpus.tokenizer).path == corpus.path
    with pytest.raises(InputError, match="must have the tokenizer of the model"):
        open_corpus(corpus.path, train_tokenizer("char", ["abc"]))


def test_an_earlier_schema_is_refused_in_one_line(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "old.h5"
    path.write_bytes(corpus.path.read_bytes())
    with h5py.File(path, "r+") as file:
        assert file.attrs["kind"] == KIND.encode()
        file.attrs["schema"] = SCHEMA - 1
    hdf5.seal(path)
    with pytest.raises(InputError, match=f"earlier mmrec .schema {SCHEMA - 1}") as caught:
        Corpus.open(path)
    assert "\n" not in str(caught.value)


def test_too_small_to_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="too small to split .* 1 document of 1 byte:"):
        prepare(str(tmp_path / "a.txt"), "byte")
    with pytest.raises(InputError, match="too small to have training text; it has 1 byte"):
        next(training_texts(str(tmp_path / "a.txt")))


def test_text_of_near_copies_is_not_called_small() -> None:
    text = " ".join(f"word{i}" for i in range(2_000))
    copies = [f"{text} number {i}" for i in range(25)]
    size = sum(map(len, copies)) + len(copies[0])
    with pytest.raises(InputError, match=f"26 documents of {size:,} bytes, 1 of them exact") as e:
        prepare([*copies, copies[0]], "byte")
    assert "25 near-duplicates" in str(e.value)
    assert "small" not in str(e.value)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("", "0 documents$"),
        ("x", "1 document, too short to cut"),
        ("book", "1 document, 1 of them copies of other text"),
    ],
)
def test_a_source_of_a_mixture_without_training_text(
    text_file: Path, tmp_path: Path, other: str, reason: str
) -> None:
    path = tmp_path / "other.txt"
    path.write_text(text_file.read_text() if other == "book" else other)
    with pytest.raises(InputError, match=f"other.txt must have training text of its own.*{reason}"):
        prepare(f"1:{text_file},1:{path}", "byte")


def test_uneven_documents_are_cut_and_it_is_said(tmp_path: Path, library: Library) -> None:
    notes = [d.text for d in library(1_000, 3_000, 29)]
    book = "\n".join(d.text for d in library(3_000, 20_000, 60))
    lines: list[str] = []
    corpus = Corpus.open(prepare([book, *notes], "byte", progress=lines.append))
    assert corpus.info["cut_documents"] == 1
    [line] = [x for x in lines if x.startswith("split")]
    share = corpus.val.n_bytes / (corpus.val.n_bytes + corpus.train.n_bytes)
    assert 0.05 < share < 0.2
    assert f"1 of 30 are cut, and their last parts are validation text; it has {share:.1%}" in line
    assert len(corpus.train.doc_bytes) + len(corpus.val.doc_bytes) == 31
    decoded = corpus.tokenizer.decode(corpus.val.tokens)
    assert book[-1000:] in decoded
    assert 1 <= sum(note in decoded for note in notes) <= 15


def test_a_vocabulary_that_the_text_cannot_fill_is_noted(text_file: Path) -> None:
    lines: list[str] = []
    corpus = Corpus.open(prepare(text_file, "bpe", 50_000, progress=lines.append))
    size = corpus.tokenizer.vocab_size
    assert size < 50_000
    assert any(f"{size:,} tokens, not the 50,000" in line for line in lines)


def test_a_given_validation_file(text_file: Path, tmp_path: Path) -> None:
    val_file = tmp_path / "val.txt"
    val_file.write_text("held out words")
    options = ReadOptions(val_file=str(val_file))
    corpus = Corpus.open(prepare(text_file, "byte", options=options))
    assert corpus.tokenizer.decode(corpus.val.tokens) == "held out words"
    assert corpus.tokenizer.decode(corpus.train.tokens) == text_file.read_text()


def test_options_are_read_from_a_configuration() -> None:
    settings = {
        "text_field": "body",
        "skip_bad": True,
        "max_bytes": 10,
        "val_fraction": 0.2,
        "val_file": "x",
    }
    assert read_options(SimpleNamespace(**settings, other=1)) == ReadOptions(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="val_fraction"):
        read_options(SimpleNamespace(**{**settings, "val_fraction": 1}))


def test_training_texts_are_those_of_the_corpus(library: Library, tmp_path: Path) -> None:
    texts = [d.text for d in library(1_000, 9_000, 40)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    corpus = Corpus.open(prepare(tmp_path / "a.txt", "byte", out=tmp_path / "a.h5"))
    joined = "".join(training_texts(tmp_path / "a.txt"))
    assert corpus.tokenizer.decode(corpus.train.tokens) == joined
    assert sum(map(len, texts)) > len(joined)


def test_a_compressed_corpus_is_smaller_and_the_same(text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    plain = Corpus.open(prepare(text_file, "bpe", 400, path))
    size = path.stat().st_size
    compressed = Corpus.open(prepare(text_file, "bpe", 400, path, compress=True))
    assert path.stat().st_size < size
    for split in ("train", "val"):
        assert (getattr(compressed, split).tokens == getattr(plain, split).tokens).all()


def test_many_tokens_stay_on_the_disk(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepare(text_file, "bpe", 400)
    in_memory = Corpus.open(path).train.tokens
    monkeypatch.setattr(hdf5, "MAPPED_BYTES", 0)
    mapped = Corpus.open(path).train.tokens
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, in_memory)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


def assert_same(one: Path, other: Path) -> None:
    a, b = Corpus.open(one), Corpus.open(other)
    assert a.tokenizer.to_json() == b.tokenizer.to_json()
    for x, y in ((a.train, b.train), (a.val, b.val)):
        for name in ("tokens", "doc_offsets", "doc_bytes"):
            assert np.array_equal(getattr(x, name), getattr(y, name)), name


class StoppingTokenizer(Tokenizer):
    """A tokenizer that is interrupted at a batch of texts."""

    batches = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        self.batches += 1
        if self.batches == 6:  # the first one estimates the room that is needed
            raise KeyboardInterrupt
        return super().encode_batch(texts)


@pytest.mark.parametrize("lost", [None, "shard-00001.h5", "tokenizer.json"])
def test_shards_make_the_same_file_and_are_continued(
    tmp_path: Path, lost: str | None, library: Library
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, document in enumerate(library(1_000, 9_000, 50)):
        (folder / f"{i}.txt").write_text(document.text)
    text = (folder / "0.txt").read_text()
    tokenizer = train_tokenizer("bpe", [text], 400)
    straight = prepare(folder, tokenizer, out=tmp_path / "straight.h5")
    out, shards = tmp_path / "cut.h5", tmp_path / ".cut.h5.shards"
    stopping = StoppingTokenizer.from_json(tokenizer.to_json())
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, stopping, out=out, shard_chars=30_000)
    assert len(list(shards.glob("shard-*.h5"))) == 4
    if lost:
        (shards / lost).write_bytes(b"damaged")
    lines: list[str] = []
    prepare(folder, tokenizer, out=out, progress=lines.append, shard_chars=30_000)
    assert any("were done before" in line for line in lines) == (lost != "tokenizer.json")
    assert_same(out, straight)
    assert not shards.exists()


def test_a_kill_loses_a_shard(tmp_path: Path, library: Library) -> None:
    """A real process, killed when it has stored a shard or two."""
    text = tmp_path / "all.txt"
    text.write_text("<|endoftext|>".join(d.text for d in library(1_000, 9_000, 60)))
    out = tmp_path / "made.h5"
    code = (
        "from pathlib import Path\nfrom mmrec.data.prepare import prepare\n"
        f"prepare({str(text)!r}, 'bpe', 600, Path({str(out)!r}), print, shard_chars=30_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    shards, deadline = tmp_path / ".made.h5.shards", time.monotonic() + 120
    while not (shards / "shard-00000.h5").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    killed = process.returncode != 0
    assert killed or out.exists()
    again = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert ("were done before" in again.stdout) == killed
    assert_same(out, prepare(text, "bpe", 600, tmp_path / "straight.h5"))
    assert not shards.exists()


def test_the_tokenizer_is_trained_on_a_sample_of_much_text(
    tmp_path: Path, library: Library
) -> None:
    documents = library(1_000, 5_000, 100)
    pieces = [(VAL if i % 10 == 0 else TRAIN, d) for i, d in enumerate(documents)]
    sample = list(sample_training_text(pieces, 0.3))
    assert sample == list(sample_training_text(pieces, 0.3))  # the same each time
    assert set(sample) <= {d.text for split, d in pieces if split == TRAIN}
    assert 0.2 < len(sample) / len(pieces) < 0.4
    assert len(list(sample_training_text(pieces, 1))) == 90
    text = tmp_path / "a.txt"
    text.write_text("<|endoftext|>".join(d.text for d in documents))
    sampled = [
        prepare(text, "bpe", 300, tmp_path / f"{i}.h5", tokenizer_sample_bytes=30_000)
        for i in range(2)
    ]
    assert_same(*sampled)
    full = Corpus.open(prepare(text, "bpe", 300, tmp_path / "full.h5"))
    assert full.tokenizer.to_json() != Corpus.open(sampled[0]).tokenizer.to_json()
    quarter = text.stat().st_size // 4 + 1  # no sample is needed of so little text
    whole = prepare(text, "bpe", 300, tmp_path / "whole.h5", tokenizer_sample_bytes=quarter)
    assert Corpus.open(whole).tokenizer.to_json() == full.tokenizer.to_json()


def test_two_at_once_wait_for_each_other(text_file: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with exclusive_preparation(tmp_path, lines.append):
        code = (
            "from pathlib import Path\nfrom mmrec.data.prepare import prepare\n"
            f"prepare({str(text_file)!r}, 'byte', 0, Path({str(tmp_path / 'x.h5')!r}), "
            "lambda line: print(line, flush=True))"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert "waiting for another process" in process.stdout.readline()
        assert not (tmp_path / "x.h5").exists()
    assert process.wait(60) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]
    assert not lines
    process.stdout.close()


def test_a_folder_that_cannot_be_locked_is_used_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a lock file cannot be created in it
    lines: list[str] = []
    with exclusive_preparation(tmp_path / "file", lines.append):
        assert not lines


@pytest.mark.parametrize("few", [True, False])
def test_a_mixture_of_sources(tmp_path: Path, few: bool, library: Library) -> None:
    """The corpus tells where the tokens of each source lie, however its documents were split."""
    texts = [d.text for d in library(1_000, 9_000, 90)]
    sources = {"a": texts[:30], "b": texts[30:90]} if not few else {"a": texts[:2], "b": texts[2:5]}
    for name, documents in sources.items():
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>".join(documents))
    source = f"3:{tmp_path}/a.txt,1:{tmp_path}/b.txt"
    corpus = Corpus.open(prepare(source, "byte", out=tmp_path / "made.h5"))
    (three, begin, end_of_a), (one, begin_of_b, end) = corpus.mixture_streams
    assert (three, one, begin, end) == (3.0, 1.0, 0, corpus.train.n_tokens)
    other = prepare(source.replace("3:", "2:"), "byte", out=tmp_path / "made.h5")
    assert Corpus.open(other).mixture_streams[0][0] == 2.0  # prepared again for other weights
    assert end_of_a == begin_of_b
    for documents, tokens in (
        (sources["a"], corpus.train.tokens[:end_of_a]),
        (sources["b"], corpus.train.tokens[end_of_a:]),
    ):
        decoded = corpus.tokenizer.decode(tokens)
        assert len(decoded) > 0
        for text in documents:
            assert (text[:500] in decoded) or not few
        others = [t for t in texts if t not in documents]
        assert not any(t[:500] in decoded for t in others)


def test_the_cache_tells_mixtures_apart_by_what_is_in_each_source(tmp_path: Path) -> None:
    """The same documents in the same order, divided in another way."""
    ends, fingerprints = [], set()
    for first in (1, 2):
        texts = [f"document {i} of several words " * 9 for i in range(4)]
        (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts[:first]))
        (tmp_path / "b.txt").write_text("<|endoftext|>".join(texts[first:]))
        corpus = Corpus.open(prepare(f"1:{tmp_path}/a.txt,1:{tmp_path}/b.txt", "byte"))
        ends.append(corpus.info["mixture"][0]["end"])
        fingerprints.add(corpus.info["fingerprint"])
    assert ends[1] == 2 * ends[0]
    options = ReadOptions(val_file=f"{tmp_path}/a.txt")
    with_val_file = Corpus.open(prepare(tmp_path / "b.txt", "byte", options=options))
    assert len({with_val_file.info["fingerprint"], *fingerprints}) == 3


def test_the_text_to_grow_a_vocabulary_may_come_from_a_pipe(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read three times."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text_file.read_bytes())))
    assert "".join(training_texts("-")) == "".join(training_texts(text_file))


def test_mixtures_that_are_none() -> None:
    with pytest.raises(InputError, match="mixture must be > 0; got 0:stdlib,1:x"):
        prepare("0:stdlib,1:x")
    with pytest.raises(InputError, match="must be of texts; got the corpus file"):
        prepare("1:stdlib,1:made.h5")


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path))
    path = prepare(["a text", "another"], "byte")
    assert path.parent == cache_folder() == tmp_path / "corpora"
    assert re.fullmatch(r"documents-byte-[0-9a-f]{16}\.h5", path.name)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot make the folder"):
        prepare(["a text", "another"], "byte")


def test_nothing_posix_only_is_imported() -> None:
    code = (
        "import sys\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None\n"
        "import mmrec.data.prepare"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
