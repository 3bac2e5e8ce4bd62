"""Checkpoints: model, optimizer, random state and position in the data, in one HDF5 file.

The layout is described in docs/formats.md. Nothing in it is code, and nothing is unpickled.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from mmrec.checkpoint.hdf5 import (
    atomic_write,
    open_file,
    read_array,
    read_json,
    write_array,
    write_json,
)
from mmrec.checkpoint.structure import attribute
from mmrec.config import ModelConfig, TrainConfig, from_dict
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.lora import FACTORS, merge
from mmrec.model import Model, State
from mmrec.runtime.distributed import ALONE, World

KIND, SCHEMA = "checkpoint", 3
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")  # of AdamW, and of MuonAdamW


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
    carried: State | None = None,
    world: World = ALONE,
) -> None:
    """Write a checkpoint, complete or not at all. Of several processes, rank 0 writes.

    Args:
        path: the file; replaced if it exists.
        model: its parameters are stored by name in float32.
        tokenizer: stored whole, so that the checkpoint can be used alone.
        step: optimizer steps taken.
        info: what a reader is told, as JSON values.
        optimizer: with ``progress`` it makes the checkpoint one to resume from.
        progress: position in the data, clock and records of the run, as JSON values.
        carried: what the rows of the next batch go on from.
        world: that of the model; one parameter at a time is whole in all processes.

    Raises:
        StorageError: the system refused; the earlier file is intact.
    """
    numbers = _numbers(model, optimizer, world, _settings(info))
    try:
        if world.rank == 0:
            with atomic_write(path, KIND, SCHEMA) as file:
                file.attrs["step"] = step
                write_json(file, "config", asdict(model.config))
                write_json(file, "tokenizer", json.loads(tokenizer.to_json()))
                write_json(file, "info", info)
                for name, data in numbers:
                    write_array(file, name, data, pack=True)
                if optimizer is not None:
                    write_json(file, "progress", progress)
                    write_array(file, "rng", torch.get_rng_state().numpy())
                    for name, x in _named(carried) if carried else ():
                        write_array(file, f"carried/{name}", x.numpy())
    finally:
        for _ in numbers:  # the processes give each other their shares, whatever became of the file
            pass


def _settings(info: dict[str, Any]) -> TrainConfig:
    made: TrainConfig = from_dict(TrainConfig, info.get("train", {}))
    return made


def _numbers(
    model: Model, optimizer: torch.optim.Optimizer | None, world: World, train: TrainConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the weights, then of the moments; without them, what is for use only:
    factors of LoRA are then merged into what they stand beside."""
    weights = dict(model.named_parameters())
    for name, p in weights.items():
        value, stem = world.whole(p.detach()), name.removesuffix(".weight")
        if optimizer is None and f"{stem}.up" in weights:
            down, up = (weights[f"{stem}{part}"].detach() for part in FACTORS)
            value = merge(value, down, up, train.lora_alpha / train.lora)
        if optimizer is not None or not name.endswith(FACTORS):
            yield f"model/{name}", value.float().numpy()
    for name, p in weights.items() if optimizer is not None else ():
        state = optimizer.state.get(p, {})  # type: ignore[union-attr]
        for moment in MOMENTS:
            if moment in state:
                yield f"optimizer/{moment}/{name}", world.whole(state[moment]).float().numpy()


def _tensor(file: h5py.File, name: str, like: Tensor) -> Tensor:
    return torch.from_numpy(read_array(file, name, np.float32, tuple(like.shape)))


def _read_config(file: h5py.File) -> ModelConfig:
    """The model configuration, held against what is stored before a model is made of it."""
    config: ModelConfig = from_dict(ModelConfig, read_json(file, "config"))
    weights = file.get("model")
    if not isinstance(weights, h5py.Group) or config.depth > len(weights):
        raise ValueError(f"its config says {config.depth:,} layers; fewer weights are stored")
    return config


def _read_model(file: h5py.File, info: dict[str, Any]) -> Model:
    config = _read_config(file)
    with torch.device("meta"):  # shapes are checked before anything is allocated
        model = Model(config)
    train, weights = _settings(info), dict[str, Tensor]()
    for name, p in model.named_parameters():
        value, stem = _tensor(file, f"model/{name}", p), name.removesuffix(".weight")
        if f"model/{stem}.up" in file:  # a run with LoRA is under way
            down, up = p.new_empty(train.lora, p.shape[-1]), p.new_empty(len(p), train.lora)
            down, up = (
                _tensor(file, f"model/{stem}{part}", like)
                for part, like in zip(FACTORS, (down, up), strict=True)
            )
            value = merge(value, down, up, train.lora_alpha / train.lora)
        weights[name] = value
    model.load_state_dict(weights, assign=True)
    for p in model.parameters():
        p.requires_grad_()
    return model


def _read_info(file: h5py.File) -> tuple[int, dict[str, Any]]:
    step, info = attribute(file, "step", int), read_json(file, "info")
    if step < 0:
        raise ValueError(f"step must be >= 0; it is {step}")
    _settings(info)
    for key in ("preset", "source", "fingerprint"):
        if not isinstance(info.get(key, ""), str):
            raise ValueError(f"{key} in info must be text")
    return step, info


def load_model(path: Path) -> Loaded:
    """Read the model of a checkpoint. Raises InputError for every file that is not a whole one."""
    with open_file(path, KIND, SCHEMA, SCHEMA) as file:
        step, info = _read_info(file)
        model = _read_model(file, info)
        tokenizer = Tokenizer.from_json(json.dumps(read_json(file, "tokenizer")))
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError("the tokenizer and the model have vocabularies of different sizes")
        return Loaded(path, model.eval(), tokenizer, step, info)


def read_info(path: Path) -> tuple[int, dict[str, Any], ModelConfig]:
    """Step, info and model configuration of a checkpoint, without its weights."""
    with open_file(path, KIND, SCHEMA, SCHEMA) as file:
        return *_read_info(file), _read_config(file)


class _Moments(Mapping[str, dict[str, Tensor]]):
    """Moments by parameter, each read when it is asked for."""

    def __init__(self, file: h5py.File, model: nn.Module) -> None:
        self._file, self._shapes = file, dict(model.named_parameters())

    def _kept(self, name: str) -> list[str]:
        return [m for m in MOMENTS if f"optimizer/{m}/{name}" in self._file]

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        like, kept = self._shapes[name], self._kept(name)
        if not kept:
            raise KeyError(name)
        return {m: _tensor(self._file, f"optimizer/{m}/{name}", like) for m in kept}

    def __iter__(self) -> Iterator[str]:
        return filter(self._kept, self._shapes)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@contextlib.contextmanager
def open_moments(
    path: Path, model: nn.Module
) -> Iterator[tuple[Mapping[str, dict[str, Tensor]], int]]:
    """Optimizer moments of a checkpoint by parameter and name, read one parameter at a time, and
    the steps that they have seen; none if it was saved without."""
    with open_file(path, KIND, SCHEMA, SCHEMA) as file:
        if "progress" not in file:
            yield {}, 0
            return
        aged = read_json(file, "progress").get("aged", 0)
        yield _Moments(file, model), attribute(file, "step", int) + int(aged)


def put_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, dict[str, Tensor]],
    steps: int,
) -> None:
    """Give an optimizer the moments that so many steps left, and forget those that it has."""
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for name in moments:
        optimizer.state[parameters[name]] = {"step": torch.tensor(float(steps)), **moments[name]}


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World = ALONE
) -> dict[str, Any]:
    """Put weights, optimizer moments and random state back in place; return the saved progress.

    Of several processes, rank 0 reads and deals out one parameter at a time.

    Raises InputError if the checkpoint is damaged or was written without them; the model and the
    optimizer are then of no use until another one is restored.
    """
    alone: Any = contextlib.nullcontext()
    with alone if world.rank else open_file(path, KIND, SCHEMA, SCHEMA) as file:

        def put(x: Tensor, group: str) -> Tensor:
            return world.put(x, None if file is None else _tensor(file, f"{group}/{name}", x))

        read = None if file is None else _read_progress(file, path, model)
        progress, rng, kept = world.told(read)  # type: ignore[misc]
        optimizer.state.clear()
        for name, p in model.named_parameters():
            put(p.data, "model")
            if kept[name]:
                moments = {m: put(torch.zeros_like(p), f"optimizer/{m}") for m in kept[name]}
                age = float(progress["step"] + progress.get("aged", 0))
                optimizer.state[p] = {"step": torch.tensor(age), **moments}
        torch.set_rng_state(torch.from_numpy(rng))
        return progress


def _read_progress(file: h5py.File, path: Path, model: nn.Module) -> Any:
    """Progress, random state, and which moments are kept of each parameter."""
    if "progress" not in file:
        raise InputError(f"{path} holds a model but no training state: resume from last.h5")
    progress = read_json(file, "progress") | {"step": _read_info(file)[0]}
    kept = {
        name: [m for m in MOMENTS if f"optimizer/{m}/{name}" in file]
        for name, _ in model.named_parameters()
    }
    return progress, read_array(file, "rng", np.uint8), kept


def _named(state: State) -> Iterator[tuple[str, Tensor]]:
    yield "recent", state.recent
    for i, layer in enumerate(state.layers):
        yield from ((f"{i}/{name}", x) for name, x in layer._asdict().items() if x is not None)


def carried(path: Path, like: State) -> State | None:
    """What the rows of the next batch go on from, shaped like a state; None if nothing is stored.

    Raises InputError if it is of another shape.
    """
    with open_file(path, KIND, SCHEMA, SCHEMA) as file:
        if "carried" not in file:
            return None
        for name, x in _named(like):
            stored = read_array(file, f"carried/{name}", x.numpy().dtype, tuple(x.shape))
            x.copy_(torch.from_numpy(stored))
        return like
