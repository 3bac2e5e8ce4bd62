"""Evaluation: every token of a split scored once, with carried state."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.data.dataloader import evaluation_streams
from mmrec.errors import InputError
from mmrec.kernels.fused_linear_cross_entropy.loss import LOSS_ROWS
from mmrec.model import Model, State

LANES = 8
CHUNK = 512  # tokens of a single text that are read at once
LANE_TOKENS = 1024  # a shorter split gets fewer lanes: a lane's start lacks context


@dataclass(frozen=True)
class Evaluation:
    """Scores over a whole split."""

    loss: float
    """Mean cross-entropy, nats a token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """All nats, in bits, over the bytes of the text: comparable between tokenizers."""
    accuracy: float
    """Share of tokens that were the likeliest."""
    tokens: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class TokenScores:
    """What each of n tokens got; ``evaluate`` fills the arrays."""

    nats: np.ndarray
    """(n,) float32, minus the log-probability of the token."""
    sure: np.ndarray
    """(n,) float32, the probability of the likeliest token there."""
    right: np.ndarray
    """(n,) bool, whether that was the token."""

    @classmethod
    def empty(cls, count: int) -> "TokenScores":
        """Room for the scores of so many tokens."""
        return cls(np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count, bool))


@torch.inference_mode()
def evaluate(
    model: Model,
    tokens: np.ndarray,
    eot: int,
    n_bytes: int,
    *,
    chunk: int = 256,
    resets: bool = False,
    detail: TokenScores | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Score tokens (n,), n ≥ 1, in contiguous lanes whose state is carried from chunk to chunk.

    Args:
        model: left in the mode it came in.
        tokens: token ids of the split, documents ended by ``eot``.
        eot: the id given as context to the first token.
        n_bytes: UTF-8 bytes of the text that the tokens stand for.
        chunk: tokens of a lane at once; changes speed and memory only.
        resets: start every document without a memory of those before it.
        detail: is given the scores of each token.
        progress: called with the number of tokens just scored; what it raises ends the evaluation.

    Raises:
        InputError: there is no token to score.
    """
    if len(tokens) == 0 or n_bytes == 0:
        raise InputError("nothing to evaluate: the validation split is empty")
    lanes = max(1, min(LANES, len(tokens) // LANE_TOKENS))
    training, begin = model.training, time.perf_counter()
    model.eval()
    state: State | None = None
    nats, right = 0.0, 0
    places = torch.arange(lanes * -(-len(tokens) // lanes))
    columns = places.view(lanes, -1).split(chunk, 1)  # the tokens that a chunk scores
    try:
        for (x, y, mask), column in zip(
            evaluation_streams(tokens, eot, lanes, chunk), columns, strict=True
        ):
            at = column[mask].split(LOSS_ROWS)
            starts = x == eot if resets else None
            hidden, state = model.hidden_states(x, state, document_starts=starts)
            rows = hidden[mask].split(LOSS_ROWS)  # logits are large: few are alive at once
            for h, target, where in zip(rows, y[mask].split(LOSS_ROWS), at, strict=True):
                logits = model.lm_head(h)
                each = F.cross_entropy(logits, target, reduction="none")
                nats += float(each.sum(dtype=torch.float64))
                likeliest = logits.argmax(-1)
                hits = likeliest == target
                right += int(hits.sum())
                if detail is not None:
                    sure = F.cross_entropy(logits, likeliest, reduction="none").neg().exp()
                    index = where.numpy()
                    detail.nats[index], detail.sure[index] = each.numpy(), sure.numpy()
                    detail.right[index] = hits.numpy()
            if progress is not None:
                progress(int(mask.sum()))
    finally:
        model.train(training)
    loss = nats / len(tokens)
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / n_bytes,
        accuracy=right / len(tokens),
        tokens=len(tokens),
        bytes=n_bytes,
        seconds=time.perf_counter() - begin,
    )


class Continuation:
    """A model that has read a text: what does it think of what may follow?"""

    def __init__(self, model: Model, last: Tensor, state: State) -> None:
        """``last`` (1, D), the hidden state at the newest token."""
        self._model, self._last, self._state = model, last, state

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Minus the log-probability, in nats, of each of the next tokens (n,) given those before
        it, float64; and whether it was the likeliest, bool."""
        targets, state, last = torch.tensor(ids, dtype=torch.int64), self._state, self._last
        nats, right = [np.empty(0)], [np.empty(0, bool)]
        for piece in targets.split(CHUNK) if ids else ():
            hidden, state = self._model.hidden_states(piece[None], state)
            logits = self._model.lm_head(torch.cat((last, hidden[0, :-1]))).double()
            nats.append(F.cross_entropy(logits, piece, reduction="none").numpy())
            right.append((logits.argmax(-1) == piece).numpy())
            last = hidden[0, -1:]
        return np.concatenate(nats), np.concatenate(right)


@torch.inference_mode()
def continuation(model: Model, ids: Sequence[int]) -> Continuation:
    """Let a model read a text of at least one token, in chunks."""
    state: State | None = None
    for piece in torch.tensor(ids, dtype=torch.int64).split(CHUNK):
        hidden, state = model.hidden_states(piece[None], state)
    assert state is not None
    return Continuation(model, hidden[0, -1:], state)
