"""Checkpoints: model, optimizer, random state and position in the data, in one HDF5 file.

The layout is described in docs/formats.md. Nothing in it is code, and nothing is unpickled.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from mmrec.config import InputError, ModelConfig, TrainConfig, from_dict
from mmrec.data.tokenizer import Tokenizer
from mmrec.model import Model, State
from mmrec.storage import (
    DamagedError,
    atomic_write,
    open_file,
    read_array,
    read_json,
    write_array,
    write_json,
)
from mmrec.structure import attribute

KIND, SCHEMA = "checkpoint", 3
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
    carried: State | None = None,
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
        carried: what the rows of the next batch go on from.

    Raises:
        StorageError: the system refused; the earlier file is intact.
    """
    with atomic_write(path, KIND, SCHEMA) as file:
        file.attrs["step"] = step
        write_json(file, "config", asdict(model.config))
        write_json(file, "tokenizer", json.loads(tokenizer.to_json()))
        write_json(file, "info", info)
        for name, p in model.named_parameters():
            write_array(file, f"model/{name}", _numbers(p), pack=True)
        if optimizer is not None:
            for name, p in model.named_parameters():
                state = optimizer.state.get(p, {})
                for moment in MOMENTS:
                    if moment in state:
                        data = _numbers(state[moment])
                        write_array(file, f"optimizer/{moment}/{name}", data, pack=True)
            write_json(file, "progress", progress)
            write_array(file, "rng", torch.get_rng_state().numpy())
            for name, x in _named(carried) if carried else ():
                write_array(file, f"carried/{name}", x.numpy())


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().float().numpy()


def _tensor(file: h5py.File, name: str, like: Tensor) -> Tensor:
    return torch.from_numpy(read_array(file, name, np.float32, tuple(like.shape)))


def _read_config(file: h5py.File) -> ModelConfig:
    """The model configuration, held against what is stored before a model is made of it."""
    config: ModelConfig = from_dict(ModelConfig, read_json(file, "config"))
    weights = file.get("model")
    if not isinstance(weights, h5py.Group) or config.depth > len(weights):
        raise ValueError(f"its config says {config.depth:,} layers; fewer weights are stored")
    return config


def _read_model(file: h5py.File) -> Model:
    config = _read_config(file)
    with torch.device("meta"):  # shapes are checked before anything is allocated
        model = Model(config)
    weights = {name: _tensor(file, f"model/{name}", p) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    for p in model.parameters():
        p.requires_grad_()
    return model


def _read_info(file: h5py.File) -> tuple[int, dict[str, Any]]:
    step, info = attribute(file, "step", int), read_json(file, "info")
    if step < 0:
        raise ValueError(f"step must be >= 0; it is {step}")
    from_dict(TrainConfig, info.get("train", {}))
    for key in ("preset", "source", "fingerprint"):
        if not isinstance(info.get(key, ""), str):
            raise ValueError(f"{key} in info must be text")
    return step, info


def load_model(path: Path) -> Loaded:
    """Read the model of a checkpoint. Raises InputError for every file that is not a whole one."""
    with open_file(path, KIND, SCHEMA, SCHEMA) as file:
        step, info = _read_info(file)
        model = _read_model(file)
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


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights, optimizer moments and random state back in place; return the saved progress.

    Raises InputError if the checkpoint is damaged or was written without them; the model and the
    optimizer are then of no use until another one is restored.
    """
    with open_file(path, KIND, SCHEMA, SCHEMA) as file:
        if "progress" not in file:
            raise InputError(f"{path} holds a model but no training state: resume from last.h5")
        step, _ = _read_info(file)
        progress = read_json(file, "progress")
        for name, p in model.named_parameters():
            p.data.copy_(_tensor(file, f"model/{name}", p))
        put_moments(model, optimizer, _Moments(file, model), step + progress.get("aged", 0))
        torch.set_rng_state(torch.from_numpy(read_array(file, "rng", np.uint8)))
        return progress | {"step": step}


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


def run_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer of a run, from its furthest checkpoint that can be read.

    Raises InputError if there is none.
    """
    for path in reversed(run_checkpoints(run)):
        with contextlib.suppress(InputError), open_file(path, KIND, SCHEMA, SCHEMA) as file:
            return Tokenizer.from_json(json.dumps(read_json(file, "tokenizer")))
    raise InputError(f"{run} holds no whole checkpoint, so its tokenizer is lost: start it again")


def resume(
    run: Path, load: Callable[[Path], dict[str, Any]], say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """Load the furthest whole checkpoint of a run; return its path and what ``load`` returned.

    A damaged one is named and set aside as ``NAME.h5.damaged``, so that it is neither counted as
    kept nor in the way, and the one before it is tried.

    Raises InputError if none is whole, or the furthest is whole but not for this version.
    """
    saved, lost = run_checkpoints(run), []
    if not saved:
        raise InputError(f"{run} holds no checkpoint to resume from (last.h5 or step-N.h5)")
    for path in reversed(saved):
        try:
            info = load(path)
        except DamagedError as error:
            say(f"{error}; going back to the checkpoint before it")
            lost.append(path)
            continue
        for bad in lost:
            with contextlib.suppress(OSError):
                bad.replace(bad.with_name(f"{bad.name}.damaged"))
        return path, info
    raise InputError(f"no checkpoint of {run} is whole: {', '.join(p.name for p in saved)}")


def step_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """The step-N checkpoints of a run folder by their number, which their names say."""
    named = ((re.fullmatch(r"step-(\d{1,18})\.h5", p.name), p) for p in run.glob("step-*.h5"))
    return sorted((int(match[1]), path) for match, path in named if match)


def run_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder to resume from, the furthest one last.

    last.h5 is placed by its step, or taken for the furthest if that cannot be read.
    """
    found: list[tuple[float, Path]] = [*step_checkpoints(run)]
    last = run / "last.h5"
    if last.exists():
        try:
            found.append((read_info(last)[0], last))
        except InputError:
            found.append((math.inf, last))
    return [path for _, path in sorted(found, key=lambda pair: pair[0])]


def trim(run: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest step-N checkpoints."""
    for _, path in step_checkpoints(run)[: -keep or None]:
        path.unlink()


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
