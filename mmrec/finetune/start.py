"""Starting from a checkpoint: its weights and moments, grown to the shape that is wanted."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import optim

from mmrec.checkpoint import checkpoint
from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.config import ModelConfig
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.finetune.grow import Growth
from mmrec.model import Model
from mmrec.optimizer import MuonAdamW, parameter_groups
from mmrec.training.run_dir import Progress


def take_over(
    model: Model,
    optimizer: optim.Optimizer,
    source: LoadedModel,
    how: str = "preserve",
    pieces: Sequence[list[int]] = (),
) -> int:
    """Turn a model, just initialised, into the source grown to its shape.

    Args:
        model: filled; what is drawn at random comes from torch's global generator.
        optimizer: given the source's moments, if it was saved with them, else left without any.
        source: the checkpoint.
        how: see ``Growth``.
        pieces: see ``Growth``.

    Returns:
        The steps that the moments had seen; 0 without them.

    Raises:
        InputError: see ``Growth``.
    """
    growth = Growth(source.model.config, model.config, how, pieces)
    growth.fill(model, source.model)
    with checkpoint.open_moments(source.path, source.model) as (kept, steps):
        moments = growth.moments(model, kept)
    if not moments:
        optimizer.state.clear()
        return 0
    muon = {p for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    for name, p in model.named_parameters():  # AdamW counts steps: all are of one age
        if name not in moments and p not in muon:
            moments[name] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
    checkpoint.put_moments(model, optimizer, moments, steps)
    return steps


def freeze(model: Model, what: str) -> None:
    """Let parameters keep their values: they get no gradient from now on.

    Args:
        model: changed in place.
        what: as ``TrainConfig.freeze``; empty freezes nothing.

    Raises:
        InputError: a word is unknown, a layer is not there, or nothing would be left to learn.
    """
    for word in filter(None, what.split(",")):
        layers = re.fullmatch(r"layers:(\d{1,9})(?:-(\d{1,9}))?", word)
        if layers:
            first, last = int(layers[1]), int(layers[2] or layers[1])
            if not first <= last < model.config.depth:
                raise InputError(
                    f"freeze must name layers from 0 to {model.config.depth - 1}, the "
                    f"first one first; got {word!r}"
                )
            starts = tuple(f"layers.{i}." for i in range(first, last + 1))
            names = [n for n, _ in model.named_parameters() if n.startswith(starts)]
        elif word == "embeddings":
            names = ["embedding", "ngram_embedding"]
        elif word == "memory":
            names = [n for n, _ in model.layers.named_parameters(prefix="layers") if "ffn" not in n]
        else:
            raise InputError(
                "freeze must be words out of embeddings, memory, layers:0-2, joined "
                f"by commas; got {word!r}"
            )
        for name, p in model.named_parameters():
            if name in names:
                p.requires_grad_(False)
    if not any(p.requires_grad for n, p in model.named_parameters() if n != "norm.weight"):
        raise InputError(f"freeze must leave something to learn; got {what!r}")


def grow_checkpoint(
    source: LoadedModel,
    config: ModelConfig,
    out: Path,
    *,
    name: str,
    how: str,
    seed: int,
    tokenizer: Tokenizer | None = None,
    pieces: Sequence[list[int]] = (),
) -> Model:
    """Write a checkpoint of the source grown to a shape, with its moments if it has any.

    Args:
        source: the checkpoint.
        config: the shape wanted.
        out: the file; replaced if it exists.
        name: the preset that the file says.
        how: see ``Growth``.
        seed: of what is drawn at random.
        tokenizer: with the new tokens; None for the source's.
        pieces: see ``Growth``.

    Raises:
        InputError: see ``Growth``.
        StorageError: the file cannot be written.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(config)
        optimizer = MuonAdamW(
            parameter_groups(model, 0.0), lr=1.0, betas=(0.9, 0.95), matrix_lr=1.0
        )
        steps = take_over(model, optimizer, source, how, pieces)
    metadata = source.info | {
        "preset": name,
        "val": None,
        "grown_from": str(source.path),
        "how": how,
    }
    progress = dataclasses.asdict(Progress(step=source.step, aged=steps - source.step))
    resumable = {"optimizer": optimizer, "progress": progress} if steps else {}
    tokenizer = tokenizer or source.tokenizer
    checkpoint.save_checkpoint(out, model, tokenizer, source.step, metadata, **resumable)
    return model
