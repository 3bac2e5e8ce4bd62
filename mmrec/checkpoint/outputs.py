"""What may be overwritten: no command destroys a file that mmrec did not write.

A file that a user names as an output replaces an existing one only if mmrec wrote that one and it
is of the same kind, or with ``force``. A file that is read is never replaced.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from mmrec.checkpoint.hdf5 import file_kind
from mmrec.errors import InputError

REPORT_MARK = "<!-- written by mmrec eval -->\n"
"""First line of a report, in Markdown and in HTML."""
PAGE_MARK = "<!-- written by mmrec score -->\n"
"""First line of a page of scores."""
RUN_MARK = "<!-- written by mmrec report -->\n"
"""First line of a page about a run."""
START_BYTES = 4096
"""A picture, a report and a page say within so many bytes who wrote them."""


def _starts(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(START_BYTES)


def _is_picture(path: Path) -> bool:
    start = _starts(path)
    return start.startswith(b"\x89PNG") and b"Software\0mmrec " in start


def _has_keys(path: Path, *keys: str) -> bool:
    """Whether a file is a JSON object with these keys, or a list of such objects, named or not."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(value, dict) and value.keys() == {"runs"}:
        value = value["runs"]
    rows = value if isinstance(value, list) and value else [value]
    return all(isinstance(row, dict) and all(key in row for key in keys) for row in rows)


KINDS: dict[str, Callable[[Path], bool]] = {
    "corpus": lambda path: file_kind(path) == "corpus",
    "picture": _is_picture,
    "report": lambda path: _starts(path).startswith(REPORT_MARK.encode()),
    "score page": lambda path: _starts(path).startswith(PAGE_MARK.encode()),
    "page of a run": lambda path: _starts(path).startswith(RUN_MARK.encode()),
    "session": lambda path: file_kind(path) == "session",
    "stages": lambda path: _has_keys(path, "stage", "flops"),
    "recipe": lambda path: _has_keys(path, "stages", "start_scores"),
    "benchmark result": lambda path: _has_keys(path, "machine"),
    "checkpoint": lambda path: False,  # a trained model is not made again in a minute
}
"""How a file that mmrec wrote is known, by kind."""


def check_output(
    path: Path,
    kind: str,
    *,
    option: str = "--out",
    inputs: Iterable[Path] = (),
    force: bool | None = False,
) -> None:
    """Check that a file may be written, before the work that it will hold.

    Args:
        path: The file.
        kind: One of ``KINDS``.
        option: What error messages call it.
        inputs: The files that are read. They are asked for only if ``path`` exists.
        force: Replace a file whoever wrote it, unless it is an input. None is False where the user
            has no ``--force``.

    Raises:
        InputError: The path is a folder, a device or an input, its folder does not exist or cannot
            be written, or a file is there that must not be replaced.
    """
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        raise InputError(f"{option} must be a file to write; {path}: {error.strerror}") from None
    if is_folder:
        raise InputError(f"{option} must be a file to write; {path} is a folder")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{option} must lie in a folder that exists; there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} must lie in a folder that can be written; {folder} cannot")
    if not exists:
        return
    check_not_read(path, inputs, option=option)
    if not path.is_file():
        raise InputError(f"{option} must be a file to write; {path} is a device or pipe")
    if force or _is_ours(path, kind):
        return
    what = "" if kind == "checkpoint" else f", and mmrec wrote no {kind} there"
    remedy = "" if force is None else ", or add --force to overwrite it"
    raise InputError(f"{path} is there already{what}: choose another {option}{remedy}")


def check_output_folder(folder: Path, *, option: str, force: bool = False) -> None:
    """Check that a folder may be filled, before the work that it will hold.

    Args:
        folder: The folder. It need not exist.
        option: What error messages call it.
        force: Write into a folder that holds something.

    Raises:
        InputError: The path is a file, the folder above it does not exist, one of them cannot be
            written, or the folder holds something.
    """
    try:
        exists, is_folder = folder.exists(), folder.is_dir()
        held = sorted(p.name for p in folder.iterdir()) if is_folder else []
    except OSError as error:
        raise InputError(
            f"{option} must be a folder to write; {folder}: {error.strerror}"
        ) from None
    if exists and not is_folder:
        raise InputError(f"{option} must be a folder to write; {folder} is a file")
    above = folder if is_folder else folder.parent
    if not above.is_dir():
        raise InputError(f"{option} must lie in a folder that exists; there is no folder {above}")
    if not os.access(above, os.W_OK):
        raise InputError(f"{option} must be a folder that can be written; {above} cannot")
    if held and not force:
        others = f" and {len(held) - 1} more" if len(held) > 1 else ""
        raise InputError(
            f"{option} must be new or empty; {folder} holds {held[0]}{others}: choose another "
            f"{option}, or add --force to write into it"
        )


def check_not_read(path: Path, inputs: Iterable[Path], *, option: str = "--out") -> None:
    """Check that a file to write is none of those that are read, under any of their names.

    Args:
        path: The file to write.
        inputs: The files that are read.
        option: What the error message calls the file to write.

    Raises:
        InputError: It is one of them: by a link, another spelling, or in upper or lower case.
    """
    for source in inputs:
        if is_same_file(path, source):
            also = "" if source == path else f", which is {source}"
            raise InputError(
                f"{option} must not be a file that is read, and {path} is one{also}: choose "
                f"another {option}"
            )


def is_same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file that exists."""
    try:
        return a.samefile(b)
    except (OSError, ValueError):
        return False


def _is_ours(path: Path, kind: str) -> bool:
    try:
        return KINDS[kind](path)
    except (OSError, ValueError, RecursionError):
        return False
