"""Memory of checkpoints, long texts and training steps, as the system counts it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmrec.config import PRESETS, TrainConfig
from mmrec.profiling.memory import training_memory
from tests.conftest import ROOT

CLEAR_PEAK = Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(
    not CLEAR_PEAK.exists(), reason="only Linux resets the peak of a process"
)

MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch

def resident(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

def reset_peak():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")

def peak_rise(call):
    before = reset_peak()
    result = call()
    return resident("VmHWM") - before, result
"""


def measure(code: str, *arguments: str) -> dict[str, float]:
    """Run code after MEASURE in a process of its own; return the JSON that it prints."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURE + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, float] = json.loads(process.stdout)
    return found


CHECKPOINTS = """
import dataclasses
from mmrec.checkpoint.checkpoint import load_model, restore_training_state, save_checkpoint
from mmrec.config import ModelConfig
from mmrec.data.tokenizer import train_tokenizer
from mmrec.finetune.grow import grow_checkpoint
from mmrec.model import Model
from mmrec.optimizer import build_optimizer

def build(config, value):
    model = Model(config)
    optimizer = build_optimizer(model)
    for group in optimizer.param_groups:
        for p in group["params"]:
            names = ["momentum"] if group["use_muon"] else ["exp_avg", "exp_avg_sq"]
            optimizer.state[p] = {"step": torch.tensor(1.0)}
            optimizer.state[p] |= {n: torch.full_like(p.detach(), value) for n in names}
    return model, optimizer

folder = Path(sys.argv[1])
tokenizer = train_tokenizer("byte", [])
small = ModelConfig(32, 2, 2, tokenizer.vocab_size, "n", ngram_buckets=64)
large = ModelConfig(
    512, 4, 4, tokenizer.vocab_size, "n", ffn_multiplier=3.5, ngram_buckets=4096
)
found = {}
for config in (small, large):  # the first one loads what is loaded once per process
    path, grown = folder / "a.h5", folder / "b.h5"
    model, optimizer = build(config, 1.0)
    found["model"] = sum(4 * p.numel() for p in model.parameters())
    found["moments"] = sum(4 * x.numel() for s in optimizer.state.values() for x in s.values())
    found["largest"] = max(4 * p.numel() for p in model.parameters())
    found["save"], _ = peak_rise(
        lambda: save_checkpoint(
            path, model, tokenizer, 1, {}, optimizer=optimizer, progress={"seconds": 1.0}
        )
    )
    found["restore"], _ = peak_rise(lambda: restore_training_state(path, model, optimizer))
    del model, optimizer
    found["load"], loaded = peak_rise(lambda: load_model(path))
    deeper = dataclasses.replace(config, depth=config.depth + 1)
    found["grow"], _ = peak_rise(
        lambda: grow_checkpoint(loaded, deeper, grown, preset="tiny", force=True)
    )
    del loaded
print(json.dumps(found))
"""


def test_a_checkpoint_takes_the_model_and_one_parameter(tmp_path: Path) -> None:
    """A model of 54 MB, its largest parameter 8 MB: a second copy of the model would show."""
    found = measure(CHECKPOINTS, str(tmp_path))
    margin = found["largest"] + 16e6
    assert found["model"] > 1.8 * margin
    assert found["save"] < margin
    assert found["restore"] < margin
    assert found["load"] < found["model"] + margin
    # one new layer beside four old ones
    assert found["grow"] < 1.25 * (found["model"] + found["moments"]) + margin


CARRY = """
from mmrec.config import ModelConfig
from mmrec.model import Model
from mmrec.training.replicas import Replicas, forward_backward

model, replicas = Model(ModelConfig(64, 2, 2, 64, "nl", ngram_buckets=64)), Replicas(1)
text = torch.randint(64, (1, 16385))

def learn(length, chunk):
    state = None
    for lo in range(0, length, chunk):
        window = text[:, lo : lo + chunk + 1]
        _, state = forward_backward(
            model, replicas, window[:, :-1], window[:, 1:], state=state, end_of_text=0
        )
        for p in model.parameters():
            p.grad = None

learn(256, 256)
cases = {"short": (1024, 256), "long": (16384, 256), "whole": (16384, 16384)}
print(json.dumps({name: peak_rise(lambda: learn(*case))[0] for name, case in cases.items()}))
"""


def test_a_carried_state_bounds_the_memory_of_a_long_document() -> None:
    """16,384 tokens in chunks take what 1,024 take; in one window they take many times that."""
    found = measure(CARRY)
    assert found["long"] < found["short"] + 8e6
    assert found["whole"] > found["long"] + 100e6


# A process inherits the peak of its parent, which is large here, so a small process stands between.
LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(1024 * usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_of_training(tmp_path: Path, text: Path, *options: str) -> int:
    """Run two steps of ``mmrec train``; return its largest resident memory in bytes."""
    model = ["mini", "--vocab", "600", "--precision", "float32", "--steps", "2"]
    model += ["--eval-tokens", "1000", "--sample-tokens", "0"]
    where = ["--data", str(text), "--out", str(tmp_path / "run"), "--force"]
    command = [sys.executable, "-m", "mmrec", "train", *model, *where, *options]
    process = subprocess.run(
        [sys.executable, "-c", LAUNCH, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return int(process.stdout)


def test_the_memory_of_a_run_is_as_counted(tmp_path: Path, text_file: Path) -> None:
    """What activation checkpointing saves. The memory of the process itself depends on the machine
    and on torch, so two real runs are compared; test_cost.py compares batches and precisions."""
    config = replace(PRESETS["mini"], vocab_size=600)
    rows = ("--batch-size", "10")
    peak_of_training(tmp_path, text_file, "--batch-size", "1")  # compiles, which takes memory, too
    peaks = {
        checkpointed: peak_of_training(
            tmp_path, text_file, *rows, *["--activation-checkpointing"] * checkpointed
        )
        for checkpointed in (False, True)
    }
    counted = {}
    for checkpointed in (False, True):
        train = TrainConfig.from_flat(
            {
                "batch_size": 10,
                "precision": "float32",
                "activation_checkpointing": checkpointed,
            }
        )
        counted[checkpointed] = sum(training_memory(config, train).values())
    saved = peaks[False] - peaks[True]
    assert counted[False] - counted[True] == pytest.approx(saved, rel=0.2)
