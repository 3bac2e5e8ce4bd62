"""Preparing a corpus: documents to tokens in one HDF5 file, in bounded memory, on all cores."""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmrec.checkpoint.hdf5 import atomic_h5_file, open_h5_file, read_json, write_json
from mmrec.config import TrainConfig
from mmrec.data.corpus import KIND, SCHEMA, Corpus, cache_folder, is_prepared
from mmrec.data.readers import Document, Reading
from mmrec.data.sources import Source, documents, mixture, reread
from mmrec.data.split import TRAIN, Plan, scan, sketches, split
from mmrec.data.tokenize import Parts
from mmrec.data.tokenizer import Tokenizer, check_wish, train_tokenizer
from mmrec.errors import InputError
from mmrec.runtime.atomic import remove_stale_temporaries

SAMPLE = 1 << 26  # bytes of training text that a bpe tokenizer is trained on

Say = Callable[[str], None]


def reading(config: TrainConfig) -> Reading:
    """How a run reads its text."""
    names = ("text_field", "skip_bad", "max_bytes", "val_share", "val_file")
    return Reading(**{name: getattr(config, name) for name in names})


def tokenizer_kind(config: TrainConfig) -> str:
    """The kind of tokenizer that a run's text will have."""
    if not is_prepared(config.data):
        return config.tokenizer
    return Corpus.open(Path(config.data)).tokenizer.kind


def prepare(
    source: str,
    tokenizer: str | Tokenizer = "bpe",
    vocab_size: int = 5000,
    out: Path | None = None,
    progress: Say | None = None,
    how: Reading | None = None,
    *,
    pack: bool = False,
) -> Path:
    """Make the corpus file of a source, or find the one made before, and return its path.

    Memory does not grow with the text but by about 250 bytes a document. A text of more than
    64 M characters is tokenised in parts, and what a kill left done is not done again.

    Args:
        source: see ``corpora.documents``, or a prepared ``.h5`` file (returned as it is).
        tokenizer: ``bpe`` (trained on the training split), ``char`` or ``byte``; or one made
            before, to be used as it is.
        vocab_size: vocabulary of ``bpe``.
        out: where to write; None for the cache.
        progress: called with a line of text at each stage.
        how: fields, what is skipped, and the split.
        pack: compress the tokens; they are then read into memory whole.

    Raises:
        InputError: the source cannot be read or is too small to split; the tokenizer is unknown.
        StorageError: the file cannot be written.
    """
    say, how = progress or (lambda line: None), dataclasses.replace(how or Reading(), bad=0)
    mixed = mixture(source)
    if is_prepared(source) and len(mixed) == 1:
        return Path(source)
    if isinstance(tokenizer, str):
        check_wish(tokenizer, vocab_size)
    folder = out.parent if out else cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from None
    with contextlib.ExitStack() as held:
        if any(is_prepared(part) for _, part in mixed):
            raise InputError(f"a mixture must be of texts; got the corpus file in {source}")
        mains = [held.enter_context(reread(part, how, folder)) for _, part in mixed]
        held.enter_context(_alone(folder, say))
        remove_stale_temporaries(folder)
        work = _Work(source, mains, tokenizer, vocab_size, how, say, pack=pack)
        path = out or folder / work.name
        if path.exists() and _matches(path, work.wanted):
            say(f"corpus {source}: unchanged, using {path}")
        else:
            work.make(path)
    return path


def open_corpus(
    source: str, tokenizer: Tokenizer, progress: Say | None = None, how: Reading | None = None
) -> Corpus:
    """The corpus of a source under a tokenizer made before: that of a model to go on with.

    Raises:
        InputError: as of ``prepare``, or a prepared file was made with another tokenizer.
    """
    corpus = Corpus.open(prepare(source, tokenizer, progress=progress, how=how))
    if corpus.tokenizer.to_json() != tokenizer.to_json():
        raise InputError(
            f"{source} must be tokenised as the model's text was; it was made with another "
            "tokenizer: give the text itself, which is tokenised anew"
        )
    return corpus


def training_texts(source: str, how: Reading | None = None) -> Iterator[str]:
    """The texts of the training side of a source, piece by piece."""
    how = how or Reading()
    found = scan(documents(source, how))
    plan = split(found, how, lambda: sketches(documents(source, how), lambda n: None))
    return (d.text for side, d in plan.deal(documents(source, how)) if side == TRAIN)


@contextlib.contextmanager
def _alone(folder: Path, say: Say) -> Iterator[None]:
    """Wait until no other process prepares a corpus in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # where the file system knows no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that prepares a corpus in {folder}")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _bar(total: int | None, what: str) -> Any:
    often = 0.5 if os.isatty(2) else 30.0
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        leave=False,
        delay=2,
        mininterval=often,
        dynamic_ncols=True,
    )


class _Work:
    """One source on its way to a corpus file."""

    def __init__(
        self,
        source: str,
        mains: list[Source],
        tokenizer: str | Tokenizer,
        vocab_size: int,
        how: Reading,
        say: Say,
        *,
        pack: bool,
    ) -> None:
        self.source, self.how, self.say, self.pack = source, how, say, pack
        self.known = tokenizer if isinstance(tokenizer, Tokenizer) else None
        kind = tokenizer if isinstance(tokenizer, str) else tokenizer.kind
        self.kind, self.vocab_size = kind, vocab_size if kind == "bpe" else 0
        self.streams = mains
        held_out = Reading(how.text_field, how.skip_bad) if how.val_file else None
        if how.val_file:
            self.streams = [lambda: documents(how.val_file, held_out), *mains]
        self.ends: list[int] = []
        """Documents up to the end of each stream."""
        with _bar(None, "reading") as bar:
            self.found = scan(self._numbered(bar))
        self.skipped = how.bad + (held_out.bad if held_out else 0)
        self.given = self.ends[0] if how.val_file else 0
        if len(self.found.keys) == self.given:
            raise InputError(f"{source} is empty: expected text; got only white space or nothing")
        rule: Any = self.given or how.val_share
        detail: Any = self.vocab_size
        if self.known:
            detail = hashlib.sha256(self.known.to_json().encode()).hexdigest()
        weights = [weight for weight, _ in mixture(source)]
        self.wanted = [self.found.fingerprint, kind, detail, rule, weights, SCHEMA]
        self.wanted += ["packed"] * pack
        stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(source).stem or source).strip("-") or "text"
        key = hashlib.sha256(json.dumps(self.wanted).encode()).hexdigest()[:16]
        self.name = f"{stem}-{kind}-{key}.h5"

    def _numbered(self, bar: Any) -> Iterator[Document]:
        number = 0
        for stream in self.streams:
            for d in stream():
                bar.update(len(d.text))
                number += not d.more
                yield d
            self.ends.append(number)

    def stream(self) -> Iterator[Document]:
        """All documents, the validation file's first."""
        return itertools.chain.from_iterable(stream() for stream in self.streams)

    def make(self, path: Path) -> None:
        """Write the corpus file."""
        found, size = self.found, int(self.found.sizes.sum())
        with _bar(size, "comparing") as bar:
            plan = split(found, self.how, lambda: sketches(self.stream(), bar.update), self.given)
        if not plan.has_both(found):
            raise InputError(
                f"{self.source} is too small to split into training and validation text"
            )
        parts = Parts(path, self.wanted)
        tokenizer = self.known or parts.tokenizer
        if tokenizer is None:
            self.say(
                f"corpus {self.source}: {len(found.keys):,} documents, {size:,} bytes; "
                f"training the {self.kind} tokenizer"
            )
            tokenizer = self._train(plan)
            parts.tokenizer = tokenizer
        if self.known is None and tokenizer.vocab_size < self.vocab_size:
            self.say(
                f"note: this text makes a vocabulary of {tokenizer.vocab_size:,} tokens, not "
                f"the {self.vocab_size:,} asked for"
            )
        begin, left = time.perf_counter(), size - parts.bytes
        done = f", {parts.bytes:,} bytes were done before" if parts.bytes else ""
        self.say(f"corpus {self.source}: tokenising{done}")
        with _bar(size, "tokenising") as bar:
            bar.update(parts.bytes)
            parts.fill(tokenizer, plan.deal(self.stream()), bar.update)
        rate = left / 1e6 / (time.perf_counter() - begin)
        info = {
            "source": self.source,
            "fingerprint": found.fingerprint,
            "wanted": self.wanted,
            "duplicates": plan.duplicates,
            "near_duplicates": plan.near,
            "skipped": self.skipped,
            "longest": found.longest,
            "random": found.random,
            "mixture": self._mixture(plan, parts),
            "python": platform.python_version(),
        }
        with atomic_h5_file(path, KIND, SCHEMA) as file:
            parts.copy_into(file, pack=self.pack)
            write_json(file, "tokenizer", json.loads(tokenizer.to_json()))
            write_json(file, "info", info)
        self.say(f"corpus {self.source}: {parts.n_tokens:,} tokens at {rate:.1f} MB/s; {path}")
        parts.remove()

    def _mixture(self, plan: Plan, parts: Parts) -> list[dict[str, Any]]:
        """Weight of each source, and where its training tokens end: they lie one after another."""
        offsets, _ = parts.documents(TRAIN)
        ends = self.ends[1:] if self.given else self.ends
        mixed = zip(mixture(self.source), ends, strict=True)
        return [
            {"source": name, "weight": weight, "end": int(offsets[plan.training(end)])}
            for (weight, name), end in mixed
        ]

    def _train(self, plan: Plan) -> Tokenizer:
        """A tokenizer of the training text, or of a sample of it where there is much."""
        dealt = plan.deal(self.stream())
        if self.kind != "bpe":  # validation text, too, so that none of its characters is unknown
            return train_tokenizer(self.kind, (d.text for _, d in dealt))
        rng, share = np.random.default_rng(0), SAMPLE / int(self.found.sizes.sum())
        texts = (d.text for side, d in dealt if side == TRAIN and rng.random() < share)
        return train_tokenizer(self.kind, texts, self.vocab_size)


def _matches(path: Path, wanted: list[Any]) -> bool:
    try:
        with open_h5_file(path, KIND, SCHEMA, SCHEMA) as file:
            return bool(read_json(file, "info")["wanted"] == wanted)
    except InputError:
        return False  # a damaged cache file is made again
