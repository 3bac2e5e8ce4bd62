"""``--help`` shows every panel and loses no brackets; shells can complete commands and options."""

import os
import subprocess
import sys

import pytest

from mmrec.cli.options import ALL_SETTINGS, PANELS


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
