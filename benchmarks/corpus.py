"""Large text: speed and memory of preparing it, and what reading it from disk costs training.

    python benchmarks/corpus.py TEXTS [--bytes 500000000] [--folder FOLDER]

TEXTS is a folder of real text, of which no part is there twice: copies would be dropped. Recipes:

* code: `apt-get download linux-source-6.1`, then `dpkg -x` and `tar -xf` (1.2 GB);
* English books: `git clone https://github.com/mlschmitt/classic-books-markdown` (331 MB).

Its files become a text in two forms: JSON lines, in documents of about 3 kB, and a .txt of long
documents, 50 MB each. `mmrec data prepare` runs on each of them in a process of its own, with an
empty cache: for a vocabulary of 5,000, and again for one of 32,000, which finds the documents of
the first run. The highest resident memory of each process is recorded, and the time of each stage
by the lines that it writes. The tokens are compared with those of the `tokenizers` library, one by
one, on a part of the text. In the end, training steps of tiny are timed, alternately with windows
from the mapped file and from an array in memory.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmrec.cli.startup import prepare_process

prepare_process(["train"])

import numpy as np  # noqa: E402

from mmrec.checkpoint import hdf5  # noqa: E402
from mmrec.config import TrainConfig, preset  # noqa: E402
from mmrec.data.corpus import Corpus  # noqa: E402
from mmrec.data.dataloader import WindowLoader  # noqa: E402
from mmrec.data.readers import ReadOptions  # noqa: E402
from mmrec.data.sources import iter_documents  # noqa: E402
from mmrec.data.tokenizer import Tokenizer  # noqa: E402
from mmrec.profiling.kernel_bench import describe_machine  # noqa: E402
from mmrec.training.trainer import Trainer  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "corpus.json"
hdf5.MAPPED_BYTES = 0  # map a smaller text than usual
SHORT_CHARS, LONG_BYTES = 3_000, 50_000_000
VOCABULARIES = (5_000, 32_000)
LIBRARY_CHARS = 20_000_000  # characters that the libraries encode alone
STEPS = 60  # training steps from each kind of array
MEASURE = """
import json, resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6]))
"""
"""A small process between this one and the measured one, which would inherit the peak of memory."""


def paragraphs(texts: Path) -> Iterator[str]:
    """Yield the text of all files in runs of whole lines, about ``SHORT_CHARS`` long."""
    for document in iter_documents(texts, ReadOptions(skip_bad=True)):
        begin = 0
        while begin < len(document.text):
            end = document.text.find("\n", begin + SHORT_CHARS) + 1 or len(document.text)
            yield document.text[begin:end]
            begin = end


def write_texts(texts: Path, size: int, lines: Path, long: Path) -> int:
    """Write both forms, ``size`` bytes of text each; return the bytes written."""
    written, document = 0, 0
    with lines.open("w", encoding="utf-8") as short_file, long.open("w", encoding="utf-8") as file:
        for text in paragraphs(texts):
            if written >= size:
                break
            short_file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            file.write(text)
            written, document = written + len(text.encode()), document + len(text)
            if document >= LONG_BYTES:
                file.write("<|endoftext|>")
                document = 0
    return written


def run_prepare(text: Path, vocabulary: int, out: Path, cache: Path, size: int) -> dict[str, Any]:
    """Prepare a text in a process of its own; return its speed, memory and seconds by stage."""
    command = [sys.executable, "-m", "mmrec", "data", "prepare", str(text)]
    command += ["--vocab", str(vocabulary), "--out", str(out)]
    begin, lines = time.perf_counter(), []
    process = subprocess.Popen(
        [sys.executable, "-c", MEASURE, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MMREC_CACHE": str(cache)},
    )
    assert process.stderr is not None
    assert process.stdout is not None
    for line in process.stderr:
        lines.append((time.perf_counter() - begin, line))
    status, cpu_seconds, peak_memory = json.loads(process.communicate()[0])
    seconds = time.perf_counter() - begin
    said = "".join(line for _, line in lines)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed: {said}")
    [read] = [at for at, line in lines if "training the bpe" in line]
    [trained] = [at for at, line in lines if line.rstrip().endswith(": tokenising")]
    [rate] = re.findall(r"tokens at ([\d.]+) MB/s", said)
    tokenised = size / 1e6 / float(rate)
    stages = {"read": read, "train": trained - read, "tokenise": tokenised}
    return {
        "vocabulary": vocabulary,
        "mb_per_s": size / 1e6 / seconds,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_memory_mb": peak_memory,
        "stages": {**stages, "write": seconds - trained - tokenised},
    }


def compare_ids(tokenizer: Tokenizer, text: Path, chars: int) -> dict[str, float]:
    """Encode a text by ``tokenizers`` and by what prepares corpora; return their MB/s.

    Raises:
        AssertionError: a token differs.
    """
    batch: list[str] = []
    seconds = {"tokenizers": 0.0, "fastokens": 0.0}
    size = 0

    def compare() -> None:
        begin = time.perf_counter()
        encodings = tokenizer._bpe.encode_batch_fast(batch, add_special_tokens=False)
        middle = time.perf_counter()
        encoded = tokenizer.encode_batch(batch)
        seconds["tokenizers"] += middle - begin
        seconds["fastokens"] += time.perf_counter() - middle
        for encoding, ids in zip(encodings, encoded, strict=True):
            assert np.array_equal(np.array(encoding.ids), ids)
        batch.clear()

    tokenizer.encode_batch([""])  # builds the encoder
    for document in iter_documents(text):
        batch.append(document.text)
        size += len(document.text.encode())
        if sum(map(len, batch)) > 1_000_000:
            compare()
        if size > chars:
            break
    compare()
    return {"bytes": size, **{name: size / 1e6 / spent for name, spent in seconds.items()}}


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
    parser.add_argument("texts", type=Path, help="folder of real text")
    parser.add_argument("--bytes", type=int, default=500_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room")
    parser.add_argument(
        "--compare", type=int, default=LIBRARY_CHARS, help="bytes that are compared"
    )
    parser.add_argument("--no-steps", action="store_true", help="time no training steps")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        lines, long, out = folder / "text.jsonl", folder / "text.txt", folder / "corpus.h5"
        size = result["bytes"] = write_texts(args.texts, args.bytes, lines, long)
        time.sleep(3)  # a text that has just been written is not kept
        for text, form in ((lines, "JSON lines"), (long, "long documents")):
            runs = result[form] = [
                run_prepare(text, vocabulary, out, folder / form, size)
                for vocabulary in VOCABULARIES
            ]
            print(form, json.dumps(runs, indent=1), flush=True)
            corpus = Corpus.open(out)
            result[f"ids, {form}"] = compare_ids(corpus.tokenizer, text, args.compare)
            print(result[f"ids, {form}"], flush=True)
        if not args.no_steps:
            times = result["step_seconds"] = step_times(corpus, folder / "run")
            result["mapped_against_memory"] = times["mapped"] / times["memory"]
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
