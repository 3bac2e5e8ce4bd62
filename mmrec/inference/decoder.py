"""Run a model token by token, without torch: read text, score it, write it.

The recurrent state of a text has a fixed size, so every token takes the same time and memory, and
a text can be saved, copied and continued at the cost of copying a few kilobytes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmrec.checkpoint.header import (
    open_checkpoint,
    read_header,
    read_lora_settings,
    read_model_config,
    read_tokenizer,
)
from mmrec.config import WEIGHT_DTYPES, ModelConfig, SamplingConfig, state_layout
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.inference.weights import model_parameters, read_parameters
from mmrec.kernels.decoder.reference import hidden_step
from mmrec.kernels.sampling.reference import (
    REPETITION_WINDOW,
    adjust_logits,
    draw,
    log_softmax,
    next_token_probabilities,
    uniform,
)

if TYPE_CHECKING:
    from mmrec.model import Model


@dataclass
class DecoderState:
    """Where a text stands. The newest token is pending: the network has not read it yet."""

    values: np.ndarray
    """(state_size,) float32, the recurrent state before the pending token."""
    recent: np.ndarray
    """(REPETITION_WINDOW,) int32, the last tokens, the pending one last; -1 before the text."""
    length: int = 0
    """Tokens of the text so far, without the end token that stands before it."""

    def copy(self) -> "DecoderState":
        """Return a state that continues from the same place, independent of this one."""
        return DecoderState(self.values.copy(), self.recent.copy(), self.length)


@dataclass
class Stream:
    """One text that is being written. ``Decoder.decode`` changes it in place."""

    state: DecoderState
    sampling: SamplingConfig
    seed: int
    """Draw number i uses a random number that depends on the seed and on i only."""
    limit: int
    """Most tokens that are still to be drawn."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """What is added to the logits of tokens."""
    drawn: int = 0
    """Tokens drawn so far."""
    counts: np.ndarray | None = None
    """(V,) int32, how often each token was drawn; kept where a penalty needs it."""
    finished: str | None = None
    """``stop`` after the end token, ``length`` at the limit, else None."""


class Decoded(NamedTuple):
    """The tokens that one call drew for one stream."""

    tokens: np.ndarray
    """(n,) int32, without the end token."""
    logprobs: np.ndarray
    """(n,) float32, log-probability of each in nats, before penalties, temperature and filters."""
    top_tokens: np.ndarray
    """(n, top) int32, the most likely tokens, the likeliest first."""
    top_logprobs: np.ndarray
    """(n, top) float32, their log-probabilities."""


class TokenScores(NamedTuple):
    """What a model says of the tokens of a text."""

    logprobs: np.ndarray
    """(n,) float32, log-probability of each token in nats, given all before it."""
    top_tokens: np.ndarray
    """(n, top) int32, the most likely tokens, the likeliest first."""
    top_logprobs: np.ndarray
    """(n, top) float32, their log-probabilities."""


class Decoder:
    """A model and its tokenizer, ready to read and write text."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, np.ndarray],
        tokenizer: Tokenizer,
        *,
        weights: str = "float32",
        threads: int | None = None,
        path: Path | None = None,
        step: int = 0,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Lay out the weights.

        Args:
            config: The shape of the model.
            parameters: float32 arrays by the names that ``mmrec.model.Model`` gives them.
            tokenizer: That of the model.
            weights: How the weights are held: one of ``WEIGHT_DTYPES``.
            threads: Threads that work on a token; None chooses by the size of the model.
            path: The checkpoint, if there is one.
            step: Optimizer steps that the model has taken.
            metadata: What the checkpoint says of itself.

        Raises:
            InputError: ``weights`` or ``threads`` is not as above.
        """
        if weights not in WEIGHT_DTYPES:
            raise InputError(f"weights must be one of {', '.join(WEIGHT_DTYPES)}; got {weights!r}")
        if threads is not None and (type(threads) is not int or threads < 1):
            raise InputError(f"threads must be >= 1; got {threads!r}")
        self.config, self.tokenizer, self.weights = config, tokenizer, weights
        self.path, self.step, self.metadata = path, step, metadata or {}
        self.state_size = state_layout(config)[-1][-1][2]
        self.fingerprint = _fingerprint(config, parameters)
        self._parameters = dict(parameters)

    @classmethod
    def load(cls, path: Path, *, weights: str = "float32", threads: int | None = None) -> "Decoder":
        """Read the model of a checkpoint.

        Args:
            path: The checkpoint.
            weights: As in ``Decoder``.
            threads: As in ``Decoder``.

        Raises:
            InputError: There is no complete checkpoint of this version at ``path``.
        """
        with open_checkpoint(path) as file:
            step, metadata = read_header(file)
            config = read_model_config(file)
            parameters = read_parameters(file, config, read_lora_settings(file))
            tokenizer = read_tokenizer(file)
        return cls(
            config,
            parameters,
            tokenizer,
            weights=weights,
            threads=threads,
            path=path,
            step=step,
            metadata=metadata,
        )

    @classmethod
    def from_model(
        cls,
        model: "Model",
        tokenizer: Tokenizer,
        *,
        weights: str = "float32",
        threads: int | None = None,
    ) -> "Decoder":
        """Take the weights of a torch model as they are now."""
        return cls(
            model.config, model_parameters(model), tokenizer, weights=weights, threads=threads
        )

    def initial_state(self) -> DecoderState:
        """Return the state of an empty text, which begins after an end token."""
        recent = np.full(REPETITION_WINDOW, -1, np.int32)
        recent[-1] = self.tokenizer.eot
        return DecoderState(np.zeros(self.state_size, np.float32), recent)

    def read(self, state: DecoderState, tokens: Sequence[int] | np.ndarray) -> None:
        """Append tokens to the text of a state, in place."""
        for token in self._check_tokens(tokens):
            self._read_pending(state)
            _append(state, int(token))

    def score(
        self, state: DecoderState, tokens: Sequence[int] | np.ndarray, *, top: int = 0
    ) -> TokenScores:
        """Append tokens to the text of a state, in place, and return how likely each was.

        Args:
            state: The text before the tokens.
            tokens: (n,) ids.
            top: How many of the most likely tokens to return for each place.
        """
        ids = self._check_tokens(tokens)
        logprobs = np.empty(len(ids), np.float32)
        top_tokens = np.empty((len(ids), top), np.int32)
        top_logprobs = np.empty((len(ids), top), np.float32)
        for i, token in enumerate(ids):
            all_logprobs = log_softmax(self._read_pending(state))
            _append(state, int(token))
            logprobs[i] = all_logprobs[token]
            top_tokens[i] = np.argsort(-all_logprobs, kind="stable")[:top]
            top_logprobs[i] = all_logprobs[top_tokens[i]]
        return TokenScores(logprobs, top_tokens, top_logprobs)

    def decode(self, streams: Sequence[Stream], steps: int, *, top: int = 0) -> list[Decoded]:
        """Draw up to ``steps`` tokens for each of several texts. Their states advance in place.

        What is drawn for a stream does not depend on the others.

        Args:
            streams: The texts. Those that are finished get no token.
            steps: Most tokens to draw for each.
            top: How many of the most likely tokens to return for each place.

        Raises:
            InputError: The logits are not finite.
        """
        return [self._decode_one(stream, steps, top) for stream in streams]

    def next_token_logits(self, state: DecoderState) -> np.ndarray:
        """Return the logits (V,) float32 of the token that follows; the state stays as it is."""
        return self._read_pending(state.copy())

    def _decode_one(self, stream: Stream, steps: int, top: int) -> Decoded:
        tokens, logprobs, top_tokens, top_logprobs = [], [], [], []
        penalised = stream.sampling.frequency_penalty or stream.sampling.presence_penalty
        if penalised and stream.counts is None:
            stream.counts = np.zeros(self.config.vocab_size, np.int32)
        while stream.finished is None and len(tokens) < steps:
            if stream.limit <= 0:
                stream.finished = "length"
                break
            before = stream.state.copy()
            logits = self._read_pending(stream.state)
            adjusted = adjust_logits(
                logits, stream.sampling, stream.state.recent, stream.counts, stream.logit_bias
            )
            p = next_token_probabilities(adjusted, stream.sampling)
            if not np.isfinite(p).all():
                raise InputError(
                    "the logits of the model must be finite; its weights are damaged, or the "
                    f"temperature {stream.sampling.temperature} is too small"
                )
            token = draw(p, uniform(stream.seed, stream.drawn))
            if token == self.tokenizer.eot:
                stream.finished = "stop"
                stream.state.values[:] = before.values
                break
            all_logprobs = log_softmax(logits)
            tokens.append(token)
            logprobs.append(all_logprobs[token])
            top_tokens.append(np.argsort(-all_logprobs, kind="stable")[:top])
            top_logprobs.append(all_logprobs[top_tokens[-1]])
            _append(stream.state, token)
            stream.drawn, stream.limit = stream.drawn + 1, stream.limit - 1
            if stream.counts is not None:
                stream.counts[token] += 1
        if stream.finished is None and stream.limit <= 0:
            stream.finished = "length"
        return Decoded(
            np.array(tokens, np.int32),
            np.array(logprobs, np.float32),
            np.array(top_tokens, np.int32).reshape(len(tokens), top),
            np.array(top_logprobs, np.float32).reshape(len(tokens), top),
        )

    def _read_pending(self, state: DecoderState) -> np.ndarray:
        """Let the network read the pending token; return the logits (V,) float32 after it."""
        tokens = np.maximum(state.recent[-self.config.max_ngram :], 0).tolist()
        hidden = hidden_step(self.config, self._parameters, state.values, tokens)
        return self._parameters["embedding"] @ hidden

    def _check_tokens(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(tokens)
        if ids.size == 0:
            return np.empty(0, np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"tokens must be a list of token ids; got {tokens!r}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = int(ids[(ids < 0) | (ids >= self.config.vocab_size)][0])
            raise InputError(f"token ids must lie in 0 to {self.config.vocab_size - 1}; got {bad}")
        return ids.astype(np.int64)


def _append(state: DecoderState, token: int) -> None:
    state.recent[:-1] = state.recent[1:]
    state.recent[-1] = token
    state.length += 1


def _fingerprint(config: ModelConfig, parameters: Mapping[str, np.ndarray]) -> str:
    """Digest of a model, from its shape and a sample of each parameter."""
    digest = hashlib.sha256(repr(config).encode())
    for name, values in sorted(parameters.items()):
        flat = values.reshape(-1)
        digest.update(f"{name} {values.shape}".encode())
        digest.update(np.ascontiguousarray(flat[:: max(1, flat.size // 1024)]).tobytes())
    return digest.hexdigest()[:32]
