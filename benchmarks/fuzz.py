"""Fuzz the readers: mutated checkpoints, corpora and tokenizers, each read under limits.

    python benchmarks/fuzz.py --files 10000 --seed 0 [--json benchmarks/results/fuzz.json]

Small real files are changed in every way that disks, programs and attackers change files, and are
read as ``mmrec eval``, ``--resume`` and ``--data`` read them, by worker processes with a limit on
memory and on time. Half of the byte-level changes, and all of those made through HDF5, are sealed
again afterwards, as one who forges a file would, so that HDF5 and the checks behind the seal are
met. Counts must be zero for: crash, hang, wrong content, other exception, memory.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from mutations import mutate

from mmrec.errors import InputError

SECONDS, MEMORY = 20.0, 1 << 30  # of one file, and beyond what the libraries take
BAD = ("crash", "hang", "wrong content", "other exception", "memory")


def originals(folder: Path, text: str) -> list[tuple[str, Path]]:
    """Small real files of every kind: two tokenizers in two corpora, and checkpoints of both."""
    import torch

    from mmrec.checkpoint import checkpoint
    from mmrec.config import ModelConfig
    from mmrec.data.corpus import Corpus
    from mmrec.data.prepare import prepare
    from mmrec.model import Model
    from mmrec.optimizer import MuonAdamW, parameter_groups

    (folder / "text.txt").write_text(text)
    made: list[tuple[str, Path]] = []
    small = ModelConfig(
        width=16,
        depth=2,
        heads=2,
        layer_types="sl",
        ffn_multiplier=2.0,
        ngram_buckets=32,
        max_timescale=32,
    )
    for kind in ("bpe", "char"):
        path = prepare(str(folder / "text.txt"), kind, 300, folder / f"{kind}.h5")
        corpus = Corpus.open(path)
        torch.manual_seed(0)
        model = Model(replace(small, vocab_size=corpus.tokenizer.vocab_size))
        optimizer = MuonAdamW(
            parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95), matrix_lr=0.02
        )
        x = torch.from_numpy(corpus.train.tokens[:65].astype(np.int64))[None]
        model.loss(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        info = {"preset": "tiny", "train": {"data": "stdlib"}, "fingerprint": "0", "source": "s"}
        whole = folder / f"{kind}-checkpoint.h5"
        checkpoint.save(whole, model, corpus.tokenizer, 1, info, optimizer, {"seconds": 1.0})
        made += [("corpus", path), ("checkpoint", whole)]
    return made


def digest(value: Any) -> str:
    """Of everything that a reader hands over."""
    made = hashlib.sha256()
    for part in value:
        made.update(
            np.ascontiguousarray(part).tobytes()
            if isinstance(part, np.ndarray)
            else repr(part).encode()
        )
        made.update(b"\0")
    return made.hexdigest()


def read(kind: str, path: Path) -> str:
    """Read a file in every way that mmrec does, use what it gave a little, return its digest."""
    from mmrec.checkpoint import checkpoint
    from mmrec.data.corpus import Corpus
    from mmrec.inference.generate import generate
    from mmrec.model import Model
    from mmrec.optimizer import MuonAdamW, parameter_groups

    if kind == "corpus":
        c = Corpus.open(path)
        c.tokenizer.encode(c.tokenizer.decode(c.val.tokens[:50].tolist()))
        parts = [
            getattr(s, f) for s in (c.train, c.val) for f in ("tokens", "doc_offsets", "doc_bytes")
        ]
        return digest([*parts, c.tokenizer.to_json(), c.info])
    loaded = checkpoint.load_model(path)
    config = loaded.model.config
    "".join(generate(loaded.model, loaded.tokenizer, "", max_tokens=2, seed=0))
    checkpoint.read_info(path)
    model = Model(config)
    optimizer = MuonAdamW(parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95), matrix_lr=0.02)
    progress = checkpoint.restore(path, model, optimizer)
    weights = [p.detach().numpy() for p in model.parameters()]
    moments = [
        optimizer.state[p][m].numpy()
        for p in model.parameters()
        for m in sorted(optimizer.state[p])
        if m != "step"
    ]
    return digest(
        [*weights, *moments, loaded.tokenizer.to_json(), loaded.step, loaded.info, progress]
    )


def judge(kind: str, path: Path, sealed: bool, want: str) -> tuple[str, str]:
    """Read one file; say how it went."""
    try:
        found = read(kind, path)
    except InputError as error:
        text = str(error)
        good = "\n" not in text and len(text) < 1000
        return ("one clear error", text) if good else ("other exception", text[:300])
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException:
        return "other exception", traceback.format_exc()[-1500:]
    if found == want:
        return "identical content", ""
    # who seals a file can put in it what they like; what the structure allows is then content
    return ("forged content", "") if sealed else ("wrong content", "")


def work(pipe: Connection) -> None:
    """A worker: limits first, then one file after another."""
    import torch

    from mmrec.checkpoint import checkpoint  # noqa: F401
    from mmrec.data import corpus  # noqa: F401

    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    kind, path, want = pipe.recv()
    read(kind, path)  # libraries are loaded and kernels compiled: the limit is over that
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    pipe.send("ready")
    while True:
        kind, path, sealed, want = pipe.recv()
        pipe.send(judge(kind, path, sealed, want))


def start(first: tuple[str, Path]) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    ours.send((*first, ""))
    ours.recv()
    return process, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that went wrong")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    text = Path(argparse.__file__).read_text()[:12_000]
    counts: Counter[str] = Counter()
    by_change: dict[str, Counter[str]] = {}
    begin, slowest = time.perf_counter(), 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sources = originals(folder, text)
        wants = {path: read(kind, path) for kind, path in sources}
        process, pipe = start(sources[1])
        for number in range(options.files):
            rng = random.Random(f"{options.seed} {number}")
            kind, source = sources[rng.randrange(len(sources))]
            target = folder / "mutated.h5"
            change, sealed = mutate(source, target, rng)
            since = time.perf_counter()
            try:
                pipe.send((kind, target, sealed, wants[source]))
                outcome = pipe.recv() if pipe.poll(SECONDS) else ("hang", "")
            except (EOFError, ConnectionError):
                process.join()
                outcome = ("crash", f"exit code {process.exitcode}")
            slowest = max(slowest, time.perf_counter() - since)
            counts[outcome[0]] += 1
            by_change.setdefault(change, Counter())[outcome[0]] += 1
            if outcome[0] in BAD:
                print(f"{number}: {change} of {source.name}: {outcome[0]}\n{outcome[1]}")
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(target, options.keep / f"{number}-{kind}.h5")
            if outcome[0] in ("hang", "crash"):
                process.kill()
                process.join()
                process, pipe = start(sources[1])
            if (number + 1) % 500 == 0:
                left = (time.perf_counter() - begin) / (number + 1) * (options.files - number - 1)
                where = f"{number + 1:,} of {options.files:,}, {left / 60:.1f} min left"
                print(f"{where}: {dict(counts)}", flush=True)
        process.kill()
    each = {k: dict(v) for k, v in sorted(by_change.items())}
    made = {
        "files": options.files,
        "seed": options.seed,
        "hdf5": h5py.version.hdf5_version,
        "seconds": round(time.perf_counter() - begin),
        "slowest_seconds": round(slowest, 2),
        "memory_limit_bytes": MEMORY,
        "counts": {**dict.fromkeys(BAD, 0), **counts},
        "by_change": each,
    }
    print(json.dumps(made["counts"], indent=1))
    if options.json:
        options.json.write_text(json.dumps(made, indent=1) + "\n")
    raise SystemExit(any(counts[b] for b in BAD))


if __name__ == "__main__":
    main()
