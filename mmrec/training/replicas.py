"""Replicas: threads of one process that each run forward and backward on a share of a batch.

A step of a small model is hundreds of short operations. Splitting each operation over the cores
costs one wake-up and one wait per operation. Splitting the batch costs one of each per step, and
every core works on its own data in its own cache. A replica runs torch and the kernels on one
thread, so nothing inside it waits for a core that another process occupies.

All replicas share the model's parameters. Each computes its own gradients, which are then added.
In a run that lasts, processes take the place of the threads (``replica_processes.py``).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mmrec.model import LayerState, Model, State
from mmrec.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mmrec.runtime.numeric import cdiv

if TYPE_CHECKING:
    from mmrec.training.replica_processes import ReplicaProcesses

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
        self.processes: ReplicaProcesses | None = None
        """What computes gradients in the place of all threads but one, once it is ready."""
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

    def start_processes(
        self,
        model: Model,
        batch_size: int,
        seq_len: int,
        echo: Callable[[str], None] = lambda line: None,
        *,
        wait: bool = False,
    ) -> None:
        """Start processes that take the place of all threads but one, as soon as they are ready.

        Nothing starts with one replica, on systems where processes cannot share memory by a
        descriptor (all but Linux), and for a model with hooks.

        Args:
            model: in training mode, with its precision set. Its parameters move into shared memory.
            batch_size: sequences of a batch.
            seq_len: tokens of a sequence.
            echo: called with a line for the user if a process fails.
            wait: return when they are ready.

        Raises:
            OSError: there is no room for the processes or their memory.
            pickle.PicklingError: the model holds what another process cannot have.
        """
        from mmrec.training.replica_processes import ReplicaProcesses, are_supported

        if self.count == 1 or self.processes is not None or not are_supported(model):
            return
        rows = cdiv(batch_size, self.count)
        self.processes = ReplicaProcesses(model, self.count - 1, rows, seq_len, echo)
        if wait:
            self.processes.are_ready(wait=True)

    def end_processes(self) -> None:
        """End the processes; threads go on. Without processes this does nothing."""
        if self.processes is not None:
            self.processes.close()
            self.processes = None

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

    An n-gram embedding whose gradients are sparse does not count.
    A sharded model gets one replica too: its layers are assembled for one forward at a time.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    if model.sparse_gradients and model.config.has_large_ngram_table:
        sizes.pop("ngram_embedding", None)
    is_small = sum(sizes.values()) < MAX_PARAMETERS
    if not is_small or process_group.sharded:
        return 1
    return min(torch.get_num_threads(), batch_size)


ReplicaResult = tuple[float, Sequence[Tensor], State]
"""A replica's share of the mean loss, its gradients, and the new state of its rows."""


class Share(NamedTuple):
    """A replica's share of a batch, and all that its gradients depend on besides the model."""

    tokens: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64; negative where a token does not count."""
    seed: int
    """Of the generator that dropout draws from."""
    state: State | None
    """The recurrent state before the rows; None starts them from zero."""
    counted: int
    """Targets that count in the whole batch."""
    scale: float = 1.0
    """Multiplies the gradient."""
    end_of_text: int | None = None
    """A token at which a document begins and the recurrent state is reset."""
    compute_loss: Callable[..., tuple[Tensor, State]] = Model.loss
    """See ``forward_backward``."""
    loss_options: Mapping[str, Any] | None = None
    """More arguments of ``compute_loss``."""
    soft_targets: Tensor | None = None
    """(B, T, V) float32, see ``forward_backward``."""


def replica_gradients(model: Model, parameters: Sequence[Tensor], share: Share) -> ReplicaResult:
    """The gradients of a replica's share of a batch.

    Args:
        model: in training mode.
        parameters: those to differentiate for; with none, their ``grad`` is set instead.
        share: of the batch.
    """
    own_count = count_targets(share.targets)
    weight, ignores = own_count / share.counted, own_count < share.targets.numel()
    generator = torch.Generator().manual_seed(share.seed)
    starts = None if share.end_of_text is None else share.tokens == share.end_of_text
    extra: dict[str, Any] = {"some_ignored": True} if ignores else {}
    if share.soft_targets is not None:
        extra["soft_targets"] = share.soft_targets
    loss, new_state = share.compute_loss(
        model,
        share.tokens,
        share.targets,
        share.state,
        document_starts=starts,
        generator=generator,
        **extra,
        **(share.loss_options or {}),
    )
    scaled_loss = loss * (weight * share.scale)
    gradients: tuple[Tensor, ...] = ()
    if parameters:
        gradients = torch.autograd.grad(scaled_loss, parameters)
    else:
        scaled_loss.backward()
    return loss.item() * weight, gradients, new_state


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
    compute_loss: Callable[..., tuple[Tensor, State]] = Model.loss,
    loss_options: Mapping[str, Any] | None = None,
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
        compute_loss: takes the place of ``Model.loss``, with its arguments and results.
        loss_options: more arguments of ``compute_loss``.
        soft_targets: (B, T, V) float32, a distribution for each target, which ``compute_loss`` gets
            as an argument of this name.

    Returns:
        The mean loss in nats per token, and the state after the batch, which carries no gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    count, counted = replicas.count, max(1, count_targets(targets))
    token_parts, target_parts = tokens.tensor_split(count), targets.tensor_split(count)
    soft_parts = [None] * count if soft_targets is None else soft_targets.tensor_split(count)
    state_parts = [None] * count if state is None else split_state(state, count)
    seeds = torch.randint(1 << 62, (count if process_group.size == 1 else process_group.size,))
    seed_list = seeds.tolist()
    if process_group.size > 1:
        seed_list = [seed_list[process_group.rank] + replica for replica in range(count)]
    shares = [
        Share(x, y, seed, before, counted, scale, end_of_text, compute_loss, loss_options, soft)
        for x, y, seed, before, soft in zip(
            token_parts, target_parts, seed_list, state_parts, soft_parts, strict=True
        )
    ]
    # a single replica sets the gradients itself: sharded layers listen to backward
    differentiated = parameters if count > 1 else []
    tasks = [partial(replica_gradients, model, differentiated, share) for share in shares]
    processes = replicas.processes
    if processes is not None and processes.are_ready():
        results = processes.run(shares, tasks, replicas.run)
    else:
        results = replicas.run(tasks)

    def add_gradients() -> None:
        all_gradients = (gradients for _, gradients, _ in results)
        for p, *of_replicas in zip(parameters, *all_gradients, strict=True):
            for gradient in of_replicas:
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
