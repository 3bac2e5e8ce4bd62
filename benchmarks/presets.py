"""Which preset for which time? Each trains for each number of minutes, on one core of its own.

    python benchmarks/presets.py TEXT --presets tiny mini --minutes 5 10 20 60 --cores 0 1
    python benchmarks/presets.py TEXT --presets small --minutes 60 --seeds 1 --add

TEXT is a large text, such as the books of `bases/books.py`. A preset trains as `mmrec train PRESET`
does, with its own vocabulary, batch and windows, and a schedule that ends with the time. Scores are
bits per byte of the whole validation split, which is the same text for each vocabulary.

The loss of a preset after t minutes is fitted by E + A t^-a, without its longest time, which the
fit then predicts. Writes results/presets-NAME.json and .png. A run that is there is not made again
with `--add`.
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from outputs import add_add, add_force, check_results
from scipy.optimize import curve_fit

from mmrec.config import PRESETS, preset
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.model import parameter_counts
from mmrec.profiling.kernel_bench import describe_machine
from mmrec.runtime.pictures import METADATA

RESULTS = Path(__file__).parent / "results"
LEAST_POINTS = 4
"""Times of a preset below which nothing is fitted: three numbers are fitted to one fewer."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    preset: str
    minutes: float
    seed: int


def train(cell: Cell, text: str, core: int, extra: list[str]) -> dict[str, Any]:
    """Train in a process of its own on one core, and return the scores.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mmrec", "train", cell.preset, "--data", text]
        command += ["--minutes", str(cell.minutes), "--seed", str(cell.seed), "--force"]
        command += ["--sample-tokens", "0", "--save-every", "1000000", "--out", folder, *extra]
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})  # of this thread, and of the process that it starts
        try:
            process = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        finally:
            os.sched_setaffinity(0, cores)
        if process.returncode:
            raise RuntimeError(f"{cell} failed:\n{process.stderr[-2000:]}")
        summary = json.loads(Path(folder, "summary.json").read_text())
        log = [json.loads(x) for x in Path(folder, "metrics.jsonl").read_text().splitlines()]
    seconds_per_step = summary["seconds"] / summary["steps"]
    return asdict(cell) | {
        "bits_per_byte": summary["epochs"][-1]["bits_per_byte"],
        "tokens": summary["tokens"],
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "precision": summary["precision"],
        "curve": [
            [round(line["step"] * seconds_per_step, 1), round(line["bits_per_byte"], 4)]
            for line in log
            if line["kind"] == "val"
        ],
    }


def medians(rows: list[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Median bits per byte over seeds, by preset and minutes, both in order."""
    scores: dict[str, dict[float, list[float]]] = {}
    for row in sorted(rows, key=lambda r: (list(PRESETS).index(r["preset"]), r["minutes"])):
        own = scores.setdefault(row["preset"], {})
        own.setdefault(row["minutes"], []).append(row["bits_per_byte"])
    return {
        name: {minutes: statistics.median(values) for minutes, values in own.items()}
        for name, own in scores.items()
    }


def loss_after(minutes: np.ndarray, floor: float, scale: float, power: float) -> np.ndarray:
    """E + A t^-a."""
    return np.asarray(floor + scale * minutes**-power)


def predict(points: dict[float, float]) -> dict[str, float] | None:
    """Fit all times but the longest, and predict that one; None if there are too few.

    Args:
        points: bits per byte by minutes, in order.
    """
    if len(points) < LEAST_POINTS:
        return None
    x, y = np.array(list(points)), np.array(list(points.values()))
    bounds = ([0.0, 0.0, 0.05], [y.min(), 10.0, 2.0])
    start = (0.8 * y.min(), 0.5, 0.3)
    (floor, scale, power), _ = curve_fit(loss_after, x[:-1], y[:-1], start, bounds=bounds)
    predicted = float(loss_after(x[-1], floor, scale, power))
    return {
        "E": float(floor),
        "A": float(scale),
        "a": float(power),
        "minutes": float(x[-1]),
        "predicted": predicted,
        "measured": float(y[-1]),
        "error": predicted / float(y[-1]) - 1,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown: a row per preset, a column per time; the lowest of a time is bold."""
    scores = medians(rows)
    times = sorted({row["minutes"] for row in rows})
    lines = ["| bits per byte after | " + " | ".join(f"{t:g} min" for t in times) + " | tokens/s |"]
    lines += ["|---" * (len(times) + 2) + "|"]
    for name, own in scores.items():
        cells = []
        for t in times:
            best = min(o[t] for o in scores.values() if t in o)
            text = f"{own[t]:.3f}" if t in own else ""
            cells.append(f"**{text}**" if own.get(t) == best else text)
        speeds = [row["tokens"] / row["seconds"] for row in rows if row["preset"] == name]
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(speeds):,.0f} |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw final scores against minutes as lines with dots.

    The course of the longest run is thin; it is of the fixed subset, which is a little harder or
    easier than the whole split.
    """
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, own) in enumerate(medians(rows).items()):
        axes.plot(list(own), list(own.values()), "o-", color=f"C{number}", label=name)
        longest = max((r for r in rows if r["preset"] == name), key=lambda r: r["minutes"])
        if longest["curve"]:
            seconds, bits = zip(*longest["curve"], strict=True)
            minutes = [s / 60 for s in seconds]
            axes.plot(minutes, bits, color=f"C{number}", alpha=0.35, linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="minutes of one core (thin: the longest run, on the validation subset)",
        ylabel="bits per byte of the validation split",
        title=title,
    )
    times = sorted({row["minutes"] for row in rows})
    axes.set_xticks([1.0, *times], [f"{t:g}" for t in (1.0, *times)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata=METADATA)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", help="a text, as for mmrec train --data")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["tiny", "mini"])
    parser.add_argument("--minutes", nargs="+", type=float, default=[5.0, 10.0, 20.0, 60.0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cores", nargs="+", type=int, default=[0], help="a run on each")
    parser.add_argument("--train-options", type=str.split, default=[], help="of mmrec train")
    parser.add_argument("--name", help="of the results; by default that of the text")
    add_add(parser)
    add_force(parser)
    args = parser.parse_args()
    path = RESULTS / f"presets-{args.name or Path(args.text).stem}.json"
    check_results(parser, args, path, path.with_suffix(".png"))
    rows: list[dict[str, Any]] = []
    if args.add and path.exists():
        rows = json.loads(path.read_text("utf-8"))["runs"]
    done = {Cell(row["preset"], row["minutes"], row["seed"]) for row in rows}
    for name in args.presets:  # once, before runs side by side would each do it
        vocab = preset(name).vocab_size
        corpus = Corpus.open(prepare(args.text, "bpe", vocab, None, print))
        size = parameter_counts(preset(name))["total"]
        print(f"{name}: {size:,} parameters, {corpus.train.n_tokens:,} tokens of text")
    cores: queue.Queue[int] = queue.Queue()
    for core in args.cores:
        cores.put(core)

    def run(cell: Cell) -> dict[str, Any]:
        core = cores.get()
        try:
            return train(cell, args.text, core, args.train_options)
        finally:
            cores.put(core)

    cells = [
        Cell(name, minutes, seed)
        for seed in range(args.seeds)
        for minutes in args.minutes
        for name in args.presets
    ]
    with ThreadPoolExecutor(len(args.cores)) as pool:
        for future in [pool.submit(run, cell) for cell in cells if cell not in done]:
            row = future.result()
            rows.append(row)
            print(json.dumps(row | {"curve": len(row["curve"])}), flush=True)
            result = {
                "machine": describe_machine(),
                "settings": {"train_options": args.train_options},
                "fits": {name: predict(points) for name, points in medians(rows).items()},
                "runs": rows,
            }
            path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            draw(rows, path.with_suffix(".png"), args.name or Path(args.text).stem)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
