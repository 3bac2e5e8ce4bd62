"""The walks of docs/development/tour.md: their functions exist, and they stay short."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "docs" / "development" / "tour.md"
WALKS = {
    "A training step": (7, 15),
    "A generated token": (5, None),
    "An op": (4, None),
}
"""Heading of each walk, its largest number of files, and of switches between files."""


def read_walk(heading: str) -> list[tuple[str, str]]:
    """(file, function) of each entry under a heading."""
    section = TOUR.read_text(encoding="utf-8").split(f"\n### {heading}\n")[1].split("\n### ")[0]
    return re.findall(r"^- `([^`:]+):([\w.]+)`$", section, re.MULTILINE)


def defines(file: str, name: str) -> bool:
    """Whether a file defines a function or method, without importing the file."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    *classes, function = name.split(".")
    for class_name in classes:
        found = [n for n in body if isinstance(n, ast.ClassDef) and n.name == class_name]
        if not found:
            return False
        body = found[0].body
    return any(isinstance(n, ast.FunctionDef) and n.name == function for n in body)


@pytest.mark.parametrize("heading", WALKS)
def test_every_function_of_a_walk_exists(heading: str) -> None:
    walk = read_walk(heading)
    assert len(walk) >= 5
    assert [f"{file}:{name}" for file, name in walk if not defines(file, name)] == []


@pytest.mark.parametrize("heading", WALKS)
def test_a_walk_stays_short(heading: str) -> None:
    most_files, most_switches = WALKS[heading]
    files = [file for file, _ in read_walk(heading)]
    assert len(set(files)) <= most_files
    switches = sum(a != b for a, b in itertools.pairwise(files))
    assert most_switches is None or switches <= most_switches


def test_a_missing_function_is_noticed() -> None:
    assert defines("mmrec/model.py", "Model.loss")
    assert not defines("mmrec/model.py", "Model.no_such_method")
    assert not defines("mmrec/model.py", "NoSuchClass.loss")
