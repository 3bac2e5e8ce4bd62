"""What training and generation take in memory, measured, beside what 'mmrec info' says.

    python benchmarks/memory_use.py [PRESET ...] [--seq-len T] [--batch B]

Each case has a process of its own: it imports everything, compiles the kernels on a small model and
sets the system's high-water mark back; then come real training steps (model, lanes, Muon),
or loading a checkpoint, reading a prompt of 1,100 tokens and writing 64. What the mark rose by
is compared with mmrec.footprint. Writes results/memory_use.json.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mmrec.cli.startup import prepare_process

RESULTS = Path(__file__).parent / "results" / "memory_use.json"
PRESETS = ["tiny", "mini", "small", "base"]


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


def begin() -> int:
    """Forget the mark; return what is resident now."""
    from mmrec.state import give_back_memory

    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def steps(shape: Any, config: Any, count: int) -> float:
    """So many training steps; seconds of the last."""
    import numpy as np
    import torch

    from mmrec.data.batches import Batches
    from mmrec.lanes import gradients, lanes_for
    from mmrec.model import Model
    from mmrec.optimizer import Muon

    model = Model(shape)
    model.set_precision(config.precision)
    model.recompute = config.recompute
    lanes = lanes_for(model, config.batch)
    groups = model.parameter_groups(config.weight_decay, config.table_decay)
    optimizer = Muon(groups, lr=config.lr, betas=(0.9, 0.95), muon_lr=config.muon_lr, lanes=lanes)
    tokens = config.batch * config.seq_len * (count + 1)
    text = np.random.default_rng(0).integers(0, shape.vocab_size, tokens).astype(np.uint16)
    batches = Batches(text, config.batch, config.seq_len, 0)
    weights = list(model.parameters())
    for number in range(count):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        gradients(model, lanes, *batches.get(number))
        lanes.run([lambda: torch.nn.utils.clip_grad_norm_(weights, 1.0)])
        optimizer.step()
    return time.perf_counter() - start


def write(path: Path) -> None:
    """Load a checkpoint and write 64 tokens after a long prompt."""
    from mmrec.checkpoint import load_model
    from mmrec.generate import generate

    loaded = load_model(path)
    "".join(generate(loaded.model, loaded.tokenizer, "x" * 1100, max_tokens=64, seed=0))


def save(path: Path, shape: Any) -> None:
    """A checkpoint of the shape, for a tokenizer by byte."""
    from mmrec.checkpoint import save
    from mmrec.data.tokenizer import train_tokenizer
    from mmrec.model import Model

    tokenizer = train_tokenizer("byte", [])
    shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    save(path, Model(shape), tokenizer, 0, {})


def ask(case: list[Any]) -> str:
    """What a process of its own prints of a case."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def measure(
    name: str, what: str, precision: str, batch: int, seq_len: int, count: int
) -> dict[str, Any]:
    """One case, in this process."""
    from mmrec import footprint
    from mmrec.config import PRESETS, TrainConfig

    shape = PRESETS[name]
    config = TrainConfig(batch=batch, seq_len=seq_len, precision=precision,
                         recompute=what == "recompute")  # fmt: skip
    small = dataclasses.replace(shape, width=32, heads=2, vocab_size=300, ngrams=64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.h5"
        if what == "generation":
            shape = dataclasses.replace(shape, vocab_size=257)  # of a tokenizer by byte
            save(path, small)
            write(path)
            ask([name, "save", str(path)])  # what that takes is not to be found here
            before, seconds = begin(), 0.0
            write(path)
            counted = footprint.generation(shape)
        else:
            steps(small, dataclasses.replace(config, batch=4, seq_len=16), 2)
            before = begin()
            seconds = steps(shape, config, count)
            counted = {}
        measured = status("VmHWM") - before
    if what != "generation":
        counted = footprint.training(shape, config)
    total = sum(counted.values())
    return {"preset": name, "what": what, "precision": precision, "batch": batch,
            "seq_len": seq_len, "measured": measured, "counted": total,
            "ratio": round(total / measured, 3), "parts": counted,
            "seconds_a_step": round(seconds, 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--what", nargs="*", default=["training", "recompute", "generation"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        name, what, *rest = json.loads(given.case)
        if what == "save":
            from mmrec.config import PRESETS as SHAPES

            save(Path(rest[0]), SHAPES[name])
        else:
            print(json.dumps(measure(name, what, *rest)))
        return
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for name in given.presets:
        for what in given.what:
            for precision in given.precision if what != "generation" else ["float32"]:
                case = [name, what, precision, given.batch, given.seq_len]
                row = json.loads(ask([*case, given.steps]))
                print({k: v for k, v in row.items() if k != "parts"}, flush=True)
                rows = [r for r in rows if [r[k] for k in ("preset", "what", "precision", "batch",
                                                           "seq_len")] != case]  # fmt: skip
                rows.append(row)
    from mmrec.bench import machine

    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    prepare_process(["train"])
    main()
