"""The application: what answers at which path."""

import asyncio
import contextlib
import hmac
import ipaddress
from collections.abc import AsyncIterator, Callable, Coroutine
from importlib.resources import files
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrec.config import ServerConfig
from mmrec.data.chat_template import ChatTemplate
from mmrec.errors import InputError, RequestError
from mmrec.inference.decoder import Decoder
from mmrec.server.generation import Generation
from mmrec.server.metrics import Metrics
from mmrec.server.requests import RequestReader, TextRequest
from mmrec.server.responses import (
    ChatShape,
    CompletionShape,
    Envelope,
    Shape,
    error_body,
    to_json,
)
from mmrec.server.worker import Worker

T = TypeVar("T")

BODY_SECONDS = 30.0
"""Time that a client has to send the body of its request."""
MIN_EVENT_SECONDS, EVENTS_PER_SECOND = 0.015, 500
"""Pace of streams. An event costs as much as some ten tokens of a small model."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: itself, and what this server answers."""


class Server:
    """One model behind OpenAI's API.

    Attributes:
        app: the ASGI application.
    """

    def __init__(
        self,
        decoder: Decoder,
        name: str,
        limits: ServerConfig | None = None,
        *,
        api_key: str | None = None,
        is_local: bool = False,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """Create a server.

        Args:
            decoder: the model.
            name: the name of the model in requests.
            limits: what requests may ask for; None takes the defaults.
            api_key: the key that requests must bring; None lets every request pass.
            is_local: whether requests must name this machine as their host. Otherwise the page of
                another site could reach a server without a key, by a name that it lets lead here.
            chat_template: makes the prompt of a chat; None if the model has none.
        """
        self._is_local = is_local
        self._name, self._decoder, self._api_key = name, decoder, api_key
        self._limits = limits or ServerConfig()
        self._reader = RequestReader(name, decoder.tokenizer, self._limits, chat_template)
        self._worker = Worker(decoder, self._limits.max_streams, self._on_failure)
        self._metrics = Metrics(
            lambda: min(self._texts, self._limits.max_streams),
            lambda: max(0, self._texts - self._limits.max_streams),
        )
        self._generations: set[Generation] = set()
        self._texts = 0
        """Texts of all requests that are not finished."""
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._page = files("mmrec.server").joinpath("page.html").read_text(encoding="utf-8")
        routes = [
            Route("/", self._answer_page),
            Route("/health", self._answer_health),
            Route("/metrics", self._answer_metrics),
            Route("/v1/models", self._answer_models),
            Route("/v1/models/{name:path}", self._answer_model),
            Route("/v1/completions", self._answer_completion, methods=["POST"]),
            Route("/v1/chat/completions", self._answer_chat, methods=["POST"]),
        ]
        starlette = Starlette(
            routes=routes,
            exception_handlers={
                InputError: _answer_error,
                HTTPException: _answer_http_error,
                ClientDisconnect: self._answer_nobody,
                Exception: _answer_failure,
            },
            lifespan=self._lifespan,
        )
        starlette.router.redirect_slashes = False  # a path with a slash too many is another one
        self.app = self._counted(starlette, frozenset(route.path for route in routes))

    # ---- the life of the server

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self._worker.start()
        try:
            yield
        finally:
            self.end_requests()
            await asyncio.to_thread(self._worker.stop)

    def refuse_requests(self) -> None:
        """Refuse new requests from now on: the server is about to stop."""
        self._is_stopping = True

    def end_requests(self) -> None:
        """End the requests that are still running with an error."""
        self._is_stopping = True
        self._fail_all(RequestError("the server stops", status=503, code="server_stopping"))

    def _on_failure(self, error: Exception) -> None:
        """The engine broke. Called by its thread."""
        assert self._loop is not None
        failure = RequestError(f"the engine failed: {type(error).__name__}", status=500)
        self._loop.call_soon_threadsafe(self._fail_all, failure)

    def _fail_all(self, error: RequestError) -> None:
        for generation in self._generations:
            generation.fail(error)

    # ---- answers

    async def _answer_page(self, request: Request) -> Response:
        return HTMLResponse(
            self._page,
            headers={
                "Content-Security-Policy": PAGE_POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
            },
        )

    async def _answer_health(self, request: Request) -> Response:
        is_well = self._worker.is_alive and not self._is_stopping
        status = "ok" if is_well else "stopping" if self._is_stopping else "failed"
        return _json({"status": status, "model": self._name}, 200 if is_well else 503)

    async def _answer_metrics(self, request: Request) -> Response:
        self._check(request)
        text = await asyncio.to_thread(self._metrics.to_text)
        return Response(text, headers={"Content-Type": self._metrics.content_type})

    async def _answer_models(self, request: Request) -> Response:
        self._check(request)
        return _json({"object": "list", "data": [self._model()]})

    async def _answer_model(self, request: Request) -> Response:
        self._check(request)
        self._reader.check_model(request.path_params["name"])
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        path = self._decoder.path
        created = int(path.stat().st_mtime) if path is not None and path.exists() else 0
        return {"id": self._name, "object": "model", "created": created, "owned_by": "mmrec"}

    async def _answer_completion(self, request: Request) -> Response:
        return await self._answer_texts(request, CompletionShape, self._reader.completion)

    async def _answer_chat(self, request: Request) -> Response:
        return await self._answer_texts(request, ChatShape, self._reader.chat)

    async def _answer_texts(
        self, request: Request, shape: type[Shape], read: Callable[[bytes], TextRequest]
    ) -> Response:
        self._check(request)
        body = await self._body(request)
        # in a thread of its own: a long prompt takes a while to tokenise
        texts = await asyncio.to_thread(read, body)
        if self._is_stopping:
            raise RequestError("the server stops", status=503, code="server_stopping")
        if self._texts >= self._limits.max_streams + self._limits.max_queue:
            raise RequestError(
                f"{self._texts} texts are being generated or wait already; try again later",
                status=429,
                code="rate_limit_exceeded",
            )
        envelope = Envelope(shape, self._name, self._decoder.fingerprint)
        generation = Generation(self._worker, texts, shape, envelope, self._event_seconds)
        with contextlib.ExitStack() as end:
            self._admit(generation)
            end.callback(self._release, generation)
            await _unless_gone(request.receive, generation.start())
            if texts.stream:
                return _Stream(generation, end.pop_all(), self._metrics.cancelled.inc)
            return _json(await _unless_gone(request.receive, generation.whole()))

    async def _answer_nobody(self, request: Request, error: Exception) -> Response:
        """The client has left."""
        self._metrics.cancelled.inc()
        return Response(status_code=499)  # nginx's number for it; it is seen in /metrics only

    def _event_seconds(self) -> float:
        """The time between two events of a stream: all streams together share one rate."""
        return max(MIN_EVENT_SECONDS, len(self._generations) / EVENTS_PER_SECOND)

    def _admit(self, generation: Generation) -> None:
        self._generations.add(generation)
        self._texts += len(generation.choices)

    def _release(self, generation: Generation) -> None:
        """Let go of a request. Whatever happened to it, its texts end and are counted."""
        generation.cancel()
        self._generations.discard(generation)
        self._texts -= len(generation.choices)
        self._metrics.prompt_tokens.inc(generation.prompt_tokens)
        self._metrics.generated_tokens.inc(generation.generated_tokens)
        self._metrics.duration.observe(generation.seconds)
        if generation.first_token_seconds is not None:
            self._metrics.first_token.observe(generation.first_token_seconds)

    # ---- what requests bring

    def _check(self, request: Request) -> None:
        """Check the host and the key that a request names."""
        if self._is_local and not _is_this_machine(request.url.hostname or ""):
            raise RequestError(
                "without a key the server answers to 127.0.0.1 and localhost only; got the host "
                f"{request.headers.get('host', '')[:100]!r}",
                status=403,
                code="wrong_host",
            )
        if self._api_key is None:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(key.strip().encode(), self._api_key.encode())
        if kind.lower() != "bearer" or not is_right:
            raise RequestError(
                "wrong API key: it is sent as 'Authorization: Bearer KEY'",
                status=401,
                code="invalid_api_key",
            )

    async def _body(self, request: Request) -> bytes:
        """Read the body of a request.

        Raises:
            RequestError: it is too large, not said to be JSON, or does not come.
        """
        limit = self._limits.max_body_bytes
        too_large = RequestError(f"the body may have {limit} bytes", status=413)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # pages of other sites cannot send it without asking
            raise RequestError(
                f"the content type must be application/json; got {kind[:100]!r}", status=415
            )
        if int(request.headers.get("content-length", "0")) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise RequestError(
                f"the body must come within {BODY_SECONDS:g} seconds", status=408
            ) from None
        return bytes(body)

    def _counted(self, app: ASGIApp, paths: frozenset[str]) -> ASGIApp:
        """Count the answers by path and status."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            path = scope["path"] if scope["path"] in paths else "other"

            async def send_counted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._metrics.requests.labels(path, str(message["status"])).inc()
                await send(message)

            await app(scope, receive, send_counted)

        return counted


class _Stream(Response):
    """An answer that comes as server-sent events."""

    def __init__(
        self,
        generation: Generation,
        end: contextlib.ExitStack,
        on_disconnect: Callable[[], object],
    ) -> None:
        """Create it.

        Args:
            generation: what is sent.
            end: closed after the last event, or when the client leaves.
            on_disconnect: called if the client leaves before the end.
        """
        super().__init__(
            media_type="text/event-stream",
            # proxies such as nginx would collect the events
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._generation, self._end, self._on_disconnect = generation, end, on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        with self._end:
            try:
                await _unless_gone(receive, self._send_all(send))
            except (ClientDisconnect, OSError):
                self._on_disconnect()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for data in self._generation.events():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await work, and cancel it if the client leaves.

    Raises:
        ClientDisconnect: it left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _json(values: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(values), status, headers, "application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        error = RequestError(str(error))
    body = error_body(str(error), error.status, param=error.param, code=error.code)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return _json(body, error.status, headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """No such path, or not this method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    code = "unknown_url" if error.status_code == 404 else None
    headers = dict(error.headers or {})
    return _json(error_body(message, error.status_code, code=code), error.status_code, headers)


async def _answer_failure(request: Request, error: Exception) -> Response:
    """An error of the program. Its traceback is printed; the client is not told more."""
    return _json(error_body("the server failed", 500), 500)
