"""Models as ``model.safetensors``, ``config.json`` and ``tokenizer.json``, written and read back.

Names of tensors and settings are those that ``modeling_mmrec.py`` gives them, so that one layout
serves every program. The header of ``model.safetensors`` says how the model was trained. Another
program that changes the weights and saves them leaves that out.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.checkpoint.header import check_header
from mmrec.config import MODEL_SETTINGS, VERSION, ModelConfig, parameter_shapes
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import DamagedError, InputError
from mmrec.export.tokenizer import (
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    tokenizer_files,
    tokenizer_from_json,
)
from mmrec.model import Model
from mmrec.runtime.atomic import atomic_path, atomic_write_text

MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
MODEL_TYPE = "mmrec"
RENAMED = {"embedding": "embed_tokens.weight", "ngram_embedding": "ngram_embedding.weight"}
"""Parameters with another name in ``modeling_mmrec.py``, where they belong to a module."""
LAYER_PATTERN = "layer_pattern"
"""The setting ``layer_types`` in ``config.json``. To transformers that name means other things."""
FLOATS = ("F32", "BF16", "F16")
"""Dtypes that are read; each of their numbers is a float32."""


def exported_name(parameter: str) -> str:
    """The name of a parameter of ``mmrec.model.Model`` in a file."""
    return f"model.{RENAMED.get(parameter, parameter)}"


def import_library(name: str) -> Any:
    """Import a package of the extra ``export``.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package = name.split(".")[0]
        raise InputError(f"this needs the package {package}: pip install 'mmrec[export]'") from None


# ---- writing


def export_safetensors(loaded: LoadedModel, folder: Path) -> None:
    """Write a model as ``model.safetensors``, ``config.json`` and ``tokenizer.json``.

    Args:
        loaded: the model.
        folder: where to write; it is made if it is not there.

    Raises:
        InputError: the package safetensors is missing.
        StorageError: the system refused.
    """
    write_folder(
        loaded,
        folder,
        {CONFIG_FILE: config_to_json(loaded), **tokenizer_files(loaded.tokenizer)},
    )


def write_folder(loaded: LoadedModel, folder: Path, texts: Mapping[str, str]) -> None:
    """Write text files by name, and then the weights of a model; see ``export_safetensors``."""
    save_file = import_library("safetensors.torch").save_file
    write_error = import_library("safetensors").SafetensorError
    facts = {"step": loaded.step, "metadata": loaded.metadata, "version": VERSION}
    # "format" is what transformers asks for
    header = {"format": "pt", "mmrec": json.dumps(facts)}
    tensors = {
        exported_name(name): p.detach().contiguous() for name, p in loaded.model.named_parameters()
    }
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    with atomic_path(folder / MODEL_FILE) as temporary:
        try:
            save_file(tensors, temporary, metadata=header)
        except write_error as error:
            raise OSError(str(error)) from None


def config_to_json(loaded: LoadedModel, **others: Any) -> str:
    """Return the contents of ``config.json``.

    Args:
        loaded: the model.
        others: further keys and values.
    """
    settings = asdict(loaded.model.config)
    settings[LAYER_PATTERN] = settings.pop("layer_types")
    eot = loaded.tokenizer.eot
    contents = {
        "architectures": ["MMRecForCausalLM"],
        "model_type": MODEL_TYPE,
        **settings,
        "dtype": "float32",
        "tie_word_embeddings": True,
        "bos_token_id": eot,  # a text begins after the end of another one
        "eos_token_id": eot,
        "pad_token_id": eot,
    }
    return json.dumps(contents | others, indent=2) + "\n"


# ---- reading


def import_folder(folder: Path) -> LoadedModel:
    """Read a model that ``export_safetensors`` or ``export_transformers`` wrote.

    A folder that transformers saved after training is read, too. No code in the folder is run.

    Args:
        folder: the folder.

    Returns:
        The model, in evaluation mode and in float32. ``path`` is the folder.

    Raises:
        DamagedError: a file is damaged or truncated.
        InputError: the folder is no export, or describes a model that mmrec does not have.
    """
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise InputError(f"{folder} must be a folder that mmrec export wrote; {found}")
    config = _read_config(folder)
    try:
        has_template = (folder / TEMPLATE_FILE).is_file()
        template = _read_text(folder, TEMPLATE_FILE) if has_template else ""
        tokenizer = tokenizer_from_json(_read_text(folder, TOKENIZER_FILE), template)
    except InputError as error:
        raise InputError(f"{folder / TOKENIZER_FILE} cannot be used: {error}") from None
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{folder / TOKENIZER_FILE} must have as many tokens as {CONFIG_FILE} says, "
            f"{config.vocab_size:,}; it has {tokenizer.vocab_size:,}"
        )
    step, metadata, weights = _read_weights(_path(folder, MODEL_FILE), config, tokenizer)
    with torch.device("meta"):
        model = Model(config)
    model.load_state_dict(weights, assign=True)
    return LoadedModel(folder, model.eval().requires_grad_(), tokenizer, step, metadata)


def _path(folder: Path, name: str) -> Path:
    """The path of a file of an export, which must be there."""
    path = folder / name
    if not path.is_file():
        raise InputError(
            f"{folder} must be what mmrec export wrote --to safetensors or transformers; it holds "
            f"no {name}"
        )
    return path


def _read_text(folder: Path, name: str) -> str:
    """Read a text file of an export."""
    path = _path(folder, name)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DamagedError(f"{path} is damaged: it is not UTF-8") from None


def _read_config(folder: Path) -> ModelConfig:
    path = folder / CONFIG_FILE
    try:
        stored = json.loads(_read_text(folder, CONFIG_FILE))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not JSON: {error}") from None
    found = stored.get("model_type") if isinstance(stored, dict) else None
    if found != MODEL_TYPE:
        raise InputError(f"{path} must describe a model of type {MODEL_TYPE!r}; got {found!r}")
    names = {name: LAYER_PATTERN if name == "layer_types" else name for name in MODEL_SETTINGS}
    missing = [name for name in names.values() if name not in stored]
    if missing:
        raise InputError(f"{path} must hold {', '.join(names.values())}; {missing[0]} is missing")
    try:
        return ModelConfig.from_dict({name: stored[key] for name, key in names.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_weights(
    path: Path, config: ModelConfig, tokenizer: Tokenizer
) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """Steps taken, metadata, and the parameters of a model by their names in ``mmrec.model``."""
    library = import_library("safetensors")
    try:
        with library.safe_open(path, framework="pt") as file:
            step, metadata = _read_facts(path, file.metadata() or {}, tokenizer)
            return step, metadata, dict(_checked_tensors(path, file, config))
    except library.SafetensorError as error:
        raise DamagedError(f"{path} is damaged or truncated: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _checked_tensors(path: Path, file: Any, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The parameters in float32. All shapes are compared before the first one is read."""
    stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    if config.depth > len(stored):
        raise InputError(f"{path} must hold {config.depth:,} layers; it has {len(stored)} tensors")
    shapes = {n: (exported_name(n), shape) for n, shape in parameter_shapes(config).items()}
    for name, shape in shapes.values():
        if name not in stored:
            raise InputError(f"{path} must hold {name} of shape {shape}; it is missing")
        found, dtype = tuple(stored[name].get_shape()), stored[name].get_dtype()
        if found != shape:
            raise InputError(f"{name} in {path} must have shape {shape}; got {found}")
        if dtype not in FLOATS:
            raise InputError(f"{name} in {path} must be one of {', '.join(FLOATS)}; got {dtype}")
    unknown = sorted(stored.keys() - {name for name, _ in shapes.values()})
    if unknown:
        raise InputError(f"{path} holds {unknown[0]}, which a model of this shape does not have")
    for parameter, (name, _) in shapes.items():
        yield parameter, file.get_tensor(name).float()


def _read_facts(
    path: Path, header: dict[str, str], tokenizer: Tokenizer
) -> tuple[int, dict[str, Any]]:
    """Steps taken and metadata, as a checkpoint has them."""
    if "mmrec" not in header:
        data = {"source": "another program", "tokenizer": tokenizer.kind}
        return 0, {"train": {"data": data}}
    try:
        facts = json.loads(header["mmrec"])
        step, metadata = int(facts["step"]), dict(facts["metadata"])
        check_header(step, metadata)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: what it says of its training: {error}") from None
    return step, metadata
