"""Generate many texts at once: requests at different stages share the steps of one decoder.

What comes of a request, its tokens, text and log-probabilities, has the same bits whatever shares
the batch, whenever it was admitted, and however many tokens a step draws.
"""

import hashlib
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mmrec.config import DEFAULT_MAX_TOKENS, MAX_COUNT, TRAIN_SETTINGS, SamplingConfig
from mmrec.errors import InputError
from mmrec.inference.decoder import Decoded, Decoder, DecoderState, Stream
from mmrec.inference.text import TextStream

MAX_STREAMS = 32
"""Texts that are read or written at the same time, by default."""
STEP_SECONDS = 0.02
"""Time that a step aims at for reading and again for drawing, by default."""
MAX_STEP_TOKENS = 256
"""Most tokens that a step draws for each text."""
MIN_SHARED_STEP_TOKENS = 8
"""Where requests wait, a step draws no more tokens than the shortest text still needs, and at least
this many: a text that ends in the middle of a step leaves its place empty until the next one."""
FIRST_CHUNK, MAX_CHUNK = 64, 2048
"""Tokens of a prompt that are read at once, at first and at most."""
SEED_BITS = 53  # of a seed that is drawn at random: JSON readers know whole numbers up to 2^53
MAX_BIAS = 100.0


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclass(frozen=True)
class Request:
    """A text to generate.

    Raises:
        InputError: a field is of another type or out of its range.
    """

    prompt: str | Sequence[int] = ""
    """Text to continue, or its token ids; may be empty."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_tokens: int = DEFAULT_MAX_TOKENS
    """Most tokens to generate; 0 reads the prompt only."""
    stop: Sequence[str] = ()
    """Texts that end the generation. They are not part of the text."""
    stop_token: int | None = None
    """A token that ends it, besides the end token: that at the end of a turn."""
    seed: int | None = None
    """Equal seeds give equal tokens; None draws a seed, which the completion tells."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """What is added to the logits of tokens, -100 to 100."""
    logprobs: int | None = None
    """None: no log-probabilities. Else those of the drawn tokens, and of this number of the most
    likely tokens at each place."""
    state: DecoderState | None = None
    """The text that comes before the prompt; it is copied. None is an empty text."""
    return_state: bool = True
    """Whether the completion has a state. It can take reading the last tokens once more."""

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            _check_characters("prompt", self.prompt)
        elif not _is_ids(self.prompt):
            raise InputError(f"prompt must be a text or token ids; got {_shown(self.prompt)}")
        if not isinstance(self.sampling, SamplingConfig):
            raise InputError(f"sampling must be of type SamplingConfig; got {self.sampling!r}")
        if not _is_whole(self.max_tokens):
            raise InputError(f"max_tokens must be of type int; got {self.max_tokens!r}")
        if not 0 <= self.max_tokens <= MAX_COUNT:
            limit = "must be >= 0" if self.max_tokens < 0 else "must be at most 10^15"
            raise InputError(f"max_tokens {limit}; got {self.max_tokens}")
        is_list = isinstance(self.stop, Sequence) and not isinstance(self.stop, str)
        if not is_list or not all(isinstance(text, str) for text in self.stop):
            raise InputError(f"stop must be a list of texts; got {self.stop!r}")
        for text in self.stop:
            _check_characters("stop", text)
        if not all(self.stop):
            raise InputError("a stop text must not be empty")
        if self.seed is not None:
            TRAIN_SETTINGS["seed"].check(self.seed)
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias must map token ids to numbers; got {self.logit_bias!r}")
        for token, bias in self.logit_bias.items():
            if not _is_whole(token):
                raise InputError(f"logit_bias must map token ids to numbers; got the id {token!r}")
            is_number = isinstance(bias, int | float | np.number) and not isinstance(bias, bool)
            if not is_number or not -MAX_BIAS <= bias <= MAX_BIAS:
                raise InputError(
                    f"a logit_bias must lie in [-{MAX_BIAS:g}, {MAX_BIAS:g}]; got {bias!r}"
                )
        if self.logprobs is not None and not (_is_whole(self.logprobs) and self.logprobs >= 0):
            raise InputError(f"logprobs must be None or a whole number >= 0; got {self.logprobs!r}")
        if self.state is not None and not isinstance(self.state, DecoderState):
            raise InputError(f"state must be of type DecoderState; got {_shown(self.state)}")

    def check(self, decoder: Decoder) -> None:
        """Check what depends on the model.

        Raises:
            InputError: the prompt holds a character that a ``char`` tokenizer does not know, a
                token id is none, more log-probabilities are asked for than there are tokens, or
                the state is one of another model.
        """
        size = decoder.config.vocab_size
        if isinstance(self.prompt, str):
            decoder.tokenizer.check_text(self.prompt, "the prompt")
        stop_tokens = [] if self.stop_token is None else [self.stop_token]
        for name, tokens in (
            ("prompt", self.prompt),
            ("logit_bias", self.logit_bias),
            ("stop_token", stop_tokens),
        ):
            if isinstance(tokens, str) or not len(tokens):
                continue
            ids = np.array(list(tokens), np.int64)
            if ids.min() < 0 or ids.max() >= size:
                bad = ids[(ids < 0) | (ids >= size)][0]
                raise InputError(f"token ids of {name} must lie in 0 to {size - 1:,}; got {bad}")
        if self.logprobs is not None and self.logprobs > size:
            raise InputError(
                f"logprobs must be at most {size:,}, the vocabulary; got {self.logprobs}"
            )
        if self.state is not None:
            like = decoder.initial_state()
            for name in ("values", "recent"):
                found, wanted = getattr(self.state, name), getattr(like, name)
                if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                    raise InputError(
                        f"state must be of this model: {name} of {wanted.dtype} {wanted.shape}; "
                        f"got {found.dtype} {found.shape}"
                    )
            if self.state.cache_size != like.cache_size:
                raise InputError(
                    f"state must have a neural cache of {like.cache_size:,} tokens; got one of "
                    f"{self.state.cache_size:,}"
                )
            recent = self.state.recent
            if recent.min() < -1 or recent[-1] < 0 or recent.max() >= size:
                raise InputError(
                    f"state must be of this model: recent tokens up to {size - 1:,}; got others"
                )


def _is_ids(prompt: object) -> bool:
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1 and (prompt.dtype.kind in "iu" or not len(prompt))
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        return False
    return all(map(_is_whole, prompt))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _check_characters(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} must be of characters; {text[error.start]!r} at position {error.start} is "
            "half of a surrogate pair"
        ) from None


TopTokens = list[tuple[int, float]]
"""The most likely tokens at one place and their log-probabilities, the likeliest first."""


@dataclass
class Completion:
    """What came of a request."""

    text: str
    """The generated text. Bytes that are no character are U+FFFD."""
    tokens: list[int]
    """The generated tokens, without the end or stop token. Where a stop text ended the text, the
    whole tokens before it: a token that the stop text begins in is left out, though the text holds
    what stands before the stop text in it."""
    logprobs: list[float] | None
    """Log-probability of each token in nats, before penalties, temperature and filters."""
    top_logprobs: list[TopTokens] | None
    """For each token the most likely tokens of its place, as many as the request asks for."""
    finish_reason: str
    """``stop`` (the end token, the stop token or a stop text), ``length`` or ``cancelled``."""
    seed: int
    """Repeats these tokens."""
    prompt_tokens: int
    """Tokens of the prompt, without those of the request's state."""
    state: DecoderState | None
    """Continues the text exactly after ``tokens``. None if the request does not ask for it, or was
    cancelled before its prompt was read."""


class Piece(NamedTuple):
    """A part of the text as it comes. All pieces together are the completion."""

    text: str
    """Ends between characters; may be empty."""
    tokens: list[int]
    """Tokens that surely belong to the completion."""
    logprobs: list[float]
    """As in Completion; empty if they are not asked for."""
    top_logprobs: list[TopTokens]
    """As in Completion; empty if they are not asked for."""


class _Prompt:
    """A prompt on its way through the decoder. Requests with the same one share it."""

    def __init__(self, tokens: np.ndarray, state: DecoderState) -> None:
        self.tokens, self.state = tokens, state
        self.position = 0
        """How many tokens are read."""
        self.turn = 0
        """When a chunk of it was read last."""

    @property
    def is_read(self) -> bool:
        return self.position == len(self.tokens)


class Handle:
    """A request in an engine: its text as it comes, and its completion.

    ``pieces`` and ``cancel`` may be called from any thread.

    Attributes:
        request: what was submitted.
        seed: that of the request, or the one that was drawn.
        prompt_tokens: tokens of its prompt.
        completion: set when the text is finished.
        error: set instead if the text cannot be generated.
    """

    def __init__(
        self,
        request: Request,
        decoder: Decoder,
        prompt: _Prompt,
        on_update: Callable[["Handle"], object] | None,
    ) -> None:
        """Make the handle of a request that is not admitted yet; see ``Engine.submit``."""
        self.request = request
        self.seed = secrets.randbits(SEED_BITS) if request.seed is None else int(request.seed)
        self.prompt_tokens = len(prompt.tokens)
        self.completion: Completion | None = None
        self.error: InputError | None = None
        self._decoder, self._on_update = decoder, on_update
        self._prompt: _Prompt | None = prompt
        self._stream: Stream | None = None
        self._text = TextStream(decoder.tokenizer, request.stop)
        self._is_cancelled = False
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[TopTokens] = []
        self._texts: list[str] = []
        self._pieces: deque[Piece] = deque()
        self._told_tokens = 0
        """Tokens that are in pieces."""
        self._earlier: deque[tuple[int, DecoderState]] = deque()
        """Where the text stood after some numbers of tokens, to return to if a stop text takes some
        away. The first number is never above that of the settled tokens."""

    @property
    def is_finished(self) -> bool:
        """Whether there is a completion or an error."""
        return self.completion is not None or self.error is not None

    def pieces(self) -> list[Piece]:
        """Return what came since the last call; may be empty."""
        pieces = []
        while self._pieces:
            pieces.append(self._pieces.popleft())
        return pieces

    def cancel(self) -> None:
        """End the text at the next step. What was generated until then is its completion."""
        self._is_cancelled = True

    def result(self) -> Completion:
        """Return the completion of a finished request.

        Raises:
            InputError: the text could not be generated.
        """
        if self.error is not None:
            raise self.error
        assert self.completion is not None, "the request is not finished"
        return self.completion

    def _begin(self) -> None:
        """Begin to write after the prompt."""
        assert self._prompt is not None
        self._stream = Stream(
            self._prompt.state.copy(),
            self.request.sampling,
            self.seed,
            int(self.request.max_tokens),
            dict(self.request.logit_bias),
            stop_token=self.request.stop_token,
            return_state=self.request.return_state,
        )
        if self.request.max_tokens == 0:
            self._finish("length")

    def _remember(self) -> None:
        """Remember where the text stands, before more is drawn than may be kept."""
        if self.request.stop and self.request.return_state and self._stream is not None:
            self._earlier.append((len(self._tokens), self._stream.state.copy()))

    def _accept(self, decoded: Decoded) -> None:
        """Take what a step drew."""
        assert self._stream is not None
        tokens = decoded.tokens.tolist()
        self._tokens += tokens
        if (top := self.request.logprobs) is not None:
            self._logprobs += decoded.logprobs.tolist()
            ids, values = decoded.top_tokens[:, :top], decoded.top_logprobs[:, :top]
            self._top_logprobs += [
                list(zip(*row, strict=True))
                for row in zip(ids.tolist(), values.tolist(), strict=True)
            ]
        text = self._text.feed(tokens)
        if self._text.is_stopped:
            self._finish("stop", text)
        elif self._stream.finished is not None:
            self._finish(self._stream.finished, text)
        else:
            self._forget_before(self._text.settled_tokens)
            if self._put(text):
                self._update()

    def _forget_before(self, count: int) -> None:
        """Drop the places that are not needed to return to ``count`` tokens or more."""
        while len(self._earlier) > 1 and self._earlier[1][0] <= count:
            self._earlier.popleft()

    def _put(self, text: str) -> bool:
        """Make a piece of a text and of the tokens that are settled; False if there is nothing."""
        told, settled = self._told_tokens, self._text.settled_tokens
        if not text and told == settled:
            return False
        self._told_tokens = settled
        self._texts.append(text)
        new = slice(told, settled)
        piece = Piece(text, self._tokens[new], self._logprobs[new], self._top_logprobs[new])
        self._pieces.append(piece)
        return True

    def _update(self) -> None:
        if self._on_update is not None:
            self._on_update(self)

    def _finish(self, reason: str, text: str = "") -> None:
        if not self._text.is_stopped:
            text += self._text.finish()
            if self._text.is_stopped:  # by the U+FFFD of a character that is not complete
                reason = "stop"
        self._put(text)
        count, state = self._told_tokens, self._stream.state if self._stream else None
        if not self.request.return_state:
            state = None
        elif count < len(self._tokens):  # a stop text took some away
            self._forget_before(count)
            begin, state = self._earlier[0]
            self._decoder.read(state, self._tokens[begin:count])
        has_logprobs = self.request.logprobs is not None
        self.completion = Completion(
            "".join(self._texts),
            self._tokens[:count],
            self._logprobs[:count] if has_logprobs else None,
            self._top_logprobs[:count] if has_logprobs else None,
            reason,
            self.seed,
            self.prompt_tokens,
            state,
        )
        self._let_go()

    def _fail(self, error: InputError) -> None:
        self.error = error
        self._let_go()

    def _let_go(self) -> None:
        """Drop what only an unfinished request needs, and tell that it is finished."""
        self._stream = self._prompt = None
        self._earlier.clear()
        self._update()


class _Pace:
    """How many tokens to take at once, so that they take some time.

    It is a power of two, so that the decoder meets few sizes, and at most doubles each time.
    """

    def __init__(self, seconds: float, first: int, most: int) -> None:
        self.seconds, self.count, self._most = seconds, first, most

    def record(self, count: int, seconds: float) -> None:
        """Learn how long some tokens took."""
        wanted = min(int(count * self.seconds / max(seconds, 1e-9)), 2 * self.count, self._most)
        self.count = 1 << max(wanted, 1).bit_length() - 1


class Engine:
    """Generates many texts at once.

    Requests are admitted in the order in which they came, as many as there are places. Prompts are
    read in turns, a chunk of each, so that a long one does not hold up the others. Requests with
    the same prompt, such as samples, read it once, if one of them is not finished when the next one
    is submitted.

    ``submit`` may be called from any thread, ``step`` by one thread at a time.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_streams: int = MAX_STREAMS,
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        """Begin without requests.

        Args:
            decoder: the model.
            max_streams: most texts that are read or written at the same time.
            step_seconds: time that a step aims at for reading, and again for drawing. It changes
                speed only: long steps take less time per token, short ones pass text on earlier.

        Raises:
            InputError: max_streams is less than 1.
        """
        if not _is_whole(max_streams) or max_streams < 1:
            raise InputError(f"max_streams must be a whole number >= 1; got {max_streams!r}")
        self.decoder, self.max_streams = decoder, max_streams
        self._lock = threading.Lock()
        """Guards ``_waiting`` and ``_prompts``."""
        self._waiting: deque[Handle] = deque()
        self._active: list[Handle] = []
        self._prompts: weakref.WeakValueDictionary[bytes, _Prompt] = weakref.WeakValueDictionary()
        """Prompts that an unfinished request holds."""
        self._turns = 0
        self._drawing = _Pace(step_seconds, 1, MAX_STEP_TOKENS)
        self._reading = _Pace(step_seconds, FIRST_CHUNK, MAX_CHUNK)

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """How many requests have a place: their prompts are read, or their texts written."""
        return len(self._active)

    def submit(
        self, request: Request, *, on_update: Callable[[Handle], object] | None = None
    ) -> Handle:
        """Add a request. It waits until a place is free.

        Args:
            request: the request.
            on_update: called by ``step`` with the handle whenever there is a new piece, and when
                the request is finished. It must be quick and must not raise.

        Raises:
            InputError: the request does not suit the model.
        """
        request.check(self.decoder)
        is_text = isinstance(request.prompt, str)
        ids = self.decoder.tokenizer.encode(str(request.prompt)) if is_text else request.prompt
        ids = np.array(ids, np.int64)
        state = self.decoder.initial_state() if request.state is None else request.state.copy()
        digest = hashlib.blake2b()
        parts = [state.values, state.recent, np.int64(state.length), ids]
        if state.cache is not None:
            cache = state.cache
            parts += [cache.keys, cache.tokens, np.int64(cache.count), cache.posterior]
        for part in parts:
            digest.update(part.tobytes())
        with self._lock:
            prompt = self._prompts.setdefault(digest.digest(), _Prompt(ids, state))
            handle = Handle(request, self.decoder, prompt, on_update)
            self._waiting.append(handle)
        return handle

    def step(self) -> bool:
        """Work for some milliseconds: admit requests, read a part of prompts, draw some tokens.

        Returns:
            Whether anything is left to do.
        """
        self._admit()
        self._read_prompts()
        self._draw()
        self._active = [h for h in self._active if not h.is_finished]
        return bool(self._active or self._waiting)

    def _admit(self) -> None:
        """End what was cancelled, and fill the places that are free."""
        with self._lock:
            cancelled = [h for h in (*self._active, *self._waiting) if h._is_cancelled]
            for waiting in [h for h in cancelled if h in self._waiting]:
                self._waiting.remove(waiting)
        for handle in cancelled:
            handle._finish("cancelled")
        self._active = [h for h in self._active if not h.is_finished]
        with self._lock:
            while self._waiting and len(self._active) < self.max_streams:
                self._active.append(self._waiting.popleft())

    def _read_prompts(self) -> None:
        """Read chunks of prompts for the time of a step; begin the texts of those at the end."""
        end = time.perf_counter() + self._reading.seconds
        unread = {h._prompt for h in self._active if h._prompt and not h._prompt.is_read}
        while unread:
            prompt = min(unread, key=lambda prompt: prompt.turn)
            self._turns += 1
            prompt.turn = self._turns
            chunk = prompt.tokens[prompt.position : prompt.position + self._reading.count]
            begin = time.perf_counter()
            self.decoder.read(prompt.state, chunk)
            prompt.position += len(chunk)
            now = time.perf_counter()
            if len(chunk) == self._reading.count:  # the end of a prompt says less
                self._reading.record(len(chunk), now - begin)
            if prompt.is_read:
                unread.remove(prompt)
            if now >= end:
                break
        for handle in self._active:
            if handle._stream is None and handle._prompt and handle._prompt.is_read:
                handle._begin()

    def _draw(self) -> None:
        """Draw tokens for every text that is being written."""
        writing = [(h, h._stream) for h in self._active if h._stream is not None]
        if not writing:
            return
        steps = self._drawing.count
        if self._waiting:
            shortest = min(stream.limit for _, stream in writing)
            steps = min(steps, max(shortest, MIN_SHARED_STEP_TOKENS))
        for handle, _ in writing:
            handle._remember()
        begin = time.perf_counter()
        try:
            most = self._draw_together(writing, steps)
        except InputError:  # nothing was drawn for any of them
            for handle, stream in writing:
                try:
                    self._draw_together([(handle, stream)], steps)
                except InputError as error:
                    handle._fail(error)
        else:
            self._drawing.record(max(1, most), time.perf_counter() - begin)

    def _draw_together(self, writing: list[tuple[Handle, Stream]], steps: int) -> int:
        """Draw up to ``steps`` tokens for texts; return the largest number that one of them got."""
        wanted = [h.request.logprobs for h, _ in writing if h.request.logprobs is not None]
        results = self.decoder.decode(
            [stream for _, stream in writing],
            steps,
            top=max(wanted, default=0),
            logprobs=bool(wanted),
        )
        for (handle, _), decoded in zip(writing, results, strict=True):
            handle._accept(decoded)
        return max(len(decoded.tokens) for decoded in results)


def nth_seed(seed: int | None, index: int) -> int | None:
    """Return the seed of one of several texts: those of texts 0, 1, 2 … follow one another.

    So any of them can be repeated alone. After the largest seed comes 0. None stays None.
    """
    return None if seed is None else (seed + index) % (int(TRAIN_SETTINGS["seed"].maximum or 0) + 1)


def complete(
    decoder: Decoder, requests: Iterable[Request], *, max_streams: int = MAX_STREAMS
) -> Iterator[Completion]:
    """Generate the texts of requests, as many at once as there are places.

    Args:
        decoder: the model.
        requests: the requests; they are taken as they are needed.
        max_streams: most texts that are read or written at the same time.

    Yields:
        Their completions, in the order of the requests.

    Raises:
        InputError: a request does not suit the model, or the logits are not finite.
    """
    engine, handles = Engine(decoder, max_streams=max_streams), deque[Handle]()
    remaining, is_exhausted = iter(requests), False
    while True:
        while not is_exhausted and engine.waiting < 2 * max_streams:
            request = next(remaining, None)
            if request is None:
                is_exhausted = True
            else:
                handles.append(engine.submit(request))
        if not handles:
            return
        engine.step()
        while handles and handles[0].is_finished:
            yield handles.popleft().result()
