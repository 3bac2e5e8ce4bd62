"""Batches: windows for training, and lanes that score a whole split exactly once.

Axes: B windows of a batch, T tokens of a window.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mmrec.errors import InputError

BLOCK = 256  # windows in which a mixture keeps its shares


class Batches:
    """Training windows, a pure function of the position, so a position is all that a resume needs.

    Each epoch cuts the stream at a fresh random offset into windows of ``seq_len`` inputs and as
    many targets, one token on, and deals them out in a fresh order; both come from (seed, epoch).
    With ``carry`` a row of one batch goes on where that row of the batch before it ended.
    """

    def __init__(
        self, tokens: np.ndarray, batch: int, seq_len: int, seed: int, *, carry: bool = False
    ) -> None:
        """``tokens`` (n,) ids. Raises InputError if they do not fill one batch."""
        self._tokens, self.batch, self.seq_len, self.seed = tokens, batch, seq_len, seed
        self._carry = carry
        self._windows = (len(tokens) - 1) // seq_len
        self.steps_per_epoch = self._windows // batch
        if self.steps_per_epoch == 0:
            raise InputError(
                f"one batch needs {batch} windows of {seq_len} tokens = {batch * seq_len + 1:,}; "
                f"the training split has {len(tokens):,}: use more text, a smaller batch or seq_len"
            )
        self._epoch = -1
        self._starts = np.empty(0, np.int64)

    def _deal(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        slack = len(self._tokens) - 1 - self.steps_per_epoch * self.batch * self.seq_len
        offset = rng.integers(0, slack + 1)
        count = self.steps_per_epoch * self.batch
        order = rng.permutation(count)
        if self._carry:
            order = np.arange(count).reshape(self.batch, -1).T.ravel()
        self._starts, self._epoch = offset + order * self.seq_len, epoch

    def begins(self, step: int) -> bool:
        """Whether an epoch begins: there, no row goes on where another ended."""
        return step % self.steps_per_epoch == 0

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64, of a micro-step counted from 0 over all epochs."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._deal(epoch)
        starts = self._starts[at * self.batch : (at + 1) * self.batch]
        windows = self._tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64)
        both = torch.from_numpy(windows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


class Mixture:
    """Windows of several streams, each stream with its share of them, in batches.

    Every 256 windows hold each stream's share, in a fresh order from (seed, number of the 256); the
    windows of one stream come as from Batches. A pure function of the position, too.
    """

    def __init__(
        self,
        streams: Sequence[np.ndarray],
        weights: Sequence[float],
        batch: int,
        seq_len: int,
        seed: int,
    ) -> None:
        """Streams (n,) of ids. Raises InputError if one does not fill a window, or never comes."""
        self._streams = [Batches(s, 1, seq_len, seed + i) for i, s in enumerate(streams)]
        self.batch, self.seq_len, self.seed = batch, seq_len, seed
        self.steps_per_epoch = sum(s.steps_per_epoch for s in self._streams) // batch
        if self.steps_per_epoch == 0:
            raise InputError(
                f"one batch needs {batch} windows of {seq_len} tokens; the training "
                "text has fewer: use more text or a smaller batch"
            )
        exact = np.asarray(weights) / sum(weights) * BLOCK
        self._counts = exact.astype(np.int64)
        left = np.argsort(self._counts - exact, kind="stable")[: BLOCK - self._counts.sum()]
        self._counts[left] += 1
        if not self._counts.all():
            raise InputError(
                f"the weights of a mixture must be at least 1/{BLOCK} of their sum; "
                f"got {', '.join(f'{w:g}' for w in weights)}"
            )
        self._block, self._order = -1, np.empty(0, np.int64)

    def begins(self, step: int) -> bool:
        """Whether an epoch begins: as many windows as all streams hold."""
        return step % self.steps_per_epoch == 0

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64, of a micro-step counted from 0."""
        rows = [self._row(k) for k in range(step * self.batch, (step + 1) * self.batch)]
        x, y = zip(*rows, strict=True)
        return torch.cat(x), torch.cat(y)

    def _row(self, number: int) -> tuple[Tensor, Tensor]:
        block, at = divmod(number, BLOCK)
        if block != self._block:
            order = np.repeat(np.arange(len(self._counts)), self._counts)
            self._order = np.random.default_rng([self.seed, block]).permutation(order)
            self._block = block
        stream = self._order[at]
        before = int((self._order[:at] == stream).sum())
        return self._streams[stream].get(block * int(self._counts[stream]) + before)


def deal(
    tokens: np.ndarray,
    parts: Sequence[tuple[float, int, int]],
    batch: int,
    seq_len: int,
    seed: int,
    *,
    carry: bool,
) -> Batches | Mixture:
    """Training batches of a corpus: of its stream, or of a mixture's (weight, begin, end).

    Raises InputError if the text is too short, or a mixture is to be carried on.
    """
    if len(parts) == 1:
        return Batches(tokens, batch, seq_len, seed, carry=carry)
    if carry:
        raise InputError("state carry must have one source to go on in; this corpus is a mixture")
    streams, weights = [tokens[lo:hi] for _, lo, hi in parts], [weight for weight, _, _ in parts]
    return Mixture(streams, weights, batch, seq_len, seed)


class Mixed:
    """Batches in which a share of the windows is of another text; of both, a position is all that a
    resume needs.

    What is still seen is not forgotten: rehearsal, in Robins 1995, "Catastrophic forgetting,
    rehearsal and pseudorehearsal".
    """

    def __init__(self, new: Batches | Mixture, old: Batches, share: float) -> None:
        """Both of one shape (B, T); ``share`` of the windows, in the mean, are of ``old``."""
        self._new, self._old, self._each = new, old, share * new.batch
        self.steps_per_epoch, self.begins = new.steps_per_epoch, new.begins

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64; the first rows are of the old text."""
        x, y = self._new.get(step)
        count = int((step + 1) * self._each) - int(step * self._each)
        if count:
            old_x, old_y = self._old.get(step)
            x[:count], y[:count] = old_x[:count], old_y[:count]
        return x, y


def eval_lanes(
    tokens: np.ndarray, eot: int, lanes: int, chunk: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut a stream into contiguous lanes and walk them side by side, for a carried state.

    Every token is a target exactly once; its input is the token before it, and the first one's the
    end token. Yields inputs (lanes, T) int64, targets (lanes, T) int64, and a mask (lanes, T) bool
    that is False where a shorter lane has ended.
    """
    length = -(-len(tokens) // lanes)
    padded = np.full(lanes * length + 1, eot, np.int64)
    padded[1 : len(tokens) + 1] = tokens
    x = torch.from_numpy(padded[:-1].reshape(lanes, length))
    y = torch.from_numpy(padded[1:].reshape(lanes, length))
    mask = torch.arange(lanes * length).reshape(lanes, length) < len(tokens)
    for lo in range(0, length, chunk):
        cut = slice(lo, lo + chunk)
        yield x[:, cut].contiguous(), y[:, cut].contiguous(), mask[:, cut].contiguous()


def spread_pieces(tokens: np.ndarray, count: int, pieces: int) -> np.ndarray:
    """About ``count`` tokens as ``pieces`` equal runs, evenly spaced over the whole stream.

    The first tokens of a split would be one or two documents, and speak for nothing else.
    """
    size = count // pieces
    if size == 0 or count >= len(tokens):
        return tokens[:count]
    starts = np.linspace(0, len(tokens) - size, pieces).astype(np.int64)
    return tokens[(starts[:, None] + np.arange(size)).ravel()]
