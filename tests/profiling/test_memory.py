"""What checkpoints, long texts and whole commands take in memory, as the system counts it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmrec.config import PRESETS, TrainConfig
from mmrec.profiling.memory import training
from tests.conftest import ROOT

MARK = Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(not MARK.exists(), reason="Linux keeps the mark")

TOOLS = """
import ctypes, gc, json, sys
from pathlib import Path
import torch

def resident(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

def begin():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")

def rise(call):
    before = begin()
    made = call()
    return resident("VmHWM") - before, made
"""

CHECKPOINTS = """
from mmrec.checkpoint.checkpoint import load_model, restore, save
from mmrec.config import ModelConfig
from mmrec.data.tokenizer import train_tokenizer
from mmrec.model import Model
from mmrec.optimizer import MuonAdamW, parameter_groups
from mmrec.finetune.start import grow_checkpoint
import dataclasses

def build(shape, value):
    model = Model(shape)
    optimizer = MuonAdamW(parameter_groups(model, 0.1), lr=1.0, betas=(0.9, 0.95), matrix_lr=1.0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            names = ["momentum"] if group["use_muon"] else ["exp_avg", "exp_avg_sq"]
            optimizer.state[p] = {"step": torch.tensor(1.0)}
            optimizer.state[p] |= {n: torch.full_like(p.detach(), value) for n in names}
    return model, optimizer

folder = Path(sys.argv[1])
tokenizer = train_tokenizer("byte", [])
small = ModelConfig(32, 2, 2, tokenizer.vocab_size, "n", ngram_buckets=64)
large = ModelConfig(512, 8, 4, tokenizer.vocab_size, "n", ffn_multiplier=3.5, ngram_buckets=4096)
found = {}
for shape in (small, large):  # the first loads what is loaded once
    path, grown = folder / "a.h5", folder / "b.h5"
    model, optimizer = build(shape, 1.0)
    found["model"] = sum(4 * p.numel() for p in model.parameters())
    found["moments"] = sum(4 * x.numel() for s in optimizer.state.values() for x in s.values())
    found["largest"] = max(4 * p.numel() for p in model.parameters())
    found["save"], _ = rise(
        lambda: save(path, model, tokenizer, 1, {}, optimizer, {"seconds": 1.0})
    )
    found["restore"], _ = rise(lambda: restore(path, model, optimizer))
    del model, optimizer
    found["load"], loaded = rise(lambda: load_model(path))
    deeper = dataclasses.replace(shape, depth=shape.depth + 1)
    found["grow"], _ = rise(lambda: grow_checkpoint(
        loaded, deeper, grown, name="x", how="preserve", seed=0))
    del loaded
print(json.dumps(found))
"""


def run(code: str, *arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", TOOLS + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_a_checkpoint_takes_the_model_and_one_parameter(tmp_path: Path) -> None:
    """A model of 95 MB, its largest parameter 8 MB: a second copy of either would be seen."""
    found = run(CHECKPOINTS, str(tmp_path))
    print(found)
    spare = found["largest"] + 16e6
    assert found["model"] > 90e6
    assert found["save"] < spare
    assert found["restore"] < spare
    assert found["load"] < found["model"] + spare
    assert found["grow"] < 1.13 * (found["model"] + found["moments"]) + spare  # one layer in eight


CARRY = """
from mmrec.config import ModelConfig
from mmrec.training.replicas import Lanes, gradients
from mmrec.model import Model

model, lanes = Model(ModelConfig(64, 2, 2, 64, "nl", ngram_buckets=64)), Lanes(1)
text = torch.randint(64, (1, 16385))

def learn(length, chunk):
    state = None
    for lo in range(0, length, chunk):
        piece = text[:, lo : lo + chunk + 1]
        _, state = gradients(model, lanes, piece[:, :-1], piece[:, 1:], state=state, eot=0)
        for p in model.parameters():
            p.grad = None

learn(256, 256)
lengths = {"short": (1024, 256), "long": (16384, 256), "whole": (16384, 16384)}
print(json.dumps({name: rise(lambda: learn(*how))[0] for name, how in lengths.items()}))
"""


def test_a_carried_state_bounds_the_memory_of_a_long_document() -> None:
    """16,384 tokens in chunks take what 1,024 take; in one window they take many times that."""
    found = run(CARRY)
    assert found["long"] < found["short"] + 8e6
    assert found["whole"] > found["long"] + 100e6


# A process begins with the mark of the one that started it, which here holds gigabytes: a small one
# stands between.
BETWEEN = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(1024 * usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak(tmp_path: Path, text: Path, *options: str) -> int:
    """Bytes that two steps of training have resident at most."""
    size = ["mini", "--vocab", "600", "--precision", "float32", "--steps", "2"]
    where = ["--data", str(text), "--out", str(tmp_path), "--force"]
    command = [sys.executable, "-m", "mmrec", "train", *size, *where, *options]
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_info_tells_what_the_command_takes(tmp_path: Path, text_file: Path) -> None:
    """The process itself depends on the machine and its torch; what larger batches and layers that
    are run again change about it does not."""
    config = replace(PRESETS["mini"], vocab_size=600)
    peak(tmp_path, text_file)  # compiles what is not compiled yet
    cases = {"small": (4, False), "large": (20, False), "again": (20, True)}
    found, told = {}, {}
    for name, (batch, recompute) in cases.items():
        options = ["--batch", str(batch), *["--recompute"] * recompute]
        found[name] = peak(tmp_path, text_file, *options)
        settings = TrainConfig(batch=batch, precision="float32", recompute=recompute)
        told[name] = sum(training(config, settings).values())
    print(found, told)
    for one in ("small", "again"):
        rise = found["large"] - found[one]
        assert told["large"] - told[one] == pytest.approx(rise, rel=0.2), one
