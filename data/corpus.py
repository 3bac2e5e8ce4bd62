"""Tokenised corpora: one HDF5 file each, prepared once and reused while its source is unchanged.

The layout of the file is described in docs/reference/file-formats.md.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import platformdirs

from mmrec.checkpoint.hdf5 import map_array, open_h5_file, read_array, read_json
from mmrec.data.document_record import DocumentRecord
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.runtime.names import user_path

KIND, SCHEMA = "corpus", 4
SPLITS = ("train", "val")
CORPUS_SUFFIXES = (".h5", ".hdf5")
"""A source that ends so is a prepared corpus file."""
EVALUATION_STREAMS = 8
"""Contiguous streams that a text is cut into for evaluation; they are scored side by side."""
MIN_STREAM_TOKENS = 1024
"""A shorter text gets fewer streams, because each of them starts without context."""


def count_evaluation_streams(n_tokens: int) -> int:
    """Return how many streams of equal length a text is scored in; only the last is shorter."""
    return max(1, min(EVALUATION_STREAMS, n_tokens // MIN_STREAM_TOKENS))


@dataclass(frozen=True)
class Split:
    """The training or the validation text of a corpus; every document ends with the end token.

    Attributes:
        tokens: (n,) uint16 or uint32. A long array is read from the disk as it is used.
        doc_offsets: (documents + 1,) int64, index in ``tokens`` where each document begins; the
            last is n.
        doc_bytes: (documents,) int64, UTF-8 bytes of each document; of a conversation those of its
            answers.
        answers: (n,) bool, for conversations, whether a token belongs to an answer; only those are
            learnt and scored. None for texts, of which all tokens are.
    """

    tokens: np.ndarray
    doc_offsets: np.ndarray
    doc_bytes: np.ndarray
    answers: np.ndarray | None = None

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
    """A prepared corpus.

    Attributes:
        path: its file.
        train: the training text.
        val: the validation text.
        tokenizer: what the text was tokenised with.
        info: JSON: ``source``, ``fingerprint`` (SHA-256 of the texts), ``duplicates``,
            ``near_duplicates``, ``cut_documents`` and ``skipped`` (counts), ``longest`` and
            ``random`` (some documents of both kinds), ``mixture``, ``cache_key`` and ``python``;
            of a text that was added to another one also ``earlier``, the identities of those that
            it continues.
        documents: the record of its documents; None for conversations, and for files of mmrec 0.6
            and earlier.
    """

    path: Path
    train: Split
    val: Split
    tokenizer: Tokenizer
    info: dict[str, Any]
    documents: DocumentRecord | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the text, as JSON: its SHA-256, and how it is mixed, split and tokenised.

        Names do not count.
        """
        streams = [list(stream) for stream in self.mixture_streams]
        return {
            "fingerprint": self.info["fingerprint"],
            "mixture": streams if len(streams) > 1 else [],
            "split": [self.train.n_tokens, self.val.n_tokens],
            "tokenizer": hashlib.sha256(self.tokenizer.to_json().encode()).hexdigest(),
        }

    @property
    def earlier(self) -> list[dict[str, Any]]:
        """The identities of the texts to which this one was added, the oldest first."""
        earlier: list[dict[str, Any]] = self.info.get("earlier", [])
        return earlier

    def continues(self, fingerprint: Any) -> bool:
        """Whether this is the text with a fingerprint, or that text with more added to it."""
        known = [self.info["fingerprint"], *(text["fingerprint"] for text in self.earlier)]
        return fingerprint in known

    @property
    def mixture_streams(self) -> list[tuple[float, int, int]]:
        """Weight of each component of a mixture, and where its training tokens begin and end."""
        streams, begin = [], 0
        for component in self.info["mixture"]:
            streams.append((component["weight"], begin, component["end"]))
            begin = component["end"]
        return streams

    @property
    def mixture_names(self) -> list[str]:
        """The source of each component of a mixture."""
        return [component["source"] for component in self.info["mixture"]]

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """Open a corpus file.

        Args:
            path: the file.

        Raises:
            DamagedError: it is damaged.
            InputError: it is missing, not a corpus, or was written by another version of mmrec.
        """
        with open_h5_file(path, KIND, SCHEMA, SCHEMA) as file:
            info = read_json(file, "info")
            _check_info(info)
            tokenizer = Tokenizer.from_json(json.dumps(read_json(file, "tokenizer")))
            documents = None
            if "documents" in file:
                documents = DocumentRecord.read_arrays(
                    file, "documents", val_documents=info.get("val_documents", 0)
                )
            train, val = (_read_split(file, path, name, tokenizer) for name in SPLITS)
            ends = [0, *(component["end"] for component in info["mixture"])]
            weights = [component["weight"] for component in info["mixture"]]
            if sorted(ends) != ends or ends[-1] != train.n_tokens or not min(weights) > 0:
                raise ValueError("its mixture does not add up to the training tokens")
        corpus = cls(path, train, val, tokenizer, info, documents)
        if documents is None:
            return corpus
        whole = replace(documents, identity=corpus.identity, earlier=corpus.earlier)
        return replace(corpus, documents=whole)


def _check_info(info: dict[str, Any]) -> None:
    """Raise KeyError or ValueError unless every entry that is used has its type."""
    types = {
        "source": str,
        "fingerprint": str,
        "duplicates": int,
        "near_duplicates": int,
        "skipped": int,
        "longest": list,
        "random": list,
        "mixture": list,
    }
    excerpt = {"name": str, "bytes": int, "text": str}
    component = {"source": str, "weight": float, "end": int}
    if not all("fingerprint" in text for text in info.get("earlier", [])):
        raise ValueError("earlier in info has the wrong type")
    for key, kind in types.items():
        fields = component if key == "mixture" else excerpt
        good = isinstance(info[key], kind) and all(
            isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in fields.items())
            for entry in (info[key] if kind is list else [])
        )
        if not good:
            raise ValueError(f"{key} in info has the wrong type")


def _read_split(file: h5py.File, path: Path, name: str, tokenizer: Tokenizer) -> Split:
    offsets = read_array(file, f"{name}/doc_offsets", np.int64)
    doc_bytes = read_array(file, f"{name}/doc_bytes", np.int64)
    tokens = map_array(file, path, f"{name}/tokens", token_dtype(tokenizer))
    if len(tokens) and int(tokens.max()) >= tokenizer.vocab_size:
        raise ValueError("a token id lies outside the vocabulary")
    fits = len(offsets) == len(doc_bytes) + 1 and offsets[0] == 0 and offsets[-1] == len(tokens)
    if not fits or (np.diff(offsets) <= 0).any() or (doc_bytes < 0).any():
        raise ValueError(f"the documents of {name} do not add up to its tokens")
    answers = None
    if f"{name}/answers" in file:
        answers = read_array(file, f"{name}/answers", np.uint8, tokens.shape).astype(bool)
    return Split(tokens, offsets, doc_bytes, answers)


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger[Any]]:
    """The smaller of uint16 and uint32 that holds every token id."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _user_cache_folder() -> str:
    """The user's cache folder; ``~`` if it is not known."""
    try:
        return platformdirs.user_cache_dir("mmrec")
    except RuntimeError:  # older versions of platformdirs return a path that begins with ~
        return "~"


def cache_folder() -> Path:
    """Where prepared corpora are kept: under ``$MMREC_CACHE``, else in the user's cache folder.

    Raises:
        InputError: no variable names a folder, and this user has no home.
    """
    root = user_path(os.environ.get("MMREC_CACHE") or _user_cache_folder())
    if root.parts[:1] == ("~",):
        raise InputError(
            "no folder is known for prepared corpora, as this user has no home: set MMREC_CACHE to "
            "a folder that you can write"
        )
    return root / "corpora"


def is_prepared(source: str | Path) -> bool:
    """Whether a source names a prepared corpus file rather than text."""
    return str(source).endswith(CORPUS_SUFFIXES)
