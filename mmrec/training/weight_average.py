"""An exponential moving average of the weights, kept beside them while they are trained.

The average of the weights of many steps predicts better than the weights of the last one, whose
noise is that of single batches. Source: Polyak and Juditsky 1992, "Acceleration of stochastic
approximation by averaging"; of the exponential form Izmailov et al. 2018 (arXiv:1803.05407) and
Morales-Brotons et al. 2024 (arXiv:2411.18704).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mmrec.runtime.distributed import SINGLE_PROCESS, ProcessGroup


class WeightAverage:
    """The average of the weights of a model that are trained.

    Attributes:
        decay: the average of the steps before counts so much, the newest weights the rest; 0 keeps
            no average.
        values: the averages by the names of their parameters, sharded like them. Empty before the
            first step, where the weights are their own average. While they are ``swapped``, the
            weights that training goes on from.
    """

    def __init__(
        self, model: nn.Module, decay: float, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        """Begin without a value.

        Args:
            model: the model, on whose parameters the average follows.
            decay: see the class.
            process_group: that of the model.
        """
        self.decay, self.values = decay, dict[str, Tensor]()
        self._parameters, self._process_group = dict(model.named_parameters()), process_group
        self._is_swapped = False

    def update_tasks(self, step: int, count: int) -> list[Callable[[], None]]:
        """What takes in the weights after a step, as tasks that may run side by side.

        The decay is at most (1 + n) / (10 + n) after n steps: the average reaches back over a tenth
        of a young run, and so never to its beginning.

        Args:
            step: n, the steps of the run before this one.
            count: how many tasks there are at most.
        """
        if not self.decay:
            return []
        if not self.values:
            trained = ((n, p) for n, p in self._parameters.items() if p.requires_grad)
            self.values = {name: p.detach().clone() for name, p in trained}
            return []
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        pairs = list(self._pairs())
        return [partial(_lerp, pairs[i::count], weight) for i in range(count)]

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model hold the averages meanwhile, and ``values`` its weights.

        Within itself it changes nothing.
        """
        if self._is_swapped:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._is_swapped = not self._is_swapped
        for average, p in self._pairs():
            kept = p.clone()
            p.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each average with its parameter, or this rank's shards of them."""
        local_shard = self._process_group.local_shard
        for name, average in self.values.items():
            yield local_shard(average), local_shard(self._parameters[name].detach())


def _lerp(pairs: Sequence[tuple[Tensor, Tensor]], weight: float) -> None:
    """Move each average by ``weight`` of the way to its parameter."""
    for average, p in pairs:
        average.lerp_(p, weight)
