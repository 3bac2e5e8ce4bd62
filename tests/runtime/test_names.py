"""Names that users choose, shown on one line and made short; and paths with ``~``."""

import os
from pathlib import Path

import pytest

from mmrec.runtime.names import extensible, path_exists, printable, shorten, user_path


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("runs/tiny", "runs/tiny"),
        ("日本 😀 é [bold]$x_%s{a}\\n", "日本 😀 é [bold]$x_%s{a}\\n"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred\x07\x7f\x9b", "\\x1b[31mred\\x07\\x7f\\x9b"),
        ("a\u2028b\u2029\x85", "a\\u2028b\\u2029\\x85"),
        (os.fsdecode(b"caf\xe9"), "caf\\udce9"),
    ],
)
def test_a_name_is_printed_on_one_line(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable(Path(name)) == shown
    assert len(shown.splitlines()) == 1
    shown.encode()


def test_a_long_name_keeps_both_ends() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghij", 6) == "abc…ij"
    assert shorten("a\nb", 4) == "a\\nb"
    assert len(shorten("x" * 999, 60)) == 60


def test_a_file_name_leaves_room() -> None:
    assert extensible("x" * 205) == "x" * 205
    assert len(extensible("日" * 80)) == 32
    assert extensible("x" * 206) != extensible("x" * 207)


def test_a_path_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
    assert user_path("~nosuchuser/x") == Path("~nosuchuser/x")
    Path("~").mkdir()
    Path("~/x").touch()
    assert user_path("~/x") == Path("~/x")
    assert [path_exists(name) for name in ("~/x", "~/y", "x" * 999, "a\0b", "~/x/y")] == (
        [True] + [False] * 4
    )
