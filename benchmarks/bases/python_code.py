"""Python code under permissive licences as JSON lines, for the pretrained model ``python``.

    python benchmarks/bases/python_code.py OUT

``OUT/train.jsonl`` holds the standard library of the running Python and files of PACKAGES, one file
per line. ``OUT/held-out.jsonl`` holds the packages HELD_OUT, by other authors, which the model
never sees. ``OUT/packages.json`` says of each package its version, its licence, the SHA-256 of its
wheel, and what was taken of it. pip loads wheels into ``OUT/wheels``; those that are there are not
loaded again.

Left out are tests, copies of other packages inside a package, generated files, tables, files with
very long lines, very short files, and files that occurred before. A large package gives a part of
its files only, so that no style dominates.
"""

import argparse
import hashlib
import io
import json
import platform
import re
import subprocess
import sys
import sysconfig
import tokenize
import zipfile
from collections import Counter
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath
from typing import Any

from text_files import OutputFiles

from mmrec.data.stdlib import is_table, library_files

PACKAGES = {
    "accelerate": "1.15.0",
    "aiohttp": "3.14.5",
    "alembic": "1.20.1",
    "anyio": "4.16.0",
    "arcade": "3.3.3",
    "arviz": "0.23.4",
    "astropy": "8.0.2",
    "attrs": "26.1.0",
    "babel": "2.19.0",
    "bandit": "1.9.4",
    "beautifulsoup4": "4.15.0",
    "black": "26.10.1",
    "bokeh": "3.9.2",
    "boto3": "1.44.8",
    "botocore": "1.44.8",
    "bottle": "0.13.4",
    "celery": "5.7.0",
    "cirq-core": "1.7.0",
    "click": "8.5.1",
    "control": "0.10.2",
    "coverage": "7.17.5",
    "cvxpy": "1.9.3",
    "dask": "2026.8.0",
    "datasets": "5.2.0",
    "distributed": "2026.8.0",
    "django": "5.2.19",
    "djangorestframework": "3.18.3",
    "docker": "7.2.0",
    "fabric": "3.2.3",
    "falcon": "4.4.0",
    "fastapi": "0.165.0",
    "flask": "3.1.3",
    "flax": "0.12.8",
    "geopandas": "1.2.0",
    "gunicorn": "27.0.1",
    "httpie": "3.2.4",
    "httpx": "0.28.1",
    "imageio": "2.38.1",
    "invoke": "3.0.3",
    "ipython": "9.18.1",
    "jax": "0.10.2",
    "jedi": "0.20.1",
    "jinja2": "3.1.6",
    "kombu": "5.7.0",
    "langchain-core": "1.8.4",
    "lark": "1.3.1",
    "lightning": "2.6.6",
    "locust": "2.47.0",
    "luigi": "3.8.1",
    "manim": "0.22.0",
    "markdown": "3.11.3",
    "marshmallow": "4.4.0",
    "matplotlib": "3.11.2",
    "mesa": "3.3.1",
    "mido": "1.3.3",
    "mitmproxy": "11.0.2",
    "mkdocs": "1.6.1",
    "more-itertools": "11.2.1",
    "mypy": "2.4.1",
    "nbconvert": "7.17.2",
    "networkx": "3.6.1",
    "nicegui": "3.18.0",
    "nikola": "8.3.3",
    "nltk": "3.10.4",
    "numba": "0.68.1",
    "numpy": "2.4.6",
    "openpyxl": "3.1.5",
    "optax": "0.2.8",
    "pandas": "3.1.1",
    "parso": "0.8.7",
    "pillow": "13.0.0",
    "pip": "26.3",
    "ply": "3.11",
    "poetry": "2.5.1",
    "prefect": "3.9.1",
    "prompt-toolkit": "3.0.53",
    "pydantic": "2.14.4",
    "pyflakes": "4.1.0",
    "pygments": "2.21.0",
    "pymc": "5.28.5",
    "pyomo": "6.10.1",
    "pyparsing": "3.3.3",
    "pypdf": "7.1.1",
    "pytest": "9.2.0",
    "python-docx": "1.2.0",
    "qiskit": "2.6.2",
    "rdflib": "7.6.0",
    "requests": "2.34.2",
    "rich": "15.0.0",
    "sanic": "25.12.1",
    "scikit-image": "0.26.0",
    "scikit-learn": "1.9.1",
    "scipy": "1.17.1",
    "scrapy": "2.19.0",
    "seaborn": "0.13.2",
    "sentry-sdk": "2.75.0",
    "setuptools": "84.2.1",
    "shapely": "2.2.0",
    "simpy": "4.1.2",
    "spacy": "3.8.18",
    "sphinx": "9.0.4",
    "sqlalchemy": "2.1.9",
    "starlette": "1.10.0",
    "statsmodels": "0.15.0",
    "streamlit": "1.67.0",
    "sympy": "1.14.0",
    "textual": "8.2.8",
    "toolz": "1.2.0",
    "tornado": "6.6.1",
    "tox": "4.67.15",
    "transformers": "5.24.0",
    "trio": "0.35.0",
    "twisted": "26.10.0",
    "typer": "0.29.2",
    "urllib3": "2.8.0",
    "uvicorn": "0.54.0",
    "virtualenv": "21.15.11",
    "wagtail": "8.0.1",
    "werkzeug": "3.1.9",
    "xarray": "2026.9.0",
    "xlsxwriter": "3.3.1",
    "xonsh": "0.25.0",
    "zarr": "3.1.6",
}
"""Packages and their versions. Wheels of other versions can hold other files."""
HELD_OUT = ("flask", "networkx", "rich", "werkzeug")
"""Packages that measure the model."""
MAX_PACKAGE_BYTES = 1_000_000
"""A larger package gives files of about this size in all, drawn by the hash of their names."""
STDLIB = "standard library"
PLATFORM = ["--python-version", "3.11", "--implementation", "cp"]
PLATFORM += [word for abi in ("cp311", "abi3", "none") for word in ("--abi", abi)]
PLATFORM += [
    word
    for name in ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "any")
    for word in ("--platform", name)
]
"""What pip loads wheels for: the same on every machine."""

PERMISSIVE = re.compile(
    r"0BSD|Apache(-2\.0)?( Software)?|BSD([- ][23]-Clause)?|CC0-1\.0|HPND|ISC|MIT(-CMU|-0)?"
    r"|PSF(-2\.0)?|Python(-2\.0)?( Software Foundation)?|Unlicense|Zlib"
)
"""A licence, without the word "License" behind it."""
SKIPPED_FOLDERS = {
    *("test", "tests", "testsuite", "idle_test", "idlelib", "pydoc_data", "migrations", "locale"),
    *("_vendor", "vendor", "_vendored", "vendored", "third_party", "thirdparty", "_third_party"),
    *("extern", "externals", "_externals", "site-packages", "__pycache__", "_bundled", "lib2to3"),
}
TEST_FILE = re.compile(r"(test_.*|.*_tests?|tests?|conftest)\.py")
GENERATED_FILE = re.compile(r".*(_pb2|_pb2_grpc|_version|_parsetab|parsetab|_lextab|lextab)\.py")
MIN_FILE_BYTES = 300
MAX_LINE_CHARS = 400


def reason_to_skip(name: str, text: str) -> str:
    """Return why a file is left out; empty if it is not.

    Args:
        name: its path, with ``/``.
        text: its content.
    """
    path = PurePosixPath(name)
    if not SKIPPED_FOLDERS.isdisjoint(path.parts[:-1]):
        return "folder"
    if TEST_FILE.fullmatch(path.name):
        return "test"
    if GENERATED_FILE.fullmatch(path.name):
        return "generated"
    if len(text.encode()) < MIN_FILE_BYTES:
        return "short"
    if max(map(len, text.splitlines())) > MAX_LINE_CHARS:
        return "long lines"
    return "table" if is_table(text, python=True) else ""


def decode(raw: bytes) -> str:
    """Return the text of a Python file, with ``\\n`` at the ends of lines; empty if it has none."""
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
        text = raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return ""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def licence(metadata: Message) -> str:
    """Return the licence of a wheel from its metadata.

    Args:
        metadata: the headers of its file METADATA.

    Returns:
        The SPDX expression if there is one; else the names in its classifiers, joined by AND; else
        the first line of the field License.

    Raises:
        ValueError: none of them is there, or one of its licences is not permissive.
    """
    classifiers = [
        value.split(" :: ")[-1]
        for value in metadata.get_all("Classifier", [])
        if value.startswith("License :: ") and value != "License :: OSI Approved"
    ]
    lines = str(metadata.get("License", "")).strip().splitlines()
    found = str(
        metadata.get("License-Expression") or " AND ".join(classifiers) or "".join(lines[:1])
    )
    parts = re.split(r" (?:AND|OR) |[()/;]", found)
    names = [
        re.sub(r"^The |,? [Ll]icen[cs]e| Version| v?2\.0|Modified |New ", "", p).strip(" \"'")
        for p in parts
    ]
    if not found or not all(PERMISSIVE.fullmatch(name) for name in names if name):
        raise ValueError(f"the licence must be permissive; got {found!r}")
    return found


def find_wheel(package: str, version: str, folder: Path) -> Path | None:
    """Return the wheel of a package if it is in a folder."""
    start = re.sub("[-_.]+", "_", f"{package}-{version}-").lower()
    wheels = sorted(folder.glob("*.whl"))
    names = [re.sub("[-_.]+", "_", path.name).lower() for path in wheels]
    return next((path for path, n in zip(wheels, names, strict=True) if n.startswith(start)), None)


def load_wheel(package: str, version: str, folder: Path) -> Path:
    """Return the wheel of a package; pip loads it unless it is in the folder.

    Raises:
        CalledProcessError: pip could not load it.
    """
    if (wheel := find_wheel(package, version, folder)) is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--only-binary", ":all:", *PLATFORM, "-d", str(folder), f"{package}=={version}"]
        subprocess.run(command, check=True)
        wheel = find_wheel(package, version, folder)
    assert wheel is not None
    return wheel


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each module of the running Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in library_files(root):
        if path.suffix == ".py":
            yield f"stdlib/{path.relative_to(root).as_posix()}", decode(path.read_bytes())


def wheel_files(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each Python file of a wheel, in the order of the paths."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and ".data/" not in name:
                yield name, decode(archive.read(name))


def read_licence(wheel: Path) -> str:
    """Return the licence of a wheel; see ``licence``."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
        return licence(Parser().parsestr(archive.read(name).decode()))


def choose_files(
    files: Iterator[tuple[str, str]], max_bytes: int | None, seen: set[bytes], skipped: Counter[str]
) -> list[tuple[str, str]]:
    """Return the files of a package that are taken, in their order.

    Args:
        files: paths and texts.
        max_bytes: size of the files together, exceeded by less than a file; None is no limit.
        seen: digests of the texts that were taken before; those of new ones are added.
        skipped: counts the files that are left out, by the reason.
    """
    wanted = {}
    for name, text in files:
        digest = hashlib.sha256(text.encode()).digest()
        if reason := "duplicate" * (digest in seen) or reason_to_skip(name, text):
            skipped[reason] += 1
        else:
            seen.add(digest)
            wanted[name] = text
    size, chosen = 0, set()
    for name in sorted(wanted, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if max_bytes is None or size < max_bytes:
            chosen.add(name)
            size += len(wanted[name].encode())
    if left := len(wanted) - len(chosen):
        skipped["beyond the size of a package"] += left
    return [(name, text) for name, text in wanted.items() if name in chosen]


def write_code(out: Path) -> dict[str, list[int]]:
    """Write the texts and the record of the packages into a folder.

    Args:
        out: the folder; made if it is not there.

    Returns:
        Of each file of texts its documents and its bytes.
    """
    wheels = out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    record: list[dict[str, Any]] = []
    with OutputFiles(out) as files:
        # what is held out is read first, so that copies of it are left out of the other
        for package in sorted([*PACKAGES, STDLIB], key=lambda name: (name not in HELD_OUT, name)):
            row: dict[str, Any] = {"package": package}
            if package == STDLIB:
                row |= {"version": platform.python_version(), "licence": "PSF-2.0"}
                found, limit = standard_library(), None
            else:
                wheel = load_wheel(package, PACKAGES[package], wheels)
                row |= {"version": PACKAGES[package], "licence": read_licence(wheel)}
                row["sha256"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
                found, limit = wheel_files(wheel), MAX_PACKAGE_BYTES
            skipped: Counter[str] = Counter()
            chosen = choose_files(found, limit, seen, skipped)
            split = "held-out" if package in HELD_OUT else "train"
            size = sum(files.write(split, name, text) for name, text in chosen)
            row |= {"split": split, "files": len(chosen), "bytes": size, "skipped": dict(skipped)}
            record.append(row)
            print(f"{package}: {len(chosen)} files, {size / 1e6:.2f} MB", flush=True)
        (out / "packages.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return files.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    for split, (number, size) in write_code(parser.parse_args().out).items():
        print(f"{split}: {number} files, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
