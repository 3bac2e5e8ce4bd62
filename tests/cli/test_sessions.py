"""``mmrec generate --read``, ``--state``, ``--save-state``: a text is read once and continued."""

import io
import json
import sys
from pathlib import Path

import pytest

from mmrec.cli import main
from mmrec.inference.session import Session
from tests.inference.test_session import make_decoder


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, char_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the run and a text, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    Path("run").symlink_to(char_run)
    Path("text.txt").write_text("It was the best of times,\nit was ")


def run(arguments: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints."""
    patch.setattr(sys, "argv", ["mmrec", "generate", "run", *arguments.split()])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main.run()
    printed = capsys.readouterr()
    assert not caught.value.code, printed.err
    return printed.out


def test_a_text_is_read_once_and_continued(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--max-tokens 30 --seed 1 --prompt the"
    want = run(f"--read text.txt {options}", monkeypatch, capsys)
    assert want.startswith("the")
    without = run("--prompt the --max-tokens 30 --seed 1", monkeypatch, capsys)
    assert without != want
    assert run("--read text.txt --max-tokens 0 --save-state a.h5", monkeypatch, capsys) == "\n"
    for _ in range(2):  # the state stays as it is
        assert run(f"--state a.h5 {options}", monkeypatch, capsys) == want
    samples = run(f"--state a.h5 {options} --samples 2 --json", monkeypatch, capsys)
    texts = [json.loads(line)["text"] for line in samples.splitlines()]
    assert f"the{texts[0]}\n" == want
    assert len(texts) == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("text.txt").read_bytes())))
    assert run(f"--read - {options}", monkeypatch, capsys) == want


def test_the_saved_state_stands_after_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("--prompt it --max-tokens 9 --seed 1 --save-state a.h5", monkeypatch, capsys)
    second = run("--state a.h5 --max-tokens 9 --seed 2 --save-state a.h5", monkeypatch, capsys)
    Path("both.txt").write_text(first.removesuffix("\n") + second.removesuffix("\n"))
    want = run("--read both.txt --max-tokens 9 --seed 3", monkeypatch, capsys)
    assert run("--state a.h5 --max-tokens 9 --seed 3", monkeypatch, capsys) == want


def test_a_session_of_another_model_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Session(make_decoder("char")).save(Path("other.h5"))
    for command in ("generate", "chat"):
        monkeypatch.setattr(sys, "argv", ["mmrec", command, "run", "--state", "other.h5"])
        with pytest.raises(SystemExit) as caught:
            main.run()
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith(
            "error: other.h5 must be a session of run/best.h5; it is of another"
        )
        assert error.count("\n") == 1
