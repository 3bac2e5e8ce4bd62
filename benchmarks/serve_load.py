"""Let many clients stream from one server at once, for a long time.

    python benchmarks/serve_load.py [--model RUN] [--minutes 10] [--clients 32]

Each client asks for one text after another on a connection of its own. Measured are errors, tokens
per second against those of the engine alone (the same requests without a server, before and
after), the time to the first token, and the resident memory of the server. A sample of the texts is
generated again, each alone, and must be equal. Without ``--model`` a model of the preset ``tiny``
with random weights is used: it takes as long per token as a trained one.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from mmrec.checkpoint.manager import find_checkpoint
from mmrec.config import SamplingConfig
from mmrec.inference.decoder import Decoder
from mmrec.inference.engine import Engine, Request, complete
from mmrec.profiling.kernel_bench import describe_machine

RESULTS = Path(__file__).parent / "results"
PROMPTS = ("Once upon a time", "It was", "def main", "", "The ", "One day a cat and a dog")
MAX_TOKENS = 1000
SAMPLING = SamplingConfig(temperature=0.8, top_p=0.95)
WARMUP_SECONDS = 5.0
"""Time in the beginning that is not counted."""
SAMPLED = 200
"""Most texts that are generated again."""


def request_of(client: int, number: int) -> dict[str, Any]:
    """The parameters of a request: of each client and number another prompt and seed."""
    return {
        "prompt": PROMPTS[(client + number) % len(PROMPTS)],
        "seed": client * 1_000_000 + number,
        "max_tokens": MAX_TOKENS,
        "temperature": SAMPLING.temperature,
        "top_p": SAMPLING.top_p,
    }


def engine_request(values: dict[str, Any]) -> Request:
    """The same request to the engine."""
    return Request(
        values["prompt"],
        sampling=SAMPLING,
        seed=values["seed"],
        max_tokens=values["max_tokens"],
        return_state=False,
    )


def engine_rate(decoder: Decoder, clients: int, seconds: float) -> float:
    """Tokens per second of the engine alone with as many texts at once."""
    engine = Engine(decoder, max_streams=clients)
    numbers = [0] * clients
    handles = [engine.submit(engine_request(request_of(c, 0))) for c in range(clients)]
    tokens, begin = 0, 0.0
    start = time.perf_counter()
    while True:
        engine.step()
        now = time.perf_counter()
        if not begin and now - start > min(WARMUP_SECONDS, seconds / 4):
            begin, tokens = now, 0
        if begin and now - begin > seconds:
            return tokens / (now - begin)
        for client, handle in enumerate(handles):
            tokens += sum(len(piece.tokens) for piece in handle.pieces())
            if handle.is_finished:
                numbers[client] += 1
                request = engine_request(request_of(client, numbers[client]))
                handles[client] = engine.submit(request)


@dataclass
class Load:
    """What the clients saw."""

    begin: float
    end: float
    errors: list[str] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    requests: int = 0
    tokens: int = 0
    """Of requests that ended in the time that is counted."""
    sampled: list[tuple[dict[str, Any], str]] = field(default_factory=list)


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """The status line of an answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    return head.split(b"\r\n", 1)[0]


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    """The next chunk of a body; empty at its end."""
    size = int(await reader.readline(), 16)
    return (await reader.readexactly(size + 2))[:-2]


async def one_client(url: str, model: str, client: int, load: Load) -> None:
    """Ask for one text after another until the time is over."""
    where, rng, number = urlsplit(url), random.Random(client), 0
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    while time.perf_counter() < load.end:
        values = request_of(client, number)
        number += 1
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps({"model": model, **values, **options}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: "
        head += f"{len(body)}\r\nContent-Type: application/json\r\n\r\n"
        begin = time.perf_counter()
        writer.write(head.encode() + body)
        status = await read_head(reader)
        if b" 200 " not in status:
            load.errors.append(status.decode())
            break
        first = None
        chunks = []
        while chunk := await read_chunk(reader):
            chunks.append(chunk)
            if first is None:
                first = time.perf_counter() - begin
        events = [x.removeprefix(b"data: ") for x in b"".join(chunks).split(b"\n\n") if x]
        if events[-1] != b"[DONE]" or b'"usage"' not in events[-2]:
            load.errors.append(f"a stream without an end: {events[-1][:200]!r}")
            continue
        if load.begin <= time.perf_counter() <= load.end:  # as many begin before as end after
            assert first is not None
            load.first_token_seconds.append(first)
            load.requests += 1
            load.tokens += json.loads(events[-2])["usage"]["completion_tokens"]
        if len(load.sampled) < 4 * SAMPLED or rng.random() < 0.01:
            parts = [json.loads(event)["choices"] for event in events[:-2]]
            load.sampled.append((values, "".join(c[0]["text"] for c in parts)))
    writer.close()


async def watch_memory(pid: int, load: Load) -> list[tuple[float, float]]:
    """Resident memory (MB) of the server over time (s)."""
    found = []
    while (now := time.perf_counter()) < load.end:
        if now >= load.begin:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            found.append((now - load.begin, pages * os.sysconf("SC_PAGE_SIZE") / 1e6))
        await asyncio.sleep(min(1.0, max(0.05, load.end - now)))
    return found


async def run_clients(
    url: str, model: str, pid: int, clients: int, seconds: float
) -> tuple[Load, list[tuple[float, float]]]:
    """Run all clients for a time."""
    now = time.perf_counter()
    warmup = min(WARMUP_SECONDS, seconds / 4)
    load = Load(now + warmup, now + warmup + seconds)
    watching = asyncio.create_task(watch_memory(pid, load))
    await asyncio.gather(*(one_client(url, model, c, load) for c in range(clients)))
    return load, await watching


def make_model(folder: Path) -> Path:
    """Save a model of the preset tiny with random weights and 5,000 tokens; return its folder."""
    import torch

    from mmrec.checkpoint.checkpoint import save_checkpoint
    from mmrec.config import preset
    from mmrec.data.tokenizer import train_tokenizer
    from mmrec.model import Model

    torch.manual_seed(0)
    text = "".join(
        chr(97 + i // 676 % 26) + chr(97 + i // 26 % 26) + chr(97 + i % 26) + " "
        for i in range(17_576)
    )
    tokenizer = train_tokenizer("bpe", [text], 5000)
    config = preset("tiny")
    run = folder / "tiny"
    run.mkdir()
    model = Model(type(config)(**{**config.__dict__, "vocab_size": tokenizer.vocab_size}))
    save_checkpoint(run / "best.h5", model, tokenizer, 0, {})
    return run


def main() -> int:
    """Run it; return 1 if there was an error or a text differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--weights", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_load.json")
    options = parser.parse_args()
    seconds = options.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        path = find_checkpoint(options.model or make_model(Path(folder)))
        command = [sys.executable, "-m", "mmrec", "serve", str(path), "--port", "0"]
        command += ["--max-streams", str(options.clients), "--weights", options.weights]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            decoder = Decoder.load(path, weights=options.weights)
            alone_seconds = min(30.0, seconds / 2)
            before = engine_rate(decoder, options.clients, alone_seconds)
            load, memory = asyncio.run(
                run_clients(url, _name(url), process.pid, options.clients, seconds)
            )
            after = engine_rate(decoder, options.clients, alone_seconds)
        finally:
            process.terminate()
            process.wait(60)
        sample = random.Random(0).sample(load.sampled, min(SAMPLED, len(load.sampled)))
        different = sum(
            next(complete(decoder, [engine_request(values)])).text != text
            for values, text in sample
        )
    first = np.array(load.first_token_seconds) * 1000
    times, sizes = np.array(memory).T
    late = times >= times[-1] / 2
    slope = float(np.polyfit(times[late], sizes[late], 1)[0]) * 60
    rate, alone = load.tokens / seconds, (before + after) / 2
    results = {
        "machine": describe_machine(),
        "model": "tiny, random weights" if options.model is None else str(options.model.name),
        "weights": options.weights,
        "clients": options.clients,
        "seconds": round(seconds),
        "requests": load.requests,
        "errors": load.errors,
        "tokens_per_second": round(rate),
        "engine_alone_tokens_per_second": [round(before), round(after)],
        "share_of_engine_alone": round(rate / alone, 3),
        "first_token_ms": {
            f"p{q}": round(float(np.percentile(first, q)), 1) for q in (50, 95, 99, 100)
        },
        "memory_mb": {
            "first": round(float(sizes[0]), 1),
            "last": round(float(sizes[-1]), 1),
            "largest": round(float(sizes.max()), 1),
            "slope_per_minute_of_second_half": round(slope, 3),
        },
        "texts_generated_again": len(sample),
        "texts_that_differ": different,
    }
    print(json.dumps(results, indent=1))
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(bool(load.errors) or different > 0)


def _name(url: str) -> str:
    from urllib.request import urlopen

    with urlopen(f"{url}/v1/models") as answer:
        return str(json.load(answer)["data"][0]["id"])


if __name__ == "__main__":
    sys.exit(main())
