"""Fine-tuning against training from scratch: the same text, the same number of tokens.

    python benchmarks/finetune.py stdlib stories.txt --steps 200 --out stdlib-to-stories
    python benchmarks/finetune.py c4.jsonl project/ --source runs/tiny-c4 --out english-to-code

A model is trained on the first text once, unless a run is named. For every seed it is then
fine-tuned on the second text with several methods, and a model of the same size is trained on the
second text from scratch. All runs use the command, as a user does, and their learning rates reach
zero at the last step. Scores are bits per byte of the best checkpoint, on the whole validation
splits of both texts; they can be compared between tokenizers. Writes results/finetune-NAME.json and
.png.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from outputs import add_force, check_results
from perplexity import mmrec

from mmrec.profiling.kernel_bench import describe_machine
from mmrec.runtime.pictures import METADATA

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, list[str]] = {
    "scratch": [],
    "finetune": [],
    "finetune --replay-fraction 0.1": ["--replay-fraction", "0.1"],
    "finetune --lora-rank 8": ["--lora-rank", "8"],
}


def result(run: Path) -> dict[str, Any]:
    """Return the summary of a run, with its curve of (step, bits per byte)."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(x["step"], x["bits_per_byte"]) for x in lines if x["kind"] == "val"]
    keys = ("steps", "tokens", "seconds", "best_step", "best_reason")
    scores = summary.get("bits_per_byte")
    return {k: summary[k] for k in keys} | {"curve": curve, "scores": scores}


def race(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train the source, and each method for each seed; return their rows."""
    source, rows = args.source or folder / "source", []
    if not args.source:
        mmrec("train", args.preset, "--data", args.old, "--out", str(source))
    rows.append({"method": "source", "seed": 0, **result(source)})
    length = ["--steps", str(args.steps), "--eval-every", str(args.eval_every)]
    length += ["--max-bytes", str(args.max_bytes)] if args.max_bytes else []
    for seed in range(args.seeds):
        common = ["--data", args.new, *length, "--seed", str(seed), "--dropout", str(args.dropout)]
        for method in args.methods:
            run = folder / f"{method.replace(' ', '')}-{seed}"
            if method == "scratch":
                mmrec("train", args.preset, *common, "--patience", "5", "--out", str(run))
                score = json.loads(mmrec("eval", str(run), "--json"))["bits_per_byte"]
                row = result(run) | {"scores": {"new": {"after": score}}}
            else:
                mmrec("finetune", str(source), *common, *METHODS[method], "--out", str(run))
                row = result(run)
            rows.append({"method": method, "seed": seed, **row})
            print(f"seed {seed}, {method}: {json.dumps(row['scores'])}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table, a row per method: medians over the seeds and their range."""
    lines = ["| | new text | earlier text |", "|---|---|---|"]
    before = next(r["scores"] for r in rows if r["method"].startswith("finetune"))
    earlier, new = (f"{before[k]['before']:.3f}" for k in ("earlier", "new"))
    lines.append(f"| before fine-tuning | {new} | {earlier} |")
    for method in dict.fromkeys(r["method"] for r in rows[1:]):
        own, cells = [r for r in rows if r["method"] == method], []
        for text in ("new", "earlier"):
            after = sorted(r["scores"][text]["after"] for r in own if text in r["scores"])
            cell = ""
            if after:
                cell = f"{statistics.median(after):.3f} ({after[0]:.3f} to {after[-1]:.3f})"
            cells.append(cell)
        lines.append(f"| {method} | {cells[0]} | {cells[1]} |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    figure = Figure(figsize=(7.2, 4.4), dpi=120, layout="constrained")
    axes, lowest = figure.add_subplot(), []
    for i, method in enumerate(dict.fromkeys(r["method"] for r in rows[1:])):
        for row in (r for r in rows if r["method"] == method):
            x, y = zip(*row["curve"], strict=True)
            lowest.append(min(y))
            axes.plot(x, y, color=f"C{i}", label=method if row["seed"] == 0 else None)
    axes.set(
        xlabel="steps on the new text",
        title=title,
        ylabel="bits per byte, validation subset of the new text",
        ylim=(min(lowest) * 0.97, max(lowest) * 1.4),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata=METADATA)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", help="text that the source is trained on")
    parser.add_argument("new", help="text that it is fine-tuned on")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--source", type=Path, help="a run on the first text")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--max-bytes", type=int, help="read at most this much of the new text")
    parser.add_argument("--add", action="store_true", help="keep the rows of other methods")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", required=True, help="name of the results")
    add_force(parser)
    args = parser.parse_args()
    path = RESULTS / f"finetune-{args.out}.json"
    check_results(parser, args, path, path.with_suffix(".png"))
    with tempfile.TemporaryDirectory() as name:
        rows = race(args, Path(name))
    if args.add:
        earlier = [r for r in json.loads(path.read_text())["rows"] if r["method"] != "source"]
        rows += [r for r in earlier if r["method"] not in args.methods]
        rows.sort(key=lambda r: ["source", *METHODS].index(r["method"]))
    not_settings = ("old", "new", "out", "source", "add", "methods", "force")
    settings = {k: v for k, v in vars(args).items() if k not in not_settings}
    result = {"machine": describe_machine(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"), args.out)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
