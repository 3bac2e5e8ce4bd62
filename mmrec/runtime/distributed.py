"""Distributed training on CPUs, with torch.distributed over gloo.

Each process computes the gradients of its share of the rows of a batch. With ``ddp`` each process
holds the whole model, and gradients are summed (Li et al. 2020, arXiv:2006.15704). With ``fsdp``
each process holds a shard of every parameter, gradient and moment, and the parameters of a layer
are gathered while it computes (Zhao et al. 2023, arXiv:2304.11277).
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
from mmrec.runtime.hardware import bfloat16_instructions
from mmrec.runtime.numeric import cdiv

STRATEGIES = ["ddp", "fsdp"]
BUCKET_ELEMENTS = 1 << 23
"""Gradient elements that are summed in one message."""
TIMEOUT = timedelta(days=30)
"""How long processes wait while another one works alone, for instance prepares a text."""

Value = TypeVar("Value")
Work = Callable[[list[Tensor]], list[Tensor]]


class ProcessGroup:
    """The operations of one process that trains alone, and the interface of several.

    All processes of a ``TorchrunGroup`` must call the same operations in the same order.
    """

    rank, size, local_rank = 0, 1, 0
    sharded = False
    """Whether parameters are sharded (FSDP)."""

    def bfloat16_instructions(self) -> str:
        """Name the instructions for bfloat16; see ``mmrec.runtime.hardware``.

        The name is empty unless every process has such instructions, since all must compute the
        same.
        """
        found = self.all_gather_object(bfloat16_instructions())
        return found[0] if all(found) else ""

    def shard_layer(self, module: nn.Module) -> nn.Module:
        """Shard the parameters of a layer in place, if this group shards. Return the layer."""
        return module

    def shard_model(self, model: nn.Module) -> None:
        """Shard the parameters of a model that belong to no layer, if this group shards."""

    def reshard(self, model: nn.Module) -> None:
        """Free the full parameters that a forward pass without a backward pass has gathered."""

    def broadcast_object(self, value: Value) -> Value:
        """Return the value of rank 0. The values of other ranks are ignored."""
        return value

    def all_gather_object(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in the order of ranks."""
        return [value]

    def all_reduce_max(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        return value

    def local_rank_zero_first(self, work: Callable[[], Value]) -> Value:
        """Call ``work`` in one process of each machine, then in the others. Return its result."""
        return work()

    def all_reduce_gradients(self, loss: float, gradients: list[Tensor]) -> float:
        """Sum the losses of all ranks, and their gradients in place.

        Args:
            loss: This rank's share of the loss.
            gradients: Float32 tensors of any shape, which may be sparse in their first axis. FSDP
                has summed them already.

        Returns:
            The sum of all losses.
        """
        return loss

    def full_tensor(self, x: Tensor) -> Tensor:
        """Return a parameter, moment or norm in full, gathered from all ranks."""
        return x

    def local_shard(self, x: Tensor) -> Tensor:
        """Return this rank's shard of a tensor. Writing to it changes the tensor."""
        return x

    def scatter_tensor_(self, x: Tensor, value: Tensor | None) -> Tensor:
        """Write the full value that rank 0 has into ``x``.

        Args:
            x: A parameter or moment, possibly sharded.
            value: Float32, of the full shape of ``x``; None in the other ranks.

        Returns:
            ``x``.
        """
        assert value is not None
        return x.copy_(value)

    def map_sharded(
        self, work: Work, shards: list[Tensor], shapes: Sequence[torch.Size], dtype: torch.dtype
    ) -> list[Tensor]:
        """Apply a function to full tensors of which each rank holds a shard.

        Each full tensor is computed by one rank.

        Args:
            work: Maps a list of full tensors to as many tensors of the same shapes.
            shards: This rank's shards.
            shapes: The full shapes.
            dtype: That in which shards travel. Inputs and results lose no precision only if they
                are numbers of this dtype.

        Returns:
            This rank's shards of the results, in float32.
        """
        return work(shards)


SINGLE_PROCESS = ProcessGroup()


class TorchrunGroup(ProcessGroup):
    """The processes that torchrun started, connected over gloo.

    As a context manager, it ends all processes together. A failing rank records its error in the
    store, and the other ranks exit silently. If another rank vanished without a record, leaving the
    context raises ProcessLostError.
    """

    def __init__(self, strategy: str) -> None:
        """Connect to the other processes.

        Args:
            strategy: One of ``STRATEGIES``.

        Raises:
            InputError: The installed NumPy cannot shard.
        """
        self._store, self.rank, self.size = next(dist.rendezvous("env://"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size)
        self._patient_group = dist.new_group(timeout=TIMEOUT)
        self.sharded = strategy == "fsdp"
        if self.sharded:
            self._mesh = dist.init_device_mesh("cpu", (self.size,))
            # FSDP frees and refills the storage of full parameters. torch forbids that for a tensor
            # that was shared by Tensor.numpy(), but not for one that was shared by DLPack.
            if not np.from_dlpack(torch.zeros(1)).flags.writeable:
                raise InputError("--parallel fsdp needs NumPy 2.1 or newer: upgrade it, or use ddp")
            use_dlpack()
        # here, where all processes are at the same place: rank 0 builds its trainer before others
        self._bfloat16_instructions = super().bfloat16_instructions()

    def bfloat16_instructions(self) -> str:
        return self._bfloat16_instructions

    def __enter__(self) -> "TorchrunGroup":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        if kind is None:  # together: as soon as one exits with an error, torchrun kills the others
            with contextlib.suppress(RuntimeError):  # a rank may have died after its work
                dist.barrier()
                dist.destroy_process_group()
            return
        first = True
        with contextlib.suppress(RuntimeError):  # the store is lost with the machine of rank 0
            first = self._store.add("mmrec/errors", 1) == 1
        if issubclass(kind, RuntimeError) and _is_connection_error(error):
            if first:
                raise ProcessLostError("a process of this job has ended") from None
            raise SystemExit(1) from None

    def shard_layer(self, module: nn.Module) -> nn.Module:
        if self.sharded:
            self._shard(module, reshard_after_forward=True)
        return module

    def shard_model(self, model: nn.Module) -> None:
        if self.sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            # the loss needs the embedding again
            self._shard(model, reshard_after_forward=False)
            register_fsdp_forward_method(model, "hidden_states")

    def _shard(self, module: nn.Module, *, reshard_after_forward: bool) -> None:
        from torch.distributed.fsdp import fully_shard  # takes half a second to import

        sharded = fully_shard(module, mesh=self._mesh, reshard_after_forward=reshard_after_forward)
        # A rank's loss is already its share of the batch's loss, so gradients are summed without
        # a division. gloo has no other reduction.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    def reshard(self, model: nn.Module) -> None:
        if self.sharded:
            model.reshard()  # type: ignore[operator]

    def broadcast_object(self, value: Value) -> Value:
        values = [value]
        dist.broadcast_object_list(values, 0, group=self._patient_group)
        return values[0]

    def all_gather_object(self, value: Value) -> list[Value]:
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_reduce_max(self, value: float) -> float:
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def local_rank_zero_first(self, work: Callable[[], Value]) -> Value:
        result = None if self.local_rank else work()
        dist.barrier(self._patient_group)
        return result if result is not None else work()

    def all_reduce_gradients(self, loss: float, gradients: list[Tensor]) -> float:
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total)
        bucket: list[Tensor] = []
        for gradient in gradients:
            if gradient.is_sparse:
                self._all_reduce_sparse(gradient)
        dense = [x for x in gradients if not (self.sharded or x.is_sparse)]
        for i, gradient in enumerate(dense, 1):
            bucket.append(gradient)
            if i == len(dense) or sum(x.numel() for x in bucket) >= BUCKET_ELEMENTS:
                flat = torch.cat([x.reshape(-1) for x in bucket])
                dist.all_reduce(flat)
                for x, summed in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                    x.copy_(summed.view_as(x))
                bucket = []
        return total.item()

    def _all_reduce_sparse(self, gradient: Tensor) -> None:
        """Put the rows of all ranks into a gradient, in the order of ranks."""
        indices, values = gradient._indices()[0], gradient._values()
        missing = int(self.all_reduce_max(len(values))) - len(values)
        # a row of zeros adds nothing, whatever its index
        indices = torch.cat((indices, indices.new_zeros(missing)))
        values = torch.cat((values, values.new_zeros(missing, *values.shape[1:])))
        all_indices = [torch.empty_like(indices) for _ in range(self.size)]
        all_values = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(all_indices, indices)
        dist.all_gather(all_values, values)
        summed = torch.sparse_coo_tensor(
            torch.cat(all_indices)[None],
            torch.cat(all_values),
            gradient.shape,
            check_invariants=False,
        )
        gradient.zero_().add_(summed)

    def full_tensor(self, x: Tensor) -> Tensor:
        return x.full_tensor() if self.sharded else x  # type: ignore[attr-defined]

    def local_shard(self, x: Tensor) -> Tensor:
        return x.to_local() if self.sharded else x  # type: ignore[attr-defined]

    def scatter_tensor_(self, x: Tensor, value: Tensor | None) -> Tensor:
        full = torch.empty(x.shape) if value is None else value.contiguous()
        dist.broadcast(full, 0)
        shard = full.view(-1).split(self._shard_sizes(x.shape))[self.rank] if self.sharded else full
        local = self.local_shard(x)
        local.copy_(shard.view_as(local))
        return x

    def map_sharded(
        self, work: Work, shards: list[Tensor], shapes: Sequence[torch.Size], dtype: torch.dtype
    ) -> list[Tensor]:
        ranks, sizes = range(self.size), [self._shard_sizes(shape) for shape in shapes]
        owned = [range(rank, len(shards), self.size) for rank in ranks]
        mine = owned[self.rank]
        if self.sharded:
            flat = [x.reshape(-1).to(dtype) for x in shards]
            received = self._all_to_all(
                [[flat[i] for i in owned[r]] for r in ranks],
                [[sizes[i][r] for i in mine] for r in ranks],
                dtype,
            )
            full = [
                torch.cat(x).view(shapes[i])
                for i, x in zip(mine, zip(*received, strict=True), strict=True)
            ]
        else:
            full = [shards[i] for i in mine]
        results = [x.reshape(-1).to(dtype) for x in work(full)] if full else []
        split = [
            x.split(sizes[i]) if self.sharded else [x] * self.size
            for i, x in zip(mine, results, strict=True)
        ]
        received = self._all_to_all(
            [[x[r] for x in split] for r in ranks],
            [[shards[i].numel() for i in owned[r]] for r in ranks],
            dtype,
        )
        return [
            received[i % self.size][i // self.size].float().view_as(x) for i, x in enumerate(shards)
        ]

    def _shard_sizes(self, shape: torch.Size) -> list[int]:
        """Return the elements in each rank's shard.

        Shards hold ``cdiv(rows, size)`` rows, and the last ones hold fewer or none, as in FSDP.
        """
        rows_per_rank = cdiv(shape[0], self.size)
        rows = [
            max(0, min(rows_per_rank, shape[0] - rank * rows_per_rank)) for rank in range(self.size)
        ]
        return [n * shape[1:].numel() for n in rows]

    def _all_to_all(
        self, sent: list[list[Tensor]], sizes: list[list[int]], dtype: torch.dtype
    ) -> list[list[Tensor]]:
        """Send tensors of shape (n,) to each rank, and receive some from each.

        Args:
            sent: For each rank, the tensors that it gets.
            sizes: For each rank, the lengths of the tensors that come from it.
            dtype: That of all tensors.

        Returns:
            For each rank, the tensors that came from it.
        """
        empty = torch.empty(0, dtype=dtype)
        messages = [torch.cat([empty, *x]) for x in sent]
        received = torch.empty(sum(map(sum, sizes)), dtype=dtype)
        lengths = [sum(x) for x in sizes]
        dist.all_to_all_single(received, torch.cat(messages), lengths, [len(x) for x in messages])
        return [list(x.split(n)) for x, n in zip(received.split(lengths), sizes, strict=True)]


def _is_connection_error(error: BaseException) -> bool:
    """Return whether an error says that the other end of a connection is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "onnection" in text
