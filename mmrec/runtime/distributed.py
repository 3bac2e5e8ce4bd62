"""Several processes that train one model together, on torch's own engine: torch.distributed.

Each takes a share of the rows of every batch. With ``ddp`` each holds the whole model and gradients
are added up (Li et al. 2020, arXiv:2006.15704); with ``fsdp`` each holds a share of every
parameter, gradient and moment, and a layer is whole only while it works (Zhao et al. 2023,
arXiv:2304.11277).
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmrec.errors import InputError, ProcessLostError
from mmrec.kernels._tensors import use_dlpack

KINDS = ["ddp", "fsdp"]
BUCKET = 1 << 23  # gradients that are added up in one message
PATIENCE = timedelta(days=30)  # for what one process does while the others wait: reading a text

Value = TypeVar("Value")
Work = Callable[[list[Tensor]], list[Tensor]]


class World:
    """One process alone. Of several (``Ranks``), all call the same operations in the same order."""

    rank, size, local_rank = 0, 1, 0
    sharded = False

    def shard(self, module: nn.Module) -> nn.Module:
        """A layer whose parameters are dealt out, if this world shards; changed in place."""
        return module

    def shard_root(self, model: nn.Module) -> None:
        """Deal out what of a model is in no layer."""

    def rest(self, model: nn.Module) -> None:
        """Free what a forward without a backward left whole."""

    def told(self, value: Value) -> Value:
        """The value that rank 0 has."""
        return value

    def all(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order."""
        return [value]

    def most(self, value: float) -> float:
        """The largest of all values."""
        return value

    def in_turn(self, work: Callable[[], Value]) -> Value:
        """Work first in one process of each machine, then in the others."""
        return work()

    def add_up(self, loss: float, gradients: list[Tensor]) -> float:
        """The sum of all ranks' losses; gradients, unless they are sharded, become their sums."""
        return loss

    def whole(self, x: Tensor) -> Tensor:
        """A parameter, moment or norm with the shares of all ranks."""
        return x

    def local(self, x: Tensor) -> Tensor:
        """The share of it that is here, which may be written to."""
        return x

    def put(self, x: Tensor, value: Tensor | None) -> Tensor:
        """Write the whole value that rank 0 has into x; returns x."""
        assert value is not None
        return x.copy_(value)

    def apart(self, work: Work, parts: list[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Work on tensors of which each rank has its share; returns its share of what comes out.

        Each whole tensor is worked on by one rank. On the way they are in bfloat16, so it is for
        work that begins and ends with that. ``work`` maps so many tensors to as many alike.
        """
        return work(parts)


ALONE = World()


class Ranks(World):
    """The processes that torchrun started, over gloo. As a context: what ends one ends all.

    Left by an error of its own, a process says so to the others, which then end without a word;
    left because another one vanished, it raises ProcessLostError, or SystemExit if one has said so already.
    """

    def __init__(self, kind: str) -> None:
        """``kind`` is of KINDS. Raises InputError if the library cannot do it."""
        self._store, self.rank, self.size = next(dist.rendezvous("env://"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size)
        self._patient = dist.new_group(timeout=PATIENCE)
        self.sharded = kind == "fsdp"
        if self.sharded:
            self._mesh = dist.init_device_mesh("cpu", (self.size,))
            # a tensor that NumPy has seen cannot be freed and filled again, as a layer's weights
            # must be; one that was lent by DLPack can
            if not np.from_dlpack(torch.zeros(1)).flags.writeable:
                raise InputError("--parallel fsdp needs NumPy 2.1 or newer: upgrade it, or use ddp")
            use_dlpack()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        if kind is None:  # all together: torchrun ends the others once one has ended with a code
            with contextlib.suppress(RuntimeError):  # all is done, also if one has died since
                dist.barrier()
                dist.destroy_process_group()
            return
        first = True
        with contextlib.suppress(RuntimeError):  # where rank 0's machine is gone, so is the store
            first = self._store.add("mmrec/said", 1) == 1
        if issubclass(kind, RuntimeError) and _is_network(error):
            if first:
                raise ProcessLostError("a process of this job has ended") from None
            raise SystemExit(1) from None

    def shard(self, module: nn.Module) -> nn.Module:
        if self.sharded:
            self._deal(module, whole_until_backward=False)
        return module

    def shard_root(self, model: nn.Module) -> None:
        if self.sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            self._deal(model, whole_until_backward=True)  # the loss needs the embedding, too
            register_fsdp_forward_method(model, "hidden_states")

    def _deal(self, module: nn.Module, *, whole_until_backward: bool) -> None:
        from torch.distributed.fsdp import fully_shard  # half a second that only this needs

        made = fully_shard(module, mesh=self._mesh, reshard_after_forward=not whole_until_backward)
        # sums, as a rank's loss is already a share of the batch's; gloo knows no other reduction
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)

    def rest(self, model: nn.Module) -> None:
        if self.sharded:
            model.reshard()  # type: ignore[operator]

    def told(self, value: Value) -> Value:
        held = [value]
        dist.broadcast_object_list(held, 0, group=self._patient)
        return held[0]

    def all(self, value: Value) -> list[Value]:
        held = [value] * self.size
        dist.all_gather_object(held, value)
        return held

    def most(self, value: float) -> float:
        held = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return held.item()

    def in_turn(self, work: Callable[[], Value]) -> Value:
        made = None if self.local_rank else work()
        dist.barrier(self._patient)
        return made if made is not None else work()

    def add_up(self, loss: float, gradients: list[Tensor]) -> float:
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total)
        bucket: list[Tensor] = []
        for i, x in enumerate([] if self.sharded else gradients, 1):
            bucket.append(x)
            if i == len(gradients) or sum(x.numel() for x in bucket) >= BUCKET:
                flat = torch.cat([x.reshape(-1) for x in bucket])
                dist.all_reduce(flat)
                for x, summed in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                    x.copy_(summed.view_as(x))
                bucket = []
        return total.item()

    def whole(self, x: Tensor) -> Tensor:
        return x.full_tensor() if self.sharded else x  # type: ignore[attr-defined]

    def local(self, x: Tensor) -> Tensor:
        return x.to_local() if self.sharded else x  # type: ignore[attr-defined]

    def put(self, x: Tensor, value: Tensor | None) -> Tensor:
        whole = torch.empty(x.shape) if value is None else value.contiguous()
        dist.broadcast(whole, 0)
        sizes = self._sizes(x.shape)
        share = whole.view(-1).split(sizes)[self.rank] if self.sharded else whole
        local = self.local(x)
        local.copy_(share.view_as(local))
        return x

    def apart(self, work: Work, parts: list[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        ranks, sizes = range(self.size), [self._sizes(shape) for shape in shapes]
        owned = [range(rank, len(parts), self.size) for rank in ranks]
        mine = owned[self.rank]
        if self.sharded:
            flat = [x.reshape(-1).bfloat16() for x in parts]
            came = self._exchange(
                [[flat[i] for i in owned[r]] for r in ranks],
                [[sizes[i][r] for i in mine] for r in ranks],
            )
            held = [
                torch.cat(x).view(shapes[i])
                for i, x in zip(mine, zip(*came, strict=True), strict=True)
            ]
        else:
            held = [parts[i] for i in mine]
        made = [x.reshape(-1).bfloat16() for x in work(held)] if held else []
        shares = [
            x.split(sizes[i]) if self.sharded else [x] * self.size
            for i, x in zip(mine, made, strict=True)
        ]
        came = self._exchange(
            [[x[r] for x in shares] for r in ranks],
            [[parts[i].numel() for i in owned[r]] for r in ranks],
        )
        return [came[i % self.size][i // self.size].float().view_as(x) for i, x in enumerate(parts)]

    def _sizes(self, shape: torch.Size) -> list[int]:
        """Elements of each rank's share: rows in equal numbers, fewer or none in the last ones."""
        each = -(-shape[0] // self.size)
        rows = [max(0, min(each, shape[0] - rank * each)) for rank in range(self.size)]
        return [n * shape[1:].numel() for n in rows]

    def _exchange(self, to: list[list[Tensor]], sizes: list[list[int]]) -> list[list[Tensor]]:
        """Send tensors (n,) in bfloat16 to each rank; returns those of so many sizes from each."""
        none = torch.empty(0, dtype=torch.bfloat16)
        sent = [torch.cat([none, *x]) for x in to]
        made = torch.empty(sum(map(sum, sizes)), dtype=torch.bfloat16)
        counts = [sum(x) for x in sizes]
        dist.all_to_all_single(made, torch.cat(sent), counts, [len(x) for x in sent])
        return [list(x.split(n)) for x, n in zip(made.split(counts), sizes, strict=True)]


def _is_network(error: BaseException) -> bool:
    """Whether an error is that of a connection whose other end is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "onnection" in text
