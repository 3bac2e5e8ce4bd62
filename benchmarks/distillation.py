"""A small text and much time: several models, their mean, and one model that learns the mean.

    python benchmarks/distillation.py input.txt --seconds 900 --members 4 --share 0.55

The members train first, one per core at a time, for a share of the seconds in all. Then the student
trains on all cores for the rest, with the members as teachers; the seconds in which they read the
text for it count. A plain run of all seconds on all cores stands beside them (``--plain``). All are
scored on the whole validation split; the mean is that of the members' probabilities. Writes
results/distillation-NAME.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outputs import add_add, add_force, check_results, write_runs

from mmrec.checkpoint.checkpoint import load_model
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.evaluation.evaluate import TokenScores, evaluate_split
from mmrec.profiling.kernel_bench import describe_machine
from mmrec.runtime.hardware import bfloat16_instructions, resolve_precision
from mmrec.training.distillation import MAX_TABLE_BYTES, Teachers
from mmrec.training.replicas import Replicas

RESULTS = Path(__file__).parent / "results"


def start(
    args: argparse.Namespace, out: Path, seconds: float, seed: int, words: list[str], threads: int
) -> subprocess.Popen[bytes]:
    """Start a run of ``mmrec train``."""
    command = [sys.executable, "-m", "mmrec", "train", args.preset, "--data", args.data]
    command += ["--tokenizer", args.tokenizer, "--out", str(out), "--seed", str(seed), *words]
    command += [
        "--minutes",
        str(seconds / 60),
        "--eval-every",
        "1000000",
        "--save-every",
        "1000000",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run; end this program if it failed."""
    if process.wait():
        raise SystemExit(f"failed: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]


def nats_of(run: Path, corpus: Corpus) -> np.ndarray:
    """(n,) float64, minus the log-probability of each validation token under the last model."""
    loaded = load_model(run / "last.h5")
    scores = TokenScores.empty(corpus.val.n_tokens)
    evaluate_split(
        loaded.model, corpus.val, corpus.tokenizer, reset_at_documents=False, token_scores=scores
    )
    return scores.nats.astype(np.float64)


def tokens_of(run: Path) -> int:
    """Tokens that a run was trained on."""
    return int(json.loads((run / "summary.json").read_text())["tokens"])


def seconds_to_read(names: str, corpus: Corpus) -> float:
    """Seconds in which the teachers read the text, as they do before the student trains."""
    precision, _ = resolve_precision("auto", bfloat16_instructions())
    teachers = Teachers.load(names, corpus.tokenizer, precision)
    tokens, replicas = corpus.train.tokens, Replicas(torch.get_num_threads())
    if teachers.table_bytes(len(tokens)) > MAX_TABLE_BYTES:
        return 0.0
    seconds = []
    for part in (tokens[:50_000], tokens):  # the first one compiles
        begin = time.perf_counter()
        teachers.predict_text(part, None, replicas)
        seconds.append(time.perf_counter() - begin)
    return seconds[1]


def measure(args: argparse.Namespace, seed: int, folder: Path, corpus: Corpus) -> dict[str, Any]:
    """Train all models of one seed; return their scores in nats per token."""
    cores = os.cpu_count() or 1
    rounds = -(-args.members // cores)
    seconds = args.share * args.seconds / rounds
    members = [folder / f"member-{seed}-{i}" for i in range(args.members)]
    for begin in range(0, args.members, cores):
        group = members[begin : begin + cores]
        seeds = range(1000 * seed + begin, 1000 * seed + begin + len(group))
        running = [
            start(args, out, seconds, s, args.member_settings, 1)
            for out, s in zip(group, seeds, strict=True)
        ]
        for process in running:
            wait(process)
    student, names = folder / f"student-{seed}", ",".join(map(str, members))
    reading = seconds_to_read(names, corpus)
    teachers = ["--teachers", names, *args.student_settings]
    wait(start(args, student, (1 - args.share) * args.seconds - reading, seed, teachers, cores))
    nats = [nats_of(member, corpus) for member in members]
    mean = -np.log(np.mean(np.exp(-np.stack(nats)), axis=0))
    row: dict[str, Any] = {
        "seed": seed,
        "members": [round(float(x.mean()), 4) for x in nats],
        "member_tokens": [tokens_of(m) for m in members],
        "mean_of_members": round(float(mean.mean()), 4),
        "student": round(float(nats_of(student, corpus).mean()), 4),
        "student_tokens": tokens_of(student),
        "reading_seconds": round(reading, 1),
    }
    if args.plain:
        plain = folder / f"plain-{seed}"
        wait(start(args, plain, args.seconds, seed, args.plain_settings, cores))
        row |= {"plain": round(float(nats_of(plain, corpus).mean()), 4)}
        row |= {"plain_tokens": tokens_of(plain)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", help="a text file")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--tokenizer", default="char", help="char, byte or bpe")
    parser.add_argument("--seconds", type=float, default=900.0, help="of all training together")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.55, help="of the seconds, for the members")
    parser.add_argument("--seeds", type=int, default=1)
    for who, default in (("member", "--dropout 0.1"), ("student", ""), ("plain", "--dropout 0.2")):
        parser.add_argument(
            f"--{who}-settings", type=str.split, default=default.split(), help="of mmrec train"
        )
    parser.add_argument("--plain", action="store_true", help="train a plain model as well")
    add_add(parser)
    add_force(parser)
    args = parser.parse_args()
    path = RESULTS / f"distillation-{Path(args.data).stem}.json"
    check_results(parser, args, path)
    corpus = Corpus.open(prepare(args.data, args.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            row = measure(args, seed, Path(folder), corpus)
            print(json.dumps(row), flush=True)
            settings = {k: v for k, v in vars(args).items() if k not in ("add", "force", "data")}
            run = {"machine": describe_machine(), "settings": settings, **row}
            write_runs(path, run, add=args.add or seed > 0)


if __name__ == "__main__":
    main()
