"""Names that users choose, such as paths: looked up as they are meant, and shown on one line."""

import hashlib
import os
import unicodedata
from pathlib import Path

MAX_STEM_CHARS = 60
"""Characters that the name of a file or folder takes over from the name of a text. Systems allow
255 bytes, and other parts are added."""


def user_path(name: str | Path) -> Path:
    """The path that a name means: ``~`` stands for a home folder.

    A file that begins with ``~``, or the home of a user that the system does not know, is taken
    literally.
    """
    path = Path(name)
    if path_exists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # no such user, or HOME is not set and this user has no entry
        return path


def path_exists(path: str | Path) -> bool:
    """Whether a file or folder exists. A name that no file can have does not exist."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, not readable, or with a NUL
        return False


def extensible(file_name: str) -> str:
    """A file name to which 50 bytes can be added: itself, or a digest of it if it is too long."""
    encoded = os.fsencode(file_name)
    return file_name if len(encoded) <= 205 else hashlib.sha256(encoded).hexdigest()[:32]


def printable(name: str | Path) -> str:
    """A name on one line: line ends and control characters are escaped, as are bytes that are not
    UTF-8."""
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        else c
        for c in str(name)
    )


def shorten(name: str | Path, width: int) -> str:
    """A printable name of at most ``width`` characters, its middle replaced by ``…``."""
    text = printable(name)
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"
