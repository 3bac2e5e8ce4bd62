"""``--help`` shows every panel and loses no brackets; shells can complete commands and options."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from mmrec.cli import main
from mmrec.cli.options import ALL_SETTINGS, PANELS
from tests.conftest import command_line


def mmrec(*arguments: str, **environment: str) -> str:
    """Standard output of a real process with a wide terminal."""
    command = [sys.executable, "-m", "mmrec", *arguments]
    env = os.environ | {"COLUMNS": "240", "TERM": "dumb"} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_help_of_train_shows_all_settings_in_their_panels() -> None:
    text = mmrec("train", "--help")
    assert "[data], [model], [optimizer]" in text
    for title in PANELS.values():
        assert f"─ {title} ─" in text
    for setting in ALL_SETTINGS.values():
        assert f"{setting.flag} " in text
        assert setting.help.split(":")[0].split(";")[0] in text


@pytest.mark.parametrize(
    ("words", "expected"), [("mmrec tr", "train"), ("mmrec train --seq", "--seq-len")]
)
def test_bash_completes(words: str, expected: str) -> None:
    count = len(words.split()) - 1
    out = mmrec(_MMREC_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(count))
    assert expected in out.split()


def commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its words, groups included."""
    yield path, command
    for name, member in getattr(command, "commands", {}).items():
        yield from commands(member, f"{path} {name}".strip())


def shown(arguments: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, with single spaces and without frames."""
    patch.setattr(sys, "argv", ["mmrec", *arguments.split()])
    patch.setattr(main, "prepare_process", lambda command: None)  # it is for whole processes
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert not caught.value.code
    return " ".join(re.sub("[─│╭╮╰╯]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("rich", [True, False])
def test_help_is_shown_as_it_is_written(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether rich formats it or not, no word is left out. ``-h`` is ``--help``."""
    monkeypatch.setattr(typer.core, "HAS_RICH", rich)
    monkeypatch.setattr(main, "build_command", functools.cache(command_line.__wrapped__))
    monkeypatch.setenv("COLUMNS", "1000")
    found = list(commands(typer.main.get_command(main.app)))
    assert {"", "train", "data inspect", "bench train"} <= {path for path, _ in found}
    for path, command in found:
        text = shown(f"{path} --help", monkeypatch, capsys)
        if rich:
            assert shown(f"{path} -h", monkeypatch, capsys) == text
        helps = [command.help, *(p.help for p in command.params if not p.hidden)]
        for written in helps:
            assert " ".join(written.split()) in text
        for p in command.params:
            assert p.hidden or not p.metavar or p.metavar in text


def test_help_in_a_narrow_terminal_loses_no_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for path, command in commands(typer.main.get_command(main.app)):
        text = shown(f"{path} --help", monkeypatch, capsys)
        for p in command.params:
            assert not set(p.help.split()) - set(text.split())
