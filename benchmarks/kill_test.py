"""Kill a training process many times, resume it, and compare it with one that was never killed.

    python benchmarks/kill_test.py [--kills 60] [--out benchmarks/results/kill_test.json]

``mmrec train`` trains a small model on real text with dropout, gradient accumulation and bfloat16
over several epochs. It is sent SIGKILL at any moment from its start on, at random moments of
training, or while a checkpoint is being written. After each kill every checkpoint must load, no
step up to the newest complete checkpoint may be lost, and the log must be the beginning of the log
of the run that was never killed. At the end logs, weights, moments and random state must be equal
bit for bit.
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
from outputs import add_force, check_results

from mmrec.checkpoint.checkpoint import load_model, read_metadata
from mmrec.checkpoint.hdf5 import read_json
from mmrec.checkpoint.manager import list_checkpoints
from mmrec.profiling.kernel_bench import describe_machine

CONFIG = """preset = "tiny"
[model]
width = 64
depth = 2
heads = 2
ngram_buckets = 512
layer_types = "nl"
dropout = 0.1
[data]
tokenizer = "byte"
batch_size = 2
seq_len = 64
[optimizer]
gradient_accumulation_steps = 2
precision = "bfloat16"
[evaluation]
eval_every = 15
eval_tokens = 2048
save_every = 5
"""
TRAINING_STATE = ("model", "optimizer", "rng", "recurrent_state")
TIMEOUT = 300  # seconds to wait for the moment of a kill


def start(folder: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start ``mmrec train`` in a folder. Its errors go to stderr.txt there."""
    command = [sys.executable, "-m", "mmrec", "train", *arguments]
    with (folder / "stderr.txt").open("wb") as errors:
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)


def being_written(run: Path) -> str:
    """Return which checkpoint is being written (best, last or step); empty if none is."""
    names = [p.name for p in run.glob(".*.h5.*.tmp")]
    return names[0].split(".")[1].split("-")[0] if names else ""


def latest_step(run: Path) -> int:
    """Return the largest N of the complete step-N checkpoints; -1 if there is none."""
    return max((int(p.stem.split("-")[1]) for p in run.glob("step-*.h5")), default=-1)


def kill(run: Path, process: subprocess.Popen[bytes], moment: str, rng: random.Random) -> str:
    """Wait for the moment and kill the process.

    Args:
        run: The run folder.
        process: The training process.
        moment: ``any``, ``training``, or ``writing`` a checkpoint.
        rng: Chooses how long to wait.

    Returns:
        The checkpoint that was being written, ``-`` for none, or ``done`` if the run had ended.
    """
    end, goal = time.monotonic() + TIMEOUT, latest_step(run) + rng.choice([1, 1, 6, 11])
    if moment == "any":
        time.sleep(rng.uniform(0, 6))
    else:
        while process.poll() is None and latest_step(run) < goal:
            assert time.monotonic() < end
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.5))
    while moment == "writing" and process.poll() is None and not being_written(run):
        assert time.monotonic() < end
    before = latest_step(run)
    if process.poll() is not None:
        assert process.returncode == 0, (run.parent / "stderr.txt").read_text()
        return "done"
    process.kill()
    process.wait()
    assert latest_step(run) >= before
    return being_written(run) or "-"


def inspect(run: Path, reference: list[str]) -> int:
    """Check a run folder whose writer was killed; return the step of its latest checkpoint.

    Args:
        run: The run folder.
        reference: The lines of the log of the run that was never killed.
    """
    for path in run.glob("*.h5"):
        load_model(path)
    logged = (
        (run / "metrics.jsonl").read_bytes().decode().split("\n")[:-1]
        if (run / "metrics.jsonl").exists()
        else []
    )
    assert logged == reference[: len(logged)], "the log is not what it would have been"
    checkpoints = list_checkpoints(run)
    step = read_metadata(checkpoints[-1]).step if checkpoints else 0
    steps = [x["step"] for x in map(json.loads, logged) if x["kind"] == "train"]
    assert steps[:step] == list(range(1, step + 1)), "steps before the checkpoint are not logged"
    return step


def contents(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a training state, and its progress without clock times."""
    arrays: dict[str, np.ndarray] = {}

    def collect(name: str, x: h5py.HLObject) -> None:
        if isinstance(x, h5py.Dataset) and name.split("/")[0] in TRAINING_STATE:
            arrays[name] = x[()]

    with h5py.File(path) as file:
        file.visititems(collect)
        if "progress" in file:
            progress = read_json(file, "progress")
            progress.pop("seconds")
            for epoch in (*progress["epochs"], progress["current_epoch"]):
                epoch.pop("seconds", None)
                epoch.pop("began", None)
            arrays["progress"] = np.array(json.dumps(progress))
    return arrays


def assert_equal(a: Path, b: Path) -> int:
    """Assert that two checkpoints hold the same bits; return the number of arrays compared."""
    assert read_metadata(a).step == read_metadata(b).step
    arrays_a, arrays_b = contents(a), contents(b)
    assert arrays_a.keys() == arrays_b.keys()
    for name, values in arrays_a.items():
        assert values.tobytes() == arrays_b[name].tobytes(), f"{name} differs"
    return len(arrays_a)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--steps", type=int, default=0, help="default: 25 per kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "kill_test.json"
    )
    add_force(parser)
    args = parser.parse_args()
    check_results(parser, args, args.out)
    rng, begin = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small.toml").write_text(CONFIG)
        modules = sorted(Path(str(email.__file__)).parent.glob("[fgm]*.py"))
        (folder / "email.txt").write_text("\n".join(p.read_text() for p in modules))
        steps = args.steps or 25 * args.kills
        arguments = ["--config", "small.toml", "--data", "email.txt", "--steps", str(steps)]
        uninterrupted = start(folder, [*arguments, "--out", "whole"])
        assert uninterrupted.wait(3600) == 0, (folder / "stderr.txt").read_text()
        log = (folder / "whole" / "metrics.jsonl").read_text()
        reference, run = log.splitlines(), folder / "killed"
        moments, written = collections.Counter[str](), collections.Counter[str]()
        resumed_at = []
        while True:
            # two of five kills while a checkpoint is written, two of five during training
            moment = ["writing", "training", "writing", "training", "any"][moments.total() % 5]
            resume = ["--resume"] if (run / "config.toml").exists() else arguments
            process = start(folder, [*resume, "--out", "killed"])
            if moments.total() >= args.kills:
                assert process.wait(3600) == 0, (folder / "stderr.txt").read_text()
                break
            what = kill(run, process, moment, rng)
            assert what != "done", (
                f"the run ended after {moments.total()} kills: ask for more steps"
            )
            moments[moment] += 1
            written[what] += 1
            if run.exists():
                resumed_at.append(inspect(run, reference))
            print(
                f"kill {moments.total()}: {moment}, writing {what}, "
                f"resumes at step {resumed_at[-1] if resumed_at else 0}",
                flush=True,
            )
        assert (run / "metrics.jsonl").read_text() == log
        arrays = {n: assert_equal(folder / "whole" / n, run / n) for n in ("last.h5", "best.h5")}
        left = [p.name for p in run.glob(".*")]
        assert not left, f"left behind: {left}"
        epochs = len(json.loads((run / "summary.json").read_text())["epochs"])
    result = {
        "machine": describe_machine(),
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
        "kills": moments.total(),
        "aimed": dict(moments),
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
        f"{moments.total()} kills, {steps} steps, {len(reference)} log lines and {arrays} arrays "
        "equal bit for bit"
    )


if __name__ == "__main__":
    main()
