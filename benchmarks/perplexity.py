"""Perplexity and bits per byte of a preset on held-out text, with the default training.

    python benchmarks/perplexity.py shakespeare=input.txt:char stdlib c4=c4_sample.jsonl

A text is NAME=SOURCE, with :char or :byte for another tokenizer than bpe. `mmrec train tiny` trains
on each with its defaults, and `mmrec eval` scores the best checkpoint on the whole validation
split. Writes results/perplexity.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmrec.profiling.kernel_bench import describe_machine

RESULTS = Path(__file__).parent / "results" / "perplexity.json"
SCORES = ("loss", "perplexity", "bits_per_byte", "accuracy", "interval", "tokens", "bytes")


def mmrec(*words: str) -> str:
    """Run the command; return its output."""
    command = [sys.executable, "-m", "mmrec", *words]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stdout + process.stderr)
    return process.stdout


def train_and_score(
    text: str, preset: str, seed: int, options: list[str], folder: Path
) -> dict[str, Any]:
    """Train on one text; return the scores as a row."""
    name, _, source = text.partition("=")
    source, _, kind = (source or name).partition(":")
    load, run = os.getloadavg()[0], folder / f"{preset}-{name}-{seed}"
    options = [*options, "--tokenizer", kind or "bpe"]
    mmrec("train", preset, "--data", source, "--seed", str(seed), "--out", str(run), *options)
    summary = json.loads((run / "summary.json").read_text())
    scores = json.loads(mmrec("eval", str(run), "--json"))
    row = {"text": name, "options": options, "seed": seed, "load": load}
    row |= {k: summary[k] for k in ("steps", "seconds", "tokens_per_second", "best_step")}
    return row | {"best_reason": summary["best_reason"]} | {k: scores[k] for k in SCORES}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", nargs="+", metavar="NAME[=SOURCE[:TOKENIZER]]")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--options", default="", help="more options of mmrec train, as one argument"
    )
    parser.add_argument("--runs", type=Path, help="folder to keep the runs in")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = args.runs or Path(name)
        for text in args.texts:
            for seed in range(args.seeds):
                row = train_and_score(text, args.preset, seed, args.options.split(), folder)
                rows.append(row)
                print(
                    f"{row['text']}, seed {seed}: perplexity {row['perplexity']:.2f}, "
                    f"{row['loss']:.4f} nats/token, {row['bits_per_byte']:.4f} bits per byte, "
                    f"{row['seconds']:.0f} s; {row['best_reason']}",
                    flush=True,
                )
                result = {"machine": describe_machine(), "preset": args.preset, "rows": rows}
                RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
