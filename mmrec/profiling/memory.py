"""Memory of training and generation, counted by running the real code on tensors without numbers.

torch's fake tensors have shapes but no storage, so a step of the largest preset takes a second and
allocates nothing. Every storage that an operation makes is noted from its birth to its death, so
the count follows the code.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrec.config import ModelConfig, TrainConfig
from mmrec.inference.generate import PROMPT_CHUNK
from mmrec.model import Model
from mmrec.optimizer import MuonAdamW, parameter_groups
from mmrec.training.replicas import count_lanes

PARTS = ("weights", "moments", "gradients", "activations", "temporaries", "holes", "process")
HOLES = 0.2
"""Share of activations and temporaries that the heap has in holes besides, where freed blocks stay
in it; measured 12 to 29 %, on a busy machine 24 to 36 % and once 63 %."""
PROCESS = {"training": 580_000_000, "generation": 470_000_000}
"""Python, torch, the kernels and the buffers of the matrix libraries, as benchmarks/memory_use.py
found them with two threads of torch 2.13."""


class Ledger(TorchDispatchMode):
    """While it is entered, counts the bytes of every storage that comes to be, until it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}
        """Of the storages that live, by their addresses, which are used again."""
        self.alive: dict[int, int] = {}
        """Their bytes by number; 0 for what was there before."""
        self.now = 0
        self.then: dict[int, int] = {}
        """What was alive when it was most."""
        self.peak = self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._note((args, kwargs), 0)
        made = func(*args, **(kwargs or {}))
        self._note(made, 1)
        return made

    def _note(self, tensors: Any, new: int) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.numbers:
                storage = x.untyped_storage()
                number = self._count = self._count + 1
                self.numbers[storage._cdata] = number
                self.alive[number] = new * storage.nbytes()
                self.now += self.alive[number]
                weakref.finalize(storage, self._forget, storage._cdata)
        if self.now > self.peak:
            self.peak, self.then = self.now, self.alive.copy()

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(self.numbers.pop(key))


def _bytes(ledger: dict[int, int], keys: set[int]) -> int:
    return sum(size for key, size in ledger.items() if key in keys)


def training(config: ModelConfig, train: TrainConfig) -> dict[str, int]:
    """Bytes of a training step by part, at the moment when all together are most.

    Args:
        config: the model.
        train: batch, seq_len, precision (``auto`` counts as float32), accumulate and recompute
            count; windows are taken to start without a state.

    Returns:
        PARTS and their bytes: activations are what forward keeps for backward, gradients those of
        every lane, temporaries what is alive within one operation or a few. All but the last two
        are counted.
    """
    with FakeTensorMode():
        model = Model(config)
        model.set_precision(train.precision)
        model.activation_checkpointing = train.recompute
        lanes = count_lanes(model, train.batch)
        optimizer = MuonAdamW(
            parameter_groups(model, 0.1), lr=1.0, betas=(0.9, 0.95), matrix_lr=1.0
        )
        parameters = list(model.parameters())
        tokens = torch.zeros(-(-train.batch // lanes), train.seq_len, dtype=torch.int64)
        with Ledger() as ledger:
            loss, _ = model.loss(tokens, tokens)
            kept = set(ledger.alive)
            gradients = torch.autograd.grad(loss, parameters)
        made = {ledger.numbers[g.untyped_storage()._cdata] for g in gradients}
        learning = {
            "gradients": lanes * _bytes(ledger.then, made),
            "activations": lanes * _bytes(ledger.then, kept - made),
            "temporaries": lanes * _bytes(ledger.then, ledger.then.keys() - kept - made),
        }
        size = sum(4 * p.numel() for p in parameters)
        if train.accumulate > 1:
            learning["gradients"] += size
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        with Ledger() as first:
            optimizer.step()
        with Ledger() as second:
            optimizer.step()
        update = {"gradients": size, "activations": 0, "temporaries": lanes * second.peak}
    most = max(learning, update, key=lambda parts: sum(parts.values()))
    holes = 0 if train.recompute else round(HOLES * (most["activations"] + most["temporaries"]))
    return {
        "weights": size,
        "moments": first.now,
        **most,
        "holes": holes,
        "process": PROCESS["training"],
    }


def generation(config: ModelConfig) -> dict[str, int]:
    """Bytes of generation by part: weights, the state, temporaries while a prompt of 1,024 tokens
    and more is read, the process."""
    with FakeTensorMode(), torch.inference_mode():
        model = Model(config).eval()
        piece = torch.zeros(1, PROMPT_CHUNK, dtype=torch.int64)
        with Ledger() as ledger:
            x, state = model.hidden_states(piece)
            model.lm_head(x[0, -1])
            del x
            held = ledger.now
        del state
        size = sum(4 * p.numel() for p in model.parameters())
    return {
        "weights": size,
        "state": held,
        "temporaries": ledger.peak - held,
        "process": PROCESS["generation"],
    }
