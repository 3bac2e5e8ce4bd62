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


def previous(tokens: Tensor, recent: Tensor, starts: Tensor | None) -> list[Tensor]:
    """The tokens one, two, … places before each of (B, T), 0 where that is another text.

    ``recent`` (B, R) are the R tokens before them, the newest last.
    """
    back, time = recent.shape[1], tokens.shape[1]
    joined, made = torch.cat((recent, tokens), 1), []
    near = starts  # whether a text begins at a place or just before it
    for k in range(1, back + 1):
        before = joined[:, back - k : back - k + time]
        if near is not None and starts is not None:
            before = before.masked_fill(near, 0)
            near = near.clone()
            near[:, k:] |= starts[:, : time - k]
        made.append(before)
    return made


def newest(tokens: Tensor, recent: Tensor, starts: Tensor | None) -> Tensor:
    """The last R tokens of (B, R) and (B, T) together, 0 where that is another text."""
    back, time = recent.shape[1], tokens.shape[1]
    made = torch.cat((recent, tokens), 1)[:, time:].clone()
    if starts is not None:
        for k in range(1, back):
            made[:, back - 1 - k].masked_fill_(starts[:, max(0, time - k) :].any(1), 0)
    return made
