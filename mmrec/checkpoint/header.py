"""What a checkpoint says about its model: configuration, tokenizer, step and metadata.

Nothing here imports torch.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from mmrec.checkpoint.hdf5 import open_h5_file, read_attribute, read_json
from mmrec.config import ModelConfig, TrainConfig
from mmrec.data.tokenizer import Tokenizer

KIND, SCHEMA = "checkpoint", 4


class CheckpointHeader(NamedTuple):
    """What can be read from a checkpoint without its weights."""

    step: int
    """Optimizer steps taken."""
    metadata: dict[str, Any]
    """preset, train (the training configuration), val (loss and bits per byte), fingerprint …"""
    model_config: ModelConfig


def open_checkpoint(path: Path) -> contextlib.AbstractContextManager[h5py.File]:
    """Open a checkpoint of this version for reading; see ``open_h5_file``."""
    return open_h5_file(path, KIND, SCHEMA, oldest=SCHEMA)


def read_metadata(path: Path) -> CheckpointHeader:
    """Read step, metadata and model configuration of a checkpoint, without its weights.

    Raises:
        InputError: There is no complete checkpoint of this version at ``path``.
    """
    with open_checkpoint(path) as file:
        return CheckpointHeader(*read_header(file), read_model_config(file))


def read_header(file: h5py.File) -> tuple[int, dict[str, Any]]:
    """Read the steps taken and the metadata of an open checkpoint, as in CheckpointHeader.

    Raises:
        KeyError: One of them is missing.
        ValueError: One of them is not valid.
    """
    step, metadata = read_attribute(file, "step", int), read_json(file, "metadata")
    check_header(step, metadata)
    return step, metadata


def check_header(step: int, metadata: dict[str, Any]) -> None:
    """Raise ValueError unless steps taken and metadata are valid, as in CheckpointHeader."""
    if step < 0:
        raise ValueError(f"step must be >= 0; it is {step}")
    TrainConfig.from_dict(metadata.get("train", {}))  # raises if a setting is not valid
    for key in ("preset", "source", "fingerprint"):
        if not isinstance(metadata.get(key, ""), str):
            raise ValueError(f"{key} in metadata must be text")


def read_model_config(file: h5py.File) -> ModelConfig:
    """Read the model configuration. Refuse one with more layers than the file can hold.

    Raises:
        KeyError: It is missing.
        ValueError: It is not valid.
    """
    config = ModelConfig.from_dict(read_json(file, "config"))
    weights = file.get("model")
    if not isinstance(weights, h5py.Group) or config.depth > len(weights):
        raise ValueError(f"its config says {config.depth:,} layers; fewer weights are stored")
    return config


def read_tokenizer(file: h5py.File) -> Tokenizer:
    """Read the tokenizer of an open checkpoint.

    Raises:
        KeyError: It is missing.
        ValueError: It is not valid, or not of the size of the model's vocabulary.
    """
    tokenizer = Tokenizer.from_json(json.dumps(read_json(file, "tokenizer")))
    if tokenizer.vocab_size != read_model_config(file).vocab_size:
        raise ValueError("the tokenizer and the model have vocabularies of different sizes")
    return tokenizer


def read_lora_settings(file: h5py.File) -> tuple[int, float] | None:
    """Read rank and alpha of the LoRA factors of an open checkpoint; None if it holds none.

    Raises:
        ValueError: They are not valid.
    """
    if "lora" not in file:
        return None
    stored = read_json(file, "lora")
    rank, alpha = stored.get("rank"), stored.get("alpha")
    if type(rank) is not int or not isinstance(alpha, int | float):
        raise ValueError("lora must hold a rank and an alpha")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha in lora must be finite and > 0; it is {alpha}")
    return rank, alpha
