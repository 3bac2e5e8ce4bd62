"""One request while it is generated: its texts as they come, between the engine and a client."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from mmrec.errors import InputError, RequestError
from mmrec.inference.engine import Completion, Handle, Request, TopTokens
from mmrec.server.requests import TextRequest
from mmrec.server.responses import DONE, Envelope, Shape, error_body, event, usage
from mmrec.server.worker import Worker

SEEDS = 1 << 63


class Choice:
    """One of the texts of a request."""

    def __init__(self, index: int, prompt: tuple[int, ...], shape: Shape) -> None:
        """Create it.

        Args:
            index: its number in the answer.
            prompt: token ids of its prompt.
            shape: writes its parts.
        """
        self.index, self.prompt, self.shape = index, prompt, shape
        self.handle: Handle | None = None
        self.echo = ""
        """Text of the prompt, if it is part of the answer and was not sent yet."""
        self.echo_logprobs: tuple[list[int], list[float], list[TopTokens]] = ([], [], [])
        self.tokens = 0
        """Generated tokens that were answered."""
        self.is_ended = False
        """Whether the last event of its stream was sent."""

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete."""
        return self.handle is not None and self.handle.is_finished

    def part(
        self,
        text: str,
        tokens: list[int],
        logprobs: list[float],
        top_logprobs: list[TopTokens],
        end: Completion | None,
        *,
        is_stream: bool,
        with_logprobs: bool,
    ) -> dict[str, Any]:
        """A piece of the text, or all of it, in the shape of the answer. The prompt comes first."""
        self.tokens += len(tokens)
        text, self.echo = self.echo + text, ""
        (first, first_logprobs, first_top), self.echo_logprobs = self.echo_logprobs, ([], [], [])
        part: dict[str, Any] = {
            "index": self.index,
            **self.shape.text(text, is_stream=is_stream),
            "logprobs": self.shape.logprobs(
                [*first, *tokens], [*first_logprobs, *logprobs], [*first_top, *top_logprobs]
            )
            if with_logprobs
            else None,
            "finish_reason": None if end is None else end.finish_reason,
        }
        return part if end is None else part | {"seed": end.seed}


class Generation:
    """The texts of one request, from its admission to its end."""

    def __init__(
        self,
        worker: Worker,
        request: TextRequest,
        shape: type[Shape],
        envelope: Envelope,
        event_seconds: Callable[[], float],
    ) -> None:
        """Create it; ``start`` gives the texts to the engine.

        Args:
            worker: the thread that generates.
            request: what is asked for.
            shape: the kind of the answer.
            envelope: what all parts of the answer have in common.
            event_seconds: gives the least time between two events of a stream. The first comes at
                once; later ones carry all tokens that came meanwhile.
        """
        self._event_seconds = event_seconds
        self._worker, self.request, self._envelope = worker, request, envelope
        tokenizer = worker.decoder.tokenizer
        self.choices = [
            Choice(i, prompt, shape(tokenizer))
            for i, prompt in enumerate(p for p in request.prompts for _ in range(request.n))
        ]
        self.error: Exception | None = None
        """Why the texts cannot be finished."""
        self.first_token_seconds: float | None = None
        self._begin = time.perf_counter()
        self._changed, self._finished = asyncio.Event(), asyncio.Event()
        self._is_told = False
        """Whether the loop was told of a change that it has not looked at."""

    async def start(self) -> None:
        """Give the texts to the engine. Prompts whose tokens are asked for are scored before.

        Raises:
            InputError: the request does not suit the model.
        """
        request = self.request
        for i, prompt in enumerate(request.prompts):
            choices = self.choices[i * request.n : (i + 1) * request.n]
            state = None
            if request.echo:
                text = self._worker.decoder.tokenizer.decode(prompt)
                scored = None
                if request.logprobs is not None and prompt:
                    job = self._worker.score(prompt, request.logprobs)
                    scores, state = await job.scores(), job.state
                    ids, values = scores.top_tokens.tolist(), scores.top_logprobs.tolist()
                    top = [list(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]
                    scored = (list(prompt), scores.logprobs.tolist(), top)
                for choice in choices:
                    choice.echo = text
                    choice.echo_logprobs = choice.echo_logprobs if scored is None else scored
            for k, choice in enumerate(choices):
                # the first text of a prompt is that of a request for one
                seed = None if request.seed is None else (request.seed + k) % SEEDS
                choice.handle = self._worker.submit(
                    Request(
                        () if state is not None else prompt,
                        sampling=request.sampling,
                        max_tokens=request.max_tokens,
                        stop=request.stop,
                        stop_token=request.stop_token,
                        seed=seed,
                        logit_bias=request.logit_bias,
                        logprobs=request.logprobs,
                        state=state,
                        return_state=False,
                    ),
                    self._on_update,
                )
        if request.echo:
            self._changed.set()  # the prompt is sent at once
        if self._is_finished():  # before the last text was given it did not look so
            self._wake(True)

    def _is_finished(self) -> bool:
        return all(choice.is_finished for choice in self.choices)

    def _on_update(self, handle: Handle) -> None:
        """Tell the event loop of a change. Called by the thread of the engine, so it is short."""
        if self._is_finished():
            self._worker.tell(self._wake, True)
        elif not self._is_told:
            self._is_told = True
            self._worker.tell(self._wake, False)

    def _wake(self, is_finished: bool) -> None:
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self._begin
        self._changed.set()
        if is_finished:
            self._finished.set()

    @property
    def seconds(self) -> float:
        """Time since the request came."""
        return time.perf_counter() - self._begin

    def cancel(self) -> None:
        """End all texts at the next step of the engine."""
        for choice in self.choices:
            if choice.handle is not None and not choice.is_finished:
                self._worker.cancel(choice.handle)

    def fail(self, error: Exception) -> None:
        """End the request with an error: the server stops, or the engine broke."""
        self.error = error
        self.cancel()
        self._changed.set()
        self._finished.set()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(map(len, self.request.prompts))

    @property
    def generated_tokens(self) -> int:
        """Tokens of all texts that were answered."""
        return sum(choice.tokens for choice in self.choices)

    def _completion(self, choice: Choice) -> Completion:
        """The end of a text.

        Raises:
            InputError: there is none.
        """
        assert choice.handle is not None
        if self.error is not None:
            raise self.error
        if choice.handle.error is not None:
            raise RequestError(str(choice.handle.error), code="generation_failed")
        return choice.handle.result()

    async def whole(self) -> dict[str, Any]:
        """Wait for all texts; return the answer.

        Raises:
            RequestError: a text could not be generated.
        """
        await self._finished.wait()
        parts = []
        for choice in self.choices:
            end = self._completion(choice)
            parts.append(
                choice.part(
                    end.text,
                    end.tokens,
                    end.logprobs or [],
                    end.top_logprobs or [],
                    end,
                    is_stream=False,
                    with_logprobs=self.request.logprobs is not None,
                )
            )
        return self._envelope.whole(parts, usage(self.prompt_tokens, self.generated_tokens))

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events. An error is an event, too."""
        try:
            while not all(choice.is_ended for choice in self.choices):
                await self._changed.wait()
                self._changed.clear()
                self._is_told = False
                data = b"".join(map(self._new_event, self.choices))
                if not data:
                    continue
                yield data
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._event_seconds()):
                        await self._finished.wait()
        except InputError as error:
            status = error.status if isinstance(error, RequestError) else 400
            code = error.code if isinstance(error, RequestError) else None
            yield event(error_body(str(error), status, code=code))
        else:
            if self.request.include_usage:
                tokens = usage(self.prompt_tokens, self.generated_tokens)
                yield self._envelope.chunk([], tokens)
        yield DONE

    def _new_event(self, choice: Choice) -> bytes:
        """What came of a text since the last event; empty if nothing did."""
        handle = choice.handle
        if choice.is_ended or handle is None:
            return b""
        is_finished = handle.is_finished  # before the pieces, so that none comes after the end
        pieces = handle.pieces()
        end = self._completion(choice) if is_finished or self.error is not None else None
        if not (pieces or end or choice.echo):
            return b""
        choice.is_ended = end is not None
        part = choice.part(
            "".join(piece.text for piece in pieces),
            [token for piece in pieces for token in piece.tokens],
            [value for piece in pieces for value in piece.logprobs],
            [top for piece in pieces for top in piece.top_logprobs],
            end,
            is_stream=True,
            with_logprobs=self.request.logprobs is not None,
        )
        return self._envelope.chunk([part])
