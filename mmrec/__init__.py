"""MM-Rec (multi-memory recurrence): recurrent language models for CPUs.

>>> import mmrec
>>> run = mmrec.train("book.txt", preset="tiny", minutes=5)  # doctest: +SKIP
>>> model = mmrec.load(run.best)  # doctest: +SKIP
>>> model.generate("It was", max_tokens=200, seed=1)  # doctest: +SKIP
>>> mmrec.evaluate(model, "other.txt").bits_per_byte  # doctest: +SKIP

The kernels are in ``mmrec.kernels``, torch modules made of them in ``mmrec.nn``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmrec.config import PRESETS, VERSION, ModelConfig, TrainConfig
from mmrec.errors import InputError, StorageError, TrainingDivergedError

if TYPE_CHECKING:
    from mmrec.api import adapt, evaluate, generate, load
    from mmrec.checkpoint.checkpoint import LoadedModel
    from mmrec.inference.decoder import Decoder
    from mmrec.inference.session import Session
    from mmrec.model import Model
    from mmrec.training.callbacks import Callback
    from mmrec.training.setup import Run, train
    from mmrec.training.trackers import TensorBoard, Trackio

__version__ = VERSION
__all__ = [
    "PRESETS",
    "Callback",
    "Decoder",
    "InputError",
    "LoadedModel",
    "Model",
    "ModelConfig",
    "Run",
    "Session",
    "StorageError",
    "TensorBoard",
    "Trackio",
    "TrainConfig",
    "TrainingDivergedError",
    "__version__",
    "adapt",
    "evaluate",
    "generate",
    "load",
    "train",
]

# Imported at first use: torch takes a second to import, and configurations do not need it.
_LAZY = {
    "Callback": "mmrec.training.callbacks",
    "Decoder": "mmrec.inference.decoder",
    "LoadedModel": "mmrec.checkpoint.checkpoint",
    "Model": "mmrec.model",
    "Run": "mmrec.training.setup",
    "Session": "mmrec.inference.session",
    "TensorBoard": "mmrec.training.trackers",
    "Trackio": "mmrec.training.trackers",
    "adapt": "mmrec.api",
    "evaluate": "mmrec.api",
    "generate": "mmrec.api",
    "load": "mmrec.api",
    "train": "mmrec.training.setup",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmrec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
