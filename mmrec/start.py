"""Starting from a checkpoint: its weights and moments, grown to the shape that is wanted."""

import dataclasses
from pathlib import Path

import torch
from torch import optim

from mmrec import checkpoint
from mmrec.checkpoint import Loaded
from mmrec.config import ModelConfig
from mmrec.grow import Growth
from mmrec.model import Model
from mmrec.optimizer import Muon
from mmrec.run import Progress


def take_over(
    model: Model, optimizer: optim.Optimizer, source: Loaded, how: str = "preserve"
) -> int:
    """Turn a model, just initialised, into the source grown to its shape.

    Args:
        model: filled; what is drawn at random comes from torch's global generator.
        optimizer: given the source's moments, if it was saved with them, else left without any.
        source: the checkpoint.
        how: see ``Growth``.

    Returns:
        The steps that the moments had seen; 0 without them.

    Raises:
        InputError: see ``Growth``.
    """
    growth = Growth(source.model.config, model.config, how)
    growth.fill(model, source.model)
    kept, steps = checkpoint.read_moments(source.path, source.model)
    moments = growth.moments(model, kept)
    checkpoint.put_moments(model, optimizer, moments, steps)
    return steps if moments else 0


def grow_checkpoint(
    source: Loaded, config: ModelConfig, out: Path, *, name: str, how: str, seed: int
) -> Model:
    """Write a checkpoint of the source grown to a shape, with its moments if it has any.

    Args:
        source: the checkpoint.
        config: the shape wanted.
        out: the file; replaced if it exists.
        name: the preset that the file says.
        how: see ``Growth``.
        seed: of what is drawn at random.

    Raises:
        InputError: see ``Growth``.
        StorageError: the file cannot be written.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(config)
        optimizer = Muon(model.parameter_groups(0.0), lr=1.0, betas=(0.9, 0.95), muon_lr=1.0)
        steps = take_over(model, optimizer, source, how)
    info = source.info | {"preset": name, "val": None, "grown_from": str(source.path), "how": how}
    progress = dataclasses.asdict(Progress(step=source.step, aged=steps - source.step))
    kept = (optimizer, progress) if steps else (None, None)
    checkpoint.save(out, model, source.tokenizer, source.step, info, *kept)
    return model
