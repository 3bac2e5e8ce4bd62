"""The comparison of new and pretrained models: its texts, its cells, its table."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "bases"
sys.path.insert(0, str(FOLDER))
try:
    starts = importlib.import_module("starts")
finally:
    sys.path.remove(str(FOLDER))


@pytest.fixture
def pages(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Real text in the place and the form of the web pages."""
    monkeypatch.setattr(starts, "OTHER_BYTES", 20_000)
    folder = tmp_path / "texts" / "c4_sample"
    folder.mkdir(parents=True)
    text = text_file.read_text()
    lines = [json.dumps({"text": text[i : i + 2000]}) for i in range(0, 300_000, 2000)]
    (folder / "c4_sample.jsonl").write_text("\n".join(lines) + "\n")
    return folder.parent


def test_beginnings_have_the_size_and_whole_characters() -> None:
    parts = list(starts.beginnings(["äöü" * 9, "abc", "x" * 99], 60, 11))
    assert parts == ["äöüäö", "abc", "x" * 11]
    assert sum(len(p.encode()) for p in starts.beginnings(["x" * 40] * 3, 60, 99)) == 60


def test_the_texts_share_no_document(pages: Path, tmp_path: Path) -> None:
    args = Namespace(work=tmp_path, texts=pages, sizes=(9_000, 30_000, 10**7))
    texts, other = starts.write_texts("web pages", args, tmp_path)
    assert list(texts) == [9_000, 30_000]  # there are no ten megabytes

    def documents(path: Path) -> list[str]:
        return [json.loads(line)["text"] for line in path.read_text().splitlines()]

    small, large = documents(texts[9_000]), documents(texts[30_000])
    assert sum(len(text.encode()) for text in large) == 30_000
    assert small[:-1] == large[: len(small) - 1]
    assert not {*large} & {*documents(other)}


def test_the_table_says_which_start_is_better() -> None:
    common = {"kind": "code", "bytes": 100_000, "minutes": 3.0, "auto": "english"}
    rows = [
        common | {"start": start, "seed": seed, "bits_per_byte": bits}
        for start, seed, bits in (
            (starts.NEW, 0, 2.0),
            (starts.NEW, 1, 2.2),
            ("english", 0, 2.3),
            ("english", 1, 2.1),
        )
    ]
    rows += [row | {"bytes": 500_000, "auto": starts.NEW} for row in rows]
    lines = starts.show(rows).splitlines()
    assert lines[2] == "| 100 kB of code | 3 | 2.100 | 2.200 | english | a new model |"
    assert lines[-1] == "auto chooses the better start in 1 of 2"


@pytest.mark.parametrize("kind", starts.KINDS)
def test_texts_that_are_missing_are_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["starts.py", "--kinds", kind, "--out", "starts.json"])
    with pytest.raises(SystemExit) as caught:
        starts.main()
    assert caught.value.code == 2
    assert f"the texts of the kind {kind} must be there" in capsys.readouterr().err


def test_cells_are_run_once(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new model and a pretrained one, each trained for a moment in its own process."""
    out = tmp_path / "starts.json"
    words = ["starts.py", "--texts", str(pages), "--kinds", "web pages", "--sizes", "20000"]
    words += ["--minutes", "0.02", "--seeds", "0", "--starts", starts.NEW, "english-byte"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(out)])
    starts.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["start"] for row in rows] == [starts.NEW, "english-byte"]
    assert [row["tokenizer"] for row in rows] == ["char", "byte"]
    for row in rows:
        assert 1.0 < row["bits_per_byte"] < 9.0
        assert row["before"].keys() >= {"english", "english-byte"}
    assert out.with_suffix(".png").stat().st_size > 5000
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(out), "--add"])
    starts.main()
    assert json.loads(out.read_text())["rows"] == rows
    assert "auto chooses the better start in" in capsys.readouterr().out
