"""Fine-tuning against training from scratch: the same text, the same number of tokens.

    python benchmarks/finetune.py stdlib stories.txt --steps 200 --out stdlib-to-stories
    python benchmarks/finetune.py c4.jsonl project/ --source runs/tiny-c4 --out english-to-code

A model is trained on the first text once, unless a run is named; then, for every seed, it is fine-
tuned on the second in several ways, and one of its size is trained on the second alone, with the
command as its user runs it. Every run's learning rates end at its last step. Scores are bits per
byte of the best checkpoint over the whole validation split of the second text, whatever its
tokenizer, and of the first. Writes results/finetune-NAME.json and .png.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from perplexity import mmrec

from mmrec.profiling.kernel_bench import machine

RESULTS = Path(__file__).parent / "results"
WAYS: dict[str, list[str]] = {
    "scratch": [],
    "finetune": [],
    "finetune --replay 0.1": ["--replay", "0.1"],
    "finetune --lora 8": ["--lora", "8"],
}


def result(run: Path) -> dict[str, Any]:
    """What a run says of itself, with its curve in bits per byte by steps."""
    made: dict[str, Any] = json.loads((run / "summary.json").read_text())
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(x["step"], x["bits_per_byte"]) for x in lines if x["kind"] == "val"]
    kept = ("steps", "tokens", "seconds", "best_step", "best_because")
    return {k: made[k] for k in kept} | {"curve": curve, "scores": made.get("bits_per_byte")}


def race(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All runs: the source, and each way for each seed."""
    source, rows = args.source or folder / "source", []
    if not args.source:
        mmrec("train", args.preset, "--data", args.old, "--out", str(source))
    rows.append({"way": "source", "seed": 0, **result(source)})
    length = ["--steps", str(args.steps), "--eval-every", str(args.eval_every)]
    length += ["--max-bytes", str(args.max_bytes)] if args.max_bytes else []
    for seed in range(args.seeds):
        common = ["--data", args.new, *length, "--seed", str(seed), "--dropout", str(args.dropout)]
        for way in args.ways:
            run = folder / f"{way.replace(' ', '')}-{seed}"
            if way == "scratch":
                mmrec("train", args.preset, *common, "--patience", "5", "--out", str(run))
                score = json.loads(mmrec("eval", str(run), "--json"))["bits_per_byte"]
                row = result(run) | {"scores": {"new": {"after": score}}}
            else:
                mmrec("finetune", str(source), *common, *WAYS[way], "--out", str(run))
                row = result(run)
            rows.append({"way": way, "seed": seed, **row})
            print(f"seed {seed}, {way}: {json.dumps(row['scores'])}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines, a way a line: medians over the seeds and their span."""
    lines = ["| | new text | old text |", "|---|---|---|"]
    before = next(r["scores"] for r in rows if r["way"].startswith("finetune"))
    old, new = (f"{before[k]['before']:.3f}" for k in ("old", "new"))
    lines.append(f"| the model before | {new} | {old} |")
    for way in dict.fromkeys(r["way"] for r in rows[1:]):
        mine, cells = [r for r in rows if r["way"] == way], []
        for text in ("new", "old"):
            got = sorted(r["scores"][text]["after"] for r in mine if text in r["scores"])
            span = f"{statistics.median(got):.3f} ({got[0]:.3f} to {got[-1]:.3f})" if got else ""
            cells.append(span)
        lines.append(f"| {way} | {cells[0]} | {cells[1]} |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    figure = Figure(figsize=(7.2, 4.4), dpi=120, layout="constrained")
    axes, ends = figure.add_subplot(), []
    for i, way in enumerate(dict.fromkeys(r["way"] for r in rows[1:])):
        for row in (r for r in rows if r["way"] == way):
            x, y = zip(*row["curve"], strict=True)
            ends.append(min(y))
            axes.plot(x, y, color=f"C{i}", label=way if row["seed"] == 0 else None)
    axes.set(
        xlabel="steps on the new text",
        title=title,
        ylabel="bits per byte, validation subset of the new text",
        ylim=(min(ends) * 0.97, max(ends) * 1.4),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", help="what the source is trained on")
    parser.add_argument("new", help="what is learnt then")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--source", type=Path, help="a run on the first text")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--max-bytes", type=int, help="no more of the new text than this")
    parser.add_argument("--add", action="store_true", help="keep the other ways' earlier rows")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", required=True, help="name of the results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = race(args, Path(name))
    path = RESULTS / f"finetune-{args.out}.json"
    if args.add:
        before = [r for r in json.loads(path.read_text())["rows"] if r["way"] != "source"]
        rows += [r for r in before if r["way"] not in args.ways]
        rows.sort(key=lambda r: ["source", *WAYS].index(r["way"]))
    left = ("old", "new", "out", "source", "add", "ways")
    about = {k: v for k, v in vars(args).items() if k not in left}
    made = {"machine": machine(), "settings": about, "rows": rows}
    path.write_text(json.dumps(made, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"), args.out)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
