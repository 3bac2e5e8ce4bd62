"""``mmrec score``: the totals of ``mmrec eval``, as a table, JSON lines or a page."""

import gzip
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from mmrec.checkpoint.outputs import PAGE_MARK
from mmrec.cli import main

TEXT = "It was the best of times,\nit was the worst\n"


def output(
    arguments: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The lines that a command prints."""
    patch.setattr(sys, "argv", ["mmrec", *arguments.split()])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert not caught.value.code
    return capsys.readouterr().out.splitlines()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, char_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the run and a text, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(char_run)
    Path("text.txt").write_text(TEXT)


def test_totals_are_those_of_eval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want = json.loads("\n".join(output("eval run --data text.txt --json", monkeypatch, capsys)))
    *lines, last = map(json.loads, output("score text.txt run --json", monkeypatch, capsys))
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert last["total"][name] == pytest.approx(want[name], abs=1e-5)
    for name in ("checkpoint", "step", "tokens", "bytes", "documents"):
        assert last["total"][name] == want[name]
    assert "".join(line["text"] for line in lines) == TEXT
    tokens = [token for line in lines for token in line["tokens"]]
    assert len(tokens) == want["tokens"]
    assert -sum(t["logprob"] for t in tokens) / len(tokens) == pytest.approx(want["loss"], abs=1e-5)
    table = output("score text.txt run", monkeypatch, capsys)
    evaluated = output("eval run --data text.txt", monkeypatch, capsys)
    for figure in ("loss", "perplexity", "bits per byte"):
        (told,) = (line.split("(")[0].strip() for line in table if line.strip().startswith(figure))
        assert any(line.strip().startswith(told) for line in evaluated)


def test_tables_of_lines_and_of_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    *lines, _ = map(json.loads, output("score text.txt run --json", monkeypatch, capsys))
    rows = output("score text.txt run", monkeypatch, capsys)[3:]
    for row, line in zip(rows[:2], lines, strict=False):
        number, bits, rate, text = row.split(maxsplit=3)
        assert (int(number), text) == (line["line"], line["text"].rstrip("\n"))
        assert float(bits) == pytest.approx(-line["logprob"] / math.log(2), abs=0.006)
        assert float(rate) == pytest.approx(float(bits) / line["bytes"], abs=0.001)
    rows = output("score text.txt run --tokens", monkeypatch, capsys)[3:]
    tokens = [(line["line"], token) for line in lines for token in line["tokens"]]
    for row, (line, token) in zip(rows[: len(tokens)], tokens, strict=True):
        number, token_id, bits, text = row.split(maxsplit=3)
        assert (int(number), int(token_id)) == (line, token["id"])
        assert float(bits) == pytest.approx(-token["logprob"] / math.log(2), abs=0.006)
        assert text == '"' + token["text"].replace("\n", "\\n") + '"'


def test_the_reader_of_training_data_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want = output("score text.txt run --json", monkeypatch, capsys)[:-1]
    Path("packed").write_bytes(gzip.compress(TEXT.encode()))
    assert output("score packed run --json", monkeypatch, capsys)[:-1] == want
    Path("records.jsonl").write_text(json.dumps({"body": TEXT}) + "\nbroken\n")
    options = "--text-field body --skip-bad"
    assert output(f"score records.jsonl run --json {options}", monkeypatch, capsys)[:-1] == want
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert output("score - run --json", monkeypatch, capsys)[:-1] == want


def test_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = output("score text.txt run --html page.html", monkeypatch, capsys)
    assert told[-1].split() == ["page", "page.html"]
    page = Path("page.html").read_text()
    assert page.startswith(PAGE_MARK)
    assert page.count("data-h=") == len(TEXT) + 1
    output("score text.txt run --html page.html --top 0", monkeypatch, capsys)  # replaces its own
    assert len(Path("page.html").read_text()) < len(page)


def test_neither_scores_nor_a_chat_import_torch() -> None:
    code = (
        "import sys\n"
        "from mmrec.cli import main\n"
        "for words in ('score text.txt run --html page.html', 'chat run --max-tokens 5'):\n"
        "    sys.argv = ['mmrec', *words.split()]\n"
        "    try: main.run()\n"
        "    except SystemExit as end: assert not end.code\n"
        "print('torch' in sys.modules, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, input="It was\n", capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1:] == ["False"], ended.stderr
