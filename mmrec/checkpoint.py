"""Checkpoints: model, optimizer, random state and position in the data, in one HDF5 file.

The layout is described in docs/formats.md. Nothing in it is code, and nothing is unpickled.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from mmrec.config import InputError, ModelConfig, from_dict
from mmrec.data.tokenizer import Tokenizer
from mmrec.model import Model
from mmrec.storage import atomic_write, open_file, read_json, write_json

KIND, SCHEMA = "checkpoint", 2
RUNS = Path("runs")
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")  # of AdamW, and of Muon


@dataclass(frozen=True)
class Loaded:
    """A model ready to be used, and what is known about it."""

    path: Path
    model: Model
    """In evaluation mode."""
    tokenizer: Tokenizer
    step: int
    info: dict[str, Any]
    """preset, train (the training configuration), val (loss and bits per byte), fingerprint …"""


def save(
    path: Path,
    model: Model,
    tokenizer: Tokenizer,
    step: int,
    info: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    progress: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint, complete or not at all.

    Args:
        path: the file; replaced if it exists.
        model: its parameters are stored by name in float32.
        tokenizer: stored whole, so that the checkpoint can be used alone.
        step: optimizer steps taken.
        info: what a reader is told, as JSON values.
        optimizer: with ``progress`` it makes the checkpoint one to resume from.
        progress: position in the data, clock and records of the run, as JSON values.

    Raises:
        StorageError: the system refused; the earlier file is intact.
    """
    with atomic_write(path, KIND, SCHEMA) as file:
        file.attrs["step"] = step
        write_json(file, "config", asdict(model.config))
        write_json(file, "tokenizer", json.loads(tokenizer.to_json()))
        write_json(file, "info", info)
        for name, p in model.named_parameters():
            _write(file, f"model/{name}", p)
        if optimizer is not None:
            for name, p in model.named_parameters():
                state = optimizer.state.get(p, {})
                for moment in MOMENTS:
                    if moment in state:
                        _write(file, f"optimizer/{moment}/{name}", state[moment])
            write_json(file, "progress", progress)
            file["rng"] = torch.get_rng_state().numpy()


def _write(file: h5py.File, name: str, x: Tensor) -> None:
    # Bytes of equal weight side by side compress: exponents repeat, low bits do not.
    data = x.detach().float().numpy()
    packed = (
        {"compression": "gzip", "compression_opts": 1, "shuffle": True} if data.size > 64 else {}
    )
    file.create_dataset(name, data=data, **packed)


def _read(file: h5py.File, name: str, like: Tensor) -> Tensor:
    stored = file[name]
    if stored.shape != tuple(like.shape) or stored.dtype != np.float32:
        raise ValueError(
            f"{name} must be float32 {tuple(like.shape)}; it is {stored.dtype} {stored.shape}"
        )
    return torch.from_numpy(stored[()])


def _read_model(file: h5py.File) -> Model:
    config = from_dict(ModelConfig, read_json(file, "config"))
    with torch.device("meta"):  # shapes are checked before anything is allocated
        model = Model(config)
    weights = {name: _read(file, f"model/{name}", p) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    for p in model.parameters():
        p.requires_grad_()
    return model


def load_model(path: Path) -> Loaded:
    """Read the model of a checkpoint. Raises InputError for every file that is not a whole one."""
    with open_file(path, KIND, SCHEMA, SCHEMA) as file:
        model = _read_model(file)
        tokenizer = Tokenizer.from_json(json.dumps(read_json(file, "tokenizer")))
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError("the tokenizer has more tokens than the model")
        return Loaded(
            path, model.eval(), tokenizer, int(file.attrs["step"]), read_json(file, "info")
        )


def read_info(path: Path) -> tuple[int, dict[str, Any], ModelConfig]:
    """Step, info and model configuration of a checkpoint, without its weights."""
    with open_file(path, KIND, SCHEMA, SCHEMA) as file:
        config = from_dict(ModelConfig, read_json(file, "config"))
        return int(file.attrs["step"]), read_json(file, "info"), config


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights, optimizer moments and random state back in place; return the saved progress.

    Raises InputError if the checkpoint was written without them.
    """
    with open_file(path, KIND, SCHEMA, SCHEMA) as file:
        if "progress" not in file:
            raise InputError(f"{path} holds a model but no training state: resume from last.h5")
        step = int(file.attrs["step"])
        for name, p in model.named_parameters():
            p.data.copy_(_read(file, f"model/{name}", p))
            kept = [m for m in MOMENTS if f"optimizer/{m}/{name}" in file]
            if kept:
                moments = {m: _read(file, f"optimizer/{m}/{name}", p) for m in kept}
                optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
        torch.set_rng_state(torch.from_numpy(file["rng"][:]))
        progress: dict[str, Any] = read_json(file, "progress")
        return progress | {"step": step}


def run_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder that hold training state, the furthest one last."""
    steps = sorted(run.glob("step-*.h5"), key=lambda p: int(p.stem.split("-")[1]))
    found = [(int(p.stem.split("-")[1]), p) for p in steps]
    if (run / "last.h5").exists():
        found.append((read_info(run / "last.h5")[0], run / "last.h5"))
    return [path for _, path in sorted(found, key=lambda pair: pair[0])]


def newest_run(runs: Path = RUNS) -> Path:
    """The run folder whose checkpoints changed last. Raises InputError if there is none."""
    files = [p for p in runs.glob("*/*.h5") if not p.name.startswith(".")]
    if not files:
        raise InputError(f"no trained model under {runs}/: train one first with 'mmrec train tiny'")
    return max(files, key=lambda p: p.stat().st_mtime_ns).parent


def find_checkpoint(where: Path | None) -> Path:
    """The checkpoint to use: a file itself; of a run folder, or the newest run, best before last.

    Raises InputError if there is none.
    """
    run = newest_run() if where is None else where
    if not run.is_dir():
        return run  # a file, or a missing one, which opening will name
    for name in ("best.h5", "last.h5"):
        if (run / name).exists():
            return run / name
    steps = run_checkpoints(run)
    if steps:
        return steps[-1]
    raise InputError(f"no checkpoint in {run}: expected best.h5, last.h5 or step-N.h5")
