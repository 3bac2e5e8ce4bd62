"""What the long-term memory is for: recall, induction and copying, learnt from synthetic text.

    python benchmarks/recall.py [--tasks recall-16 recall-64 …] [--layers l b s n] [--seeds N]

Every task is made of random tokens, fresh at each step, so that nothing can be learnt by heart; the
score is the share of answers that are right on fresh sequences.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.config import ModelConfig
from mmrec.model import Model
from mmrec.optimizer import MuonAdamW, parameter_groups
from mmrec.profiling.kernel_bench import machine
from mmrec.training.lr_schedule import lr_factor

RESULTS = Path(__file__).parent / "results" / "recall.json"
NONE = -100  # no answer is asked for here
Sample = tuple[Tensor, Tensor]


def recall(rng: np.random.Generator, batch: int, pairs: int, length: int, vocab: int) -> Sample:
    """Multi-query associative recall: pairs of key and value, then every key again, asked for its
    value, at random places among fillers.

    Source: Arora et al. 2023, "Zoology" (arXiv:2312.04927, section 3).
    """
    half = vocab // 2
    tokens = rng.integers(half, vocab, (batch, length))  # fillers look like values
    targets = np.full((batch, length), NONE)
    for row in range(batch):
        keys = rng.choice(np.arange(1, half), pairs, replace=False)
        values = rng.integers(half, vocab, pairs)
        tokens[row, : 2 * pairs : 2], tokens[row, 1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + rng.choice(length - 2 * pairs, pairs, replace=False)
        tokens[row, places], targets[row, places] = keys, values
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def induction(rng: np.random.Generator, batch: int, length: int, vocab: int) -> Sample:
    """Induction: random text, then a token of it again: what followed it the first time?

    Source: Olsson et al. 2022, "In-context learning and induction heads" (arXiv:2209.11895).
    """
    tokens = np.stack([rng.permutation(np.arange(1, vocab))[:length] for _ in range(batch)])
    targets = np.full((batch, length), NONE)
    at = rng.integers(0, length - 2, batch)
    rows = np.arange(batch)
    tokens[rows, -1], targets[rows, -1] = tokens[rows, at], tokens[rows, at + 1]
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def copying(rng: np.random.Generator, batch: int, length: int, vocab: int) -> Sample:
    """Copying: different tokens, a mark, and then the same tokens again, one after the other."""
    half = (length - 1) // 2
    text = np.stack([rng.permutation(np.arange(1, vocab))[:half] for _ in range(batch)])
    mark = np.zeros((batch, 1), np.int64)
    tokens = np.concatenate((text, mark, text[:, :-1]), 1)
    targets = np.concatenate((np.full((batch, half), NONE), text), 1)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


@dataclasses.dataclass(frozen=True)
class Task:
    """A generator of samples, and how long it is learnt."""

    make: Callable[[np.random.Generator, int], Sample]
    vocab: int
    length: int
    steps: int
    batch: int = 32
    width: int = 128
    heads: int = 2
    warmup: float = 0.05
    first: Callable[[np.random.Generator, int], Sample] | None = None
    """An easier one for the first third of the steps, about as many tokens each: where much must be
    told apart at once, or little is asked, learning does not begin by itself."""


TASKS = {
    "recall-16": Task(lambda g, b: recall(g, b, 16, 128, 256), 256, 128, 1200),
    "recall-64": Task(
        lambda g, b: recall(g, b, 64, 512, 512),
        512,
        512,
        4200,
        heads=1,
        warmup=150 / 4200,  # with 225 steps of it, learning had not begun after 1,400
        first=lambda g, b: recall(g, 4 * b, 16, 128, 512),
    ),
    "induction": Task(
        lambda g, b: induction(g, b, 64, 256),
        256,
        64,
        2400,
        64,
        first=lambda g, b: copying(g, 2 * b, 33, 256),
    ),
    "copying": Task(
        lambda g, b: copying(g, b, 129, 256),
        256,
        129,
        2400,
        first=lambda g, b: copying(g, 4 * b, 33, 256),
    ),
}


def score(model: Model, sample: Sample) -> float:
    """Share of the answers that the model finds likeliest."""
    tokens, targets = sample
    with torch.no_grad():
        x, _ = model.hidden_states(tokens)
        asked = targets != NONE
        return float((model.lm_head(x[asked]).argmax(-1) == targets[asked]).float().mean())


def learn(
    task: Task,
    layers: str,
    seed: int,
    *,
    lr: float = 1e-2,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, float]:
    """Train two layers of these kinds on a task; returns accuracy on fresh samples, and seconds."""
    torch.manual_seed(seed)
    config = ModelConfig(
        width=task.width,
        depth=2,
        heads=task.heads,
        vocab_size=task.vocab,
        layers=layers,
        ffn_multiplier=2.0,
        max_timescale=4 * task.length,
    )
    model, rng = Model(config), np.random.default_rng(seed)
    optimizer = MuonAdamW(parameter_groups(model, 0.0), lr=lr, betas=(0.9, 0.95), matrix_lr=0.02)
    begin = time.perf_counter()
    for step in range(task.steps):
        done = (step + 0.5) / task.steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(done, task.warmup, "linear", 0.0)
        make = task.first if task.first and 3 * step < task.steps else task.make
        tokens, targets = make(rng, task.batch)
        x, _ = model.hidden_states(tokens)
        asked = targets != NONE
        loss = F.cross_entropy(model.lm_head(x[asked]), targets[asked])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            fresh = score(model, task.make(rng, 64))
            say(f"  step {step + 1}: loss {loss.item():.3f}, accuracy {fresh:.3f}")
            if fresh == 1.0 and loss.item() < 1e-3:
                break
    seconds, rng = time.perf_counter() - begin, np.random.default_rng(10**6)
    fresh = sum(score(model, task.make(rng, 64)) for _ in range(8)) / 8
    return {"accuracy": fresh, "steps": step + 1, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--layers", nargs="+", default=["nl", "l", "s", "n"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--add", action="store_true", help="keep the rows of what is not run")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = json.loads(RESULTS.read_text())["rows"] if args.add and RESULTS.exists() else []
    rows = [r for r in rows if (r["task"], r["layers"]) not in product(args.tasks, args.layers)]
    for name in args.tasks:
        for layers in args.layers:
            for seed in range(args.seeds):
                made = learn(TASKS[name], layers, seed, say=lambda line: print(line, flush=True))
                rows.append({"task": name, "layers": layers, "seed": seed, **made})
                right = f"accuracy {made['accuracy']:.4f} after {made['steps']} steps"
                print(f"{name}, layers {layers}, seed {seed}: {right}", flush=True)
                kept = {"machine": machine(), "rows": rows}
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
