"""Memory of training and generation, counted by running the real code on fake tensors.

torch's fake tensors have shapes but no storage: a step of the largest preset takes a second and
allocates nothing. Every storage that an operation makes is tracked from its creation until it is
freed, so the count follows the code.
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrec.config import ModelConfig, TrainConfig, parameter_shapes, state_layout
from mmrec.inference.decoder import READ_CHUNK
from mmrec.model import Model
from mmrec.optimizer import build_optimizer
from mmrec.runtime.numeric import cdiv
from mmrec.training.replica_processes import MEMORY_BYTES
from mmrec.training.replicas import replica_count

TRAINING_PARTS = (
    "weights",
    "average",
    "moments",
    "gradients",
    "activations",
    "temporaries",
    "fragmentation",
    "process",
)
FRAGMENTATION = 0.2
"""Unusable heap as a share of activations and temporaries, where freed blocks stay in the heap:
measured 0.12 to 0.29, on a busy machine 0.24 to 0.36 and once 0.63."""
PROCESS_BYTES = {"training": 580_000_000, "generation": 200_000_000}
"""Python, the kernels, for training torch and the buffers of the matrix libraries, as
benchmarks/memory_use.py measured them with two threads of torch 2.13."""


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of every tensor storage that is created while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: dict[int, int] = {}
        """Address of a living storage -> its id. Addresses are reused, ids are not."""
        self.living: dict[int, int] = {}
        """Id of a living storage -> its bytes; 0 if it existed before."""
        self.current = 0
        """Bytes that are alive now."""
        self.peak = 0
        """Most bytes that were alive at once."""
        self.living_at_peak: dict[int, int] = {}
        """What ``living`` was at the peak."""
        self._next_id = 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and track the storages of its results."""
        self._track((args, kwargs), created=False)
        result = func(*args, **(kwargs or {}))
        self._track(result, created=True)
        return result

    def _track(self, tensors: Any, *, created: bool) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and x.is_sparse:
                self._track(_parts_of(x), created=created)
            elif isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.ids:
                storage = x.untyped_storage()
                id_, self._next_id = self._next_id, self._next_id + 1
                self.ids[storage._cdata] = id_
                self.living[id_] = storage.nbytes() if created else 0
                self.current += self.living[id_]
                weakref.finalize(storage, self._free, storage._cdata)
        if self.current > self.peak:
            self.peak, self.living_at_peak = self.current, self.living.copy()

    def _free(self, address: int) -> None:
        self.current -= self.living.pop(self.ids.pop(address))


def _parts_of(x: Tensor) -> list[Tensor]:
    """The dense tensors that hold a tensor, which may be sparse."""
    return [x._indices(), x._values()] if x.is_sparse else [x]


def _sum_bytes(storages: dict[int, int], ids: set[int]) -> int:
    return sum(size for id_, size in storages.items() if id_ in ids)


def training_memory(config: ModelConfig, train: TrainConfig) -> dict[str, int]:
    """Count the bytes of a training step by part, at the moment when their sum is largest.

    Args:
        config: the model.
        train: the settings batch_size, seq_len, precision (``auto`` counts as float32),
            gradient_accumulation_steps, activation_checkpointing, replicas (``auto`` counts as
            processes) and ema_decay count. Windows are taken to start from the empty state.

    Returns:
        Bytes of each of TRAINING_PARTS; ``average`` only if the weights are averaged. Gradients are
        those of all replicas, activations what forward keeps for backward, temporaries what lives
        for one operation or a few. All but the last two parts are counted; those are measured
        constants.
    """
    with FakeTensorMode():
        model = Model(config)
        model.set_precision("bfloat16" if train.optimizer.precision == "bfloat16" else "float32")
        model.activation_checkpointing = train.optimizer.activation_checkpointing
        model.sparse_gradients = True
        replicas = replica_count(model, train.data.batch_size)
        processes = replicas - 1 if train.optimizer.replicas != "threads" else 0
        optimizer = build_optimizer(model)
        parameters = list(model.parameters())
        rows = cdiv(train.data.batch_size, replicas)
        tokens = torch.zeros(rows, train.data.seq_len, dtype=torch.int64)
        with StorageTracker() as tracker:
            loss, _ = model.loss(tokens, tokens)
            after_forward = set(tracker.living)
            gradients = torch.autograd.grad(loss, parameters)
        at_peak = tracker.living_at_peak
        stored = [x for g in gradients for x in _parts_of(g)]
        gradient_ids = {tracker.ids[x.untyped_storage()._cdata] for x in stored}
        activation_ids = after_forward - gradient_ids
        backward = {
            "gradients": replicas * _sum_bytes(at_peak, gradient_ids),
            "activations": replicas * _sum_bytes(at_peak, activation_ids),
            "temporaries": replicas
            * _sum_bytes(at_peak, at_peak.keys() - after_forward - gradient_ids),
        }
        weights = sum(4 * p.numel() for p in parameters)
        summed = sum(x.nbytes for g in gradients for x in _parts_of(g))
        if train.optimizer.gradient_accumulation_steps > 1:
            backward["gradients"] += summed
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        with StorageTracker() as first_step:  # makes the moments
            optimizer.step()
        with StorageTracker() as second_step:
            optimizer.step()
        update = {
            "gradients": summed,
            "activations": 0,
            "temporaries": replicas * second_step.peak,
        }
    largest = max(backward, update, key=lambda parts: sum(parts.values()))
    fragmented = largest["activations"] + largest["temporaries"]
    if model.activation_checkpointing:
        fragmented = 0  # a run with it returns freed blocks to the system
    return {
        "weights": weights,
        **({"average": weights} if train.optimizer.ema_decay else {}),
        "moments": first_step.current,
        **largest,
        "fragmentation": round(FRAGMENTATION * fragmented),
        "process": PROCESS_BYTES["training"] + processes * MEMORY_BYTES,
    }


def generation_memory(config: ModelConfig) -> dict[str, int]:
    """Count the bytes of generation by part.

    Returns:
        Bytes of the weights in float32, of the recurrent state of one text, of temporaries (a
        second copy of the weights while they are laid out, or later what a prompt is read in), and
        of the process (a measured constant).
    """
    shapes = parameter_shapes(config)
    projections = max(s[0] for name, s in shapes.items() if name.endswith("in_proj.weight"))
    values_per_token = 4 * config.width + projections + config.ffn_width
    reading = 4 * READ_CHUNK * values_per_token + 21 * config.vocab_size
    weights = sum(4 * math.prod(shape) for shape in shapes.values())
    return {
        "weights": weights,
        "state": 4 * state_layout(config)[-1][-1][2],
        "temporaries": max(weights, reading),
        "process": PROCESS_BYTES["generation"],
    }
