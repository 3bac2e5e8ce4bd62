"""Replicas: threads of one process that each run forward and backward on a share of a batch.

A step of a small model is hundreds of short operations. Splitting each operation over the cores
costs one wake-up and one wait per operation. Splitting the batch costs one of each per step, and
every core works on its own data in its own cache. A replica runs torch and the kernels on one
thread, so nothing inside it waits for a core that another process occupies.

All replicas share the model's parameters. Each computes its own gradients, which are then added.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmrec.model import LayerState, Model, State
from mmrec.runtime.distributed import SINGLE_PROCESS, ProcessGroup

MAX_PARAMETERS = 64_000_000
"""Larger models use one replica: gradients per replica would cost more than they save."""

Result = TypeVar("Result")


class Replicas:
    """A pool of threads that use one core each.

    With a count of 1 there is no pool: tasks run in the calling thread, on all cores.
    """

    def __init__(self, count: int) -> None:
        """Start ``count`` threads."""
        self.count, self._pool = count, None
        if count == 1:
            return
        threads, all_started = torch.get_num_threads(), threading.Barrier(count + 1)

        def start() -> None:
            torch.get_num_threads()  # a thread's first query takes over the newest global setting
            torch.set_num_threads(1)  # for this thread; a thread that starts later would inherit it
            all_started.wait()

        self._pool = ThreadPoolExecutor(count, "mmrec-replica", start)
        for _ in range(count):
            self._pool.submit(int)
        all_started.wait()
        torch.set_num_threads(threads)

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run tasks side by side; return their results in order.

        If tasks fail, the first error is raised once all tasks have ended.
        """
        if self._pool is None:
            return [task() for task in tasks]
        futures = [self._pool.submit(task) for task in tasks]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in futures]


def replica_count(
    model: Model, batch_size: int, process_group: ProcessGroup = SINGLE_PROCESS
) -> int:
    """min(cores, batch_size) replicas below 64 M parameters, otherwise one.

    A sharded model gets one replica too: its layers are assembled for one forward at a time.
    """
    is_small = sum(p.numel() for p in model.parameters()) < MAX_PARAMETERS
    if not is_small or process_group.sharded:
        return 1
    return min(torch.get_num_threads(), batch_size)


ReplicaResult = tuple[float, Sequence[Tensor], State]
"""A replica's share of the mean loss, its gradients, and the new state of its rows."""


def forward_backward(
    model: Model,
    replicas: Replicas,
    tokens: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    *,
    state: State | None = None,
    end_of_text: int | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
    compute_loss: Callable[..., tuple[Tensor, State]] | None = None,
    soft_targets: Tensor | None = None,
) -> tuple[float, State]:
    """Add the gradient of a batch's mean loss, times ``scale``, to ``p.grad`` of each parameter.

    The replicas' gradients are added in a fixed order, so that the result does not depend on which
    thread ends first. Each replica's dropout has its own generator, seeded from torch's global
    generator. In a distributed run every process draws the seeds of all processes, so that the
    global generators stay equal.

    Args:
        model: in training mode.
        replicas: what the batch is divided over.
        tokens: (B, T) int64, B >= number of replicas.
        targets: (B, T) int64; negative where a token does not count.
        scale: multiplies the gradient.
        state: the recurrent state before the batch; None starts every row from zero.
        end_of_text: a token at which a document begins and the recurrent state is reset; None
            never resets it.
        process_group: the processes that train together.
        compute_loss: takes the place of ``model.loss``, with its arguments and results.
        soft_targets: (B, T, V) float32, a distribution for each target, which ``compute_loss`` gets
            as an argument of this name.

    Returns:
        The mean loss in nats per token, and the state after the batch, which carries no gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    count, counted = replicas.count, max(1, count_targets(targets))

    def replica_task(
        tokens_part: Tensor,
        targets_part: Tensor,
        soft_part: Tensor | None,
        seed: int,
        state_part: State | None,
    ) -> Callable[[], ReplicaResult]:
        def run() -> ReplicaResult:
            own_count = count_targets(targets_part)
            share, ignores = own_count / counted, own_count < targets_part.numel()
            generator = torch.Generator().manual_seed(seed)
            document_starts = None if end_of_text is None else tokens_part == end_of_text
            extra: dict[str, Any] = {"some_ignored": True} if ignores else {}
            if soft_part is not None:
                extra["soft_targets"] = soft_part
            loss, new_state = (compute_loss or model.loss)(
                tokens_part,
                targets_part,
                state_part,
                document_starts=document_starts,
                generator=generator,
                **extra,
            )
            scaled_loss = loss * (share * scale)
            gradients: tuple[Tensor, ...] = ()
            if count == 1:
                scaled_loss.backward()  # sharded layers listen to this
            else:
                gradients = torch.autograd.grad(scaled_loss, parameters)
            return loss.item() * share, gradients, new_state

        return run

    token_parts, target_parts = tokens.tensor_split(count), targets.tensor_split(count)
    soft_parts = [None] * count if soft_targets is None else soft_targets.tensor_split(count)
    state_parts = [None] * count if state is None else split_state(state, count)
    seeds = torch.randint(1 << 62, (count if process_group.size == 1 else process_group.size,))
    seed_list = seeds.tolist()
    if process_group.size > 1:
        seed_list = [seed_list[process_group.rank] + replica for replica in range(count)]
    results = replicas.run(
        [
            replica_task(*parts)
            for parts in zip(
                token_parts, target_parts, soft_parts, seed_list, state_parts, strict=True
            )
        ]
    )

    def add_gradients() -> None:
        all_gradients = (gradients for _, gradients, _ in results)
        for p, *replica_gradients in zip(parameters, *all_gradients, strict=True):
            for gradient in replica_gradients:
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)

    if count > 1:
        replicas.run([add_gradients])
    return sum(loss for loss, _, _ in results), concat_states([s for _, _, s in results])


def count_targets(targets: Tensor) -> int:
    """Number of targets that count: those that are not negative."""
    return int((targets >= 0).sum())


def split_state(state: State, count: int) -> list[State]:
    """Split the rows of a state (B, …) into ``count`` states, as ``Tensor.tensor_split`` does."""

    def split(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * count if x is None else x.tensor_split(count)

    layers = [list(map(LayerState, *map(split, layer))) for layer in state.layers]
    recent_tokens = state.recent_tokens.tensor_split(count)
    return list(map(State, recent_tokens, map(list, zip(*layers, strict=True))))


def concat_states(states: list[State]) -> State:
    """Concatenate the rows of states; the result carries no gradient."""

    def concat(*parts: Tensor | None) -> Tensor | None:
        tensors = [x.detach() for x in parts if x is not None]
        return torch.cat(tensors) if tensors else None

    layers = [
        LayerState(*map(concat, *layer_states))  # type: ignore[arg-type]
        for layer_states in zip(*(s.layers for s in states), strict=True)
    ]
    return State(torch.cat([s.recent_tokens for s in states]), layers)
