"""The race: which model reaches the lowest loss in equal training time on the same cores?

    python benchmarks/race.py input.txt --seconds 30 108 300 --nanogpt path/to/nanoGPT

mmrec and its baselines (benchmarks/baselines.py) train one after the other, each in a process of
its own, for the same wall-clock seconds, with a learning-rate schedule that ends at that time. Time
for compilation, warm-up and validation does not count. Scores are medians over seeds, on the whole
validation split. `search.py` finds the settings.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from baselines import SETTINGS, pair
from outputs import add_force, check_results

from mmrec.profiling.kernel_bench import describe_machine
from mmrec.runtime.pictures import METADATA

RESULTS = Path(__file__).parent / "results"


def measure(
    name: str,
    args: argparse.Namespace,
    seconds: float,
    seed: int,
    options: dict[str, Any],
    *,
    curve: bool,
) -> dict[str, Any]:
    """Train one model in a process of its own; return its row."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("baselines.py")),
        name,
        args.data,
        "--tokenizer",
        args.tokenizer,
        "--seconds",
        str(seconds),
        "--seed",
        str(seed),
        "--preset",
        args.preset,
    ]
    command += [] if curve else ["--no-curve"]
    command += ["--nanogpt", str(args.nanogpt)] if args.nanogpt else []
    command += ["--threads", str(args.threads)] if args.threads else []
    if options:
        command += ["--set", *(f"{k}={json.dumps(v)}" for k, v in options.items())]
    load = os.getloadavg()[0]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        return {"name": name, "seed": seed, "budget": seconds, "error": process.stderr[-300:]}
    return json.loads(process.stdout.splitlines()[-1]) | {"load": load}


def table(rows: list[dict[str, Any]], unit: str) -> list[str]:
    """Return a Markdown table, a row per model and a column per budget: median and range."""
    budgets = sorted({r["budget"] for r in rows})
    key = "loss" if unit == "nats/char" else "bits_per_byte"
    lines = [
        f"| {unit} after | "
        + " | ".join(f"{b:g} s" for b in budgets)
        + " | parameters | tokens/s | ready after |"
    ]
    lines.append("|---" * (len(budgets) + 4) + "|")
    for name in dict.fromkeys(r["name"] for r in rows):
        own = [r for r in rows if r["name"] == name and "error" not in r]
        if not own:
            continue
        cells = []
        for budget in budgets:
            scores = [r[key] for r in own if r["budget"] == budget]
            span = f" ({min(scores):.3f}–{max(scores):.3f})" if len(scores) > 1 else ""
            cells.append(f"{statistics.median(scores):.3f}{span}" if scores else "")
        rate = statistics.median(r["tokens"] / r["seconds"] for r in own)
        ready = statistics.median(r["ready"] for r in own)
        lines.append(
            f"| {name} | " + " | ".join(cells) + f" | {own[-1]['parameters'] / 1e6:.2f} M"
            f" | {rate:,.0f} | {ready:.0f} s |"
        )
    return lines


def plot(rows: list[dict[str, Any]], path: Path, title: str, unit: str) -> None:
    """Draw final scores by budget as lines with dots, validations during training as thin lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    longest = max(r["budget"] for r in rows)
    finals: list[float] = []
    for i, name in enumerate(dict.fromkeys(r["name"] for r in rows)):
        own = [r for r in rows if r["name"] == name and "error" not in r]
        points = []
        for budget in sorted({r["budget"] for r in own}):
            at_budget = [r for r in own if r["budget"] == budget]
            key = "loss" if unit == "nats/char" else "bits_per_byte"
            points.append((budget, statistics.median(r[key] for r in at_budget)))
        finals += [y for _, y in points]
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=f"C{i}",
            label=name,
            linewidth=2.5 if name == "mmrec" else 1.2,
        )
        for r in own:
            if r["budget"] == longest and r["seed"] == 0:
                scale = r[key] / r["loss"]
                axes.plot(
                    [s for s, _ in r["curve"]],
                    [y * scale for _, y in r["curve"]],
                    color=f"C{i}",
                    alpha=0.35,
                    linewidth=0.8,
                )
    axes.set(xlabel="seconds of training", ylabel=f"validation loss ({unit})", title=title)
    axes.set_ylim(min(finals) * 0.985, sorted(finals)[-max(1, len(finals) // 10)] * 1.05)
    axes.set_xscale("log")
    budgets = sorted({r["budget"] for r in rows})
    axes.set_xticks(budgets, [f"{b:g}" for b in budgets])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, metadata=METADATA)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", help="corpus name or text file")
    parser.add_argument("--tokenizer", default="char", help="char, byte or bpe")
    parser.add_argument("--seconds", type=float, nargs="+", default=[108.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--set", type=pair, nargs="*", default=[], help="settings of all models")
    parser.add_argument("--preset", default="tiny", help="mmrec's preset")
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", help="name of the results; default: of the data")
    parser.add_argument(
        "--no-curve",
        dest="curve",
        action="store_false",
        help="validate at the end only: a large split takes minutes",
    )
    parser.add_argument("--add", action="store_true", help="keep the rows of other models")
    add_force(parser)
    args = parser.parse_args()
    if not args.nanogpt:
        args.models = [m for m in args.models if not m.startswith("nanogpt")]
    unit = "nats/char" if args.tokenizer == "char" else "bits per byte"
    stem = args.out or f"race-{Path(args.data).stem}"
    about = describe_machine()
    title = f"{stem.removeprefix('race-')}, {about['cpu']}, {about['cores']} cores"
    path, rows = RESULTS / f"{stem}.json", []
    check_results(parser, args, path, path.with_suffix(".png"))
    if args.add and path.exists():
        replaced = {(n, s) for n in args.models for s in args.seconds}
        old = json.loads(path.read_text())["rows"]
        rows = [r for r in old if (r["name"], r["budget"]) not in replaced]
    for seconds in args.seconds:
        for seed in range(args.seeds):
            for name in args.models:
                with_curve = args.curve and seed == 0 and seconds == max(args.seconds)
                row = measure(name, args, seconds, seed, dict(args.set), curve=with_curve)
                rows.append(row)
                outcome = (
                    row.get("error")
                    or f"{row['loss']:.4f} nats, {row['bits_per_byte']:.4f} bits/byte"
                )
                print(f"{seconds:g} s, seed {seed}, {name}: {outcome}", flush=True)
                RESULTS.mkdir(exist_ok=True)
                path.write_text(
                    json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n"
                )
    print("\n".join(table(rows, unit)))
    plot(rows, path.with_suffix(".png"), title, unit)


if __name__ == "__main__":
    main()
