"""What tiny makes of held-out text: perplexity and bits per byte, trained as its user trains it.

    python benchmarks/perplexity.py shakespeare=input.txt:char stdlib c4=c4_sample.jsonl

A text is NAME=SOURCE, with :char or :byte for another tokenizer than bpe. Each is learnt by `mmrec
train tiny` with its defaults, and the best checkpoint is scored by `mmrec eval` on the whole
validation split. Writes results/perplexity.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmrec.profiling.kernel_bench import machine

RESULTS = Path(__file__).parent / "results" / "perplexity.json"
KEPT = ("loss", "perplexity", "bits_per_byte", "accuracy", "interval", "tokens", "bytes")


def mmrec(*words: str) -> str:
    """Run the command; returns what it printed."""
    command = [sys.executable, "-m", "mmrec", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


def learn(text: str, preset: str, seed: int, options: list[str], folder: Path) -> dict[str, Any]:
    """Train on one text and score it."""
    name, _, source = text.partition("=")
    source, _, kind = (source or name).partition(":")
    load, run = os.getloadavg()[0], folder / f"{preset}-{name}-{seed}"
    options = [*options, "--tokenizer", kind or "bpe"]
    mmrec("train", preset, "--data", source, "--seed", str(seed), "--out", str(run), *options)
    made = json.loads((run / "summary.json").read_text())
    scores = json.loads(mmrec("eval", str(run), "--json"))
    row = {"text": name, "options": options, "seed": seed, "load": load}
    row |= {k: made[k] for k in ("steps", "seconds", "tokens_per_second", "best_step")}
    return row | {"best_because": made["best_because"]} | {k: scores[k] for k in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", nargs="+", metavar="NAME[=SOURCE[:TOKENIZER]]")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--options", default="", help="more options of mmrec train, in one word")
    parser.add_argument("--runs", type=Path, help="folder in which to keep the runs")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = args.runs or Path(name)
        for text in args.texts:
            for seed in range(args.seeds):
                row = learn(text, args.preset, seed, args.options.split(), folder)
                rows.append(row)
                print(
                    f"{row['text']}, seed {seed}: perplexity {row['perplexity']:.2f}, "
                    f"{row['loss']:.4f} nats/token, {row['bits_per_byte']:.4f} bits per byte, "
                    f"{row['seconds']:.0f} s; {row['best_because']}",
                    flush=True,
                )
                made = {"machine": machine(), "preset": args.preset, "rows": rows}
                RESULTS.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
