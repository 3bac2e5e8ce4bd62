"""Lanes: threads of one process that each learn from a share of a batch.

A step of a small model is hundreds of short operations. Splitting each of them over the cores
costs a wake-up and a wait apiece; splitting the batch costs one of each a step, and every core
works on data of its own, in its own cache. A lane runs torch and the kernels on one thread, so
nothing inside it waits for a core that another process has taken.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from mmrec.model import LayerState, Model, State
from mmrec.runtime.distributed import ALONE, World

LARGEST_MODEL = 64_000_000  # parameters: above, a gradient for each lane costs more than it saves

Result = TypeVar("Result")


class Lanes:
    """So many threads that take tasks side by side; one is the caller itself, with all cores."""

    def __init__(self, count: int) -> None:
        self.count, self._pool = count, None
        if count == 1:
            return
        threads, ready = torch.get_num_threads(), threading.Barrier(count + 1)

        def begin() -> None:
            torch.get_num_threads()  # a thread's first question takes over the newest setting
            torch.set_num_threads(1)  # of this thread; new ones would take it over, so all wait
            ready.wait()

        self._pool = ThreadPoolExecutor(count, "mmrec-lane", begin)
        for _ in range(count):
            self._pool.submit(int)
        ready.wait()
        torch.set_num_threads(threads)

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """All results, in the order of the tasks; an error is raised when all have ended."""
        if self._pool is None:
            return [task() for task in tasks]
        futures = [self._pool.submit(task) for task in tasks]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in futures]


def count_lanes(model: Model, batch: int, world: World = ALONE) -> int:
    """One lane a core and sequence for a small model; a single one for others, and for one that is
    sharded, whose layers are whole for one forward at a time."""
    small = sum(p.numel() for p in model.parameters()) < LARGEST_MODEL
    return min(torch.get_num_threads(), batch) if small and not world.sharded else 1


def lanes_for(model: Model, batch: int, world: World = ALONE) -> Lanes:
    """The lanes that a model learns in."""
    return Lanes(count_lanes(model, batch, world))


Part = tuple[float, Sequence[Tensor], State]


def gradients(
    model: Model,
    lanes: Lanes,
    tokens: Tensor,
    targets: Tensor,
    share: float = 1.0,
    *,
    state: State | None = None,
    eot: int | None = None,
    world: World = ALONE,
) -> tuple[float, State]:
    """Add ``share`` of the gradient of a batch's mean loss to ``grad``; returns that loss, and the
    state after the batch, which carries no gradient.

    tokens and targets (B, T) int64, B at least the number of lanes. ``state`` is what the rows go
    on from; where ``eot`` is given, a text begins at each such token. The lanes' parts are added in
    their order, so one number of lanes gives one result; dropout takes one number a lane from the
    global random state, of several processes one for each, so that the state is the same in all.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def task(x: Tensor, y: Tensor, seed: int, before: State | None) -> Callable[[], Part]:
        def work() -> Part:
            part = len(x) / len(tokens)
            dice, starts = torch.Generator().manual_seed(seed), None if eot is None else x == eot
            loss, after = model.loss_and_state(x, y, dice, before, starts)
            scaled, made = loss * (part * share), tuple[Tensor, ...]()
            if count == 1:
                scaled.backward()  # also what sharded layers listen to
            else:
                made = torch.autograd.grad(scaled, parameters)
            return loss.item() * part, made, after

        return work

    count = lanes.count
    pieces = zip(tokens.tensor_split(count), targets.tensor_split(count), strict=True)
    befores = [None] * count if state is None else split(state, count)
    seeds = torch.randint(1 << 62, (count if world.size == 1 else world.size,)).tolist()
    if world.size > 1:
        seeds = [seeds[world.rank] + lane for lane in range(count)]
    tasks = [task(x, y, *rest) for (x, y), *rest in zip(pieces, seeds, befores, strict=True)]
    made = lanes.run(tasks)

    def add() -> None:
        for p, *parts in zip(parameters, *(g for _, g, _ in made), strict=True):
            for part in parts:
                p.grad = part if p.grad is None else p.grad.add_(part)

    if count > 1:
        lanes.run([add])
    return sum(loss for loss, _, _ in made), join([after for _, _, after in made])


def split(state: State, count: int) -> list[State]:
    """The states of the rows of each of so many shares of a batch."""

    def parts(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * count if x is None else x.tensor_split(count)

    layers = [list(map(LayerState, *map(parts, layer))) for layer in state.layers]
    return list(map(State, state.recent.tensor_split(count), map(list, zip(*layers, strict=True))))


def join(states: list[State]) -> State:
    """The state of all rows."""

    def whole(*parts: Tensor | None) -> Tensor | None:
        held = [x.detach() for x in parts if x is not None]
        return torch.cat(held) if held else None

    layers = [
        LayerState(*map(whole, *same))  # type: ignore[arg-type]
        for same in zip(*(s.layers for s in states), strict=True)
    ]
    return State(torch.cat([s.recent for s in states]), layers)
