"""Kill a training process again and again, resume it, compare it with one that was never killed.

    python benchmarks/kill_test.py [--kills 60] [--out benchmarks/results/kill_test.json]

``mmrec train`` runs a small model on real text with dropout, accumulation and bfloat16 over several
epochs, and is sent SIGKILL: at any moment from its start on, at random moments of training, or
while a checkpoint is being written. After each kill every checkpoint must load, nothing up to the
newest complete one may be lost, and what was logged must be the beginning of the log of the run
that was never killed. In the end logs, weights, moments and random state must be equal bit for bit.
"""

import argparse
import collections
import email
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from mmrec.checkpoint.checkpoint import load_model, read_metadata
from mmrec.checkpoint.hdf5 import read_json
from mmrec.checkpoint.manager import list_checkpoints
from mmrec.profiling.kernel_bench import machine

CONFIG = """preset = "tiny"
[model]
width = 64
depth = 2
heads = 2
ngrams = 512
layers = "nl"
dropout = 0.1
[train]
tokenizer = "byte"
batch = 2
seq_len = 64
accumulate = 2
precision = "bfloat16"
eval_every = 15
eval_tokens = 2048
save_every = 5
"""
LIMIT = 300  # seconds that one process may take to do what it is waited for


def start(folder: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mmrec", "train", *arguments]
    with (folder / "stderr.txt").open("wb") as errors:
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)


def writing(run: Path) -> str:
    """Which checkpoint is being written, '' if none is."""
    names = [p.name for p in run.glob(".*.h5.*.tmp")]
    return names[0].split(".")[1].split("-")[0] if names else ""


def complete(run: Path) -> int:
    """Step of the newest complete checkpoint that its name tells, -1 if there is none."""
    return max((int(p.stem.split("-")[1]) for p in run.glob("step-*.h5")), default=-1)


def kill(run: Path, process: subprocess.Popen[bytes], how: str, dice: random.Random) -> str:
    """Wait for the moment and kill; returns what was being written, or 'done' if it ended first."""
    end, goal = time.monotonic() + LIMIT, complete(run) + dice.choice([1, 1, 6, 11])
    if how == "any":
        time.sleep(dice.uniform(0, 6))
    else:
        while process.poll() is None and complete(run) < goal:
            assert time.monotonic() < end
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.5))
    while how == "writing" and process.poll() is None and not writing(run):
        assert time.monotonic() < end
    before = complete(run)
    if process.poll() is not None:
        assert process.returncode == 0, (run.parent / "stderr.txt").read_text()
        return "done"
    process.kill()
    process.wait()
    assert complete(run) >= before
    return writing(run) or "-"


def inspect(run: Path, reference: list[str]) -> int:
    """Check a run folder whose writer was killed; returns the step of its newest checkpoint."""
    for path in run.glob("*.h5"):
        load_model(path)
    logged = (
        (run / "metrics.jsonl").read_bytes().decode().split("\n")[:-1]
        if (run / "metrics.jsonl").exists()
        else []
    )
    assert logged == reference[: len(logged)], "the log is not what it would have been"
    saved = list_checkpoints(run)
    step = read_metadata(saved[-1]).step if saved else 0
    steps = [x["step"] for x in map(json.loads, logged) if x["kind"] == "train"]
    assert steps[:step] == list(range(1, step + 1)), "steps before the checkpoint are not logged"
    return step


def contents(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, and its progress without the clock."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, x: found.update({name: x[()]}) if isinstance(x, h5py.Dataset) else None
        )
        if "progress" in file:
            kept = read_json(file, "progress")
            kept.pop("seconds")
            kept["epochs"] = [
                {k: v for k, v in e.items() if k != "seconds"} for e in kept["epochs"]
            ]
            kept["epoch"].pop("began", None)
            found["progress"] = np.array(json.dumps(kept))
    return {
        k: v
        for k, v in found.items()
        if k.split("/")[0] in ("model", "optimizer", "rng", "progress")
    }


def same(a: Path, b: Path) -> int:
    """Assert that two checkpoints hold the same bits; returns the number of arrays compared."""
    assert read_metadata(a).step == read_metadata(b).step
    one, two = contents(a), contents(b)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), f"{name} differs"
    return len(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--steps", type=int, default=0, help="default: 25 a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "kill_test.json"
    )
    args = parser.parse_args()
    dice, begin = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small.toml").write_text(CONFIG)
        modules = sorted(Path(str(email.__file__)).parent.glob("[fgm]*.py"))
        (folder / "email.txt").write_text("\n".join(p.read_text() for p in modules))
        steps = args.steps or 25 * args.kills
        plan = ["--config", "small.toml", "--data", "email.txt", "--steps", str(steps)]
        whole = start(folder, [*plan, "--out", "whole"])
        assert whole.wait(3600) == 0, (folder / "stderr.txt").read_text()
        log = (folder / "whole" / "metrics.jsonl").read_text()
        reference, run = log.splitlines(), folder / "killed"
        kinds, written = collections.Counter[str](), collections.Counter[str]()
        resumed_at = []
        while True:
            # two in five while a checkpoint is written, two in five while it trains
            how = ["writing", "training", "writing", "training", "any"][kinds.total() % 5]
            resume = ["--resume"] if (run / "config.toml").exists() else plan
            process = start(folder, [*resume, "--out", "killed"])
            if kinds.total() >= args.kills:
                assert process.wait(3600) == 0, (folder / "stderr.txt").read_text()
                break
            what = kill(run, process, how, dice)
            assert what != "done", f"the run ended after {kinds.total()} kills: ask for more steps"
            kinds[how] += 1
            written[what] += 1
            if run.exists():
                resumed_at.append(inspect(run, reference))
            print(
                f"kill {kinds.total()}: {how}, writing {what}, "
                f"goes on at step {resumed_at[-1] if resumed_at else 0}",
                flush=True,
            )
        assert (run / "metrics.jsonl").read_text() == log
        arrays = {n: same(folder / "whole" / n, run / n) for n in ("last.h5", "best.h5")}
        left = [p.name for p in run.glob(".*")]
        assert not left, f"left behind: {left}"
        epochs = len(json.loads((run / "summary.json").read_text())["epochs"])
    result = {
        "machine": machine(),
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
        "kills": kinds.total(),
        "aimed": dict(kinds),
        "while_writing": dict(written),
        "steps": steps,
        "epochs": epochs,
        "log_lines_equal": len(reference),
        "arrays_equal": arrays,
        "resumed_at": resumed_at,
        "seconds": round(time.monotonic() - begin),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(
        f"{kinds.total()} kills, {steps} steps, {len(reference)} log lines and {arrays} arrays "
        "equal bit for bit"
    )


if __name__ == "__main__":
    main()
