"""Fuzz the readers with mutated checkpoints, corpora and tokenizers, under limits.

    python benchmarks/fuzz.py --files 10000 --seed 0 [--json benchmarks/results/fuzz.json]

Small real files are mutated in every way in which disks, programs and attackers change files.
Worker processes with a limit on memory and time read them as ``mmrec eval``, ``--resume`` and
``--data`` do. Half of the mutations of bytes, and all mutations through HDF5, are sealed again, as
a forger would, so that they reach HDF5 and the checks behind the seal. The counts of crash, hang,
wrong content, other exception and memory must be zero.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from mutations import mutate
from outputs import add_add, add_force, check_results, write_runs

from mmrec.errors import InputError
from mmrec.profiling.kernel_bench import describe_machine

SECONDS_PER_FILE = 20.0
MEMORY_BYTES = 1 << 30  # beyond what the libraries take
BAD = ("crash", "hang", "wrong content", "other exception", "memory")


def originals(folder: Path, text: str) -> list[tuple[str, Path]]:
    """Write small real files: corpora of two tokenizers, a checkpoint of each, a compact one.

    The checkpoint of ``char`` has LoRA factors, that of ``bpe`` a recurrent state.
    """
    import torch

    from mmrec.checkpoint.checkpoint import load_model, save_checkpoint, save_compact
    from mmrec.config import ModelConfig
    from mmrec.data.corpus import Corpus
    from mmrec.data.prepare import prepare
    from mmrec.lora import apply_lora
    from mmrec.model import Model
    from mmrec.optimizer import MuonAdamW, parameter_groups

    (folder / "text.txt").write_text(text)
    files: list[tuple[str, Path]] = []
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
        if kind == "char":
            apply_lora(model, 2, 4.0)
        optimizer = MuonAdamW(
            parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95), matrix_lr=0.02
        )
        x = torch.from_numpy(corpus.train.tokens[:65].astype(np.int64))[None]
        model.loss(x[:, :-1], x[:, 1:])[0].backward()
        optimizer.step()
        checkpoint_path = folder / f"{kind}-checkpoint.h5"
        save_checkpoint(
            checkpoint_path,
            model,
            corpus.tokenizer,
            1,
            {
                "preset": "tiny",
                "train": {"data": {"source": "stdlib"}},
                "fingerprint": "0",
                "source": "s",
            },
            optimizer=optimizer,
            progress={"seconds": 1.0},
            recurrent_state=model.initial_state(2) if kind == "bpe" else None,
            raw_weights=dict(model.named_parameters()) if kind == "bpe" else None,
        )
        files += [("corpus", path), ("checkpoint", checkpoint_path)]
    loaded = load_model(checkpoint_path)
    save_compact(folder / "compact.h5", loaded, loaded.metadata)
    return [*files, ("compact", folder / "compact.h5")]


def digest(values: Iterable[Any]) -> str:
    """Return the SHA-256 of everything that a reader returned."""
    sha = hashlib.sha256()
    for value in values:
        is_array = isinstance(value, np.ndarray)
        sha.update(np.ascontiguousarray(value).tobytes() if is_array else repr(value).encode())
        sha.update(b"\0")
    return sha.hexdigest()


def read(kind: str, path: Path) -> str:
    """Read a file in every way that mmrec does, use the contents briefly, return their digest."""
    from mmrec.checkpoint import checkpoint, header
    from mmrec.data.corpus import Corpus
    from mmrec.inference.decoder import Decoder
    from mmrec.inference.engine import Request, complete
    from mmrec.model import Model
    from mmrec.optimizer import MuonAdamW, parameter_groups

    if kind == "corpus":
        c = Corpus.open(path)
        c.tokenizer.encode(c.tokenizer.decode(c.val.tokens[:50].tolist()))
        arrays = [
            getattr(s, f) for s in (c.train, c.val) for f in ("tokens", "doc_offsets", "doc_bytes")
        ]
        return digest([*arrays, c.tokenizer.to_json(), c.info])
    loaded = checkpoint.load_model(path)
    config = loaded.model.config
    list(complete(Decoder.load(path), [Request(max_tokens=2, seed=0)]))
    header.read_metadata(path)
    if kind == "compact":
        weights = [x.detach().numpy() for x in loaded.model.parameters()]
        return digest([*weights, loaded.tokenizer.to_json(), loaded.step, loaded.metadata])
    model = Model(config)
    optimizer = MuonAdamW(parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95), matrix_lr=0.02)
    averages: dict[str, Any] = {}
    progress = checkpoint.restore_training_state(path, model, optimizer, averages=averages)
    checkpoint.read_recurrent_state(path, model.initial_state(2))
    weights = [x.detach().numpy() for x in (*model.parameters(), *averages.values())]
    moments = [
        optimizer.state[p][m].numpy()
        for p in model.parameters()
        for m in sorted(optimizer.state[p])
        if m != "step"
    ]
    return digest(
        [*weights, *moments, loaded.tokenizer.to_json(), loaded.step, loaded.metadata, progress]
    )


def judge(kind: str, path: Path, sealed: bool, expected: str) -> tuple[str, str]:
    """Read one file. Return the outcome and details.

    Args:
        kind: ``corpus``, ``checkpoint`` or ``compact``.
        path: The file.
        sealed: Whether it was sealed again after its mutation.
        expected: Digest of the contents of the original.
    """
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
    if found == expected:
        return "identical content", ""
    # a forger can seal any contents that the checks allow
    return ("forged content", "") if sealed else ("wrong content", "")


def work(pipe: Connection) -> None:
    """Set the limits of a worker process, then read one file after another."""
    import resource

    import torch

    from mmrec.checkpoint import checkpoint  # noqa: F401
    from mmrec.data import corpus  # noqa: F401

    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    kind, path = pipe.recv()
    read(kind, path)  # the limit does not count loading of libraries and compiling of kernels
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = now + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send("ready")
    while True:
        kind, path, sealed, expected = pipe.recv()
        pipe.send(judge(kind, path, sealed, expected))


def start(first: tuple[str, Path]) -> tuple[Any, Connection]:
    """Start a worker that reads a file as a warm-up; return it and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    ours.send(first)
    ours.recv()
    return process, ours


class Tally:
    """What came of the files so far, of all jobs."""

    def __init__(self, files: int) -> None:
        self.files, self.begin = files, time.perf_counter()
        self.counts: Counter[str] = Counter()
        self.by_mutation: dict[str, Counter[str]] = {}
        self.slowest = 0.0
        self._lock = threading.Lock()

    def add(self, mutation: str, outcome: str, seconds: float) -> None:
        """Count a file; print every 500 files how far it is."""
        with self._lock:
            self.slowest = max(self.slowest, seconds)
            self.counts[outcome] += 1
            self.by_mutation.setdefault(mutation, Counter())[outcome] += 1
            done = self.counts.total()
            if done % 500 == 0:
                left = (time.perf_counter() - self.begin) / done * (self.files - done)
                where = f"{done:,} of {self.files:,}, {left / 60:.1f} min left"
                print(f"{where}: {dict(self.counts)}", flush=True)


def read_mutated(
    numbers: Iterable[int],
    seed: int,
    sources: list[tuple[str, Path]],
    expected: dict[Path, str],
    tally: Tally,
    keep: Path | None,
) -> None:
    """Mutate files, let a worker process read them, and count the outcomes.

    Args:
        numbers: Numbers of the mutated files, which decide the mutations.
        seed: Of all mutations.
        sources: Kinds and paths of the originals.
        expected: Digests of their contents.
        tally: Counts the outcomes.
        keep: Folder for the files that went wrong.
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "mutated.h5"
        process, pipe = start(sources[1])
        for number in numbers:
            rng = random.Random(f"{seed} {number}")
            kind, source = sources[rng.randrange(len(sources))]
            mutation, sealed = mutate(source, target, rng)
            since = time.perf_counter()
            try:
                pipe.send((kind, target, sealed, expected[source]))
                outcome = pipe.recv() if pipe.poll(SECONDS_PER_FILE) else ("hang", "")
            except (EOFError, ConnectionError):
                process.join()
                outcome = ("crash", f"exit code {process.exitcode}")
            tally.add(mutation, outcome[0], time.perf_counter() - since)
            if outcome[0] in BAD:
                print(f"{number}: {mutation} of {source.name}: {outcome[0]}\n{outcome[1]}")
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(target, keep / f"{number}-{kind}.h5")
            if outcome[0] in ("hang", "crash"):
                process.kill()
                process.join()
                process, pipe = start(sources[1])
        process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first file, to continue an earlier run"
    )
    parser.add_argument("--jobs", type=int, default=1, help="files read at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that went wrong")
    parser.add_argument("--json", type=Path)
    add_add(parser)
    add_force(parser)
    options = parser.parse_args()
    if options.json:
        check_results(parser, options, options.json, option="--json")
    if options.keep and options.keep.is_dir() and any(options.keep.iterdir()):
        parser.error(f"--keep must be a new or an empty folder; {options.keep} holds files")
    text = Path(argparse.__file__).read_text()[:12_000]
    tally = Tally(options.files)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        sources = originals(Path(scratch), text)
        expected = {path: read(kind, path) for kind, path in sources}
        jobs = [
            pool.submit(
                read_mutated,
                range(options.first + job, options.first + options.files, options.jobs),
                options.seed,
                sources,
                expected,
                tally,
                options.keep,
            )
            for job in range(options.jobs)
        ]
        for job in jobs:
            job.result()
    counts = tally.counts
    result = {
        "machine": describe_machine(),
        "files": options.files,
        "first": options.first,
        "seed": options.seed,
        "hdf5": h5py.version.hdf5_version,
        "seconds": round(time.perf_counter() - tally.begin),
        "slowest_seconds": round(tally.slowest, 2),
        "memory_limit_bytes": MEMORY_BYTES,
        "counts": {**dict.fromkeys(BAD, 0), **counts},
        "by_change": {k: dict(v) for k, v in sorted(tally.by_mutation.items())},
    }
    print(json.dumps(result["counts"], indent=1))
    if options.json:
        write_runs(options.json, result, add=options.add)
    raise SystemExit(any(counts[b] for b in BAD))


if __name__ == "__main__":
    main()
