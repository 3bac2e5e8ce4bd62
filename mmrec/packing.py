"""Packing: texts that begin inside a batch's windows, run as sequences of their own.

Axes: B rows of a batch, T tokens of a row, N sequences, which lie end to end in one row of B T.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the sequences of a batch lie."""

    starts: Tensor
    """(B, T) bool, where a text begins."""
    cu_seqlens: Tensor
    """(N + 1,) int64, as the kernels take it."""
    first: Tensor
    """(B,) int64, the sequence that each row begins with."""
    last: Tensor
    """(B,) int64, the one that it ends with."""
    goes_on: Tensor
    """(B,) bool, whether a row begins in the middle of a text."""

    @classmethod
    def of(cls, starts: Tensor) -> "Packing":
        """Sequences begin at every start and at every row."""
        rows, time = starts.shape
        begins = starts.clone()
        begins[:, 0] = True
        counts = begins.sum(1).cumsum(0)
        edges = begins.flatten().nonzero().flatten()
        cu_seqlens = torch.cat((edges, edges.new_tensor([rows * time])))
        first = torch.cat((counts.new_zeros(1), counts[:-1]))
        return cls(starts, cu_seqlens, first, counts - 1, ~starts[:, 0])

    def spread(self, state: Tensor | None) -> Tensor | None:
        """States of rows (B, …) to those of sequences (N, …); a text that begins has none."""
        if state is None:
            return None
        made = state.new_zeros(len(self.cu_seqlens) - 1, *state.shape[1:])
        keep = self.goes_on.view(-1, *[1] * (state.ndim - 1))
        return made.index_copy(0, self.first, state * keep)

    def gather(self, state: Tensor | None) -> Tensor | None:
        """States of sequences (N, …) to those that rows end with (B, …)."""
        return None if state is None else state.index_select(0, self.last)


def previous(tokens: Tensor, recent: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens one and two places before each of (B, T), 0 where that is another text."""
    joined = torch.cat((recent, tokens), 1)
    one, two = joined[:, 1:-1], joined[:, :-2]
    if starts is None:
        return one, two
    near = starts.clone()
    near[:, 1:] |= starts[:, :-1]
    return one.masked_fill(starts, 0), two.masked_fill(near, 0)
