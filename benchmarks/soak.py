"""Train, evaluate and generate in one process for a long time, and look for leaks.

    python benchmarks/soak.py [--minutes 30] [--data SOURCE]

Each round trains a small model with every part of a run (checkpoints, validation, curve), scores
validation text with the best model, and generates text with it. After each round the process counts
its resident memory, open files and threads. Slopes are least-squares fits over the second half of
the time.
"""

import argparse
import gc
import json
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mmrec.cli.startup import prepare_process

prepare_process(["train"])  # as the command does, before torch is loaded

import numpy as np  # noqa: E402

from mmrec.checkpoint.checkpoint import load_model  # noqa: E402
from mmrec.config import TrainConfig, preset  # noqa: E402
from mmrec.data.corpus import Corpus  # noqa: E402
from mmrec.data.prepare import prepare  # noqa: E402
from mmrec.evaluation.evaluate import evaluate  # noqa: E402
from mmrec.profiling.kernel_bench import describe_machine  # noqa: E402
from mmrec.training.trainer import Trainer  # noqa: E402

RESULTS = Path(__file__).parent / "results"
RESOURCES = {"memory_mb": "resident memory (MB)", "files": "open files", "threads": "threads"}
MAX_GROWTH = {"memory_mb": 0.01, "files": 0.0, "threads": 0.0}  # per hour, as a share of the mean


def measure() -> dict[str, float]:
    """Return resident memory, open files and threads of this process, as Linux counts them."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


def one_round(corpus: Corpus, folder: Path, seed: int) -> float:
    """Train, evaluate and generate; return bits per byte."""
    shape = replace(preset("tiny"), width=64, ngram_buckets=1024, dropout=0.1)
    config = TrainConfig.from_flat(
        {
            "data": str(corpus.info["source"]),
            "steps": 40,
            "batch_size": 4,
            "seq_len": 128,
            "seed": seed,
            "eval_every": 10,
            "eval_tokens": 4096,
            "save_every": 15,
        }
    )
    Trainer(folder, corpus, shape, config, "tiny", echo=lambda line: None).fit()
    loaded = load_model(folder / "best.h5")
    split = corpus.val
    tokens = split.tokens[:50_000]
    share = len(tokens) / split.n_tokens
    scores = evaluate(loaded.model, tokens, loaded.tokenizer.eot, int(split.n_bytes * share))
    text = loaded.generate("def ", max_tokens=100, seed=seed)
    assert text
    assert math.isfinite(scores.loss)
    return scores.bits_per_byte


def slope(hours: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Return the least-squares slope per hour and its standard error."""
    x = hours - hours.mean()
    rate = float(x @ values / (x @ x))
    residuals = values - values.mean() - rate * x
    return rate, float(np.sqrt(residuals @ residuals / max(1, len(x) - 2) / (x @ x)))


def draw(samples: list[dict[str, float]], slopes: dict[str, dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 6), dpi=120, layout="constrained")
    minutes = [s["seconds"] / 60 for s in samples]
    for axes, (resource, label) in zip(
        figure.subplots(3, 1, sharex=True), RESOURCES.items(), strict=True
    ):
        axes.plot(minutes, [s[resource] for s in samples], linewidth=1)
        axes.axvspan(minutes[-1] / 2, minutes[-1], alpha=0.1)
        axes.set(
            ylabel=label, title=f"second half: {slopes[resource]['slope_per_hour']:+.2f} per hour"
        )
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    axes.set(xlabel="minutes")
    figure.savefig(RESULTS / "soak.png", format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--data", default="stdlib")
    args = parser.parse_args()
    corpus = Corpus.open(prepare(args.data, "bpe", 5000, None, print))
    begin, samples = time.monotonic(), []
    scores: list[float] = []
    while not samples or samples[-1]["seconds"] < 60 * args.minutes:
        with tempfile.TemporaryDirectory() as folder:
            scores.append(one_round(corpus, Path(folder) / "run", seed=len(samples)))
        samples.append({"seconds": round(time.monotonic() - begin, 1), **measure()})
        if len(samples) % 20 == 1:
            print(f"round {len(samples)}: {samples[-1]}", flush=True)
    late = [s for s in samples if s["seconds"] >= samples[-1]["seconds"] / 2]
    hours = np.array([s["seconds"] / 3600 for s in late])
    slopes: dict[str, dict[str, float]] = {}
    for resource in RESOURCES:
        values = np.array([s[resource] for s in late])
        rate, error = slope(hours, values)
        flat = rate - 2 * error <= MAX_GROWTH[resource] * values.mean()
        slopes[resource] = {
            "first": samples[0][resource],
            "last": samples[-1][resource],
            "highest": max(s[resource] for s in samples),
            "slope_per_hour": rate,
            "standard_error": error,
            "flat": bool(flat),
        }
        verdict = "flat" if flat else "GROWS"
        print(f"{RESOURCES[resource]}: {rate:+.3f} ± {error:.3f} per hour, {verdict}")
    result = {
        "machine": describe_machine(),
        "minutes": args.minutes,
        "rounds": len(samples),
        "bits_per_byte": [min(scores), max(scores)],
        **slopes,
        "samples": samples,
    }
    (RESULTS / "soak.json").write_text(json.dumps(result) + "\n", "utf-8")
    draw(samples, slopes)


if __name__ == "__main__":
    main()
