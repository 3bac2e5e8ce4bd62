"""The thread that generates: it runs the engine, and scores prompts between its steps."""

import asyncio
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from mmrec.errors import InputError
from mmrec.inference.decoder import Decoder, DecoderState, TokenScores
from mmrec.inference.engine import Engine, Handle, Request, complete

SCORE_CHUNK = 128
"""Tokens of a prompt that are scored between two steps of the engine."""


def warm_up(decoder: Decoder) -> None:
    """Do once all that requests need, so that the first one does not wait for a compiler."""
    tokens = [decoder.tokenizer.eot] * 2
    decoder.score(decoder.initial_state(), tokens, top=1)
    list(complete(decoder, [Request(tokens, max_tokens=2, logprobs=1, return_state=False)]))


class ScoreJob:
    """A prompt whose tokens are scored.

    Attributes:
        state: after the tokens, once it is finished.
    """

    def __init__(self, state: DecoderState, tokens: np.ndarray, top: int) -> None:
        """Create it.

        Args:
            state: the text before the tokens; it is changed.
            tokens: (n,) ids.
            top: number of the most likely tokens at each place.
        """
        self.state = state
        self.is_cancelled = False
        self._tokens, self._top, self._position = tokens, top, 0
        self._parts: list[TokenScores] = []
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()

    async def scores(self) -> TokenScores:
        """Wait for the scores; raise what the decoder raises."""
        try:
            await self._done
        finally:
            self.is_cancelled = True
        return TokenScores(*(np.concatenate(parts) for parts in zip(*self._parts, strict=True)))

    def advance(self, decoder: Decoder) -> bool:
        """Score a chunk; return whether that was the last. Called by the thread."""
        chunk = self._tokens[self._position :][:SCORE_CHUNK]
        self._parts.append(decoder.score(self.state, chunk, top=self._top))
        self._position += len(chunk)
        return self._position >= len(self._tokens)

    def finish(self, error: Exception | None = None) -> None:
        """Wake who waits. Called by the thread."""
        self._loop.call_soon_threadsafe(self._set, error)

    def _set(self, error: Exception | None) -> None:
        if self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


def _call_all(told: list[tuple[Callable[[bool], object], bool]]) -> None:
    for callback, value in told:
        callback(value)


class Worker:
    """Runs the engine in a thread of its own, as long as there is something to do.

    Attributes:
        decoder: the model.
        engine: the engine.
    """

    def __init__(
        self, decoder: Decoder, max_streams: int, on_failure: Callable[[Exception], object]
    ) -> None:
        """Create it; ``start`` starts the thread.

        Args:
            decoder: the model.
            max_streams: texts that are generated together.
            on_failure: called by the thread if the engine breaks, which is an error of the program.
                All requests are lost then, and the thread goes on with a new engine.
        """
        self.decoder, self._max_streams, self._on_failure = decoder, max_streams, on_failure
        self.engine = Engine(decoder, max_streams=max_streams)
        self._jobs: deque[ScoreJob] = deque()
        self._wake = threading.Event()
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told: list[tuple[Callable[[bool], object], bool]] = []
        """What the event loop is told after the step."""
        self._thread = threading.Thread(target=self._run, name="mmrec-engine", daemon=True)

    def start(self) -> None:
        """Start the thread. It belongs to the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._is_stopping = True
        self._wake.set()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, request: Request, on_update: Callable[[Handle], object]) -> Handle:
        """Add a request to the engine; see ``Engine.submit``."""
        handle = self.engine.submit(request, on_update=on_update)
        self._wake.set()
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request at the next step."""
        handle.cancel()
        self._wake.set()

    def score(self, tokens: Sequence[int], top: int) -> ScoreJob:
        """Begin to score the tokens of a text."""
        job = ScoreJob(self.decoder.initial_state(), np.array(tokens, np.int64), top)
        self._jobs.append(job)
        self._wake.set()
        return job

    def tell(self, callback: Callable[[bool], object], value: bool) -> None:
        """Let the event loop call something after the step. Called by the thread.

        All is told at once: each time the loop is woken, the thread may lose Python's lock to it.
        """
        self._told.append((callback, value))

    def _tell_all(self) -> None:
        if self._told:
            told, self._told = self._told, []
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_call_all, told)

    def _run(self) -> None:
        while not self._is_stopping:
            self._wake.clear()  # before the work, so that what comes meanwhile is not missed
            try:
                is_busy = self.engine.step()
                self._tell_all()
                is_busy |= self._score()
            except Exception as error:
                traceback.print_exc()
                self.engine = Engine(self.decoder, max_streams=self._max_streams)
                self._on_failure(error)
                continue
            if not is_busy:
                self._wake.wait()

    def _score(self) -> bool:
        """Score a chunk of the first job, which is the last then; return whether there is one."""
        if not self._jobs:
            return False
        job = self._jobs.popleft()
        if job.is_cancelled:
            return True
        try:
            is_last = job.advance(self.decoder)
        except InputError as error:
            job.finish(error)
            return True
        if is_last:
            job.finish()
        else:
            self._jobs.append(job)
        return True
