"""The corpus file: what goes in comes out, it is made again only when it must be, and a kill costs
no more than a part."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmrec.checkpoint import hdf5 as storage
from mmrec.data import prepare as module
from mmrec.data import tokenize as encoding
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.data.readers import Reading
from mmrec.data.sources import documents
from mmrec.errors import InputError


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_tokens_give_the_text_back(text_file: Path, kind: str) -> None:
    corpus = Corpus.open(prepare(str(text_file), kind, 400))
    text = text_file.read_text()
    cut = int(len(text) * 0.9)
    for made, part in ((corpus.train, text[:cut]), (corpus.val, text[cut:])):
        assert made.tokens.dtype == np.uint16
        assert made.tokens[-1] == corpus.tokenizer.eot
        assert corpus.tokenizer.decode(made.tokens) == part
        assert made.doc_offsets.tolist() == [0, made.n_tokens]
        assert made.n_bytes == len(part.encode())


def test_reused_until_the_text_or_the_wish_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello world, " * 100)
    lines: list[str] = []
    first = prepare(str(path), "byte", progress=lines.append)
    stamp = first.stat().st_mtime_ns
    assert prepare(str(path), "byte", progress=lines.append) == first
    assert first.stat().st_mtime_ns == stamp
    assert "unchanged" in lines[-1]
    assert prepare(str(path), "byte", how=Reading(val_share=0.2)) != first
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


def test_a_vocabulary_that_the_text_cannot_fill_is_said(text_file: Path) -> None:
    lines: list[str] = []
    made = Corpus.open(prepare(str(text_file), "bpe", 50_000, progress=lines.append))
    size = made.tokenizer.vocab_size
    assert size < 50_000
    assert any(f"a vocabulary of {size:,} tokens, not the 50,000 asked for" in x for x in lines)


def test_a_given_validation_file(text_file: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("held out words")
    corpus = Corpus.open(prepare(str(text_file), "byte", how=Reading(val_file=str(held))))
    assert corpus.tokenizer.decode(corpus.val.tokens) == "held out words"
    assert corpus.tokenizer.decode(corpus.train.tokens) == text_file.read_text()


def test_a_compressed_corpus_is_smaller_and_the_same(text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    plain = prepare(str(text_file), "bpe", 400, path)
    made, size = Corpus.open(plain), plain.stat().st_size
    packed = Corpus.open(prepare(str(text_file), "bpe", 400, path, pack=True))
    assert path.stat().st_size < size
    for side in ("train", "val"):
        assert (getattr(packed, side).tokens == getattr(made, side).tokens).all()


def test_many_tokens_stay_on_the_disk(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepare(str(text_file), "bpe", 400)
    read = Corpus.open(path).train.tokens
    monkeypatch.setattr(storage, "MAPPED_BYTES", 0)
    mapped = Corpus.open(path).train.tokens
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, read)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


def same(one: Path, other: Path) -> bool:
    a, b = Corpus.open(one), Corpus.open(other)
    return a.tokenizer.to_json() == b.tokenizer.to_json() and all(
        np.array_equal(getattr(x, name), getattr(y, name))
        for x, y in ((a.train, b.train), (a.val, b.val))
        for name in ("tokens", "doc_offsets", "doc_bytes")
    )


@pytest.mark.parametrize("lost", [None, "part-00001.h5", "tokenizer.json"])
def test_parts_make_the_same_file_and_are_taken_up_again(
    tmp_path: Path, lost: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, d in enumerate(
        x for x in documents("stdlib") if "/json" in x.name or "/email" in x.name
    ):
        (folder / f"{i}.txt").write_text(d.text)
    straight = prepare(str(folder), "bpe", 500, out=tmp_path / "straight.h5")
    monkeypatch.setattr(encoding, "PART", 60_000)
    monkeypatch.setattr(encoding, "BATCH", 20_000)
    out, store = tmp_path / "cut.h5", encoding.Parts._store

    def stopping(parts: encoding.Parts) -> None:
        store(parts)
        if len(parts._files) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding.Parts, "_store", stopping)
        prepare(str(folder), "bpe", 500, out=out)
    parts = tmp_path / ".cut.h5.parts"
    assert len(list(parts.glob("part-*.h5"))) == 3
    if lost:
        (parts / lost).write_bytes(b"damaged")
    lines: list[str] = []
    prepare(str(folder), "bpe", 500, out=out, progress=lines.append)
    assert any("were done before" in x for x in lines) == (lost != "tokenizer.json")
    assert same(out, straight)
    assert not parts.exists()


def test_a_kill_costs_a_part(tmp_path: Path) -> None:
    """A real process, killed when it has stored a part or two."""
    text = tmp_path / "all.txt"
    text.write_text("<|endoftext|>".join(d.text for d in list(documents("stdlib"))[:60]))
    out = tmp_path / "made.h5"
    code = (
        f"from mmrec.data import encoding; encoding.PART = 150_000; encoding.BATCH = 50_000\n"
        f"from mmrec.data.prepare import prepare\nfrom pathlib import Path\n"
        f"prepare({str(text)!r}, 'bpe', 600, Path({str(out)!r}), print)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    parts, until = tmp_path / ".made.h5.parts", time.monotonic() + 120
    while not (parts / "part-00000.h5").exists() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    killed = process.returncode == -signal.SIGKILL
    assert killed or out.exists()
    again = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert ("were done before" in again.stdout) == killed
    assert same(out, prepare(str(text), "bpe", 600, tmp_path / "straight.h5"))
    assert not parts.exists()


def test_the_tokenizer_is_trained_on_a_sample_of_much_text(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    train = module.train_tokenizer

    def spying(kind: str, texts: object, size: int = 0) -> object:
        held = list(texts)  # type: ignore[call-overload]
        seen.append(sum(map(len, held)))
        return train(kind, held, size)

    monkeypatch.setattr(module, "train_tokenizer", spying)
    monkeypatch.setattr(module, "SAMPLE", 1_000_000)
    made = [prepare("stdlib", "bpe", 300, text_file.parent / f"{i}.h5") for i in range(2)]
    assert seen[0] == seen[1] < 3_000_000  # of 12 MB: a tenth, the same at each time
    assert same(*made)


def test_two_at_once_wait_for_each_other(text_file: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with module._alone(tmp_path, lines.append):
        code = (
            f"from mmrec.data.prepare import prepare\nfrom pathlib import Path\n"
            f"prepare({str(text_file)!r}, 'byte', 0, Path({str(tmp_path / 'x.h5')!r}), "
            "lambda line: print(line, flush=True))"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert "waiting for another process" in process.stdout.readline()
        assert not (tmp_path / "x.h5").exists()
    assert process.wait(60) == 0
    assert (tmp_path / "x.h5").exists()
    process.stdout.close()


@pytest.mark.parametrize("few", [True, False])
def test_a_mixture_of_sources(tmp_path: Path, few: bool) -> None:
    """Its corpus knows where the tokens of each source lie, however documents were split."""
    texts = [d.text for d in documents("stdlib") if 1_000 < len(d.text) < 9_000][:90]
    sources = {"a": texts[:30], "b": texts[30:90]} if not few else {"a": texts[:2], "b": texts[2:5]}
    for name, held in sources.items():
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>".join(held))
    source = f"3:{tmp_path}/a.txt,1:{tmp_path}/b.txt"
    corpus = Corpus.open(prepare(source, "byte", out=tmp_path / "made.h5"))
    (three, begin, middle), (one, at, end) = corpus.parts
    assert (three, one, begin, end) == (3.0, 1.0, 0, corpus.train.n_tokens)
    other = prepare(source.replace("3:", "2:"), "byte", out=tmp_path / "made.h5")
    assert Corpus.open(other).parts[0][0] == 2.0  # made again for other weights
    assert middle == at
    for held, tokens in (
        (sources["a"], corpus.train.tokens[:middle]),
        (sources["b"], corpus.train.tokens[middle:]),
    ):
        found = corpus.tokenizer.decode(tokens)
        assert len(found) > 0
        for text in held:
            assert (text[:500] in found) or not few
        others = [t for t in texts if t not in held]
        assert not any(t[:500] in found for t in others)


def test_mixtures_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weights of a mixture must be > 0; got 0:stdlib,1:x"):
        prepare("0:stdlib,1:x")
    with pytest.raises(InputError, match="must be of texts; got the corpus file"):
        prepare("1:stdlib,1:made.h5")
