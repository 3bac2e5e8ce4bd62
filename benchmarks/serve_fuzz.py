"""Send a server mutated requests, and look for answers that no request should get.

    python benchmarks/serve_fuzz.py [--count 10000] [--seed 1] [--clients 8]

Starts ``mmrec serve`` with a small model by character, and sends it requests whose values, bytes,
heads or paths are mutated. Every answer must come within the time limit, with status 200 or 4xx.
An error must have OpenAI's shape. At the end the server must write the same text as in the
beginning. ``tests/server/test_errors.py`` sends some hundred.
"""

import argparse
import copy
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

RESULTS = Path(__file__).parent / "results"
SECONDS = 30.0
"""Most time that an answer may take."""
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, 1e-320),
    *("", "a", "1", "nan", "\x00", "\ud800", "☃", "é", "x" * 3000, "<|endoftext|>", "../../x"),
    *([], [[]], [None], [0], [-1], ["a", 1], [[0], "a"], [[[0]]], [True], [1.5], [10**9]),
    *({}, {"a": 1}, {"0": 1}, {"-1": 1}, {"0": 1e9}, {"0": None}, {"99999": 1}, {"type": "x"}),
    [0] * 300,
    ["a"] * 100,
    {str(i): 1 for i in range(200)},
]


class Sent(NamedTuple):
    """A request."""

    change: str
    """The kind of its mutation."""
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def valid_body(rng: random.Random) -> dict[str, Any]:
    """A request that nothing is wrong with, each time with other parameters."""
    choices: dict[str, list[Any]] = {
        "prompt": ["once", "", ["a", "b"], [1, 2], [[1], [2, 3]]],
        "max_tokens": [0, 1, 5, 16],
        "temperature": [0, 0.7, 1],
        "top_p": [0.5, 1],
        "top_k": [0, 3],
        "min_p": [0, 0.2],
        "repetition_penalty": [1, 1.3],
        "frequency_penalty": [0, 1, -2],
        "presence_penalty": [0, 1, 2],
        "n": [1, 2],
        "stop": ["z", ["x", "yy"]],
        "seed": [0, 7, 2**63 - 1],
        "logprobs": [0, 3, 20],
        "logit_bias": [{}, {"1": 5}, {"2": -100}],
        "echo": [True, False],
        "stream": [True, False],
        "user": ["someone"],
        "best_of": [1],
    }
    names = rng.sample(list(choices), rng.randrange(1, 10))
    body = {"model": "small", **{name: rng.choice(choices[name]) for name in names}}
    if body.get("stream") and rng.random() < 0.5:
        body["stream_options"] = {"include_usage": rng.choice((True, False))}
    if body.get("n") == 2:
        body.pop("best_of", None)
    return body


def valid_chat(rng: random.Random) -> dict[str, Any]:
    """A chat that nothing is wrong with."""
    parts = [{"type": "text", "text": "how"}, {"type": "text", "text": " are you"}]
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": rng.choice(("hi", "", parts))},
        {"role": "assistant", "content": "ho"},
    ]
    others = valid_body(rng)
    for name in ("prompt", "echo", "best_of", "logprobs"):
        others.pop(name, None)
    if rng.random() < 0.3:
        others |= {"logprobs": True, "top_logprobs": rng.choice((0, 2, 20))}
    return others | {"messages": rng.sample(messages, rng.randrange(1, 4))}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below another one."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def change_values(body: dict[str, Any], rng: random.Random) -> bytes:
    """Put odd values in place of some."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not (found := list(places(body))):
            break
        *path, last = rng.choice(found)
        inner: Any = body
        for key in path:
            inner = inner[key]
        inner[last] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(body).encode()


def add_parameters(body: dict[str, Any], rng: random.Random) -> bytes:
    """Add parameters, most of which there are not."""
    names = [
        "max_token",
        "tools",
        "messages",
        "suffix",
        "best_of",
        "",
        "n\x00",
        "\udfff",
        "N" * 999,
    ]
    for name in rng.sample(names, rng.choice((1, 1, 2))):
        body[name] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(body).encode()


def drop_parameters(body: dict[str, Any], rng: random.Random) -> bytes:
    """Take parameters away, ``model`` among them."""
    for name in rng.sample(list(body), rng.randrange(1, len(body) + 1)):
        del body[name]
    return json.dumps(body).encode()


def change_bytes(body: dict[str, Any], rng: random.Random) -> bytes:
    """Flip, remove, insert or repeat bytes of the JSON."""
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) or 1)
        change = rng.randrange(5)
        if change == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            del data[at : at + rng.choice((1, 2, 20))]
        elif change == 2:
            data[at:at] = rng.choice((b'"', b"{", b"]", b",", b"\\u", b"\xff", b"\x00", b"1e999"))
        elif change == 3:
            data[at:at] = data[at : at + 30]
        else:
            del data[at:]
    return bytes(data)


def other_bodies(body: dict[str, Any], rng: random.Random) -> bytes:
    """Bodies that are no JSON object, or one in another form."""
    text = json.dumps(body)
    return rng.choice(
        (
            b"",
            b"null",
            b"[]",
            b'"text"',
            b"1" * 10_000,
            b"[" * 10_000,
            b'{"a":' * 5_000,
            b'{"model":"small","prompt":' + b"[" * 900 + b"]" * 900 + b"}",
            b'{"model":"small","temperature":NaN}',
            b'{"model":"small","max_tokens":Infinity}',
            b'{"model":"small","model":"other"}',
            text.encode("utf-16"),
            b"\xef\xbb\xbf" + text.encode(),
            rng.randbytes(rng.choice((1, 50, 5000))),
            text.encode() + b"{}",
            json.dumps({"model": "small", "prompt": "a" * 30_000}).encode(),
        )
    )


BODIES: dict[str, Callable[[dict[str, Any], random.Random], bytes]] = {
    function.__name__: function
    for function in (change_values, add_parameters, drop_parameters, change_bytes, other_bodies)
}


def make_request(rng: random.Random) -> Sent:
    """A mutated request; a few are whole."""
    change = rng.choice((*BODIES, *BODIES, "head", "whole"))
    is_chat = rng.random() < 0.2
    body = valid_chat(rng) if is_chat else valid_body(rng)
    headers = {"Content-Type": "application/json"}
    method, path = "POST", "/v1/chat/completions" if is_chat else "/v1/completions"
    data = BODIES[change](body, rng) if change in BODIES else json.dumps(body).encode()
    if change in BODIES and rng.random() < 0.05:
        path = "/v1/chat/completions"
    if change == "head":
        kinds = ("", "text/plain", "application/x-www-form-urlencoded", "é", ";", "a" * 5000)
        where = rng.randrange(4)
        if where == 0:
            headers["Content-Type"] = rng.choice(kinds)
        elif where == 1:
            method = rng.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "NONE"))
        elif where == 2:
            paths = ("/v1/completion", "/v1/models/%ff%00", "/v1//completions", "/%2e%2e/x")
            others = ("/v1/models/" + "x" * 3000, "/?" + "q" * 5000, "/v1/completions/", "/v1/")
            path = rng.choice((*paths, *others))
        else:
            headers["Authorization"] = rng.choice(("Bearer", "Bearer é", "Basic a:b", " " * 100))
    return Sent(change, method, path, headers, data)


def send(url: str, request: Sent) -> tuple[int, bytes, str]:
    """Send a request; return status, body and content type of the answer."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=SECONDS)
    try:
        headers = {k: v.encode("utf-8").decode("latin-1") for k, v in request.headers.items()}
        connection.request(request.method, request.path, request.body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers.get("content-type", "")
    except (BrokenPipeError, ConnectionResetError):  # refused before the body was sent
        return 413, b"", ""
    finally:
        connection.close()


def fault(request: Sent, status: int, body: bytes, kind: str) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if status != 200 and not 400 <= status < 500:
        return f"status {status}"
    if request.method == "HEAD" or not body:
        return ""
    if status == 200 and kind.startswith("text/event-stream"):
        events = re.findall(rb"data: (.*)\n\n", body)
        if events[-1] != b"[DONE]":
            return "a stream without an end"
        # a temperature of 1e-320 is a mistake that shows when the first token is drawn
        faults = [x for x in events if b'"server_error"' in x]
        return "an error of the server in a stream" if faults else ""
    if not kind.startswith("application/json"):
        return "" if status == 200 or kind.startswith("text/plain") else f"an answer of type {kind}"
    values = json.loads(body)
    if status == 200:
        return ""
    error = values.get("error", {})
    is_good = error.keys() == {"message", "type", "param", "code"}
    is_line = isinstance(error.get("message"), str) and 0 < len(error["message"]) < 600
    return "" if is_good and is_line else "an error in another shape"


def fuzz(url: str, count: int, seed: int, clients: int) -> dict[str, Any]:
    """Send requests to a server whose model is called ``small``.

    Args:
        url: where it answers.
        count: number of requests.
        seed: equal seeds send equal requests.
        clients: requests at the same time.

    Returns:
        Faults, answers by status and by kind of mutation, and the slowest answer in seconds.
    """
    rng = random.Random(seed)
    requests = [make_request(rng) for _ in range(count)]

    def judge(request: Sent) -> tuple[Sent, int, str, float]:
        begin = time.perf_counter()
        try:
            status, body, kind = send(url, request)
            wrong = fault(request, status, body, kind)
        except (OSError, http.client.HTTPException, ValueError) as error:
            status, wrong = 0, repr(error)
        return request, status, wrong, time.perf_counter() - begin

    with ThreadPoolExecutor(clients) as pool:
        judged = list(pool.map(judge, requests))
    statuses: dict[str, Counter[str]] = {}
    for request, status, _, _ in judged:
        statuses.setdefault(request.change, Counter())[str(status)] += 1
    return {
        "requests": count,
        "seed": seed,
        "faults": [f"{wrong}: {request}"[:1000] for request, _, wrong, _ in judged if wrong],
        "slowest_seconds": round(max(seconds for *_, seconds in judged), 2),
        "statuses": {change: dict(sorted(found.items())) for change, found in statuses.items()},
    }


def make_model(folder: Path) -> Path:
    """Save a small model by character, called ``small``; return its run folder."""
    import torch

    from mmrec.checkpoint.checkpoint import save_checkpoint
    from mmrec.config import ModelConfig
    from mmrec.data.tokenizer import Tokenizer
    from mmrec.model import Model

    torch.manual_seed(0)
    tokenizer = Tokenizer("char", "abcdefghijklmnopqrstuvwxyz .\n☃")
    config = ModelConfig(width=32, depth=2, heads=2, vocab_size=tokenizer.vocab_size)
    run = folder / "small"
    run.mkdir()
    save_checkpoint(run / "best.h5", Model(config), tokenizer, 0, {})
    return run


def main() -> int:
    """Start a server and send it requests; return 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mmrec", "serve", str(make_model(Path(folder)))]
        template = Path(folder) / "chat.jinja"
        template.write_text("{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}")
        command += ["--chat-template", str(template)]
        command += ["--port", "0", "--max-tokens", "64", "--max-body-bytes", "20000"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            probe = Sent(
                "whole",
                "POST",
                "/v1/completions",
                {"Content-Type": "application/json"},
                b'{"model":"small","prompt":"once","seed":1,"max_tokens":40}',
            )
            before = json.loads(send(url, probe)[1])["choices"]
            begin = time.perf_counter()
            results = fuzz(url, options.count, options.seed, options.clients)
            results["seconds"] = round(time.perf_counter() - begin)
            results["same_text_afterwards"] = json.loads(send(url, probe)[1])["choices"] == before
        finally:
            process.terminate()
            process.wait(30)
    print(json.dumps(results, indent=1))
    (RESULTS / "serve_fuzz.json").write_text(json.dumps(results, indent=1) + "\n")
    return int(bool(results["faults"]) or not results["same_text_afterwards"])


if __name__ == "__main__":
    sys.exit(main())
