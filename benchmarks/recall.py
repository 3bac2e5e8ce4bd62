"""What the gated delta rule is for: recall, induction and copying, learnt from synthetic text.

    python benchmarks/recall.py [--tasks recall-16 recall-64 …] [--layer-types nl l s n] [--seeds N]

Every step draws new random tokens, so that nothing can be memorised. The score is the fraction of
right answers on new sequences.
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
from mmrec.profiling.kernel_bench import describe_machine
from mmrec.training.lr_schedule import lr_factor

RESULTS = Path(__file__).parent / "results" / "recall.json"
NO_TARGET = -100  # no answer is asked for at this position
Sample = tuple[Tensor, Tensor]


def recall(rng: np.random.Generator, batch: int, pairs: int, length: int, vocab: int) -> Sample:
    """Multi-query associative recall: pairs of key and value, then every key again at a random
    position among fillers, where its value is asked for.

    Source: Arora et al. 2023, "Zoology" (arXiv:2312.04927, section 3).
    """
    half = vocab // 2
    tokens = rng.integers(half, vocab, (batch, length))  # fillers look like values
    targets = np.full((batch, length), NO_TARGET)
    for row in range(batch):
        keys = rng.choice(np.arange(1, half), pairs, replace=False)
        values = rng.integers(half, vocab, pairs)
        tokens[row, : 2 * pairs : 2], tokens[row, 1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + rng.choice(length - 2 * pairs, pairs, replace=False)
        tokens[row, places], targets[row, places] = keys, values
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def induction(rng: np.random.Generator, batch: int, length: int, vocab: int) -> Sample:
    """Induction: random tokens, then one of them again: which token followed it the first time?

    Source: Olsson et al. 2022, "In-context learning and induction heads" (arXiv:2209.11895).
    """
    tokens = np.stack([rng.permutation(np.arange(1, vocab))[:length] for _ in range(batch)])
    targets = np.full((batch, length), NO_TARGET)
    at = rng.integers(0, length - 2, batch)
    rows = np.arange(batch)
    tokens[rows, -1], targets[rows, -1] = tokens[rows, at], tokens[rows, at + 1]
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def copying(rng: np.random.Generator, batch: int, length: int, vocab: int) -> Sample:
    """Copying: different tokens, a separator, then the same tokens again in the same order."""
    half = (length - 1) // 2
    text = np.stack([rng.permutation(np.arange(1, vocab))[:half] for _ in range(batch)])
    separator = np.zeros((batch, 1), np.int64)
    tokens = np.concatenate((text, separator, text[:, :-1]), 1)
    targets = np.concatenate((np.full((batch, half), NO_TARGET), text), 1)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: how samples are made, and how long a model trains on them."""

    make: Callable[[np.random.Generator, int], Sample]
    vocab: int
    length: int
    steps: int
    batch: int = 32
    width: int = 128
    heads: int = 2
    warmup: float = 0.05
    first: Callable[[np.random.Generator, int], Sample] | None = None
    """An easier task for the first third of the steps, with about as many tokens per step. Where
    many keys must be distinguished at once, or few answers are asked for, learning does not start
    without it."""


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
    """Return the fraction of answers that are the model's most likely token."""
    tokens, targets = sample
    with torch.no_grad():
        hidden, _ = model.hidden_states(tokens)
        has_target = targets != NO_TARGET
        return float(
            (model.lm_head(hidden[has_target]).argmax(-1) == targets[has_target]).float().mean()
        )


def train_on(
    task: Task,
    layer_types: str,
    seed: int,
    *,
    lr: float = 1e-2,
    echo: Callable[[str], object] = lambda line: None,
) -> dict[str, float]:
    """Train a model of two layers on a task; return its accuracy on new samples, steps, seconds."""
    torch.manual_seed(seed)
    config = ModelConfig(
        width=task.width,
        depth=2,
        heads=task.heads,
        vocab_size=task.vocab,
        layer_types=layer_types,
        ffn_multiplier=2.0,
        max_timescale=4 * task.length,
    )
    model, rng = Model(config), np.random.default_rng(seed)
    optimizer = MuonAdamW(parameter_groups(model, 0.0), lr=lr, betas=(0.9, 0.95), matrix_lr=0.02)
    begin = time.perf_counter()
    for step in range(task.steps):
        fraction_done = (step + 0.5) / task.steps
        optimizer.scale_lr(lr_factor(fraction_done, task.warmup, "linear", 0.0))
        make = task.first if task.first and 3 * step < task.steps else task.make
        tokens, targets = make(rng, task.batch)
        hidden, _ = model.hidden_states(tokens)
        has_target = targets != NO_TARGET
        loss = F.cross_entropy(model.lm_head(hidden[has_target]), targets[has_target])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            accuracy = score(model, task.make(rng, 64))
            echo(f"  step {step + 1}: loss {loss.item():.3f}, accuracy {accuracy:.3f}")
            if accuracy == 1.0 and loss.item() < 1e-3:
                break
    seconds, rng = time.perf_counter() - begin, np.random.default_rng(10**6)
    accuracy = sum(score(model, task.make(rng, 64)) for _ in range(8)) / 8
    return {"accuracy": accuracy, "steps": step + 1, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--layer-types", nargs="+", default=["nl", "l", "s", "n"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--add", action="store_true", help="keep the rows of other cases")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = json.loads(RESULTS.read_text())["rows"] if args.add and RESULTS.exists() else []
    rows = [
        r for r in rows if (r["task"], r["layers"]) not in product(args.tasks, args.layer_types)
    ]
    for name in args.tasks:
        for layers in args.layer_types:
            for seed in range(args.seeds):
                scores = train_on(
                    TASKS[name], layers, seed, echo=lambda line: print(line, flush=True)
                )
                rows.append({"task": name, "layers": layers, "seed": seed, **scores})
                outcome = f"accuracy {scores['accuracy']:.4f} after {scores['steps']} steps"
                print(f"{name}, layers {layers}, seed {seed}: {outcome}", flush=True)
                result = {"machine": describe_machine(), "rows": rows}
                RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
