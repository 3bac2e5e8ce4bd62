"""Tokenised corpora: one HDF5 file each, made once and reused while its source is unchanged.

The layout is described in docs/formats.md.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import platformdirs

from mmrec.checkpoint.hdf5 import map_array, open_h5_file, read_array, read_json
from mmrec.data.sources import NAMES
from mmrec.data.tokenizer import Tokenizer

KIND, SCHEMA = "corpus", 3
SIDES = ("train", "val")


@dataclass(frozen=True)
class Split:
    """One side of a corpus: every document followed by the end token."""

    tokens: np.ndarray
    """(n,) uint16 or uint32; where there are many, they stay in the file until they are read."""
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
    """source, fingerprint (SHA-256 of the texts), how many were left out, longest and random
    documents …"""

    @property
    def parts(self) -> list[tuple[float, int, int]]:
        """Weight of each source of a mixture, and where its training tokens begin and end."""
        mixed, begin = self.info["mixture"], 0
        made = []
        for part in mixed:
            made.append((part["weight"], begin, part["end"]))
            begin = part["end"]
        return made

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """Read a corpus file. Raises InputError if it is missing, damaged or of another kind."""
        with open_h5_file(path, KIND, SCHEMA, SCHEMA) as file:
            info = read_json(file, "info")
            _check_info(info)
            tokenizer = Tokenizer.from_json(json.dumps(read_json(file, "tokenizer")))
            train, val = (_read_split(file, path, side, tokenizer) for side in SIDES)
            ends = [0, *(part["end"] for part in info["mixture"])]
            weights = [part["weight"] for part in info["mixture"]]
            if sorted(ends) != ends or ends[-1] != train.n_tokens or not min(weights) > 0:
                raise ValueError("its mixture does not add up to the training tokens")
        return cls(path, train, val, tokenizer, info)


def _check_info(info: dict[str, Any]) -> None:
    """Raise KeyError or ValueError unless it holds what is read of it."""
    kinds = {
        "source": str,
        "fingerprint": str,
        "duplicates": int,
        "near_duplicates": int,
        "skipped": int,
        "longest": list,
        "random": list,
        "mixture": list,
    }
    shown = {"name": str, "bytes": int, "text": str}
    part = {"source": str, "weight": float, "end": int}
    for key, kind in kinds.items():
        wanted = part if key == "mixture" else shown
        good = isinstance(info[key], kind) and all(
            isinstance(entry, dict) and all(isinstance(entry.get(k), v) for k, v in wanted.items())
            for entry in (info[key] if kind is list else [])
        )
        if not good:
            raise ValueError(f"{key} in info is not of its kind")


def _read_split(file: h5py.File, path: Path, side: str, tokenizer: Tokenizer) -> Split:
    dtype = token_dtype(tokenizer)
    starts, sizes = (
        read_array(file, f"{side}/{name}", np.int64) for name in ("doc_offsets", "doc_bytes")
    )
    made = Split(map_array(file, path, f"{side}/tokens", dtype), starts, sizes)
    if made.n_tokens and int(made.tokens.max()) >= tokenizer.vocab_size:
        raise ValueError("a token id lies outside the vocabulary")
    fits = len(starts) == len(made.doc_bytes) + 1 and starts[0] == 0 and starts[-1] == made.n_tokens
    if not (fits and (np.diff(starts) > 0).all() and (made.doc_bytes >= 0).all()):
        raise ValueError(f"the documents of {side} do not add up to its tokens")
    return made


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger[Any]]:
    """The smaller of uint16 and uint32 that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def cache_folder() -> Path:
    """Where prepared corpora are kept: ``$MMREC_CACHE``, else the user's cache folder."""
    root = os.environ.get("MMREC_CACHE") or platformdirs.user_cache_dir("mmrec")
    return Path(root) / "corpora"


def is_prepared(source: str) -> bool:
    """Whether a source names a prepared corpus file rather than text."""
    return source.endswith((".h5", ".hdf5")) and source not in NAMES
