"""What the pages name exists: files of the repository, and options of the command line."""

import re
from pathlib import Path
from typing import Any

import typer

from mmrec.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FOLDERS = "mmrec|cli|data|tests|benchmarks|docs"
OTHER_PROGRAMS = {
    *("--index-url", "--extra-index-url", "--no-deps"),  # pip
    *("--torch-backend", "--from", "--spec", "--pip-args"),  # uv and pipx
    *("--rm", "--pin"),  # docker; benchmarks/versions.py
    *("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"),  # torchrun
    "--max-restarts",
    *("--logdir", "--project"),  # tensorboard, trackio
    *("--seconds", "--trials", "--nanogpt", "--threads"),  # benchmarks
    *("--llama2c", "--long", "--show", "--namespaces"),
    *("--run", "--work", "--texts", "--cards", "--german", "--cores"),  # benchmarks/bases
    *("--kinds", "--sizes", "--seeds", "--add"),
    *("--install-completion", "--option"),
}


def code_of(page: Path) -> list[str]:
    """Code spans and lines of code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*found, *re.findall(r"`([^`\n]+)`", rest)]


def options(command: Any) -> set[str]:
    """All options of a command and of those below it."""
    own = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    below = [options(c) for c in getattr(command, "commands", {}).values()]
    return own.union(*below)


def test_every_file_named_in_the_pages_exists() -> None:
    pattern = re.compile(rf"(?<![\w/.])((?:{FOLDERS})/[\w/.-]+\.(?:py|json|md|png|toml))\b")
    missing = {
        (page.name, name)
        for page in PAGES
        for code in code_of(page)
        for name in pattern.findall(code)
        if not (ROOT / name).exists()
    }
    assert missing == set()


def test_every_option_named_in_the_pages_exists() -> None:
    known = options(typer.main.get_command(app)) | OTHER_PROGRAMS
    unknown = {
        (page.name, option)
        for page in PAGES
        for code in code_of(page)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", code)
        if option not in known
    }
    assert unknown == set()
