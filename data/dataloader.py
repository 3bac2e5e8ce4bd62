"""Batches of training windows, and parallel streams that score a whole split exactly once.

Axes: B windows per batch, T tokens per window.
"""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mmrec.errors import InputError
from mmrec.runtime.numeric import cdiv

TRAINING_SPLIT = "the training split"
IGNORED = -100
"""Target of a token that is not learnt, as in torch."""
MIXTURE_BLOCK = 256
"""Windows in which a mixture keeps the shares of its components exactly."""


def count_windows(tokens: np.ndarray, seq_len: int) -> int:
    """Number of windows in tokens (n,): ``seq_len`` inputs each, and the target of the last one."""
    return max(0, len(tokens) - 1) // seq_len


class WindowLoader:
    """Batches of training windows. A batch depends only on the seed and its number.

    Each epoch cuts the tokens at a new random offset into windows of ``seq_len`` inputs and as many
    targets, one token later, and visits them in a new random order. Both come from (seed, epoch).
    With ``carry`` each row of a batch continues where that row of the batch before ended.

    An epoch visits as many windows as fill whole batches. The offset decides which tokens are left
    out, less than one batch of them.

    Attributes:
        batch_size, seq_len, seed: as given.
        batches_per_epoch: whole batches in one pass over the tokens, at least 1.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        seq_len: int,
        seed: int,
        *,
        carry: bool = False,
        name: str = TRAINING_SPLIT,
    ) -> None:
        """Make the loader.

        Args:
            tokens: (n,) token ids.
            batch_size: B.
            seq_len: T.
            seed: seed of offsets and orders.
            carry: whether rows continue from batch to batch.
            name: what messages call the tokens.

        Raises:
            InputError: the tokens do not fill one batch.
        """
        self._tokens, self._carry = tokens, carry
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.batches_per_epoch = count_windows(tokens, seq_len) // batch_size
        if self.batches_per_epoch == 0:
            raise InputError(
                f"one batch needs {batch_size:,} windows of {seq_len:,} tokens = "
                f"{batch_size * seq_len + 1:,}; {name} has {len(tokens):,}: use more text, a "
                "smaller batch_size or seq_len"
            )
        self._epoch = -1
        self._starts = np.empty(0, np.int64)

    def _begin_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        windows = self.batches_per_epoch * self.batch_size
        slack = len(self._tokens) - 1 - windows * self.seq_len
        offset = rng.integers(0, slack + 1)
        order = rng.permutation(windows)
        if self._carry:
            order = np.arange(windows).reshape(self.batch_size, -1).T.ravel()
        self._starts, self._epoch = offset + order * self.seq_len, epoch

    def starts_epoch(self, number: int) -> bool:
        """Whether a batch is the first of an epoch, where no row continues another."""
        return number % self.batches_per_epoch == 0

    def window_starts(self, number: int) -> np.ndarray:
        """Return where the windows of a batch begin among the tokens, (B,) int64.

        Args:
            number: as for ``batch_at``.
        """
        epoch, position = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            self._begin_epoch(epoch)
        return self._starts[position * self.batch_size : (position + 1) * self.batch_size]

    def batch_at(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of a batch.

        Args:
            number: number of the batch, from 0, counted over all epochs.

        Returns:
            Inputs (B, T) int64 and targets (B, T) int64.
        """
        starts = self.window_starts(number)
        windows = self._tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64)
        windows_tensor = torch.from_numpy(windows)
        return windows_tensor[:, :-1].contiguous(), windows_tensor[:, 1:].contiguous()


class MixtureLoader:
    """Batches of windows from several streams, each with its share of the windows.

    Every 256 windows hold each stream's share, in a new random order from (seed, number of the
    256). The windows of one stream come as from a WindowLoader. A batch depends only on the seed
    and its number.

    Attributes:
        batch_size, seq_len, seed: as given.
        batches_per_epoch: whole batches that the windows of all streams together fill.
    """

    def __init__(
        self,
        streams: Sequence[np.ndarray],
        weights: Sequence[float],
        batch_size: int,
        seq_len: int,
        seed: int,
        names: Sequence[str] = (),
    ) -> None:
        """Make the loader.

        Args:
            streams: token ids (n,) of each component.
            weights: of each component, > 0.
            batch_size: B.
            seq_len: T.
            seed: seed of offsets and orders.
            names: what messages call the components; by default their numbers.

        Raises:
            InputError: a stream does not fill a window, the streams do not fill one batch, or a
                weight is too small for a window in 256.
        """
        for i, stream in enumerate(streams):
            if not count_windows(stream, seq_len):
                name = names[i] if names else f"number {i + 1}"
                raise InputError(
                    f"each source of a mixture must hold one window of {seq_len + 1:,} training "
                    f"tokens; {name} has {len(stream):,}: use more of it or a smaller seq_len, or "
                    "leave it out"
                )
        self._loaders = [WindowLoader(s, 1, seq_len, seed + i) for i, s in enumerate(streams)]
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        windows = sum(loader.batches_per_epoch for loader in self._loaders)
        self.batches_per_epoch = windows // batch_size
        if self.batches_per_epoch == 0:
            raise InputError(
                f"one batch needs {batch_size:,} windows of {seq_len:,} tokens; the training "
                f"text has {windows:,}: use more text or a smaller batch_size"
            )
        exact = np.asarray(weights) / sum(weights) * MIXTURE_BLOCK
        self._counts = exact.astype(np.int64)
        missing = MIXTURE_BLOCK - self._counts.sum()
        self._counts[np.argsort(self._counts - exact, kind="stable")[:missing]] += 1
        if not self._counts.all():
            raise InputError(
                f"the weights of a mixture must be at least 1/{MIXTURE_BLOCK} of their sum; "
                f"got {', '.join(f'{w:g}' for w in weights)}"
            )
        self._block, self._order = -1, np.empty(0, np.int64)

    def passes(self, batches: float) -> list[float]:
        """How many times each stream is read in so many batches."""
        windows = batches * self.batch_size
        return [
            windows * int(count) / MIXTURE_BLOCK / loader.batches_per_epoch
            for count, loader in zip(self._counts, self._loaders, strict=True)
        ]

    def starts_epoch(self, number: int) -> bool:
        """Whether no row of a batch continues another: always so."""
        return True

    def batch_at(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of a batch.

        Args:
            number: number of the batch, from 0.

        Returns:
            Inputs (B, T) int64 and targets (B, T) int64.
        """
        first = number * self.batch_size
        rows = [self._window_at(window) for window in range(first, first + self.batch_size)]
        inputs, targets = zip(*rows, strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def _window_at(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs (1, T) and targets (1, T) of a window."""
        block, position = divmod(number, MIXTURE_BLOCK)
        if block != self._block:
            order = np.repeat(np.arange(len(self._counts)), self._counts)
            self._order = np.random.default_rng([self.seed, block]).permutation(order)
            self._block = block
        stream = self._order[position]
        earlier = int((self._order[:position] == stream).sum())
        return self._loaders[stream].batch_at(block * int(self._counts[stream]) + earlier)


def make_loader(
    tokens: np.ndarray,
    streams: Sequence[tuple[float, int, int]],
    batch_size: int,
    seq_len: int,
    seed: int,
    *,
    carry: bool,
    names: Sequence[str] = (),
) -> WindowLoader | MixtureLoader:
    """Make the loader of a corpus's training batches.

    Args:
        tokens: (n,) token ids of the training text.
        streams: weight of each component of a mixture, and where its tokens begin and end.
        batch_size: B.
        seq_len: T.
        seed: seed of offsets and orders.
        carry: whether rows continue from batch to batch.
        names: what messages call the components of a mixture.

    Raises:
        InputError: the text is too short, or rows of a mixture are to continue.
    """
    if len(streams) == 1:
        return WindowLoader(tokens, batch_size, seq_len, seed, carry=carry)
    if carry:
        raise InputError("state carry needs a single source to continue in; got a mixture")
    components = [tokens[begin:end] for _, begin, end in streams]
    weights = [weight for weight, _, _ in streams]
    return MixtureLoader(components, weights, batch_size, seq_len, seed, names)


class ConversationLoader:
    """Batches of windows that hold whole conversations, of which the answers alone are targets.

    Each conversation begins with the end token, at which the recurrent state is reset. They are
    packed into windows once, by the seed; an epoch visits the windows in a new random order. A
    conversation that is longer than a window is cut at its end. A batch depends only on the seed
    and its number.

    Attributes:
        batch_size, seq_len, seed: as given.
        batches_per_epoch: whole batches that the windows fill, at least 1.
        cut: number of conversations that are longer than a window.
        left_out: number of those that have no answer before the cut. They are in no window.
        fill: share of the places in windows that hold a token.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        doc_offsets: np.ndarray,
        answers: np.ndarray,
        batch_size: int,
        seq_len: int,
        seed: int,
    ) -> None:
        """Pack the conversations.

        Args:
            tokens: (n,) token ids; each conversation ends with the end token.
            doc_offsets: (conversations + 1,) int64, where each begins.
            answers: (n,) bool, whether a token belongs to an answer.
            batch_size: B.
            seq_len: T.
            seed: seed of the packing and of the orders.

        Raises:
            InputError: the conversations do not fill one batch.
        """
        self._tokens, self._answers, self._starts = tokens, answers, doc_offsets[:-1]
        self._eot = int(tokens[-1])
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        lengths = np.diff(doc_offsets) - 1  # the end token stands before the first token
        self._lengths = np.minimum(lengths, seq_len)
        places = np.append(np.flatnonzero(answers), len(tokens))
        first_answers = places[np.searchsorted(places, self._starts)] - self._starts
        is_used = first_answers < self._lengths
        self.cut, self.left_out = int((lengths > seq_len).sum()), int((~is_used).sum())
        self._windows = self._pack(np.flatnonzero(is_used))
        self.fill = int(self._lengths[is_used].sum()) / max(1, len(self._windows) * seq_len)
        self.batches_per_epoch = len(self._windows) // batch_size
        if self.batches_per_epoch == 0:
            raise InputError(
                f"one batch needs {batch_size:,} windows of {seq_len:,} tokens; the conversations "
                f"of the training split fill {len(self._windows):,}: use more of them, a smaller "
                "batch_size or seq_len"
            )
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def _pack(self, conversations: np.ndarray) -> list[list[int]]:
        """Put each conversation, in random order, into the fullest window that has room."""
        windows: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # free places and number of each window, sorted
        for i in np.random.default_rng(self.seed).permutation(conversations).tolist():
            length = int(self._lengths[i])
            at = bisect.bisect_left(rooms, (length, -1))
            if at == len(rooms):
                windows.append([])
                room, number = self.seq_len, len(windows) - 1
            else:
                room, number = rooms.pop(at)
            windows[number].append(i)
            if room > length:
                bisect.insort(rooms, (room - length, number))
        return windows

    def starts_epoch(self, number: int) -> bool:
        """Whether no row of a batch continues another: always so."""
        return True

    def batch_at(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of a batch.

        Args:
            number: number of the batch, from 0, counted over all epochs.

        Returns:
            Inputs (B, T) int64 and targets (B, T) int64, IGNORED where no answer is.
        """
        epoch, position = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order, self._epoch = rng.permutation(len(self._windows)), epoch
        chosen = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        inputs = np.empty((self.batch_size, self.seq_len), np.int64)
        targets = np.full((self.batch_size, self.seq_len), IGNORED, np.int64)
        for row, window in enumerate(chosen.tolist()):
            at = 0
            for i in self._windows[window]:
                begin, length = int(self._starts[i]), int(self._lengths[i])
                tokens = self._tokens[begin : begin + length].astype(np.int64)
                is_answer = self._answers[begin : begin + length]
                inputs[row, at] = self._eot
                inputs[row, at + 1 : at + length] = tokens[:-1]
                targets[row, at : at + length][is_answer] = tokens[is_answer]
                at += length
            inputs[row, at:] = tokens[-1]  # goes on after the last conversation, and is not learnt
        return torch.from_numpy(inputs), torch.from_numpy(targets)


class ReplayLoader:
    """Batches in which a share of the windows comes from earlier text, against forgetting.

    The windows of the new text are those of its own loader, in the same order and none left out. So
    an epoch, one pass over the new text, has more batches. A batch depends only on the seeds and
    its number.

    Attributes:
        batches_per_epoch: mean number of batches in one pass over the new text.

    Source:
        Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal".
    """

    def __init__(
        self,
        new: WindowLoader | MixtureLoader | ConversationLoader,
        earlier: WindowLoader,
        fraction: float,
    ) -> None:
        """Make the loader.

        Args:
            new: loader of the new text.
            earlier: loader of the earlier text, of the same batch size and window length.
            fraction: mean share of the windows that come from the earlier text, in [0, 1).
        """
        self._new, self._earlier = new, earlier
        self._replayed_per_batch = fraction * new.batch_size
        self.batches_per_epoch = new.batches_per_epoch / (1 - fraction)

    def starts_epoch(self, number: int) -> bool:
        """Whether no row of a batch continues another: always so."""
        return True

    def batch_at(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of a batch; its first rows are earlier text.

        Args:
            number: number of the batch, from 0.

        Returns:
            Inputs (B, T) int64 and targets (B, T) int64.
        """
        size = self._new.batch_size
        replayed = int(number * self._replayed_per_batch)  # windows of the batches before
        count = int((number + 1) * self._replayed_per_batch) - replayed
        batch, row = divmod(number * size - replayed, size)  # the next window of the new text
        inputs, targets = self._new.batch_at(batch)
        if row > count:  # its rest is too short
            more_inputs, more_targets = self._new.batch_at(batch + 1)
            inputs, targets = torch.cat((inputs, more_inputs)), torch.cat((targets, more_targets))
        rows = slice(row, row + size - count)
        inputs, targets = inputs[rows], targets[rows]
        if count:
            earlier_inputs, earlier_targets = self._earlier.batch_at(number)
            inputs = torch.cat((earlier_inputs[:count], inputs))
            targets = torch.cat((earlier_targets[:count], targets))
        return inputs, targets


def evaluation_streams(
    tokens: np.ndarray, eot: int, streams: int, chunk_len: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut tokens into contiguous streams of equal length, and read them side by side in chunks.

    The recurrent state is carried from chunk to chunk. Every token is a target exactly once; its
    input is the token before it, and that of the first one the end token.

    Args:
        tokens: (n,) token ids.
        eot: id of the end token.
        streams: S, the number of streams.
        chunk_len: tokens of a stream per chunk; the last chunk may be shorter.

    Yields:
        Inputs (S, chunk) int64, targets (S, chunk) int64, and a mask (S, chunk) bool that is False
        where a shorter stream has ended.
    """
    length = cdiv(len(tokens), streams)
    padded = np.full(streams * length + 1, eot, np.int64)
    padded[1 : len(tokens) + 1] = tokens
    inputs = torch.from_numpy(padded[:-1].reshape(streams, length))
    targets = torch.from_numpy(padded[1:].reshape(streams, length))
    mask = torch.arange(streams * length).reshape(streams, length) < len(tokens)
    for begin in range(0, length, chunk_len):
        chunk = slice(begin, begin + chunk_len)
        yield (
            inputs[:, chunk].contiguous(),
            targets[:, chunk].contiguous(),
            mask[:, chunk].contiguous(),
        )


def evenly_spaced_sample(tokens: np.ndarray, count: int, sections: int) -> np.ndarray:
    """Take a sample of tokens in equal sections that are evenly spaced over the whole array.

    The first tokens alone would be one or two documents, and would not represent the others.

    Args:
        tokens: (n,) token ids.
        count: tokens to take, about; fewer than one per section, or more than n, takes the first.
        sections: number of sections.

    Returns:
        (about count,) token ids.
    """
    section_len = count // sections
    if section_len == 0 or count >= len(tokens):
        return tokens[:count]
    starts = np.linspace(0, len(tokens) - section_len, sections).astype(np.int64)
    return tokens[(starts[:, None] + np.arange(section_len)).ravel()]
