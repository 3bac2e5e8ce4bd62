"""The command ``mmrec serve`` with the ``openai`` package as client, and its end at a signal."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from benchmarks.serve_fuzz import make_model
from mmrec.errors import InputError
from mmrec.server.listen import is_loopback, listen

ENDLESS = {"max_tokens": 10**9, "logit_bias": {"0": -100}, "stream": True}


class Process:
    """A process that serves a model."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "mmrec", "serve", *options, "--port", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = self.line.split()[-1] if self.line else ""

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return exit code and standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text("{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}assistant ")
    return path


@pytest.fixture(scope="module")
def server(model: Path, template: Path) -> Iterator[Process]:
    options = ("--max-tokens", str(10**9), "--shutdown-timeout", "1", "--api-key", "secret")
    started = Process(str(model), *options, "--chat-template", str(template))
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


def test_the_openai_client(server: Process) -> None:
    """Completions, streams, log-probabilities, several texts, chats and errors."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
    assert [m.id for m in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "mmrec"
    whole = client.completions.create(
        model="small", prompt="once", n=2, seed=1, logprobs=2, max_tokens=20, stop=["zz"]
    )
    assert len(whole.choices) == 2
    first = whole.choices[0]
    assert first.logprobs is not None
    assert "".join(first.logprobs.tokens or ()) == first.text
    assert all(len(top) == 2 for top in first.logprobs.top_logprobs or ())
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 4
    stream = client.completions.create(
        model="small",
        prompt="once",
        seed=1,
        max_tokens=20,
        stop="zz",
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 0},
    )
    *parts, last = stream
    assert "".join(part.choices[0].text for part in parts) == first.text
    assert last.usage is not None
    assert last.usage.completion_tokens == len(first.logprobs.tokens or ())
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="small", prompt="a", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no").models.list()
    client.close()


def test_the_openai_client_chats(server: Process) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
    chat = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "hi"}],
        seed=2,
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=2,
    )
    answer = chat.choices[0]
    same = client.completions.create(
        model="small", prompt="user hi\nassistant ", seed=2, max_tokens=9, logprobs=2
    ).choices[0]
    assert answer.message.role == "assistant"
    assert answer.message.content == same.text
    assert answer.logprobs is not None
    assert same.logprobs is not None
    assert [t.logprob for t in answer.logprobs.content or ()] == same.logprobs.token_logprobs
    parts = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        seed=2,
        max_tokens=9,
        stream=True,
    )
    assert "".join(p.choices[0].delta.content or "" for p in parts) == same.text
    client.close()


def test_many_clients_at_once(server: Process) -> None:
    """Texts of streams that run together are those of each alone at its seed."""

    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model="small", prompt="once", seed=seed, max_tokens=60, stream=True
        )
        return "".join([part.choices[0].text async for part in stream])

    async def run() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret") as client:
            alone = [await ask(client, seed) for seed in range(8)]
            return alone, list(await asyncio.gather(*(ask(client, s) for s in range(8))))

    alone, together = asyncio.run(run())
    assert together == alone
    assert len(set(alone)) == 8


def test_a_signal_ends_it_tidily(server: Process) -> None:
    """A short text is finished, a long one ends with an error, and new requests are refused."""
    headers = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as client:
        body = {"model": "small", "prompt": "a", **ENDLESS}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
    assert '"server_stopping"' in rest[-4]
    assert rest[-2] == "data: [DONE]"
    _, errors = server.process.communicate(timeout=30)
    assert 0.9 < time.monotonic() - begin < 20
    assert server.process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors


def test_ctrl_c_of_an_idle_server(model: Path) -> None:
    code, errors = Process(str(model)).end(signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert "Traceback" not in errors


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port} of 127.0.0.1 is taken"):
            listen("127.0.0.1", port)


def test_events_are_not_held_back_for_acknowledgements() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_addresses() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert is_loopback("127.9.9.9")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("192.0.2.1")
    with pytest.raises(InputError, match="--host must be an address or a name"):
        listen("no such host", 0)
    if socket.has_ipv6:
        assert is_loopback("::1")
        assert not is_loopback("::")
