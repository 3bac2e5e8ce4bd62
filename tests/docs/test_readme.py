"""The README's commands and Python snippets run as they stand there, only shorter.

``MMREC_README_STEPS`` is the number of training steps, by default 2; ``full`` runs everything as
written, which takes minutes.
"""

import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STEPS = os.environ.get("MMREC_README_STEPS", "2")
IS_FULL = STEPS == "full"
SHORT = ["--steps", STEPS, "--batch-size", "2", "--seq-len", "32", "--max-bytes", "200000"]


def blocks(language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The commands of the README in their order, without comments."""
    lines = "\n".join(blocks("bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("mmrec ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the texts that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    pages = sorted((ROOT / "docs").rglob("*.md"))
    texts = [page.read_text(encoding="utf-8") for page in pages]
    (folder / "book.txt").write_text("\n".join(texts), encoding="utf-8")
    (folder / "other.txt").write_text(README, encoding="utf-8")
    return folder


def test_the_commands_run(
    folder: Path,
    run_command: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    found = commands()
    assert [c[1] for c in found] == ["generate", "train", "train", "generate", "chat", "serve"]
    outputs = {}
    for command in found[:-1]:  # tests/server/test_command.py runs the last one
        if command[1] == "train" and not IS_FULL:
            length = command.index("--minutes") if "--minutes" in command else len(command)
            command = command[:length] + SHORT
        outputs[command[1]], _ = run_command(folder, *command[1:])
    assert outputs["generate"].startswith("def ")


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_snippet_runs(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    snippet = blocks("python")[number]
    if not IS_FULL:
        snippet = snippet.replace("minutes=5", f"steps={STEPS}, batch_size=2, seq_len=32")
    exec(compile(snippet, f"snippet {number + 1}", "exec"), {})


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 120
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []
