"""A text that a model reads and writes, and its state: saved, restored, forked.

The state of a text has a fixed size of some kilobytes, however long the text is. Many continuations
of a long text need it read once.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from mmrec.checkpoint.hdf5 import (
    atomic_h5_file,
    open_h5_file,
    read_array,
    read_attribute,
    write_array,
)
from mmrec.checkpoint.outputs import check_output
from mmrec.config import DEFAULT_MAX_TOKENS, SamplingConfig
from mmrec.data.readers import Document, ReadOptions
from mmrec.data.sources import iter_documents
from mmrec.data.tokenize import check_characters, tokenize_documents
from mmrec.errors import InputError
from mmrec.inference.decoder import Decoder, DecoderState
from mmrec.inference.engine import Completion, Engine, Handle, Request
from mmrec.inference.generate import STEP_SECONDS

KIND, SCHEMA = "session", 1
TEXT_BYTES = 1 << 16
"""Newest bytes of its text that a session keeps. The state stands for all of it."""
READ_CHUNK = 4096
"""Tokens that are read between two reports of progress."""

Progress = Callable[[int], object]
"""Called with the number of tokens just read."""


class Session:
    """A text so far, and the state of the model that has read it.

    >>> decoder = Decoder.load(Path("runs/tiny-book/best.h5"))  # doctest: +SKIP
    >>> session = Session(decoder)  # doctest: +SKIP
    >>> session.read(Path("book.txt"))  # doctest: +SKIP
    >>> session.save("book.h5")  # doctest: +SKIP
    >>> "".join(session.fork().generate(seed=1))  # doctest: +SKIP

    Attributes:
        decoder: the model.
        state: the state after the text.
        completion: what came of the newest ``generate``; None before.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Begin an empty text."""
        self.decoder, self.state = decoder, decoder.initial_state()
        self.completion: Completion | None = None
        self._text = b""

    @property
    def text(self) -> str:
        """The newest 64 KiB of the text."""
        return self._text.decode("utf-8", "replace")

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return self.state.length

    def fresh(self) -> "Session":
        """Return a session of the same model with an empty text."""
        return Session(self.decoder)

    def fork(self) -> "Session":
        """Return a session at the same place, independent of this one."""
        fork = Session(self.decoder)
        fork._put(self.state.copy(), self._text)
        return fork

    def read(
        self,
        text: str | Path,
        *,
        options: ReadOptions | None = None,
        progress: Progress = lambda count: None,
    ) -> None:
        """Append to the text.

        Nothing changes if an error or an interrupt ends the call.

        Args:
            text: A text; or a file, folder or glob as for ``--data`` of training, which is read in
                pieces. The documents of a file are divided by end tokens; the last one stays open.
            options: How files are read.
            progress: Called with the number of tokens just read.

        Raises:
            InputError: The file cannot be read or holds no text, or the text holds a character that
                a ``char`` tokenizer does not know.
        """
        if isinstance(text, Path):
            pieces = self._file_tokens(text, options or ReadOptions())
        elif isinstance(text, str):
            pieces = iter([(self.decoder.tokenizer.encode(text), text)])
        else:
            raise InputError(f"text must be of type str or Path; got {text!r}")
        state, newest = self.state.copy(), self._text
        for tokens, piece in pieces:
            for chunk in np.split(tokens, range(READ_CHUNK, len(tokens), READ_CHUNK)):
                self.decoder.read(state, chunk)
                progress(len(chunk))
            newest = _newest(newest + piece.encode())
        self._put(state, newest)

    def _file_tokens(self, path: Path, options: ReadOptions) -> Iterator[tuple[np.ndarray, str]]:
        """Yield tokens and text of the pieces of a file, with end tokens between documents only."""
        tokenizer, is_first, begins = self.decoder.tokenizer, True, True
        documents = check_characters(tokenizer, iter_documents(path, options))
        pieces: Iterator[tuple[int, Document]] = ((0, document) for document in documents)
        for _, document, tokens in tokenize_documents(tokenizer, pieces):
            if begins and not is_first:
                yield np.array([tokenizer.eot]), ""
            is_first, begins = False, not document.more
            yield tokens if document.more else tokens[:-1], document.text
        if is_first:
            raise options.no_text(str(path))
        options.check_text_field(str(path))

    def generate(
        self,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        seed: int | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """Continue the text. What is generated belongs to the text.

        Args:
            max_tokens: Largest number of tokens to generate.
            stop: Texts that end the generation. They are not part of the text.
            seed: Equal seeds give equal text; None differs at every call.
            sampling: Settings of ``mmrec.config.SamplingConfig``, such as ``temperature=0``.

        Returns:
            An iterator over pieces of the text. The session changes when it ends or is closed: the
            text then holds every token that was generated.

        Raises:
            InputError: A setting is unknown or out of range.
        """
        config = SamplingConfig.from_dict(sampling)
        return self.stream(Request(sampling=config, max_tokens=max_tokens, stop=stop, seed=seed))

    def stream(self, request: Request) -> Generator[str, None, None]:
        """Append the prompt of a request to the text, and continue it; see ``generate``.

        Args:
            request: Its ``state`` is that of the session.

        Raises:
            InputError: The request does not suit the model.
        """
        engine = Engine(self.decoder, step_seconds=STEP_SECONDS)
        request = replace(request, state=self.state, return_state=True)
        return self._pieces(engine, engine.submit(request))

    def _pieces(self, engine: Engine, handle: Handle) -> Generator[str, None, None]:
        try:
            while not handle.is_finished:
                engine.step()
                yield from (piece.text for piece in handle.pieces() if piece.text)
        except GeneratorExit:
            handle.cancel()
            while not handle.is_finished:
                engine.step()
            self._take(handle)
            raise
        self._take(handle)

    def _take(self, handle: Handle) -> None:
        completion, prompt = handle.result(), handle.request.prompt
        self.completion = completion
        if completion.state is not None:
            token_bytes = self.decoder.tokenizer.token_bytes
            if isinstance(prompt, str):
                read = prompt.encode()
            else:
                read = b"".join(map(token_bytes, prompt))
            written = b"".join(map(token_bytes, completion.tokens))
            self._put(completion.state, _newest(self._text + read + written))

    def _put(self, state: DecoderState, text: bytes) -> None:
        self.state, self._text = state, text

    def save(self, path: str | Path, *, option: str = "path", force: bool | None = False) -> None:
        """Write the session to a file. A session that is there already is replaced.

        Args:
            path: The file.
            option: What error messages call it.
            force: Replace any file; see ``check_output``.

        Raises:
            InputError: The file may not be written.
            StorageError: The system refused. An earlier file at ``path`` is intact.
        """
        path, model = Path(path), self.decoder.path
        inputs = [] if model is None else [model]
        check_output(path, KIND, option=option, inputs=inputs, force=force)
        with atomic_h5_file(path, KIND, SCHEMA) as file:
            file.attrs["fingerprint"] = np.bytes_(self.decoder.fingerprint)
            self._store(file)

    def _store(self, file: h5py.File) -> None:
        """Write the text and its state into an open file."""
        file.attrs["length"] = self.state.length
        if (cache := self.state.cache) is not None:
            file.attrs["neural_cache"], file.attrs["cached"] = self.state.cache_size, cache.count
            write_array(file, "cache_keys", cache.keys)
            write_array(file, "cache_tokens", cache.tokens.astype(np.int64))
            write_array(file, "cache_posterior_bits", cache.posterior.view(np.int64))
        write_array(file, "state", self.state.values)
        write_array(file, "recent_tokens", self.state.recent.astype(np.int64))
        write_array(file, "text", np.frombuffer(self._text, np.uint8), compress=True)

    @classmethod
    def load(cls, path: str | Path, decoder: Decoder) -> Self:
        """Read a session from a file.

        Args:
            path: The file.
            decoder: The model that the session is of, with weights of any dtype.

        Raises:
            InputError: There is no intact session at ``path``, or it is of another model.
        """
        path, session = Path(path), cls(decoder)
        state = session.state
        with open_h5_file(path, KIND, SCHEMA) as file:
            if read_attribute(file, "fingerprint", str) != decoder.fingerprint:
                raise InputError(
                    f"{path} must be a session of {decoder.path or 'this model'}; it is of another "
                    "model, or of an earlier state of its training"
                )
            state.values = read_array(file, "state", np.float32, state.values.shape)
            recent = read_array(file, "recent_tokens", np.int64, state.recent.shape)
            text = read_array(file, "text", np.uint8)
            _read_cache(file, path, state, decoder.config.vocab_size)
            state.length = read_attribute(file, "length", int)
            if not np.isfinite(state.values).all():
                raise ValueError("state must be finite")
            if recent.min() < -1 or recent.max() >= decoder.config.vocab_size or recent[-1] < 0:
                raise ValueError("recent_tokens must hold token ids")
            if state.length < 0 or len(text) > TEXT_BYTES:
                raise ValueError("length or text is out of its range")
        state.recent = recent.astype(np.int32)
        session._put(state, text.tobytes())
        return session


def _read_cache(file: h5py.File, path: Path, state: DecoderState, vocab_size: int) -> None:
    """Read the neural cache of a session into the empty one of a state, if both have one.

    Raises:
        InputError: their sizes differ.
        ValueError: it holds no unit vectors or token ids, or a wrong count.
    """
    is_there = "neural_cache" in file.attrs
    size = read_attribute(file, "neural_cache", int) if is_there else 0
    if size != state.cache_size:
        raise InputError(
            f"{path} must be continued with the neural cache that it was written with: "
            f"{size} tokens; got {state.cache_size}"
        )
    if state.cache is None:
        return
    cache = state.cache
    cache.count = read_attribute(file, "cached", int)
    cache.keys = read_array(file, "cache_keys", np.float32, cache.keys.shape)
    tokens = read_array(file, "cache_tokens", np.int64, cache.tokens.shape)
    if not np.isfinite(cache.keys).all() or np.abs(cache.keys).max() > 1.001:
        raise ValueError("cache_keys must be unit vectors")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError("cache_tokens must hold token ids")
    bits = read_array(file, "cache_posterior_bits", np.int64, cache.posterior.shape)
    cache.posterior = bits.view(np.float64)
    if not (cache.posterior >= 0).all() or abs(cache.posterior.sum() - 1) > 1e-6:
        raise ValueError("cache_posterior_bits must be those of probabilities")
    if cache.count < 0:
        raise ValueError("the count of cached tokens is out of its range")
    cache.tokens = tokens.astype(np.int32)


def _newest(text: bytes) -> bytes:
    """The newest ``TEXT_BYTES`` of a text in UTF-8, from the start of a character on."""
    if len(text) <= TEXT_BYTES:
        return text
    cut = text[-TEXT_BYTES:]
    return cut[next((i for i in range(4) if cut[i] & 0xC0 != 0x80), 0) :]
