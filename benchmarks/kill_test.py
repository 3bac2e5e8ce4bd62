"""Kill training processes many times, resume them, and compare them with ones never killed.

    python benchmarks/kill_test.py [--kills 60] [--jobs 1] [--out benchmarks/results/kill_test.json]

Four kinds of run train a small model on real text with dropout and gradient accumulation:

* ``train``, in bfloat16, over several epochs: two of five kills;
* ``growth``, ``mmrec train --initialize-from`` a smaller model: one of five;
* ``finetune``, ``mmrec finetune`` with another text and replay of the earlier one: one of five;
* ``chain``, ``mmrec chain`` with two stages: one of five.

Each is sent SIGKILL at any moment from its start on, at random moments of training, or while a
checkpoint is being written. After each kill every checkpoint must load, no step up to the newest
complete checkpoint may be lost, and the log must be the beginning of the log of the run that was
never killed. At the end logs, weights, moments and random state must be equal bit for bit.
"""

import argparse
import collections
import email
import http
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from outputs import add_add, add_force, check_results, write_runs

from mmrec.checkpoint.checkpoint import load_model
from mmrec.checkpoint.hdf5 import read_json
from mmrec.checkpoint.header import read_metadata
from mmrec.checkpoint.manager import list_checkpoints
from mmrec.profiling.kernel_bench import describe_machine

MODEL = """width = 64
depth = 2
heads = 2
ngram_buckets = 512
layer_types = "nl"
dropout = 0.1
"""
GROWN = """width = 96
depth = 3
heads = 2
ngram_buckets = 512
layer_types = "nnl"
dropout = 0.1
"""
FREQUENT = "eval_every = 15\neval_tokens = 2048\nsave_every = 5\n"
CONFIG = """preset = "tiny"
[model]
{model}
[data]
tokenizer = "byte"
batch_size = 2
seq_len = 64
[optimizer]
ema_decay = 0.95
gradient_accumulation_steps = 2
precision = "{precision}"
[evaluation]
{frequent}"""
RECIPE = """data = "email.txt"
tokenizer = "byte"
out = "{out}"
batch_size = 2
seq_len = 64
precision = "float32"
ema_decay = 0.95
{frequent}
[[stage]]
preset = "tiny"
steps = {steps}
[stage.model]
{small}
[[stage]]
preset = "mini"
steps = {steps}
gradient_accumulation_steps = 2
[stage.model]
{grown}"""
SHARES = {"train": 0.4, "growth": 0.2, "finetune": 0.2, "chain": 0.2}
MOMENTS = ("writing", "training", "writing", "training", "any")
TRAINING_STATE = ("model", "raw", "optimizer", "rng", "recurrent_state")
STEPS_PER_KILL = 25
TIMEOUT = 300  # seconds to wait for the moment of a kill


@dataclass
class Scenario:
    """A kind of training that is killed."""

    name: str
    begin: list[str]
    """Arguments of ``mmrec`` that start it in the folder ``{out}``."""
    resume: list[str]
    """Arguments that continue it once there is a config.toml."""
    stages: tuple[str, ...] = ("",)
    """Run folders inside its folder, in order; "" is the folder itself."""

    def start(self, folder: Path, out: str) -> subprocess.Popen[bytes]:
        """Start or continue it in ``folder / out``."""
        begun = (folder / out / self.stages[0] / "config.toml").exists()
        arguments = self.resume if begun else self.begin
        return start(folder, [a.format(out=out) for a in arguments], log=f"{out}.stderr")

    def runs(self, folder: Path, out: str) -> list[Path]:
        """The run folders in ``folder / out`` that exist."""
        return [r for r in (folder / out / s for s in self.stages) if r.exists()]


def prepare_scenario(name: str, folder: Path, steps: int) -> Scenario:
    """Write the files of a scenario into its folder, and train the model that it begins from.

    Args:
        name: A key of ``SHARES``.
        folder: An empty folder.
        steps: Optimizer steps of the whole training.
    """
    for package, pattern in ((email, "[fgm]*.py"), (http, "*.py")):
        modules = sorted(Path(str(package.__file__)).parent.glob(pattern))
        text = "\n".join(path.read_text() for path in modules)
        (folder / f"{package.__name__}.txt").write_text(text)
    for file, model, precision in (
        ("small", MODEL, "bfloat16"),
        ("source", MODEL, "float32"),
        ("grown", GROWN, "float32"),
    ):
        text = CONFIG.format(model=model, precision=precision, frequent=FREQUENT)
        (folder / f"{file}.toml").write_text(text)
    resume = ["train", "--resume", "--out", "{out}"]
    length = ["--steps", str(steps), "--out", "{out}"]
    if name == "train":
        begin = ["train", "--config", "small.toml", "--data", "email.txt", *length]
        return Scenario(name, begin, resume)
    if name == "chain":
        for out in ("whole", "killed"):
            recipe = RECIPE.format(
                out=out, steps=steps // 2, frequent=FREQUENT, small=MODEL, grown=GROWN
            )
            (folder / f"{out}.toml").write_text(recipe)
        begin = ["chain", "{out}.toml"]
        return Scenario(name, begin, begin, ("1-tiny", "2-mini"))
    source = ["train", "--config", "source.toml", "--data", "email.txt", "--steps", "100"]
    run_to_end(start(folder, [*source, "--out", "source"], log="source.stderr"))
    if name == "growth":
        begin = ["train", "--config", "grown.toml", "--data", "email.txt"]
        return Scenario(name, [*begin, "--initialize-from", "source", *length], resume)
    options = "--replay-fraction 0.25 --patience 0 --eval-every 15 --save-every 5 --dropout 0.1"
    begin = ["finetune", "source", "--data", "http.txt", *options.split()]
    return Scenario(name, [*begin, *length], resume)


def start(folder: Path, arguments: list[str], log: str) -> subprocess.Popen[bytes]:
    """Start ``mmrec`` in a folder. Its errors go to the file ``log`` there."""
    command = [sys.executable, "-m", "mmrec", *arguments]
    with (folder / log).open("wb") as errors:
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)


def run_to_end(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has ended. It must succeed."""
    assert process.wait(7200) == 0, f"{process.args} ended with {process.returncode}"


def being_written(runs: list[Path]) -> str:
    """Return which checkpoint is being written (best, last or step); empty if none is."""
    names = [p.name for run in runs for p in run.glob(".*.h5.*.tmp")]
    return names[0].split(".")[1].split("-")[0] if names else ""


def steps_saved(runs: list[Path]) -> int:
    """Return the sum over run folders of the largest N of the complete step-N checkpoints."""
    return sum(
        max((int(p.stem.split("-")[1]) for p in run.glob("step-*.h5")), default=0) for run in runs
    )


def kill(scenario: Scenario, folder: Path, moment: str, rng: random.Random) -> str:
    """Start or continue a scenario, wait for the moment and kill the process.

    Args:
        scenario: What is started, in ``folder / "killed"``.
        folder: Folder of the scenario.
        moment: ``any``, ``training``, or ``writing`` a checkpoint.
        rng: Chooses how long to wait.

    Returns:
        The checkpoint that was being written, or ``-`` for none.
    """

    def runs() -> list[Path]:
        return scenario.runs(folder, "killed")

    end, goal = time.monotonic() + TIMEOUT, steps_saved(runs()) + rng.choice([1, 1, 6, 11])
    process = scenario.start(folder, "killed")
    if moment == "any":
        time.sleep(rng.uniform(0, 6))
    else:
        while process.poll() is None and steps_saved(runs()) < goal:
            assert time.monotonic() < end, f"{scenario.name}: no checkpoint in {TIMEOUT} s"
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.5))
    while moment == "writing" and process.poll() is None and not being_written(runs()):
        assert time.monotonic() < end, f"{scenario.name}: nothing written in {TIMEOUT} s"
    before = steps_saved(runs())
    if process.poll() is not None:
        errors = (folder / "killed.stderr").read_text()
        raise AssertionError(f"{scenario.name} ended with {process.returncode} by itself: {errors}")
    process.kill()
    process.wait()
    assert steps_saved(runs()) >= before
    return being_written(runs()) or "-"


def inspect(run: Path, whole: Path) -> int:
    """Check a run folder whose writer was killed; return the step of its latest checkpoint.

    Args:
        run: The run folder.
        whole: The run folder that was never killed.
    """
    for path in run.glob("*.h5"):
        load_model(path)
    reference = (whole / "metrics.jsonl").read_text().splitlines()
    log = run / "metrics.jsonl"
    logged = log.read_bytes().decode().split("\n")[:-1] if log.exists() else []
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


def run_scenario(name: str, kills: int, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train a scenario once undisturbed and once with kills, and compare the two.

    Args:
        name: A key of ``SHARES``.
        kills: How often the second one is killed.
        steps: Optimizer steps of the whole training.
        seed: Of the moments.
        folder: An empty folder.

    Returns:
        What was killed, and what was compared.
    """
    rng = random.Random(f"{seed} {name}")
    scenario = prepare_scenario(name, folder, steps)
    run_to_end(scenario.start(folder, "whole"))
    moments, written = collections.Counter[str](), collections.Counter[str]()
    resumed_at: list[int] = []
    for number in range(kills):
        moment = MOMENTS[number % len(MOMENTS)]
        what = kill(scenario, folder, moment, rng)
        moments[moment] += 1
        written[what] += 1
        runs = scenario.runs(folder, "killed")
        steps_kept = [
            inspect(run, folder / "whole" / run.relative_to(folder / "killed")) for run in runs
        ]
        resumed_at.append(sum(steps_kept))
        print(
            f"{name}: kill {number + 1} of {kills}: {moment}, writing {what}, "
            f"resumes at step {resumed_at[-1]} of {steps}",
            flush=True,
        )
    run_to_end(scenario.start(folder, "killed"))
    lines, arrays = 0, collections.Counter[str]()
    for stage in scenario.stages:
        whole, run = folder / "whole" / stage, folder / "killed" / stage
        log = (whole / "metrics.jsonl").read_text()
        assert (run / "metrics.jsonl").read_text() == log
        lines += log.count("\n")
        for file in ("last.h5", "best.h5"):
            arrays[file] += assert_equal(whole / file, run / file)
        left = [p.name for p in run.glob(".*")]
        assert not left, f"left behind: {left}"
    return {
        "kills": kills,
        "aimed": dict(moments),
        "while_writing": dict(written),
        "steps": steps,
        "log_lines_equal": lines,
        "arrays_equal": dict(arrays),
        "resumed_at": resumed_at,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument(
        "--steps-per-kill", type=int, default=STEPS_PER_KILL, help="length of each training"
    )
    parser.add_argument("--jobs", type=int, default=1, help="kinds that run at the same time")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), help="kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "kill_test.json"
    )
    add_add(parser)
    add_force(parser)
    args = parser.parse_args()
    check_results(parser, args, args.out)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        jobs = {}
        for name in args.only:
            kills = max(1, round(SHARES[name] * args.kills))
            folder = Path(scratch) / name
            folder.mkdir()
            steps = (kills + 1) * args.steps_per_kill
            jobs[name] = pool.submit(run_scenario, name, kills, steps, args.seed, folder)
        results = {name: job.result() for name, job in jobs.items()}
    total = {n: sum(r[n] for r in results.values()) for n in ("kills", "steps", "log_lines_equal")}
    result = {
        "machine": describe_machine(),
        "seed": args.seed,
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
        **total,
        "seconds": round(time.monotonic() - begin),
        "scenarios": results,
    }
    write_runs(args.out, result, add=args.add)
    print(
        f"{total['kills']} kills, {total['steps']} steps: {total['log_lines_equal']} log lines and "
        "all arrays equal bit for bit"
    )


if __name__ == "__main__":
    main()
