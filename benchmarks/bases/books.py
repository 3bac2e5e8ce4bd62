"""English books in the public domain as JSON lines, for the pretrained models.

    git clone https://github.com/mlschmitt/classic-books-markdown BOOKS
    python benchmarks/bases/books.py BOOKS OUT

BOOKS is a clone, with or without a work tree, that has the commit COMMIT. ``OUT/train.jsonl`` holds
one book per line; ``OUT/held-out.jsonl`` holds the books of four authors, which the models never
see. Left out of both are the texts that races and tests of this project use, and near-duplicates of
them.

Users bring text in more than one form, so the form of each book depends on a hash of its name: a
third of the books is wrapped to lines of 60 to 79 characters, as Project Gutenberg has them, and
half of the books has straight quotation marks instead of curly ones.
"""

import argparse
import hashlib
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

from text_files import OutputFiles

URL = "https://github.com/mlschmitt/classic-books-markdown"
COMMIT = "944882722e9a96fa6cf2739dc2ea757e101f412f"
"""The state of the collection that is read."""
LEFT_OUT = (
    "William Shakespeare/",
    "Various/King James Bible",
    "Thomas Jefferson/The Jefferson Bible",
)
"""Authors and books that races and tests use, and near-duplicates of them."""
HELD_OUT = ("Willa Cather/", "Lucy Maud Montgomery/", "Joseph Conrad/", "P.G. Wodehouse/")
"""Authors whose books measure the models."""
STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


def git(clone: Path, *arguments: str) -> bytes:
    """Return what a git command prints."""
    return subprocess.run(["git", "-C", clone, *arguments], check=True, capture_output=True).stdout


def books(clone: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each book, ``Author/Title.md``, and its text in Markdown, in order.

    A clone without some of the files, such as one that leaves out large ones, gives the others.
    """
    names = git(clone, "ls-tree", "-r", "-z", "--name-only", COMMIT).decode().split("\0")
    for name in sorted(names):
        if name.endswith(".md") and "/" in name and not name.startswith(LEFT_OUT):
            try:
                yield name, git(clone, "show", f"{COMMIT}:{name}").decode()
            except subprocess.CalledProcessError:
                print(f"not in the clone: {name}")


def plain(markdown: str, name: str) -> str:
    """Return the text of a book without its head and its marks, in the form that its name draws."""
    draw = hashlib.sha256(name.encode()).digest()
    _, _, body = markdown.partition("\n-------\n")
    body = (body or markdown).replace("\r\n", "\n").replace("\ufeff", "").replace("\xa0", " ")
    body = re.sub(r"^#+ *", "", body, flags=re.MULTILINE)  # headings
    body = re.sub(r"[*_]{1,3}(\S(?:[^*_\n]*\S)?)[*_]{1,3}", r"\1", body)  # emphasis
    body = re.sub(r"\\([\\`*_{}\[\]()#+\-.!])", r"\1", body)
    paragraphs = [re.sub(r"[ \t]+$", "", p, flags=re.MULTILINE) for p in re.split(r"\n\s*\n", body)]
    if draw[0] % 3 == 0:
        width = 60 + draw[1] % 20
        paragraphs = [p if "\n" in p else textwrap.fill(p, width) for p in paragraphs]
    text = "\n\n".join(p.strip("\n") for p in paragraphs if p.strip())
    return (text.translate(STRAIGHT) if draw[2] % 2 else text) + "\n"


def write_books(clone: Path, out: Path) -> dict[str, list[int]]:
    """Write the texts into a folder.

    Args:
        clone: the clone.
        out: the folder; made if it is not there.

    Returns:
        Of each file of texts its books and its bytes.
    """
    with OutputFiles(out) as files:
        for name, markdown in books(clone):
            split = "held-out" if name.startswith(HELD_OUT) else "train"
            files.write(split, name, plain(markdown, name))
    return files.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    for split, (number, size) in write_books(options.clone, options.out).items():
        print(f"{split}: {number} books, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
