"""Large text: speed and memory of preparing it, and what reading it from disk costs training.

    python benchmarks/corpus.py [--bytes 1000000000] [--folder FOLDER]

The text is Python's standard library, repeated, as JSON lines; a line at the head of each document
makes every copy unique. `mmrec data prepare` runs in a process of its own, whose highest resident
memory is recorded. Before and after it the `tokenizers` library alone encodes a part of the same
documents, in batches from memory. Then training steps of tiny are timed, alternately with windows
from the mapped file and from an array in memory.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mmrec.cli.startup import prepare_process

prepare_process(["train"])

import numpy as np  # noqa: E402

from mmrec.checkpoint import hdf5  # noqa: E402
from mmrec.config import TrainConfig, preset  # noqa: E402
from mmrec.data.corpus import Corpus  # noqa: E402
from mmrec.data.dataloader import WindowLoader  # noqa: E402
from mmrec.data.prepare import prepare  # noqa: E402
from mmrec.data.sources import iter_documents  # noqa: E402
from mmrec.data.tokenizer import Tokenizer  # noqa: E402
from mmrec.profiling.kernel_bench import describe_machine  # noqa: E402
from mmrec.training.trainer import Trainer  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "corpus.json"
hdf5.MAPPED_BYTES = 0  # map a smaller text than usual
LIBRARY_CHARS = 30_000_000  # characters that the library encodes alone, each time
STEPS = 60  # training steps from each kind of array


def write_text(path: Path, size: int) -> None:
    """Write the library's documents again and again, ``size`` bytes of text in all."""
    texts, written, copy = [d.text for d in iter_documents("stdlib")], 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for i, text in enumerate(texts):
                unique = f"# copy {copy} of document {i}\n{text}"
                file.write(json.dumps({"text": unique}, ensure_ascii=False) + "\n")
                written += len(unique.encode())
                if written >= size:
                    break
            copy += 1


def library_rate(tokenizer: Tokenizer, texts: list[str]) -> float:
    """MB/s of the library alone, with the better of two batch sizes."""
    size, best = sum(len(t.encode()) for t in texts), 0.0
    for batch in (100, 1000):
        begin = time.perf_counter()
        for lo in range(0, len(texts), batch):
            tokenizer._bpe.encode_batch_fast(texts[lo : lo + batch], add_special_tokens=False)
        best = max(best, size / 1e6 / (time.perf_counter() - begin))
    return best


def step_times(corpus: Corpus, folder: Path) -> dict[str, float]:
    """Median seconds per training step with tokens mapped and in memory, timed alternately."""
    config = TrainConfig.from_flat({"data": str(corpus.path), "steps": 10**6})
    trainer = Trainer(folder, corpus, preset("tiny"), config, "tiny", show_progress=False)
    tokens = corpus.train.tokens
    assert isinstance(tokens, np.memmap)
    kinds = {"mapped": tokens, "memory": np.array(tokens)}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for step in range(STEPS):
        order = list(kinds.items())
        for name, array in order if step % 2 else reversed(order):
            trainer.loader = WindowLoader(
                array, config.data.batch_size, config.data.seq_len, seed=step
            )
            begin = time.perf_counter()
            trainer.train_step()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(x[4:]) for name, x in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", type=int, default=10**9)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": describe_machine(), "bytes": args.bytes}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        text, out = folder / "text.jsonl", folder / "corpus.h5"
        write_text(text, args.bytes)
        small = Corpus.open(prepare("stdlib", progress=print))
        texts, size = [], 0
        for d in iter_documents(str(text)):
            texts.append(d.text)
            size += len(d.text)
            if size > LIBRARY_CHARS:
                break
        library_rates = [library_rate(small.tokenizer, texts)]
        command = [sys.executable, "-m", "mmrec", "data", "prepare", str(text), f"--out={out}"]
        begin = time.perf_counter()
        completed = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        corpus = Corpus.open(out)
        library_rates.append(library_rate(corpus.tokenizer, texts))
        [rate] = re.findall(r"tokens at ([\d.]+) MB/s", completed.stderr)
        result |= {
            "library_mb_per_s": library_rates,
            "tokenising_mb_per_s": float(rate),
            "of_the_library": float(rate) / statistics.mean(library_rates),
            "whole_mb_per_s": args.bytes / 1e6 / seconds,
            "seconds": seconds,
            "peak_memory_mb": peak / 1e6,
            "documents": len(corpus.train.doc_bytes) + len(corpus.val.doc_bytes),
            "tokens": corpus.train.n_tokens + corpus.val.n_tokens,
        }
        times = step_times(corpus, folder / "run")
        result["step_seconds"] = times
        result["mapped_against_memory"] = times["mapped"] / times["memory"]
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
