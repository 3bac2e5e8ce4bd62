"""The text that is read once: kept for the next preparation, and never taken for another text."""

import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rensa import RMinHash

from mmrec.data import documents
from mmrec.data.corpus import Corpus, cache_folder
from mmrec.data.dedup import BANDS, ROWS, SHINGLE_WORDS, SignatureBuilder
from mmrec.data.documents import read_once, remove_unused_documents
from mmrec.data.prepare import prepare
from mmrec.data.readers import Document, ReadOptions
from mmrec.errors import InputError, StorageError


@pytest.fixture
def lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library_documents: list[Document]
) -> Path:
    """JSON lines with a broken one, of a size from which on texts are kept in this test."""
    monkeypatch.setattr(documents, "KEEP_FROM_BYTES", 10_000)
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "lines.jsonl"
    texts = [json.dumps({"text": d.text}) for d in library_documents[:40]]
    path.write_text("\n".join([*texts, '{"text": null}']) + "\n")
    settle(path)
    return path


def settle(path: Path, seconds: float = 60) -> None:
    """Make a file seem to have changed some time ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def kept_texts() -> list[Path]:
    return sorted(cache_folder().with_name("texts").glob("*.txt"))


SKIP = ReadOptions(skip_bad=True)


def refuse(*arguments: object) -> Iterator[Document]:
    raise AssertionError("the text is read again")


def test_the_same_files_are_not_read_again(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = Corpus.open(prepare(lines, "bpe", 300, options=SKIP))
    fresh = Corpus.open(prepare(lines, "byte", out=tmp_path / "fresh.h5", options=SKIP))
    assert first.info["skipped"] == 1
    monkeypatch.setattr(documents, "read_documents", refuse)
    again = Corpus.open(prepare(lines, "byte", 0, tmp_path / "again.h5", said.append, SKIP))
    assert again.info == fresh.info
    assert any("1 broken records or files were skipped" in line for line in said)
    for split in ("train", "val"):
        for name in ("tokens", "doc_offsets", "doc_bytes"):
            a, b = (getattr(getattr(corpus, split), name) for corpus in (again, fresh))
            assert np.array_equal(a, b)
    half = ReadOptions(skip_bad=True, val_fraction=0.5)  # of the same documents
    assert Corpus.open(prepare(lines, "byte", options=half)).val.n_bytes > fresh.val.n_bytes
    assert len(kept_texts()) == 1


@pytest.mark.parametrize("change", ["text", "option", "recent", "damaged text", "damaged index"])
def test_other_text_is_read_again(
    lines: Path, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(lines, "byte", options=SKIP)
    [kept] = kept_texts()
    options = SKIP
    if change == "text":
        lines.write_text(lines.read_text().replace("import", "IMPORT"))  # of the same length
        settle(lines, 50)
    elif change == "option":
        options = ReadOptions(skip_bad=True, max_bytes=20_000)
    elif change == "recent":  # it could change once more without another time
        settle(lines, 0)
    elif change == "damaged text":
        kept.write_bytes(kept.read_bytes()[:-1])
    else:
        kept.with_suffix(".h5").write_bytes(b"damaged")
    monkeypatch.setattr(documents, "read_documents", refuse)
    with pytest.raises(AssertionError, match="read again"):
        prepare(lines, "char", options=options)


def test_texts_used_last_are_kept_up_to_a_limit(lines: Path) -> None:
    texts: list[Path] = []
    for size in (15_000, 30_000, 60_000):
        prepare(lines, "byte", options=ReadOptions(max_bytes=size))
        texts += set(kept_texts()).difference(texts)
        settle(texts[-1], 100 - len(texts))
    sizes = [path.stat().st_size for path in texts]
    prepare(lines, "char", options=ReadOptions(max_bytes=30_000))  # used once more
    folder = cache_folder().with_name("texts")
    remove_unused_documents(folder, sum(sizes))
    assert set(kept_texts()) == set(texts)
    remove_unused_documents(folder, sum(sizes) - 1)
    assert set(kept_texts()) == set(texts[1:])
    remove_unused_documents(folder, sizes[1])
    assert set(folder.iterdir()) == {texts[1].with_suffix(".h5"), texts[1]}
    (folder / "precious.txt").write_text("not ours")
    remove_unused_documents(folder, 0)
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("change", ["shrinks", "grows", "vanishes"])
def test_a_text_that_changes_while_it_is_read_is_refused(
    change: str, lines: Path, tmp_path: Path
) -> None:
    def change_it(read: Iterator[Document]) -> Iterator[Document]:
        yield next(read)
        if change == "vanishes":
            lines.unlink()
        else:
            size = lines.stat().st_size
            os.truncate(lines, size // 2 if change == "shrinks" else size + 1)
        yield from itertools.islice(read, 5)

    with (
        pytest.raises(InputError, match=r"lines.jsonl changed while it was read: prepare it again"),
        read_once([(str(lines), SKIP)], tmp_path / "copy", change_it),
    ):
        pytest.fail("it was accepted")
    assert not kept_texts()
    assert not list(tmp_path.glob("copy/.*"))


@pytest.mark.parametrize(("copies", "what"), [(0.5, "a copy of the text"), (1.5, "the tokens")])
def test_no_room_is_told_before_the_work(
    copies: float, what: str, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, out = lines.stat().st_size, tmp_path / "out" / "made.h5"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(copies * size))
    )
    said: list[str] = []
    with pytest.raises(InputError, match=f"out must have room for {what}.* MB; it has") as caught:
        prepare(lines, "byte", 0, out, said.append, SKIP, shard_chars=10_000)
    assert "\n" not in str(caught.value)
    assert not any("tokenising" in line for line in said)
    assert not list(out.parent.iterdir())
    assert not kept_texts() or copies > 1


@pytest.mark.parametrize(("copies", "what"), [(4, "a copy of the text"), (2, "the tokens of the")])
def test_no_room_on_a_real_disk_is_told_before_the_work(
    copies: int, what: str, library_documents: list[Document], tmp_path: Path
) -> None:
    """A file system of 3 MB, for a text of 1 MB two or four times."""
    text = "".join(d.text for d in library_documents)[:1_000_000].encode("ascii", "replace")
    (tmp_path / "text.txt").write_bytes(text * copies)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root can mount a file system")
    try:
        with pytest.raises(InputError, match=f"disk must have room for {what}.* MB; it has . MB"):
            prepare(tmp_path / "text.txt", "byte", 0, disk / "made.h5")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "text " * 100_000

    def limit() -> None:
        resource = pytest.importorskip("resource")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, resource.RLIM_INFINITY))

    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit()
    try:
        with pytest.raises(StorageError, match="could not write a copy of the text .*nothing was"):
            prepare(endless(), "byte", 0, tmp_path / "made.h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def reference_signatures(texts: list[str]) -> np.ndarray:
    """By strings, and Python's own white space."""
    shingles = []
    for text in texts:
        words = text.split()
        runs = zip(*(words[i:] for i in range(SHINGLE_WORDS)), strict=False)
        shingles.append([" ".join(run) for run in runs] or [text])
    minima = np.array(RMinHash.digests_from_token_sets(shingles, BANDS * ROWS, 1), np.uint64)
    bands = np.zeros((len(texts), BANDS), np.uint64)
    for row in range(ROWS):
        bands = (bands ^ minima[:, row::ROWS]) * np.uint64(0x9E3779B97F4A7C15)
        bands ^= bands >> np.uint64(29)
    return bands


def signatures(texts: list[str]) -> np.ndarray:
    with SignatureBuilder() as builder:
        for text in texts:
            builder.add(text.encode())
        return builder.finish()


def test_signatures_do_not_depend_on_the_batches(
    library_documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [d.text[:20_000] for d in library_documents[:150]]
    expected = reference_signatures(texts)
    assert np.array_equal(signatures(texts), expected)
    monkeypatch.setattr("mmrec.data.dedup.BATCH_BYTES", 30_000)
    assert np.array_equal(signatures(texts), expected)
    assert signatures([]).shape == (0, BANDS)
