"""A small model behind a real server, in a thread of the tests."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from mmrec.config import ModelConfig, ServerConfig, parameter_shapes
from mmrec.data.tokenizer import Tokenizer
from mmrec.inference.decoder import Decoder
from mmrec.server.app import Server
from mmrec.server.listen import WebServer, listen, url
from mmrec.server.worker import warm_up

ALPHABET = "abcdefghijklmnopqrstuvwxyz .\n☃"
LIMITS = ServerConfig(
    max_streams=4,
    max_queue=8,
    max_tokens=10**9,
    max_prompt_tokens=50,
    max_choices=6,
    max_body_bytes=20_000,
)


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    """A model by character with random weights."""
    made = make_decoder(Tokenizer("char", ALPHABET))
    warm_up(made)  # compiling takes longer than a client waits
    return made


def make_decoder(tokenizer: Tokenizer) -> Decoder:
    config = ModelConfig(
        width=8,
        depth=1,
        heads=1,
        vocab_size=tokenizer.vocab_size,
        layer_types="n",
        ffn_multiplier=1.0,
    )
    rng = np.random.default_rng(0)
    parameters = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    return Decoder(config, parameters, tokenizer)


class Running:
    """A server that runs in a thread, and a client of it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.web = WebServer(server, 5)
        self._listener = listen("127.0.0.1", 0)
        self.url = url(self._listener)
        self._thread = threading.Thread(target=self._run)
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def _run(self) -> None:
        asyncio.run(self.web.serve([self._listener]))

    def __enter__(self) -> "Running":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self.server.end_requests()
        self.web.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server does not end"

    def post(self, **body: Any) -> httpx.Response:
        """Ask for a completion."""
        return self.client.post("/v1/completions", json={"model": "small", **body})

    def text(self, **body: Any) -> Any:
        """The first choice of a completion."""
        response = self.post(**body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def events(self, **body: Any) -> Iterator[str]:
        """The data of the events of a stream."""
        body = {"model": "small", "stream": True, **body}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line:
                    assert line.startswith("data: ")
                    yield line.removeprefix("data: ")

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(x.split()[1] for x in lines if x.split()[0] == name))

    def wait_until_idle(self) -> None:
        """Wait until no text is generated."""
        end = time.monotonic() + 20
        while self.metric("mmrec_running_texts"):
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(scope="session")
def running(decoder: Decoder) -> Iterator[Running]:
    """A server that all tests share."""
    with Running(Server(decoder, "small", LIMITS)) as started:
        yield started


@contextlib.contextmanager
def serving(decoder: Decoder, **options: Any) -> Iterator[Running]:
    """A server of one test."""
    with Running(Server(decoder, "small", options.pop("limits", LIMITS), **options)) as started:
        yield started
