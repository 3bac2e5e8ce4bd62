"""Memory of checkpoints, long texts and training steps, as the system counts it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmrec.config import PRESETS, ModelConfig, TrainConfig
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
        lambda: grow_checkpoint(loaded, deeper, grown, preset="tiny", seed=0)
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


STEPS = """
from mmrec.config import ModelConfig
from mmrec.model import Model
from mmrec.optimizer import build_optimizer
from mmrec.runtime import malloc
from mmrec.training.replicas import Replicas, forward_backward, replica_count

config = ModelConfig(**json.loads(sys.argv[1]))
found = {}
for name, (batch_size, seq_len, checkpointed) in json.loads(sys.argv[2]).items():
    if checkpointed:
        malloc.return_large_blocks()  # as the trainer does
    model = Model(config)
    model.activation_checkpointing = checkpointed
    replicas = Replicas(replica_count(model, batch_size))
    optimizer = build_optimizer(model, run_tasks=replicas.run)
    tokens = torch.randint(config.vocab_size, (batch_size, seq_len))

    def train():
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            forward_backward(model, replicas, tokens, tokens)
            optimizer.step()

    if not found:  # loads the kernels
        train()
    found[name], _ = peak_rise(train)
    del train, optimizer, model, replicas
print(json.dumps(found))
"""


def test_the_memory_of_a_step_is_as_counted() -> None:
    """What more rows, and activation checkpointing, change about real training steps."""
    config = replace(PRESETS["mini"], vocab_size=600, ngram_buckets=512)
    cases = {"small": (4, 128, False), "large": (20, 128, False), "checkpointed": (20, 128, True)}
    values = {name: getattr(config, name) for name in ModelConfig.settings()}
    found = measure(STEPS, json.dumps(values), json.dumps(cases))
    counted = {}
    for name, (batch_size, seq_len, checkpointed) in cases.items():
        settings = {
            "batch_size": batch_size,
            "seq_len": seq_len,
            "precision": "float32",
            "activation_checkpointing": checkpointed,
        }
        counted[name] = sum(training_memory(config, TrainConfig.from_flat(settings)).values())
    print(found, counted)
    for name in ("small", "checkpointed"):
        difference = found["large"] - found[name]
        assert counted["large"] - counted[name] == pytest.approx(difference, rel=0.2), name
