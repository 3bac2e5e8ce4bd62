"""Pretrained models: trained once, installed with mmrec, loaded by name, without a network.

``index.toml`` lists them. Each has a checkpoint with int8 weights, ``NAME.h5``, and a model card,
``NAME.md``. ``benchmarks/bases`` holds the recipes that made them.

Larger models come as a package of their own, ``mmrec-models``. Any package can bring models: it
names itself in the entry points ``mmrec.pretrained`` and has an index of this form in its folder.

>>> mmrec.load("english").generate("It was", seed=1)  # doctest: +SKIP
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrec.errors import InputError, did_you_mean

FOLDER = Path(__file__).parent
INDEX = "index.toml"
ENTRY_POINTS = "mmrec.pretrained"
"""Group of the entry points of packages that bring models."""
MODELS_PACKAGE = "mmrec-models"
IN_MODELS_PACKAGE = ("english-mini",)
"""The models of MODELS_PACKAGE, which is built from the same tree and installed apart."""


@dataclass(frozen=True)
class PretrainedModel:
    """What the index says of a pretrained model."""

    name: str
    path: Path
    """Its checkpoint."""
    summary: str
    """What it has read, in a few words."""
    parameters: int
    tokenizer: str
    """Kind of its tokenizer: bpe, char or byte."""
    vocab_size: int
    preset: str
    sha256: str
    """Of the bytes of the checkpoint."""
    read_corpora: Sequence[str] = ()
    """Those of mmrec's own corpora that it has read, such as ``stdlib``."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Everything else: tokens, licence, bits per byte by text …"""

    @property
    def card(self) -> str:
        """The model card, in Markdown."""
        return self.path.with_suffix(".md").read_text(encoding="utf-8")

    def checked_path(self) -> Path:
        """Return the path of the checkpoint after comparing its hash.

        Raises:
            InputError: the file is missing, or is not the one that was installed.
        """
        try:
            digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(
                f"the pretrained model {self.name} is missing from this installation "
                f"({self.path}: {error.strerror}): install mmrec again"
            ) from None
        if digest != self.sha256:
            raise InputError(
                f"the pretrained model {self.name} is not the one that was installed: the SHA-256 "
                f"of {self.path} must be {self.sha256[:16]}…; it is {digest[:16]}…: install mmrec "
                "again"
            )
        return self.path


def pretrained_models(folder: Path | None = None) -> dict[str, PretrainedModel]:
    """Return the pretrained models of this installation by name, in the order of the indexes.

    Args:
        folder: where the index is; None is the folder of this package and, after it, those of other
            packages. Of two models with one name the first is meant.
    """
    models: dict[str, PretrainedModel] = {}
    for place in [folder] if folder else [FOLDER, *_folders_of_packages()]:
        index = place / INDEX
        if not index.is_file():
            continue
        for name, entry in tomllib.loads(index.read_text(encoding="utf-8")).items():
            own = {k: entry.pop(k) for k in PretrainedModel.__dataclass_fields__ if k in entry}
            models.setdefault(name, PretrainedModel(name, place / f"{name}.h5", **own, facts=entry))
    return models


@functools.cache
def _folders_of_packages() -> tuple[Path, ...]:
    """Folders of the installed packages that bring models. None of them is imported."""
    folders = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        spec = importlib.util.find_spec(entry.module.partition(".")[0])
        if spec is not None and spec.origin is not None:
            folders.append(Path(spec.origin).parent)
    return tuple(folders)


def find_pretrained(name: str | Path) -> PretrainedModel | None:
    """Return the pretrained model of a name; None if there is none, or if a file has the name."""
    text = str(name)
    if not is_plain_name(text) or Path(text).exists():
        return None
    return pretrained_models().get(text)


def names_pretrained(name: str | Path) -> bool:
    """Whether a name is that of a pretrained model, installed or not, and not that of a file."""
    is_apart = str(name) in IN_MODELS_PACKAGE and not Path(name).exists()
    return is_apart or find_pretrained(name) is not None


def pretrained_of(path: Path) -> PretrainedModel | None:
    """Return the pretrained model whose checkpoint a path is; None of any other."""
    resolved = path.resolve()
    return next((m for m in pretrained_models().values() if m.path.resolve() == resolved), None)


def note_if_read(path: Path, source: str, begun_from: str = "") -> str:
    """What to tell of scores on a corpus that a pretrained model has read; empty if it has not.

    Args:
        path: checkpoint of the model.
        source: name of the corpus, as in ``--data``.
        begun_from: the checkpoint that its training began from.
    """
    model = pretrained_of(path)
    if model is not None and source in model.read_corpora:
        return f"{model.name} has read {source}, so scores on it say nothing about new text"
    model = pretrained_of(Path(begun_from)) if begun_from else None
    if model is not None and source in model.read_corpora:
        return (
            f"the model began from {model.name}, which has read {source}, so scores on it say "
            "nothing about new text"
        )
    return ""


def is_plain_name(text: str) -> bool:
    """Whether a text can be the name of a pretrained model: no path, no file name."""
    separators = (os.sep, os.altsep or os.sep, ".")
    return bool(text) and text == text.strip() and not any(s in text for s in separators)


def unknown_name(name: str) -> str:
    """What an error says of a name that is neither a file nor that of a pretrained model."""
    known = pretrained_models()
    if name in IN_MODELS_PACKAGE:
        return f"no checkpoint at {name}: {how_to_install(name)}"
    names = f": there are {', '.join(known)}" if known else ""
    return (
        f"no checkpoint at {name}: no such file or folder, and no pretrained model of this name"
        f"{did_you_mean(name, (*known, *IN_MODELS_PACKAGE)) or names}"
    )


def how_to_install(name: str) -> str:
    """What to do for a model of IN_MODELS_PACKAGE that is not there."""
    return (
        f"the pretrained model {name} is in the package {MODELS_PACKAGE}, which is not installed; "
        "in a clone of mmrec: pip install benchmarks/bases/mmrec-models"
    )
