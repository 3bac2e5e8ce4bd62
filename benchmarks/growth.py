"""Growth against training from scratch, at equal total compute or equal total time.

    python benchmarks/growth.py input.txt stdlib --steps 1500
    python benchmarks/growth.py input.txt --minutes 10 --small tiny --large mini

For every corpus and seed: the large preset from scratch for the whole budget; and the small one for
a share of it, grown, then the large one for the rest. The budget is what --steps of the large one
cost in FLOPs, or --minutes of training; what the small model costs counts. The large one's learning
rates fall to zero at its end; the small one's stay, unless --schedule says another, since what it
would gain is lost when the large one begins at the full rates. Scores are bits per byte over the
whole validation split at the end. Writes results/growth-NAME.json and .png for each corpus.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from mmrec.checkpoint.checkpoint import load_model
from mmrec.config import TrainConfig, preset
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.finetune.grow import HOW
from mmrec.finetune.start import take_over
from mmrec.profiling.cost import flops_per_token
from mmrec.profiling.kernel_bench import machine
from mmrec.training.trainer import Trainer, train

RESULTS = Path(__file__).parent / "results"


class Race:
    """One corpus and budget: runs, and what each cost."""

    def __init__(self, data: str, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.corpus = Corpus.open(prepare(data, args.tokenizer, args.vocab, None, print))
        vocab = self.corpus.tokenizer.vocab_size
        self.shapes = {
            n: dataclasses.replace(preset(n), vocab_size=vocab) for n in (args.small, args.large)
        }
        per_step = args.batch * args.seq_len
        self.flops = {n: per_step * flops_per_token(s)["training"] for n, s in self.shapes.items()}

    def length(self, name: str, share: float) -> dict[str, Any]:
        """The length of a run of a preset that takes a share of the budget."""
        if self.args.minutes:
            return {"minutes": self.args.minutes * share}
        steps = self.args.steps * share * self.flops[self.args.large] / self.flops[name]
        return {"steps": max(1, round(steps))}

    def run(
        self,
        title: str,
        name: str,
        share: float,
        seed: int,
        source: Path | None = None,
        how: str = "preserve",
        schedule: str = "linear",
    ) -> dict[str, Any]:
        """Train a preset, from a checkpoint if there is one; returns its cost, curve and score."""
        a, folder = self.args, self.folder / f"{title}-{seed}"
        folder.mkdir()
        config = TrainConfig(
            data=str(self.corpus.path),
            batch=a.batch,
            seq_len=a.seq_len,
            seed=seed,
            eval_every=a.eval_every,
            save_every=10**6,
            schedule=schedule,
            **self.length(name, share),
        )
        trainer = Trainer(folder, self.corpus, self.shapes[name], config, name, lambda line: None)
        if source is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                trainer.progress.aged = take_over(
                    trainer.model, trainer.optimizer, load_model(source), how
                )
        made = train(trainer)
        if made["ended"] == "signal":  # the run was cut, so it cost less than its share
            raise SystemExit(128 + trainer.stop.number)
        bits = made["epochs"][-1]["bits_per_byte"]
        scale = trainer.val.bits_per_byte / trainer.val.loss if trainer.val else 1.0
        flops, seconds = self.flops[name] * made["steps"], made["seconds"]
        print(
            f"{title}, seed {seed}: {made['steps']:,} steps, {flops:.3g} FLOPs, {seconds:.0f} s, "
            f"{bits:.4f} bits per byte",
            flush=True,
        )
        # cost is spread evenly over a run's steps, validation not counted
        curve = [(c["step"] / made["steps"], c["val"] * scale) for c in trainer.progress.checks]
        return {
            "run": title,
            "preset": name,
            "seed": seed,
            "steps": made["steps"],
            "flops": flops,
            "seconds": seconds,
            "bits_per_byte": bits,
            "curve": curve,
        }


def race(data: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs of one corpus. A grown run's ``before`` says what its source cost."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        runs = Race(data, args, Path(name))
        for seed in range(args.seeds):
            rows.append(runs.run("scratch", args.large, 1.0, seed))
            small = runs.run("source", args.small, args.share, seed, schedule=args.schedule)
            rows.append(small)
            before = {k: small[k] for k in ("flops", "seconds")}
            for how in args.how:
                made = runs.run(
                    how,
                    args.large,
                    1 - args.share,
                    seed,
                    Path(name, f"source-{seed}", "last.h5"),
                    how,
                )
                rows.append(made | {"before": before})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines, a kind of run a line: total cost, median score and its span over seeds."""
    lines = ["| run | total FLOPs | total time | bits per byte |", "|---|---|---|---|"]
    for name in dict.fromkeys(r["run"] for r in rows):
        mine = [r for r in rows if r["run"] == name]
        cost = {
            k: statistics.median(r[k] + r.get("before", {}).get(k, 0) for r in mine)
            for k in ("flops", "seconds")
        }
        got = sorted(r["bits_per_byte"] for r in mine)
        score = f"{statistics.median(got):.4f} ({got[0]:.4f} to {got[-1]:.4f})"
        what = f"{mine[0]['preset']}, {name}"
        lines.append(f"| {what} | {cost['flops']:.3g} | {cost['seconds']:.0f} s | {score} |")
    return lines


def plot(rows: list[dict[str, Any]], path: Path, title: str, key: str) -> None:
    """Validation on the fixed subset against total ``flops`` or ``seconds``, a line a run."""
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
    ends = [r["curve"][-1][1] for r in rows if r["curve"]]
    what = {"flops": "total FLOPs", "seconds": "total seconds"}[key]
    axes.set(
        xlabel=f"{what} of training",
        ylabel="bits per byte, validation subset",
        title=title,
        ylim=(min(ends) * 0.97, max(ends) * 1.3),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="+", help="corpus names or text files")
    parser.add_argument("--small", default="tiny")
    parser.add_argument("--large", default="mini")
    parser.add_argument("--share", type=float, default=0.3, help="of the budget, for the small one")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="of the large one: equal FLOPs")
    length.add_argument("--minutes", type=float, help="equal time")
    parser.add_argument("--schedule", default="constant", help="of the small one")
    parser.add_argument("--how", nargs="+", choices=HOW, default=["preserve", "stack"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokenizer", default="bpe")
    parser.add_argument("--vocab", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    if not 0 < args.share < 1:
        parser.error(f"--share must lie in (0, 1); got {args.share}")
    about = {
        k: str(v) if isinstance(v, Path) else v
        for k, v in vars(args).items()
        if k not in ("data", "out")
    }
    args.out.mkdir(exist_ok=True)
    for data in args.data:
        folder = Path(data)
        name = folder.parent.name if folder.stem == "input" else folder.stem
        rows = race(data, args)
        path = args.out / f"growth-{name}{'-time' if args.minutes else ''}.json"
        made = {"machine": machine(), "settings": about, "rows": rows}
        path.write_text(json.dumps(made, indent=1) + "\n")
        key = "seconds" if args.minutes else "flops"
        plot(rows, path.with_suffix(".png"), f"{name}: {args.small} to {args.large}", key)
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
