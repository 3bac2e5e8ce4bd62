"""Preparing a corpus: documents to tokens in one HDF5 file, in bounded memory, on all cores."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from mmrec.checkpoint.hdf5 import atomic_h5_file, open_h5_file, read_json, write_json
from mmrec.checkpoint.outputs import check_not_read, check_output
from mmrec.config import DataConfig
from mmrec.data.added_text import ContinuedText, KnownText, continue_text
from mmrec.data.conversations import holds_conversations, prepare_conversations
from mmrec.data.corpus import (
    CORPUS_SUFFIXES,
    KIND,
    SCHEMA,
    Corpus,
    cache_folder,
    is_prepared,
    token_dtype,
)
from mmrec.data.document_record import DocumentRecord
from mmrec.data.documents import check_room, read_once
from mmrec.data.readers import Document, ReadOptions
from mmrec.data.sources import (
    CORPUS_NAMES,
    DOCUMENTS,
    Source,
    check_read_once,
    parse_mixture,
    source_files,
)
from mmrec.data.split import DROPPED, TRAIN, VAL, SplitPlan, plan_split
from mmrec.data.tokenize import SHARD_CHARS, AssignedPiece, TokenShards, check_characters
from mmrec.data.tokenizer import (
    Tokenizer,
    check_tokenizer_settings,
    extend_characters,
    train_tokenizer,
)
from mmrec.errors import InputError
from mmrec.runtime.atomic import remove_stale_temporaries
from mmrec.runtime.names import MAX_STEM_CHARS, user_path
from mmrec.runtime.progress import progress_bar

TOKENIZER_SAMPLE_BYTES = 1 << 24
"""Bytes of training text that a ``bpe`` tokenizer is trained on if there is much text, about."""
SAMPLED_FROM = 4
"""A text of at most so many times the sample is taken whole."""
ROOM_SAMPLE_CHARS = 1 << 20
"""Characters at the beginning of the text by which the number of its tokens is estimated."""
BPE_TOKEN_BYTES = 3.9
"""Bytes of English text per token of a BPE vocabulary of 5,000, about."""
MANY_COPIES = 0.1
"""Share of exact copies among the documents from which on they are mentioned."""
LOCK_NAME = ".mmrec.prepare.lock"
READING_SETTINGS = ("text_field", "skip_bad", "max_bytes", "val_fraction", "val_file")
"""Settings of how a text is read and split, which a prepared corpus does not need."""

Echo = Callable[[str], None]
"""Called with each line of text for the user."""


def read_options(data_config: Any) -> ReadOptions:
    """Build the options of reading from a configuration.

    Args:
        data_config: any object with the attributes ``text_field``, ``skip_bad``, ``max_bytes``,
            ``val_fraction`` and ``val_file``.

    Raises:
        InputError: a value is out of its range.
    """
    return ReadOptions(**{name: getattr(data_config, name) for name in READING_SETTINGS})


def check_given_settings(given: Mapping[str, Any], data: DataConfig) -> None:
    """Check that every setting of the text which the user gave has an effect.

    Args:
        given: the settings that the user gave, by flat name, without those of a file.
        data: all settings of the text.

    Raises:
        InputError: a setting has no effect.
    """
    declared = DataConfig.settings()
    given = {n: v for n, v in given.items() if n in declared and v != declared[n].default}

    def refuse(names: Iterable[str], reason: str) -> None:
        for name in names:
            if name in given:
                raise InputError(f"{declared[name].flag} has no effect: {reason}")

    kind = data.tokenizer
    if is_prepared(data.source):
        tokenizer = Corpus.open(Path(data.source)).tokenizer
        kind = tokenizer.kind
        refuse(READING_SETTINGS, f"{data.source} is prepared already; give the text itself")
        if given.get("tokenizer", kind) != kind:
            refuse(["tokenizer"], f"{data.source} has the tokenizer {kind}")
        if given.get("vocab", tokenizer.vocab_size) != tokenizer.vocab_size:
            refuse(["vocab"], f"{data.source} has a vocabulary of {tokenizer.vocab_size:,}")
    if kind != "bpe":
        refuse(["vocab"], f"it is the size of a bpe vocabulary, and the tokenizer is {kind}")
    if data.val_file:
        refuse(["val_fraction"], f"the validation text is {data.val_file}")
    elif all(name in CORPUS_NAMES for _, name in parse_mixture(data.source)):
        refuse(["skip_bad"], f"the built-in corpus {data.source} has no broken records")


def corpus_tokenizer_kind(source: str | Path, tokenizer: str) -> str:
    """Return the kind of tokenizer that the corpus of a source will have.

    Args:
        source: a source of text, or a prepared corpus file, which has a tokenizer already.
        tokenizer: the kind that text would be tokenised with.

    Raises:
        InputError: the corpus file cannot be opened.
    """
    components = parse_mixture(str(source))
    if len(components) > 1 or not is_prepared(components[0][1]):
        return tokenizer
    return Corpus.open(user_path(components[0][1])).tokenizer.kind


def prepare(
    source: Source,
    tokenizer: str | Tokenizer = "bpe",
    vocab_size: int = 5000,
    out: Path | None = None,
    progress: Echo | None = None,
    options: ReadOptions | None = None,
    *,
    add_characters: bool = False,
    compress: bool = False,
    force: bool = False,
    known: KnownText | None = None,
    shard_chars: int = SHARD_CHARS,
    tokenizer_sample_bytes: int = TOKENIZER_SAMPLE_BYTES,
) -> Path:
    """Prepare the corpus file of a source, or find the one that exists, and return its path.

    Memory grows by about 250 bytes per document, not with the length of the text. A text of more
    than 64 M characters is tokenised in shards on disk; after a kill the next call continues with
    the shards that are there.

    Args:
        source: a name or path, see ``iter_documents``; a mixture such as ``3:code/,1:book.txt``; a
            prepared ``.h5`` file, which is returned as it is; or a list or iterator of documents
            (strings), which makes a corpus called "documents".
        tokenizer: ``bpe`` (trained on the training text), ``char`` or ``byte``; or a tokenizer to
            use as it is.
        vocab_size: vocabulary of ``bpe``.
        out: the file to write, which ends in .h5 or .hdf5; None writes to the cache.
        progress: called with a line of text at each stage.
        options: how the source is read and split.
        add_characters: add the characters of the source to a given ``char`` tokenizer.
        compress: compress the tokens, which are then read into memory as a whole.
        force: replace a file ``out`` that is no corpus, unless it is read.
        known: the text of a run that is resumed: if the source is another one, it must be that text
            with more added to it, whose tokens, split and order stay as they are.
        shard_chars: characters of text in a shard.
        tokenizer_sample_bytes: a ``bpe`` tokenizer is trained on a random sample of about this many
            bytes of the training text if the source is more than four times as long, else on all.

    A tokenizer with a chat template makes a corpus of conversations from a file that holds some,
    unless ``options`` name a text field; see ``mmrec.data.conversations``.

    Raises:
        InputError: the source cannot be read, is empty or too small to split, a document is not a
            string, the tokenizer is unknown, a given one does not know a character, or ``out`` must
            not be written.
        StorageError: the file cannot be written.
    """
    echo = progress or (lambda line: None)
    options = dataclasses.replace(options or ReadOptions())  # with counts of its own
    if _is_chat(source, tokenizer, options):
        assert isinstance(source, str | Path)
        assert isinstance(tokenizer, Tokenizer)
        return prepare_conversations(
            source, tokenizer, options, echo, add_characters=add_characters
        )
    components = _components(source)
    known = None if len(components) > 1 else known
    if out is not None:
        inputs = [*source_files(source), *source_files(options.val_file)]
        check_not_read(out, inputs)
    if out is not None and not is_prepared(out):
        raise InputError(
            f"--out must end in {' or '.join(CORPUS_SUFFIXES)}, by which --data knows a corpus; "
            f"got {out}: name it {out}.h5"
        )
    if len(components) == 1 and is_prepared(components[0][1]):
        if out is not None:
            raise InputError(
                f"{components[0][1]} is a prepared corpus already; --out takes what text becomes"
            )
        return user_path(components[0][1])
    if isinstance(tokenizer, str):
        check_tokenizer_settings(tokenizer, vocab_size)
    if len(components) > 1 and any(is_prepared(name) for _, name, _ in components):
        raise InputError(f"a mixture must be of texts; got the corpus file in {source}")
    if is_prepared(options.val_file):
        raise InputError(f"val_file must be a text; got the corpus file {options.val_file}")
    check_read_once([*(name for _, name, _ in components), options.val_file])
    folder = out.parent if out else cache_folder()
    advice = "" if out else "; set MMREC_CACHE to a folder that you can write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}{advice}") from None
    if not os.access(folder, os.W_OK | os.X_OK):  # before the text is read, not after
        raise InputError(f"the folder {folder} cannot be written{advice}")
    if out is not None:
        check_output(out, "corpus", force=force)
    val_options = dataclasses.replace(options, max_bytes=0, val_file="")
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive_preparation(folder, echo))
        remove_stale_temporaries(folder)
        preparation = _Preparation(
            source=str(source) if isinstance(source, str | Path) else DOCUMENTS,
            mixture=[(weight, name) for weight, name, _ in components],
            sources=[component for _, _, component in components],
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            options=options,
            val_options=val_options,
            echo=echo,
            add_characters=add_characters,
            compress=compress,
            known=known,
            shard_chars=shard_chars,
            tokenizer_sample_bytes=tokenizer_sample_bytes,
        )
        preparation.read_sources(stack, folder)
        path = out or folder / preparation.file_name
        if path.exists() and _has_cache_key(path, preparation.cache_key):
            echo(f"corpus {preparation.source}: unchanged, using {path}")
        else:
            preparation.write(path)
    return path


def _is_chat(source: Source, tokenizer: str | Tokenizer, options: ReadOptions) -> bool:
    """Whether a source is read as conversations."""
    has_template = isinstance(tokenizer, Tokenizer) and bool(tokenizer.chat_template)
    return has_template and not options.text_field and holds_conversations(source)


def _components(source: Source) -> list[tuple[float, str, Source]]:
    """Weight, name and source of each component of a mixture; a single source has one."""
    if isinstance(source, str | Path):
        return [(weight, name, name) for weight, name in parse_mixture(str(source))]
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise InputError(
            "a source must be a name, a path, or a list or iterator of strings; got "
            f"{type(source).__name__}"
        )
    return [(1.0, DOCUMENTS, source)]


def open_corpus(
    source: Source,
    tokenizer: Tokenizer,
    progress: Echo | None = None,
    options: ReadOptions | None = None,
    *,
    add_characters: bool = False,
    known: KnownText | None = None,
) -> Corpus:
    """Open the corpus of a source under a given tokenizer, such as that of a trained model.

    Args:
        source, progress, options, add_characters, known: as for ``prepare``.
        tokenizer: the tokenizer that the corpus must have. With ``add_characters`` the corpus has
            it with the characters that are new to it at the end.

    Raises:
        InputError: as for ``prepare``, or a prepared file has another tokenizer.
        StorageError: the file cannot be written.
    """
    path = prepare(
        source,
        tokenizer,
        progress=progress,
        options=options,
        add_characters=add_characters,
        known=known,
    )
    corpus = Corpus.open(path)
    if tokenizer.extends(corpus.tokenizer):  # a prepared file may know fewer characters
        return dataclasses.replace(corpus, tokenizer=tokenizer)
    if not (add_characters and corpus.tokenizer.extends(tokenizer)):
        raise InputError(
            f"{source} must have the tokenizer of the model; it has another: give the text itself, "
            "which is tokenised anew"
        )
    return corpus


def training_texts(source: str | Path, options: ReadOptions | None = None) -> Iterator[str]:
    """Read the training text of a source, or a random sample of 16 MB if it is longer than 64 MB.

    Args:
        source: see ``iter_documents``.
        options: how it is read and split.

    Yields:
        The texts of the training documents, long ones in pieces.

    Raises:
        InputError: the source cannot be read, or has no training text.
    """
    options = options or ReadOptions()
    with read_once([(source, options)], cache_folder()) as stored:
        if not len(stored.scan.keys):
            raise options.no_text(str(source))
        plan = plan_split(stored.scan, options)
        total = int(stored.scan.sizes.sum())
        if not plan.in_train.any():
            raise InputError(
                f"{source} is too small to have training text; it has {_count(total, 'byte')}"
            )
        yield from sample_training_text(plan.assign(stored), _sample_fraction(total))


@dataclasses.dataclass(frozen=True)
class TextSize:
    """Size of the training and the validation text of a source, without exact copies.

    Attributes:
        source: its name.
        characters, bytes: of the training text.
        val_characters, val_bytes: of the validation text.
        tokenizer: of a prepared corpus the kind of its tokenizer; else empty.
        counts: of a prepared corpus its training and validation tokens.
    """

    source: str
    characters: int
    bytes: int
    val_characters: int
    val_bytes: int
    tokenizer: str = ""
    counts: tuple[int, int] = (0, 0)

    @classmethod
    def of_corpus(cls, corpus: Corpus) -> "TextSize":
        """The size of a prepared corpus."""
        sizes = corpus.train.n_bytes, corpus.train.n_bytes, corpus.val.n_bytes, corpus.val.n_bytes
        counts = corpus.train.n_tokens, corpus.val.n_tokens
        return cls(str(corpus.path), *sizes, corpus.tokenizer.kind, counts)

    def tokens(self, kind: str) -> int:
        """Training tokens under a kind of tokenizer, about."""
        return self.counts[0] or self._count(kind, self.characters, self.bytes)

    def val_tokens(self, kind: str) -> int:
        """Validation tokens under a kind of tokenizer, about."""
        return self.counts[1] or self._count(kind, self.val_characters, self.val_bytes)

    @staticmethod
    def _count(kind: str, characters: int, size: int) -> int:
        return {"char": characters, "byte": size}.get(kind, int(size / BPE_TOKEN_BYTES))


def measure_text(source: Source, options: ReadOptions | None = None) -> TextSize:
    """Read a source, or find it among the texts that are kept, and measure what is learnt of it.

    Args:
        source: as for ``prepare``, a mixture too, but no prepared corpus.
        options: how it is read and split.

    Raises:
        InputError: the source cannot be read, or is empty.
    """
    options = options or ReadOptions()
    train, val = np.zeros(2), np.zeros(2)  # characters and bytes
    for _, name, component in _components(source):
        own = dataclasses.replace(options)  # with counts of its own
        with read_once([(component, own)], cache_folder()) as stored:
            if not len(stored.scan.keys):
                raise own.no_text(name)
            scan, plan = stored.scan, plan_split(stored.scan, own)
        sizes = np.stack([scan.lengths, scan.sizes])
        share = plan.cuts / scan.lengths
        train += (sizes * share)[:, plan.cuts != DROPPED].sum(axis=1)
        val += (sizes * (1 - share))[:, plan.cuts != DROPPED].sum(axis=1)
    if options.val_file:
        train += val
        own = dataclasses.replace(options, max_bytes=0, val_file="")
        with read_once([(options.val_file, own)], cache_folder()) as stored:
            val[:] = stored.scan.lengths.sum(), stored.scan.sizes.sum()
    name = str(source) if isinstance(source, str | Path) else DOCUMENTS
    characters, size, val_characters, val_size = (round(float(n)) for n in (*train, *val))
    return TextSize(name, characters, size, val_characters, val_size)


@contextlib.contextmanager
def exclusive_preparation(folder: Path, echo: Echo) -> Iterator[None]:
    """Wait until no other process prepares a corpus in a folder, and keep others out.

    On a file system without locks nothing is kept out.

    Args:
        folder: the folder.
        echo: called with a line of text if there is another process.
    """
    path = folder / LOCK_NAME
    lock = FileLock(path, thread_local=False)
    try:
        with warnings.catch_warnings():  # of a file system without locks
            warnings.simplefilter("ignore")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                echo(f"waiting for another process that prepares a corpus in {folder}")
                lock.acquire()
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if lock.is_locked and os.name != "nt":  # while nobody else can have a new file
                path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            if os.name == "nt":  # which removes no open file
                path.unlink(missing_ok=True)


@dataclasses.dataclass
class _Preparation:
    """One source on its way to a corpus file. The arguments are those of ``prepare``."""

    source: str
    mixture: list[tuple[float, str]]
    sources: list[Source]
    """One per component of the mixture."""
    tokenizer: str | Tokenizer
    vocab_size: int
    options: ReadOptions
    val_options: ReadOptions
    echo: Echo
    add_characters: bool
    compress: bool
    known: KnownText | None
    shard_chars: int
    tokenizer_sample_bytes: int

    def __post_init__(self) -> None:
        self.continued: ContinuedText | None = None
        self.given_tokenizer = self.tokenizer if isinstance(self.tokenizer, Tokenizer) else None
        self.kind = self.tokenizer.kind if isinstance(self.tokenizer, Tokenizer) else self.tokenizer
        self.vocab_size = self.vocab_size if self.kind == "bpe" else 0

    def read_sources(self, stack: contextlib.ExitStack, folder: Path) -> None:
        """Read the source once: its documents, their hashes and sizes, and the cache key.

        Args:
            stack: closes what is needed until the corpus is written.
            folder: where the documents are written meanwhile.

        Raises:
            InputError: the source cannot be read, or is empty.
            StorageError: its documents cannot be written.
        """
        sources = [(source, self.options) for source in self.sources]
        if self.options.val_file:
            sources.insert(0, (self.options.val_file, self.val_options))
        tokenizer, new_characters, inspect = self.given_tokenizer, set[str](), None
        if self.known:  # whose characters are those of its text, and of what is added to it
            tokenizer = self.known.tokenizer
        if tokenizer and tokenizer.kind == "char":
            inspect = functools.partial(check_characters, tokenizer)
            if self.add_characters:
                inspect = functools.partial(_collect_characters, new_characters)
        self.stored = stack.enter_context(read_once(sources, folder, inspect))
        self.scan = self.stored.scan
        if tokenizer and new_characters:
            self.given_tokenizer = extend_characters(tokenizer, new_characters)
        self.skipped_records = self.options.skipped_records + self.val_options.skipped_records
        self.component_ends = list(self.stored.details["ends"])
        self.val_documents = self.component_ends.pop(0) if self.options.val_file else 0
        if self.options.val_file and not self.val_documents:
            raise self.val_options.no_text(f"the validation text {self.options.val_file}")
        if len(self.scan.keys) == self.val_documents:
            raise self.options.no_text(self.source)
        fingerprint = self.scan.fingerprint
        division = [self.val_documents, *self.component_ends]
        if len(division) > 2 or self.val_documents:  # which text is of which source
            fingerprint = hashlib.sha256(f"{fingerprint} {division}".encode()).hexdigest()
        self.fingerprint = fingerprint
        if self.known and fingerprint != self.known.record.identity["fingerprint"]:
            self._continue(self.known)
        if not self.val_options.has_records:
            self.options.check_text_field(self.source)
        if self.skipped_records:
            reason = self.options.skip_reason or self.val_options.skip_reason
            self.echo(
                f"note: {self.skipped_records:,} broken records or files were skipped; the first: "
                f"{reason}"
            )
        tokenizer_key: Any = self.vocab_size
        if self.given_tokenizer:
            tokenizer_key = hashlib.sha256(self.given_tokenizer.to_json().encode()).hexdigest()
        self.cache_key = [
            self.fingerprint,
            self.kind,
            tokenizer_key,
            self.val_documents or self.options.val_fraction,
            [weight for weight, _ in self.mixture],
            SCHEMA,
            self.skipped_records,
            *["compressed"] * self.compress,
        ]
        # of the components, so that a relative and an absolute mixture have one name
        stem = "-".join(Path(name).stem or name for _, name in self.mixture)
        stem = re.sub(r"[^A-Za-z0-9]+", "-", stem[:MAX_STEM_CHARS]).strip("-") or "text"
        key_hash = hashlib.sha256(json.dumps(self.cache_key).encode()).hexdigest()[:16]
        self.file_name = f"{stem}-{self.kind}-{key_hash}.h5"

    def _continue(self, known: KnownText) -> None:
        """Take the source as the text of a run to which text was added.

        Raises:
            InputError: it is another text.
        """
        self.continued = continue_text(
            known, self.source, self.stored, self.val_documents, self.options
        )
        self.fingerprint, self.given_tokenizer = self.continued.fingerprint, known.tokenizer
        self.component_ends = [len(self.continued.plan.cuts)]

    def write(self, path: Path) -> None:
        """Split and tokenise the text, and write the corpus file.

        Raises:
            InputError: the text is too small to split, or there is no room for the corpus.
            StorageError: the file cannot be written.
        """
        scan, size = self.scan, int(self.scan.sizes.sum())
        if self.continued:
            plan = self.continued.plan
        else:
            plan = plan_split(
                scan,
                self.options,
                self.val_documents,
                self.component_ends if len(self.mixture) > 1 else (),
            )
        self._check_splits(plan)
        shards = TokenShards(path, self.cache_key, self.shard_chars)
        tokenizer = self.given_tokenizer or shards.tokenizer
        if tokenizer is None:
            self.echo(
                f"corpus {self.source}: {len(scan.keys):,} documents, {size:,} bytes; "
                f"training the {self.kind} tokenizer"
            )
            tokenizer = self._train_tokenizer(plan)
        if self.given_tokenizer is None and tokenizer.vocab_size < self.vocab_size:
            self.echo(
                f"note: this text makes a vocabulary of {tokenizer.vocab_size:,} tokens, not "
                f"the {self.vocab_size:,} asked for"
            )
        self._check_room(path.parent, tokenizer, shards)
        begin, remaining = time.perf_counter(), size - shards.bytes
        earlier = f", {shards.bytes:,} bytes were done before" if shards.bytes else ""
        self.echo(f"corpus {self.source}: tokenising{earlier}")
        with progress_bar(size, "tokenising") as bar:
            bar.update(shards.bytes)
            shards.fill(tokenizer, plan.assign(self.continued or self.stored), bar.update)
        rate = f"{remaining / 1e6 / (time.perf_counter() - begin):.1f} MB/s"
        self._describe_split(plan, shards)
        info = {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "cache_key": self.cache_key,
            "duplicates": plan.duplicates,
            "near_duplicates": plan.near_duplicates,
            "cut_documents": plan.cut_documents,
            "skipped": self.skipped_records,
            "longest": scan.longest,
            "random": scan.sampled,
            "mixture": self._mixture_info(plan, shards),
            "python": platform.python_version(),
            "val_documents": self.val_documents,
        }
        if self.continued:
            record = self.continued.record
            info["earlier"] = record.earlier
        else:
            record = DocumentRecord(
                scan.keys,
                scan.lengths,
                plan.cuts,
                np.full(len(scan.keys), -1, np.int64),
                self.val_documents,
            )
        with atomic_h5_file(path, KIND, SCHEMA) as file:
            shards.copy_into(file, compress=self.compress)
            record.write_arrays(file, "documents")
            write_json(file, "tokenizer", json.loads(tokenizer.to_json()))
            write_json(file, "info", info)
        self.echo(f"corpus {self.source}: {shards.n_tokens:,} tokens, tokenised at {rate}; {path}")
        shards.remove()

    def _check_splits(self, plan: SplitPlan) -> None:
        """Check that there is validation text, and training text of each source.

        Raises:
            InputError: there is not; the message counts the documents that are left out.
        """
        begin = self.val_documents
        for (_, name), end in zip(self.mixture, self.component_ends, strict=True):
            has_rule = self.options.val_file or len(self.mixture) > 1
            if has_rule and not plan.in_train[begin:end].any():
                dropped = int((plan.cuts[begin:end] == DROPPED).sum())
                copies = "copies of other text"
                if self.options.val_file:
                    copies += " or near-duplicates of the validation text"
                facts = _count(end - begin, "document")
                if dropped:
                    facts += f", {dropped:,} of them {copies}"
                if dropped < end - begin:
                    facts += ", too short to cut"
                raise InputError(f"{name} must have training text of its own; it has {facts}")
            begin = end
        if plan.has_both_splits:
            return
        size = _count(int(self.scan.sizes.sum()), "byte")
        facts = f"it has {_count(len(plan.cuts), 'document')} of {size}"
        if plan.duplicates:
            facts += f", {plan.duplicates:,} of them exact copies, which are left out"
        advice = "use more text, or name validation text with --val-file"
        if plan.alike:
            raise InputError(
                f"{self.source} must have documents that are not near-duplicates of each other, "
                f"since those stay in one split; {facts}, and {plan.alike:,} near-duplicates: "
                f"{advice}"
            )
        raise InputError(
            f"{self.source} is too small to split into training and validation text by "
            f"val_fraction {self.options.val_fraction:g}; {facts}: {advice}"
        )

    def _describe_split(self, plan: SplitPlan, shards: TokenShards) -> None:
        """Say what is unusual about the split: documents that are cut, and copies."""
        train, val = (int(shards.document_index(split)[1].sum()) for split in (TRAIN, VAL))
        if plan.uneven:
            self.echo(
                f"split   documents are very uneven: {plan.cut_documents:,} of "
                f"{len(plan.cuts):,} are cut, and their last parts are validation text; it has "
                f"{val / (train + val):.1%} of the bytes"
            )
        if plan.duplicates > len(plan.cuts) * MANY_COPIES:
            self.echo(
                f"note    {plan.duplicates:,} of {len(plan.cuts):,} documents are exact copies of "
                "others and left out"
            )

    def _mixture_info(self, plan: SplitPlan, shards: TokenShards) -> list[dict[str, Any]]:
        """Weight of each component and where its training tokens end; they lie in this order."""
        offsets, _ = shards.document_index(TRAIN)
        return [
            {"source": name, "weight": weight, "end": int(offsets[plan.in_train[:end].sum()])}
            for (weight, name), end in zip(self.mixture, self.component_ends, strict=True)
        ]

    def _check_room(self, folder: Path, tokenizer: Tokenizer, shards: TokenShards) -> None:
        """Check, before the text is tokenised, that the disk has room for its tokens.

        Raises:
            InputError: there is no room for as many as the beginning of the text lets expect.
        """
        texts: list[str] = []
        chars = 0
        for document in self.stored:
            texts.append(document.text)
            chars += len(document.text)
            if chars >= ROOM_SAMPLE_CHARS:
                break
        tokens = len(self.scan.keys) + self.scan.lengths.sum() / chars * sum(
            map(len, tokenizer.encode_batch(texts))
        )
        # the shards stay until the corpus file is complete
        copies = 2 if self.scan.lengths.sum() >= self.shard_chars else 1
        missing = copies * tokens - shards.n_tokens
        size = int(missing * np.dtype(token_dtype(tokenizer)).itemsize)
        check_room(folder, size, "the tokens of the text")

    def _train_tokenizer(self, plan: SplitPlan) -> Tokenizer:
        pieces = plan.assign(self.stored)
        if self.kind != "bpe":  # of validation text, too, so that every character is known
            return train_tokenizer(self.kind, (document.text for _, document in pieces))
        fraction = _sample_fraction(int(self.scan.sizes.sum()), self.tokenizer_sample_bytes)
        return train_tokenizer(self.kind, sample_training_text(pieces, fraction), self.vocab_size)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _collect_characters(characters: set[str], documents: Iterable[Document]) -> Iterator[Document]:
    """Pass documents on, and add their characters to a set."""
    for document in documents:
        characters.update(document.text)
        yield document


def _sample_fraction(size: int, sample: int = TOKENIZER_SAMPLE_BYTES) -> float:
    """The share of a text of ``size`` bytes that a tokenizer is trained on."""
    return 1.0 if size <= SAMPLED_FROM * sample else sample / size


def sample_training_text(pieces: Iterable[AssignedPiece], fraction: float) -> Iterator[str]:
    """Draw a random sample of the training text, the same one each time.

    Args:
        pieces: split and text of each piece.
        fraction: probability with which a piece of training text is drawn; 1 or more takes all.

    Yields:
        The texts of the pieces.
    """
    rng = np.random.default_rng(0)
    for split, document in pieces:
        if split == TRAIN and rng.random() < fraction:
            yield document.text


def _has_cache_key(path: Path, cache_key: list[Any]) -> bool:
    """Whether a corpus file is of this text and these settings; a damaged file is not."""
    try:
        with open_h5_file(path, KIND, SCHEMA, SCHEMA) as file:
            is_whole = "documents" in file  # mmrec 0.6 and earlier wrote none
            return is_whole and bool(read_json(file, "info")["cache_key"] == cache_key)
    except InputError:
        return False
