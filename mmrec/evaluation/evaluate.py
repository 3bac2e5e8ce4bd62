"""Score every token of a text once, with the recurrent state carried along.

Axes: n tokens of the text, D model width.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.data.corpus import Split, count_evaluation_streams
from mmrec.data.dataloader import evaluation_streams
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.kernels.fused_linear_cross_entropy.op import LOGITS_CHUNK
from mmrec.model import Model, State
from mmrec.runtime.numeric import cdiv

CHUNK = 512  # tokens of a single text per forward pass


@dataclass(frozen=True)
class Evaluation:
    """Scores over a whole text; of conversations over the tokens of their answers."""

    loss: float
    """Mean cross-entropy, in nats per token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Sum of the cross-entropies, in bits, over the UTF-8 bytes of the text. It can be compared
    between tokenizers."""
    accuracy: float
    """Fraction of tokens that were the most likely one."""
    tokens: int
    bytes: int
    seconds: float
    dynamic: "DynamicEvaluation | None" = None
    """Scores of the same text by dynamic evaluation, if they were asked for. The numbers above are
    those of the model as it is."""
    cached: "CachedEvaluation | None" = None
    """Scores of the same text with a neural cache, if they were asked for."""


@dataclass(frozen=True)
class DynamicEvaluation:
    """Scores over a whole text by a model that learns from each part of it after its score."""

    loss: float
    """Mean cross-entropy, in nats per token."""
    perplexity: float
    bits_per_byte: float
    accuracy: float
    updates: int
    """Updates of the weights."""
    learning_rate: float
    segment_tokens: int
    """Tokens that are scored between two updates."""
    seconds: float


@dataclass(frozen=True)
class CachedEvaluation:
    """Scores over a whole text by a model that looks up the newest tokens of the text."""

    loss: float
    """Mean cross-entropy, in nats per token."""
    perplexity: float
    bits_per_byte: float
    accuracy: float
    neural_cache: int
    """Most tokens that were looked up."""
    seconds: float


@dataclass(frozen=True)
class TokenScores:
    """Scores of each of n tokens. ``evaluate`` fills the arrays."""

    nats: np.ndarray
    """(n,) float32, minus the log-probability of the token."""
    confidence: np.ndarray
    """(n,) float32, the probability of the most likely token."""
    correct: np.ndarray
    """(n,) bool, whether the token was the most likely one."""

    @classmethod
    def empty(cls, count: int) -> "TokenScores":
        """Allocate the scores of ``count`` tokens, without values."""
        return cls(np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count, bool))


class ScoreSums:
    """Sums over the tokens of a text that were scored so far."""

    def __init__(self, token_scores: TokenScores | None = None) -> None:
        """Begin with no token; ``token_scores`` is filled with the scores of each token."""
        self.nats, self.correct, self.tokens = 0.0, 0, 0
        self._token_scores = token_scores

    def add(self, logits: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        """Score n tokens.

        Args:
            logits: (n, V) float32.
            targets: (n,) int64, the tokens.
            positions: (n,) int64, their places in the text.

        Returns:
            Minus the log-probability of each token in nats, (n,) float32, with its gradient.
        """
        losses = F.cross_entropy(logits, targets, reduction="none")
        with torch.no_grad():
            most_likely = logits.argmax(-1)
            hits = most_likely == targets
            self.nats += float(losses.sum(dtype=torch.float64))
            self.correct += int(hits.sum())
            self.tokens += len(targets)
            if (scores := self._token_scores) is not None:
                confidence = F.cross_entropy(logits, most_likely, reduction="none").neg().exp()
                places = positions.numpy()
                scores.nats[places] = losses.detach().numpy()
                scores.confidence[places] = confidence.numpy()
                scores.correct[places] = hits.numpy()
        return losses

    def means(self, n_bytes: int) -> tuple[float, float, float, float]:
        """Return loss, perplexity, bits per byte and accuracy, as ``Evaluation`` has them.

        Args:
            n_bytes: UTF-8 bytes of the text.
        """
        loss = self.nats / self.tokens
        perplexity = math.exp(min(loss, 700.0))
        return loss, perplexity, self.nats / math.log(2) / n_bytes, self.correct / self.tokens


def evaluate_split(
    model: Model,
    split: Split,
    tokenizer: Tokenizer,
    *,
    reset_at_documents: bool,
    token_scores: TokenScores | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Score a whole split of a corpus; of conversations their answers.

    Args:
        model: left in the mode (training or evaluation) that it is in.
        split: tokens and bytes of the text.
        tokenizer: the tokenizer of the split and of the model.
        reset_at_documents: start every document from the empty state.
        token_scores: filled with the scores of each token.
        progress: called with the number of tokens just scored; an exception that it raises ends
            the evaluation.

    Raises:
        InputError: the split is empty.
    """
    return evaluate(
        model,
        split.tokens,
        tokenizer.eot,
        split.n_bytes,
        answers=split.answers,
        reset_at_documents=reset_at_documents,
        token_scores=token_scores,
        progress=progress,
    )


@torch.inference_mode()
def evaluate(
    model: Model,
    tokens: np.ndarray,
    eot: int,
    n_bytes: int,
    *,
    chunk: int = 256,
    answers: np.ndarray | None = None,
    reset_at_documents: bool = False,
    token_scores: TokenScores | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Score tokens in contiguous streams whose state is carried from chunk to chunk.

    Args:
        model: left in the mode (training or evaluation) that it is in.
        tokens: (n,) token ids of any integer dtype; every document ends with ``eot``.
        eot: id of the end token, which is also the context of the first token.
        n_bytes: UTF-8 bytes of the text that the scored tokens encode.
        chunk: tokens of each stream per forward pass. It changes speed and memory only.
        answers: (n,) bool, the tokens that are scored; the others are read only. None scores all.
        reset_at_documents: start every document from the empty state.
        token_scores: filled with the scores of each token; those of tokens that are not scored are
            left as they are.
        progress: called with the number of tokens just scored; an exception that it raises ends
            the evaluation.

    Raises:
        InputError: there is no token to score.
    """
    scored = len(tokens) if answers is None else int(answers.sum())
    if scored == 0 or n_bytes == 0:
        raise InputError("nothing to evaluate: the validation split is empty")
    streams = count_evaluation_streams(len(tokens))
    training, begin = model.training, time.perf_counter()
    model.eval()
    state: State | None = None
    sums = ScoreSums(token_scores)
    positions = torch.arange(streams * cdiv(len(tokens), streams))
    chunk_positions = positions.view(streams, -1).split(chunk, 1)
    counted = torch.ones(len(positions), dtype=torch.bool)
    if answers is not None:
        counted[: len(tokens)] = torch.from_numpy(answers)
    try:
        for (x, y, mask), position in zip(
            evaluation_streams(tokens, eot, streams, chunk), chunk_positions, strict=True
        ):
            read, mask = mask, mask & counted[position]
            document_starts = x == eot if reset_at_documents else None
            hidden, state = model.hidden_states(x, state, document_starts=document_starts)
            # logits are large, so only LOGITS_CHUNK rows of them exist at once
            for h, target, index in zip(
                hidden[mask].split(LOGITS_CHUNK),
                y[mask].split(LOGITS_CHUNK),
                position[mask].split(LOGITS_CHUNK),
                strict=True,
            ):
                sums.add(model.lm_head(h), target, index)
            if progress is not None:
                progress(int(read.sum()))
    finally:
        model.train(training)
    return Evaluation(
        *sums.means(n_bytes),
        tokens=scored,
        bytes=n_bytes,
        seconds=time.perf_counter() - begin,
    )


class ScoredContext:
    """A model that has read a context, ready to score continuations of it.

    ``read_context`` makes one.
    """

    def __init__(self, model: Model, last_hidden: Tensor, state: State) -> None:
        """Keep the model, the hidden state (1, D) at the newest token, and the recurrent state."""
        self._model, self._last_hidden, self._state = model, last_hidden, state

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Score a continuation of n tokens, each given the context and the tokens before it.

        Args:
            ids: token ids of the continuation; may be empty.

        Returns:
            Minus the log-probability of each token in nats, (n,) float64; and whether the token was
            the most likely one, (n,) bool.
        """
        targets = torch.tensor(ids, dtype=torch.int64)
        state, last_hidden = self._state, self._last_hidden
        nats, correct = [np.empty(0)], [np.empty(0, bool)]
        for chunk in targets.split(CHUNK) if ids else ():
            hidden, state = self._model.hidden_states(chunk[None], state)
            logits = self._model.lm_head(torch.cat((last_hidden, hidden[0, :-1]))).double()
            nats.append(F.cross_entropy(logits, chunk, reduction="none").numpy())
            correct.append((logits.argmax(-1) == chunk).numpy())
            last_hidden = hidden[0, -1:]
        return np.concatenate(nats), np.concatenate(correct)


@torch.inference_mode()
def read_context(model: Model, ids: Sequence[int]) -> ScoredContext:
    """Let a model read a context, in chunks.

    Args:
        model: in evaluation mode.
        ids: token ids of the context, at least one; usually the end token comes first.
    """
    state: State | None = None
    for chunk in torch.tensor(ids, dtype=torch.int64).split(CHUNK):
        hidden, state = model.hidden_states(chunk[None], state)
    assert state is not None
    return ScoredContext(model, hidden[0, -1:], state)
