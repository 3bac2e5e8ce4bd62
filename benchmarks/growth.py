"""Growth against training from scratch, at equal total compute or equal total time.

    python benchmarks/growth.py input.txt stdlib --steps 1500
    python benchmarks/growth.py input.txt --minutes 10 --small tiny --large mini

For every corpus and seed, the large preset trains from scratch for the whole budget. Beside it, the
small preset trains for a share of the budget, is grown to the large one, and that trains for the
remaining share. The budget is the cost of --steps of the large model in FLOPs, or --minutes of
training; the cost of the small model counts. The learning rates of the large model fall to zero at
its end. Those of the small model stay constant, unless --schedule says otherwise, because what a
decay would gain is lost when the large model starts at the full rates. Scores are bits per byte on
the whole validation split at the end. Writes results/growth-NAME.json and .png for each corpus.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from outputs import add_force, check_results

from mmrec.checkpoint.checkpoint import load_model
from mmrec.config import TrainConfig, preset
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.finetune.grow import METHODS
from mmrec.model import flops_per_token
from mmrec.profiling.kernel_bench import describe_machine
from mmrec.runtime.pictures import METADATA
from mmrec.training.setup import initialize_trainer
from mmrec.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"


class Race:
    """The runs on one corpus with one budget, and the cost of each."""

    def __init__(self, data: str, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.corpus = Corpus.open(prepare(data, args.tokenizer, args.vocab, None, print))
        vocab = self.corpus.tokenizer.vocab_size
        self.shapes = {
            n: dataclasses.replace(preset(n), vocab_size=vocab) for n in (args.small, args.large)
        }
        tokens_per_step = args.batch_size * args.seq_len
        self.flops_per_step = {
            n: tokens_per_step * flops_per_token(s)["training"] for n, s in self.shapes.items()
        }

    def length(self, name: str, share: float) -> dict[str, Any]:
        """Return the length of a run of a preset, as a setting, for a share of the budget."""
        if self.args.minutes:
            return {"minutes": self.args.minutes * share}
        steps = (
            self.args.steps
            * share
            * self.flops_per_step[self.args.large]
            / self.flops_per_step[name]
        )
        return {"steps": max(1, round(steps))}

    def run(
        self,
        title: str,
        name: str,
        share: float,
        seed: int,
        source: Path | None = None,
        method: str = "preserve",
        schedule: str = "linear",
    ) -> dict[str, Any]:
        """Train a preset, from a checkpoint if one is given; return its cost, curve and score."""
        folder = self.folder / f"{title}-{seed}"
        folder.mkdir()
        args = self.args
        config = TrainConfig.from_flat(
            {
                "data": str(self.corpus.path),
                "batch_size": args.batch_size,
                "seq_len": args.seq_len,
                "seed": seed,
                "eval_every": args.eval_every,
                "save_every": 10**6,
                "schedule": schedule,
                **self.length(name, share),
            }
        )
        trainer = Trainer(
            folder, self.corpus, self.shapes[name], config, name, echo=lambda line: None
        )
        if source is not None:
            initialize_trainer(trainer, load_model(source), method)
        summary = trainer.fit()
        if summary["ended"] == "signal":  # the run was cut, so it cost less than its share
            raise SystemExit(128 + trainer.stop_signal.signal_number)
        bits = summary["epochs"][-1]["bits_per_byte"]
        scores = trainer.scores
        bits_per_nat = scores.bits_per_byte / scores.loss if scores else 1.0
        flops, seconds = self.flops_per_step[name] * summary["steps"], summary["seconds"]
        print(
            f"{title}, seed {seed}: {summary['steps']:,} steps, {flops:.3g} FLOPs, "
            f"{seconds:.0f} s, {bits:.4f} bits per byte",
            flush=True,
        )
        # every step of a run costs the same; validation does not count
        curve = [
            (validation["step"] / summary["steps"], validation["val"] * bits_per_nat)
            for validation in trainer.progress.validations
        ]
        return {
            "run": title,
            "preset": name,
            "seed": seed,
            "steps": summary["steps"],
            "flops": flops,
            "seconds": seconds,
            "bits_per_byte": bits,
            "curve": curve,
        }


def race(data: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run everything on one corpus. ``before`` in the row of a grown run is its source's cost."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        runs = Race(data, args, Path(name))
        for seed in range(args.seeds):
            rows.append(runs.run("scratch", args.large, 1.0, seed))
            small = runs.run("source", args.small, args.share, seed, schedule=args.schedule)
            rows.append(small)
            before = {k: small[k] for k in ("flops", "seconds")}
            for method in args.methods:
                row = runs.run(
                    method,
                    args.large,
                    1 - args.share,
                    seed,
                    Path(name, f"source-{seed}", "last.h5"),
                    method,
                )
                rows.append(row | {"before": before})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table, a row per kind of run: total cost, median score and its range."""
    lines = ["| run | total FLOPs | total time | bits per byte |", "|---|---|---|---|"]
    for name in dict.fromkeys(r["run"] for r in rows):
        own = [r for r in rows if r["run"] == name]
        cost = {
            k: statistics.median(r[k] + r.get("before", {}).get(k, 0) for r in own)
            for k in ("flops", "seconds")
        }
        scores = sorted(r["bits_per_byte"] for r in own)
        score = f"{statistics.median(scores):.4f} ({scores[0]:.4f} to {scores[-1]:.4f})"
        title = f"{own[0]['preset']}, {name}"
        lines.append(f"| {title} | {cost['flops']:.3g} | {cost['seconds']:.0f} s | {score} |")
    return lines


def plot(rows: list[dict[str, Any]], path: Path, title: str, key: str) -> None:
    """Draw validation scores against total ``flops`` or ``seconds``, a line per run."""
    figure = Figure(figsize=(7.2, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(r["run"] for r in rows)):
        for r in (r for r in rows if r["run"] == name):
            begin = r.get("before", {}).get(key, 0)
            x = [begin + share * r[key] for share, _ in r["curve"]]
            axes.plot(
                x,
                [y for _, y in r["curve"]],
                color=f"C{i}",
                linewidth=1,
                label=f"{r['preset']}, {name}" if r["seed"] == 0 else None,
            )
    final = [r["curve"][-1][1] for r in rows if r["curve"]]
    cost = {"flops": "total FLOPs", "seconds": "total seconds"}[key]
    axes.set(
        xlabel=f"{cost} of training",
        ylabel="bits per byte, validation subset",
        title=title,
        ylim=(min(final) * 0.97, max(final) * 1.3),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata=METADATA)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="+", help="corpus names or text files")
    parser.add_argument("--small", default="tiny")
    parser.add_argument("--large", default="mini")
    parser.add_argument(
        "--share", type=float, default=0.3, help="share of the budget for the small model"
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="steps of the large model: equal FLOPs")
    length.add_argument("--minutes", type=float, help="equal time")
    parser.add_argument("--schedule", default="constant", help="schedule of the small model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["preserve", "stack"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokenizer", default="bpe")
    parser.add_argument("--vocab", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    add_force(parser)
    args = parser.parse_args()
    if not 0 < args.share < 1:
        parser.error(f"--share must lie in (0, 1); got {args.share}")
    settings = {
        k: str(v) if isinstance(v, Path) else v
        for k, v in vars(args).items()
        if k not in ("data", "out", "force")
    }
    args.out.mkdir(exist_ok=True)
    paths = []
    for data in args.data:
        folder = Path(data)
        name = folder.parent.name if folder.stem == "input" else folder.stem
        paths.append(args.out / f"growth-{name}{'-time' if args.minutes else ''}.json")
        check_results(parser, args, paths[-1], paths[-1].with_suffix(".png"))
    for data, path in zip(args.data, paths, strict=True):
        rows = race(data, args)
        result = {"machine": describe_machine(), "settings": settings, "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")
        key = "seconds" if args.minutes else "flops"
        plot(
            rows,
            path.with_suffix(".png"),
            f"{path.stem.removeprefix('growth-')}: {args.small} to {args.large}",
            key,
        )
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
