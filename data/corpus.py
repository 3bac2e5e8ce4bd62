"""Tokenised corpora: one HDF5 file each, made once and reused while its source is unchanged.

The layout is described in docs/formats.md.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import platformdirs

from mmrec.config import InputError
from mmrec.data.corpora import NAMES, Document, load_documents, split
from mmrec.data.tokenizer import Tokenizer, check_wish, train_tokenizer
from mmrec.files import sweep
from mmrec.storage import (
    atomic_write,
    open_file,
    read_array,
    read_json,
    write_array,
    write_json,
)

KIND, SCHEMA = "corpus", 2


@dataclass(frozen=True)
class Split:
    """One side of a corpus: every document followed by the end token."""

    tokens: np.ndarray
    """(n,) uint16 or uint32."""
    doc_offsets: np.ndarray
    """(documents + 1,) int64, where each document starts in tokens; the last is n."""
    doc_bytes: np.ndarray
    """(documents,) int64, UTF-8 bytes of each document."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens, end tokens included."""
        return len(self.tokens)

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text, the denominator of bits per byte."""
        return int(self.doc_bytes.sum())


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, its tokens in memory."""

    path: Path
    train: Split
    val: Split
    tokenizer: Tokenizer
    info: dict[str, Any]
    """source, fingerprint (SHA-256 of the texts), duplicates, python."""

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """Read a corpus file. Raises InputError if it is missing, damaged or of another kind."""
        with open_file(path, KIND, SCHEMA, SCHEMA) as file:
            info = read_json(file, "info")
            tokenizer = Tokenizer.from_json(json.dumps(read_json(file, "tokenizer")))
            train, val = (_read_split(file, side, tokenizer) for side in ("train", "val"))
        return cls(path, train, val, tokenizer, info)


def _read_split(file: h5py.File, side: str, tokenizer: Tokenizer) -> Split:
    dtype = _token_dtype(tokenizer)
    names = {"tokens": dtype, "doc_offsets": np.int64, "doc_bytes": np.int64}
    made = Split(*(read_array(file, f"{side}/{name}", kind) for name, kind in names.items()))
    if made.n_tokens and int(made.tokens.max()) >= tokenizer.vocab_size:
        raise ValueError("a token id lies outside the vocabulary")
    starts = made.doc_offsets
    fits = len(starts) == len(made.doc_bytes) + 1 and starts[0] == 0 and starts[-1] == made.n_tokens
    if not (fits and (np.diff(starts) > 0).all() and (made.doc_bytes >= 0).all()):
        raise ValueError(f"the documents of {side} do not add up to its tokens")
    return made


def _token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> Split:
    """Tokenise documents, each followed by the end token."""
    pieces: list[np.ndarray] = []
    dtype = _token_dtype(tokenizer)
    for ids in tokenizer.encode_batch([d.text for d in documents]):
        pieces.append(np.append(ids, tokenizer.eot).astype(dtype))
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    sizes = np.array([len(d.text.encode()) for d in documents], np.int64)
    return Split(np.concatenate([np.empty(0, dtype), *pieces]), offsets, sizes)


def cache_folder() -> Path:
    """Where prepared corpora are kept: ``$MMREC_CACHE``, else the user's cache folder."""
    root = os.environ.get("MMREC_CACHE") or platformdirs.user_cache_dir("mmrec")
    return Path(root) / "corpora"


def _fingerprint(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for d in documents:
        text = d.text.encode()
        digest.update(f"{d.name}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()


def is_prepared(source: str) -> bool:
    """Whether a source names a prepared corpus file rather than text."""
    return source.endswith((".h5", ".hdf5")) and source not in NAMES


def prepare(
    source: str,
    tokenizer: str | Tokenizer = "bpe",
    vocab_size: int = 5000,
    out: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Make the corpus file of a source, or find the one made before, and return its path.

    Args:
        source: corpus name, file, folder, glob, or a prepared ``.h5`` file (returned as it is).
        tokenizer: ``bpe`` (trained on the training split), ``char`` or ``byte``; or one made
            before, to be used as it is.
        vocab_size: vocabulary of ``bpe``.
        out: where to write; None for the cache.
        progress: called with a line of text at each stage.

    Raises:
        InputError: the source cannot be read or is too small to split; the tokenizer is unknown.
        StorageError: the file cannot be written.
    """
    say = progress or (lambda line: None)
    if is_prepared(source):
        return Path(source)
    known = tokenizer if isinstance(tokenizer, Tokenizer) else None
    if isinstance(tokenizer, Tokenizer):
        kind = tokenizer.kind
        detail: str | int = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    else:
        check_wish(tokenizer, vocab_size)
        kind, detail = tokenizer, vocab_size if tokenizer == "bpe" else 0
    documents = load_documents(source)
    fingerprint = _fingerprint(documents)
    wanted = [fingerprint, kind, detail, SCHEMA]
    if out is None:
        stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(source).stem or source).strip("-") or "corpus"
        key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
        out = cache_folder() / f"{stem}-{kind}-{key}.h5"
    if out.exists() and _matches(out, wanted):
        say(f"corpus {source}: unchanged, using {out}")
        return out
    parts = split(documents)
    if not parts.train or not parts.val:
        raise InputError(f"{source} is too small to split into training and validation text")
    if known is None:
        say(f"corpus {source}: {len(documents)} documents; training the {kind} tokenizer")
        # characters are taken from both sides, so that none of the validation text is unknown
        texts = [d.text for d in parts.train + (parts.val if kind == "char" else [])]
        known = train_tokenizer(kind, texts, vocab_size)
    say(f"corpus {source}: tokenising")
    sides = {"train": parts.train, "val": parts.val}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out.parent}: {error.strerror}") from None
    sweep(out.parent)
    with atomic_write(out, KIND, SCHEMA) as file:
        for side, docs in sides.items():
            part = encode_documents(known, docs)
            for name in ("tokens", "doc_offsets", "doc_bytes"):
                write_array(file, f"{side}/{name}", getattr(part, name))
        write_json(file, "tokenizer", json.loads(known.to_json()))
        info = {"source": source, "fingerprint": fingerprint, "wanted": wanted,
                "duplicates": parts.duplicates, "python": platform.python_version()}  # fmt: skip
        write_json(file, "info", info)
    return out


def open_corpus(
    source: str, tokenizer: Tokenizer, progress: Callable[[str], None] | None = None
) -> Corpus:
    """The corpus of a source under a tokenizer made before: that of a model to go on with.

    Raises:
        InputError: as of ``prepare``, or a prepared file was made with another tokenizer.
    """
    corpus = Corpus.open(prepare(source, tokenizer, progress=progress))
    if corpus.tokenizer.to_json() != tokenizer.to_json():
        raise InputError(
            f"{source} must be tokenised as the model's text was; it was made with another "
            "tokenizer: give the text itself, which is tokenised anew"
        )
    return corpus


def _matches(path: Path, wanted: list[Any]) -> bool:
    try:
        with open_file(path, KIND, SCHEMA, SCHEMA) as file:
            return bool(read_json(file, "info")["wanted"] == wanted)
    except InputError:
        return False  # a damaged cache file is made again
