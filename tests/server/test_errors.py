"""Mistakes in requests: OpenAI's status, shape and parameter; limits; and mutated requests."""

import contextlib
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.serve_fuzz import fuzz
from mmrec.inference.decoder import Decoder
from tests.server.conftest import LIMITS, Running, serving

JSON = {"Content-Type": "application/json"}
ENDLESS: dict[str, Any] = {"prompt": "a", "max_tokens": 10**9, "logit_bias": {"0": -100}}
"""A text that takes minutes: the end token does not come."""


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, whose shape is checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("prompt", 7),
        ("prompt", {}),
        ("prompt", []),
        ("prompt", ["a", 1]),
        ("prompt", [1, "a"]),
        ("prompt", [True]),
        ("prompt", [[]]),
        ("prompt", [31]),
        ("prompt", [-1]),
        ("prompt", [10**30]),
        ("prompt", "é"),
        ("prompt", "\ud800"),
        ("prompt", "a" * 51),
        ("prompt", [1] * 51),
        ("prompt", ["a"] * 7),
        ("n", 0),
        ("n", 7),
        ("n", "1"),
        ("n", True),
        ("n", 1.5),
        ("max_tokens", -1),
        ("max_tokens", 10**9 + 1),
        ("max_tokens", 10**40),
        ("max_tokens", 1.0),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -3),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 0.5),
        ("logprobs", 21),
        ("logprobs", True),
        ("logit_bias", [1]),
        ("logit_bias", {"31": 1}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": None}),
        ("stop", ""),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stop", ["a"] * 17),
        ("stop", "\ud800"),
        ("echo", 1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("user", 5),
        ("suffix", "end"),
        ("best_of", 2),
        ("max_token", 5),
        ("tools", []),
    ],
)
def test_a_wrong_value(running: Running, param: str, value: Any) -> None:
    body = json.dumps({"model": "small", param: value})
    error = error_of(running.client.post("/v1/completions", content=body, headers=JSON), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b"\xff", b"[" * 20_000, b'{"model":"small","top_p":NaN}'),
        b'{"model":"small","seed":' + b"1" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_json(running: Running, body: bytes) -> None:
    error_of(running.client.post("/v1/completions", content=body, headers=JSON), 400)


def test_a_number_that_is_too_large_for_json(running: Running) -> None:
    body = b'{"model":"small","temperature":1e999}'
    response = running.client.post("/v1/completions", content=body, headers=JSON)
    assert error_of(response, 400)["param"] == "temperature"


def test_an_unknown_model(running: Running) -> None:
    for response in (running.post(model="gpt-4"), running.client.get("/v1/models/gpt-4")):
        error = error_of(response, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    missing = running.client.post("/v1/completions", json={})
    assert error_of(missing, 400)["param"] == "model"
    assert running.client.get("/v1/models/small").json()["id"] == "small"


def test_paths_methods_and_types(running: Running) -> None:
    assert error_of(running.client.get("/v1/nothing"), 404)["code"] == "unknown_url"
    for path in ("/v1/completions/", "/v1//models"):
        assert error_of(running.client.get(path), 404)["code"] == "unknown_url"
    response = running.client.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    body = '{"model":"small"}'
    error_of(running.client.post("/v1/completions", content=body), 415)
    form = {"Content-Type": "text/plain"}
    error_of(running.client.post("/v1/completions", content=body, headers=form), 415)


def test_a_body_that_is_too_large(running: Running) -> None:
    body = json.dumps({"model": "small", "prompt": "a" * LIMITS.max_body_bytes})
    error_of(running.client.post("/v1/completions", content=body, headers=JSON), 413)
    pieces = (piece.encode() for piece in (body[:100], body[100:]))  # without its length
    error_of(running.client.post("/v1/completions", content=pieces, headers=JSON), 413)


def test_too_many_log_probabilities(running: Running) -> None:
    error = error_of(running.post(logprobs=20, max_tokens=20_000), 400)
    assert error["param"] == "logprobs"


def test_many_prompts_times_n(running: Running) -> None:
    assert error_of(running.post(prompt=["a", "b"], n=4), 400)["param"] == "n"


def test_a_full_queue(decoder: Decoder) -> None:
    """Four places and a queue of eight: the thirteenth text is refused, until there is room."""
    with serving(decoder) as running:
        body = {"model": "small", "stream": True, **ENDLESS, "n": 6}
        streams = contextlib.ExitStack()
        for _ in range(2):
            stream = running.client.stream("POST", "/v1/completions", json=body)
            streams.enter_context(stream)
        response = running.post(prompt="a")
        error = error_of(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert int(response.headers["retry-after"]) >= 1
        assert running.metric("mmrec_running_texts") == 4
        assert running.metric("mmrec_waiting_texts") == 8
        streams.close()  # the clients leave
        running.wait_until_idle()
        assert running.post(prompt="a").status_code == 200
        assert running.metric("mmrec_cancelled_requests_total") == 2


def test_a_client_that_leaves_ends_its_text(running: Running) -> None:
    """Whether it reads a stream or waits for the whole text, which would take minutes."""
    stream = running.events(**ENDLESS)
    next(stream)
    assert running.metric("mmrec_running_texts") == 1
    stream.close()
    running.wait_until_idle()
    with pytest.raises(httpx.ReadTimeout):
        running.client.post("/v1/completions", json={"model": "small", **ENDLESS}, timeout=0.3)
    running.wait_until_idle()


def test_a_key_is_needed(decoder: Decoder) -> None:
    with serving(decoder, api_key="secret") as running:
        for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": "secret"}):
            for method, path in (
                ("GET", "/v1/models"),
                ("GET", "/v1/models/small"),
                ("GET", "/metrics"),
                ("POST", "/v1/completions"),
                ("POST", "/v1/chat/completions"),
            ):
                response = running.client.request(method, path, headers=wrong)
                assert error_of(response, 401)["code"] == "invalid_api_key"
        odd = {"Authorization": "Bearer é".encode()}
        error_of(running.client.get("/v1/models", headers=odd), 401)
        right = {"Authorization": "Bearer secret"}
        assert running.client.get("/v1/models", headers=right).status_code == 200
        assert running.client.get("/health").status_code == 200
        assert running.client.get("/").status_code == 200


def test_another_site_cannot_reach_a_local_server(decoder: Decoder) -> None:
    with serving(decoder, is_local=True) as running:
        for host in ("evil.example", "localhost.evil.example", "192.0.2.1"):
            headers = {"Host": host}
            error = error_of(running.client.get("/v1/models", headers=headers), 403)
            assert error["code"] == "wrong_host"
        for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "mmrec.localhost"):
            response = running.client.get("/v1/models", headers={"Host": host})
            assert response.status_code == 200


def test_a_broken_engine_is_status_500_and_the_next_request_works(
    decoder: Decoder, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(decoder) as running:
        worker = running.server._worker
        before = running.text(prompt="a", seed=1)

        def broken() -> bool:
            raise OSError("broken")

        stream = running.events(**ENDLESS)
        next(stream)
        worker.engine.step = broken  # type: ignore[method-assign]
        *_, last, done = stream
        assert json.loads(last)["error"]["type"] == "server_error"
        assert done == "[DONE]"
        assert running.text(prompt="a", seed=1) == before
        worker.engine.step = broken  # type: ignore[method-assign]
        assert error_of(running.post(prompt="a"), 500)["type"] == "server_error"
    assert "OSError: broken" in capfd.readouterr().err


def test_health_and_metrics(running: Running) -> None:
    health = running.client.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "model": "small"})
    running.wait_until_idle()
    names = ("prompt_tokens_total", "generated_tokens_total", "request_seconds_count")
    before = [running.metric(f"mmrec_{name}") for name in names]
    count = running.post(prompt="four", max_tokens=3).json()["usage"]["completion_tokens"]
    after = [running.metric(f"mmrec_{name}") for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, count, 1]
    text = running.client.get("/metrics").text
    assert 'mmrec_requests_total{path="/v1/completions",status="200"}' in text
    assert 'path="/v1/models/gpt-4"' not in text


def test_no_mutated_request_breaks_the_server(running: Running) -> None:
    want = running.text(prompt="once", seed=1)
    results = fuzz(running.url, 300, seed=5, clients=4)
    assert results["faults"] == []
    assert {"200", "400", "404", "413"} <= {s for x in results["statuses"].values() for s in x}
    assert running.text(prompt="once", seed=1) == want


@pytest.mark.parametrize(
    "head",
    [
        b"\x16\x03\x01\x02\x00",  # the beginning of TLS
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http(running: Running, head: bytes) -> None:
    where = urlsplit(running.url)
    with socket.create_connection((str(where.hostname), where.port), timeout=20) as connection:
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(100)
    assert answer == b"" or answer.split()[1].startswith(b"4")
    assert running.client.get("/health").status_code == 200
