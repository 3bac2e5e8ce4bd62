"""Run a model token by token, without torch: read text, score it, write it.

The recurrent state of a text has a fixed size, so every token takes the same time and memory, and
a text can be saved, copied and continued at the cost of copying a few kilobytes.
"""

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

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
from mmrec.kernels.decoder.arguments import (
    BROKEN,
    DECODE,
    LOGITS,
    READ,
    SCORE,
    STOPPED,
    Drawn,
    Streams,
)
from mmrec.kernels.sampling.reference import REPETITION_WINDOW
from mmrec.runtime.cores import available_cores

if TYPE_CHECKING:
    from mmrec.inference.neural_cache import NeuralCache
    from mmrec.model import Model

READ_CHUNK = 256
"""Tokens of a text that are read in one call."""
SCORE_CHUNK = 64
"""Tokens of a text that are scored in one call."""
PARALLEL_WEIGHTS = 4_000_000
"""Rows of a call times the weights that one reads, from which on all cores share it."""
STREAMS_APART = 2
"""Streams per thread from which on each thread may take streams of its own."""
CACHED_BYTES = 16 << 20
"""Bytes of weights per token up to which it may: they stay in the cache that cores share."""

NO_STREAMS = Streams(
    np.empty(0, np.uint64),
    np.empty(0, np.int64),
    np.empty(0, np.int64),
    np.empty((0, 7)),
    np.empty((0, 0), np.int32),
    np.zeros(1, np.int64),
    np.empty(0, np.int32),
    np.empty(0),
    0,
    np.empty(0, np.int64),
)
NOTHING_DRAWN = Drawn(
    np.empty(0, np.int64),
    np.empty(0, np.int64),
    np.empty((0, 0), np.int32),
    np.empty((0, 0), np.float32),
    np.empty((0, 0, 0), np.int32),
    np.empty((0, 0, 0), np.float32),
)


class Activations(NamedTuple):
    """What the last call of the kernel computed for the rows of the first stream, flat and with
    the padding of the kernel; valid until the next call."""

    logits: np.ndarray
    hidden: np.ndarray
    """The hidden states before the final norm."""


@dataclass
class DecoderState:
    """Where a text stands. The newest token is pending: the network has not read it yet."""

    values: np.ndarray
    """(state_size,) float32, the recurrent state before the pending token."""
    recent: np.ndarray
    """(REPETITION_WINDOW,) int32, the last tokens, the pending one last; -1 before the text."""
    length: int = 0
    """Tokens of the text so far, without the end token that stands before it."""
    cache: "NeuralCache | None" = None
    """The neural cache of the text, under ``CachingDecoder``."""

    @property
    def cache_size(self) -> int:
        """Most tokens that the neural cache keeps; 0 without one."""
        return 0 if self.cache is None else len(self.cache.tokens)

    def copy(self) -> "DecoderState":
        """Return a state that continues from the same place, independent of this one."""
        cache = None if self.cache is None else self.cache.copy()
        return DecoderState(self.values.copy(), self.recent.copy(), self.length, cache)


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
    return_state: bool = True
    """Whether ``state`` is needed after the end token."""
    stop_token: int | None = None
    """A token that ends the text, besides the end token."""
    drawn: int = 0
    """Tokens drawn so far."""
    counts: np.ndarray | None = None
    """(V,) int32, how often each token was drawn; kept where a penalty needs it."""
    finished: str | None = None
    """``stop`` after the end or stop token, ``length`` at the limit, else None."""


class Decoded(NamedTuple):
    """The tokens that one call drew for one stream."""

    tokens: np.ndarray
    """(n,) int32, without the end or stop token."""
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
        parameters: dict[str, np.ndarray],
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
            parameters: float32 arrays by the names that ``mmrec.model.Model`` gives them. Emptied
                as they are laid out, so that a large model is in memory about once.
            tokenizer: That of the model.
            weights: How the weights are held: one of ``WEIGHT_DTYPES``.
            threads: Threads that share a call; None takes one or all cores by the size of the work.
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
        self._threads = threads
        self.bytes_per_token = self._lay_out(parameters)
        """Bytes of weights that one token of one text reads."""
        self._memory: dict[int, tuple[tuple[int, ...], Any]] = {}
        self._lock = threading.Lock()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def _lay_out(self, parameters: dict[str, np.ndarray]) -> int:
        """Lay out the weights; return how many bytes of them one token reads.

        What imports Numba is imported when it is needed, for the sake of ``NumpyDecoder``.
        """
        from mmrec.kernels.decoder.layout import bytes_per_token, lay_out

        self._weights = lay_out(self.config, parameters, self.weights)
        return bytes_per_token(self._weights)

    def _threads_for(self, rows: int) -> int:
        """How many threads run a call with that many rows.

        Threads that share little work mostly wait for each other. The results do not depend on it.
        """
        if self._threads is not None:
            return self._threads
        weights = self.bytes_per_token // self._weights.matrices.itemsize
        return available_cores() if rows * weights >= PARALLEL_WEIGHTS else 1

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        weights: str = "float32",
        threads: int | None = None,
        **options: Any,
    ) -> Self:
        """Read the model of a checkpoint.

        Args:
            path: The checkpoint.
            weights: As in ``Decoder``.
            threads: As in ``Decoder``.
            options: Further arguments of the class.

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
            **options,
        )

    @classmethod
    def from_model(
        cls,
        model: "Model",
        tokenizer: Tokenizer,
        *,
        weights: str = "float32",
        threads: int | None = None,
        **options: Any,
    ) -> Self:
        """Take the weights of a torch model as they are now; ``options`` as for ``load``."""
        return cls(
            model.config,
            model_parameters(model),
            tokenizer,
            weights=weights,
            threads=threads,
            **options,
        )

    def initial_state(self) -> DecoderState:
        """Return the state of an empty text, which begins after an end token."""
        recent = np.full(REPETITION_WINDOW, -1, np.int32)
        recent[-1] = self.tokenizer.eot
        return DecoderState(np.zeros(self.state_size, np.float32), recent)

    def read(self, state: DecoderState, tokens: Sequence[int] | np.ndarray) -> None:
        """Append tokens to the text of a state, in place."""
        ids = self._check_tokens(tokens)
        for begin in range(0, len(ids), READ_CHUNK):
            part = ids[begin : begin + READ_CHUNK]
            window = np.concatenate((state.recent, part))
            self._run(READ, state.values[None], window[None], len(part), 0)
            advance(state, window, len(part))

    def score(
        self, state: DecoderState, tokens: Sequence[int] | np.ndarray, *, top: int = 0
    ) -> TokenScores:
        """Append tokens to the text of a state, in place, and return how likely each was.

        Args:
            state: The text before the tokens.
            tokens: (n,) ids.
            top: How many of the most likely tokens to return for each place.

        Raises:
            InputError: A token is not in the vocabulary, or ``top`` is out of range.
        """
        ids = self._check_tokens(tokens)
        self._check_top(top)
        result = TokenScores(
            np.empty(len(ids), np.float32),
            np.empty((len(ids), top), np.int32),
            np.empty((len(ids), top), np.float32),
        )
        for begin in range(0, len(ids), SCORE_CHUNK):
            part = ids[begin : begin + SCORE_CHUNK]
            scores = TokenScores(*(array[begin : begin + len(part)] for array in result))
            self._score_part(state, part, scores)
        return result

    def _score_part(
        self, state: DecoderState, tokens: np.ndarray, scores: TokenScores
    ) -> Activations:
        """Append up to SCORE_CHUNK tokens to the text of a state, and fill their scores."""
        window = np.concatenate((state.recent, tokens))
        rows = {name: array[None] for name, array in scores._asdict().items()}
        drawn, count = NOTHING_DRAWN._replace(**rows), len(tokens)
        activations = self._run(SCORE, state.values[None], window[None], count, count, drawn=drawn)
        advance(state, window, count)
        return activations

    def next_token_logits(self, state: DecoderState) -> np.ndarray:
        """Return the logits (V,) float32 of the token that follows; the state stays as it is."""
        values = state.values[None].copy()
        logits = self._run(LOGITS, values, state.recent[None], 1, 1).logits
        return logits[: self.config.vocab_size].copy()

    def decode(
        self, streams: Sequence[Stream], steps: int, *, top: int = 0, logprobs: bool = True
    ) -> list[Decoded]:
        """Draw up to ``steps`` tokens for each of several texts. Their states advance in place.

        What is drawn for a stream does not depend on the others.

        Args:
            streams: The texts. Those that are finished get no token.
            steps: Most tokens to draw for each.
            top: How many of the most likely tokens to return for each place.
            logprobs: Whether to compute log-probabilities; without, ``top`` must be 0 and the
                result has none.

        Raises:
            InputError: The logits are not finite, or ``top`` is out of range. No stream is
                changed then.
        """
        self._check_top(top)
        running = [s for s in streams if s.finished is None]
        drawn = self._draw(running, max(0, steps), top, logprobs) if running else None
        results, row = [], 0
        for stream in streams:
            if drawn is None or row == len(running) or stream is not running[row]:
                results.append(_decoded(None, 0, top))
                continue
            results.append(_decoded(drawn, row, top))
            row += 1
        return results

    def _draw(self, streams: Sequence[Stream], steps: int, top: int, logprobs: bool) -> Drawn:
        batch = len(streams)
        penalised = any(is_penalised(s.sampling) for s in streams)
        counts = np.zeros((batch, self.config.vocab_size if penalised else 0), np.int32)
        for row, stream in zip(counts, streams, strict=True):
            if row.size and stream.counts is not None:
                row[:] = stream.counts
        biases = [sorted(s.logit_bias.items()) for s in streams]
        for token in {token for bias in biases for token, _ in bias}:
            self._check_tokens([token])
        limits = [min(s.limit, steps) for s in streams]
        arguments = Streams(
            np.array([s.seed for s in streams], np.uint64),
            np.array([s.drawn for s in streams], np.int64),
            np.array(limits, np.int64),
            np.array([_settings(s.sampling) for s in streams], np.float64),
            counts,
            np.cumsum([0, *map(len, biases)]).astype(np.int64),
            np.array([token for bias in biases for token, _ in bias], np.int32),
            np.array([value for bias in biases for _, value in bias], np.float64),
            self.tokenizer.eot,
            np.array([-1 if s.stop_token is None else s.stop_token for s in streams], np.int64),
        )
        width = steps if logprobs else 0
        drawn = Drawn(
            np.zeros(batch, np.int64),
            np.zeros(batch, np.int64),
            np.empty((batch, steps), np.int32),
            np.empty((batch, width), np.float32),
            np.empty((batch, width, top), np.int32),
            np.empty((batch, width, top), np.float32),
        )
        values = np.stack([s.state.values for s in streams])
        window = np.stack([s.state.recent for s in streams])
        self._run(DECODE, values, window, steps, batch, arguments, drawn)
        if (drawn.status == BROKEN).any():
            broken = streams[int(np.argmax(drawn.status == BROKEN))]
            raise InputError(broken_logits(broken.sampling))
        for b, stream in enumerate(streams):
            count = int(drawn.counts[b])
            stream.drawn, stream.limit = stream.drawn + count, stream.limit - count
            if drawn.status[b] == STOPPED:
                if stream.return_state:
                    # the network has read the last token, which the state holds as pending
                    self.read(stream.state, drawn.tokens[b, :count])
                stream.finished = "stop"
            else:
                stream.state.values[:] = values[b]
                stream.state.recent[:] = window[b]
                stream.state.length += count
                if stream.limit <= 0:
                    stream.finished = "length"
            if counts.shape[1] and is_penalised(stream.sampling):
                stream.counts = counts[b]
        return drawn

    def _run(
        self,
        task: int,
        values: np.ndarray,
        window: np.ndarray,
        steps: int,
        logits_rows: int,
        streams: Streams = NO_STREAMS,
        drawn: Drawn = NOTHING_DRAWN,
    ) -> Activations:
        """Run the kernel on a team of threads; the arguments are those of its ``run``."""
        from mmrec.kernels.decoder.kernel import Scratch
        from mmrec.kernels.decoder.kernel import run as run_kernel

        batch, length = len(values), 1 if task == DECODE else steps
        with self._lock:
            threads = self._threads_for(batch * length)
            # Streams on threads of their own need no barriers, but each thread reads all weights.
            apart = batch >= STREAMS_APART * threads and self.bytes_per_token <= CACHED_BYTES
            groups, members = (threads, 1) if apart else (1, threads)

            def run(group: int, member: int) -> Scratch:
                part = slice(batch * group // groups, batch * (group + 1) // groups)
                scratch, private = memories[group]
                run_kernel(
                    self._weights,
                    scratch,
                    private[member],
                    task,
                    values[part],
                    window[part],
                    REPETITION_WINDOW - 1,
                    steps,
                    _part_of(streams, part) if apart else streams,
                    _part_of(drawn, part) if apart else drawn,
                    np.empty(batch, np.int64),
                    member,
                    members,
                )
                return scratch

            rows = batch * length if not apart else -(-batch // groups)
            streams_of_group = -(-batch // groups)
            memories = [
                self._memory_for(n, streams_of_group, rows, min(rows, logits_rows), members)
                for n in range(groups)
            ]
            for scratch, _ in memories:
                scratch.arrived[0] = 0
            team = [(group, member) for group in range(groups) for member in range(members)]
            others = [self._executor(threads).submit(run, *who) for who in team[1:]]
            scratch = run(*team[0])
            for other in others:
                other.result()
            return Activations(scratch.logits, scratch.x)

    def _memory_for(self, group: int, *needed: int) -> Any:
        """Return memory of a team and of its members; it is kept and grows by powers of two.

        Args:
            group: Number of the team.
            needed: Streams, rows, rows with logits, and members.
        """
        from mmrec.kernels.decoder.layout import make_private, make_scratch

        sizes, memory = self._memory.get(group, ((0,) * len(needed), None))
        if memory is None or any(have < need for have, need in zip(sizes, needed, strict=True)):
            sizes = tuple(
                max(have, 1 << max(0, need - 1).bit_length())
                for have, need in zip(sizes, needed, strict=True)
            )
            streams, rows, logits_rows, members = sizes
            scratch = make_scratch(self._weights, streams, rows, logits_rows)
            private = [make_private(self._weights, rows) for _ in range(members)]
            memory = scratch, private
            self._memory[group] = sizes, memory
        return memory

    def _executor(self, members: int) -> ThreadPoolExecutor:
        """Return the threads that help; a forked child starts its own."""
        if self._pool is None or self._pool[0] != os.getpid():
            most = max(members, available_cores())
            self._pool = os.getpid(), ThreadPoolExecutor(most - 1, "mmrec-decoder")
        return self._pool[1]

    def _check_top(self, top: int) -> None:
        if not 0 <= top <= self.config.vocab_size:
            raise InputError(
                f"the number of most likely tokens must lie in 0 to {self.config.vocab_size}, the "
                f"size of the vocabulary; got {top}"
            )

    def _check_tokens(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(tokens)
        if ids.size == 0:
            return np.empty(0, np.int32)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"tokens must be a list of token ids; got {tokens!r}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = int(ids[(ids < 0) | (ids >= self.config.vocab_size)][0])
            raise InputError(f"token ids must lie in 0 to {self.config.vocab_size - 1}; got {bad}")
        return ids.astype(np.int32)


def advance(state: DecoderState, window: np.ndarray, count: int) -> None:
    """Advance a text by ``count`` tokens, the last ones of ``window``; its values have advanced."""
    state.recent[:] = window[-REPETITION_WINDOW:]
    state.length += count


def is_penalised(sampling: SamplingConfig) -> bool:
    """Whether tokens that were drawn must be counted."""
    return bool(sampling.frequency_penalty or sampling.presence_penalty)


def broken_logits(sampling: SamplingConfig) -> str:
    """The message where no token can be drawn."""
    return (
        "the logits of the model must be finite; its weights are damaged, or the temperature "
        f"{sampling.temperature} is too small"
    )


def fill_top(logprobs: np.ndarray, top_tokens: np.ndarray, top_logprobs: np.ndarray) -> None:
    """Note the most likely tokens (n,) and their log-probabilities (n,), from those of all (V,)."""
    if count := len(top_tokens):
        top_tokens[:] = np.argsort(-logprobs, kind="stable")[:count]
        top_logprobs[:] = logprobs[top_tokens]


def _settings(s: SamplingConfig) -> list[float]:
    """Sampling settings in the order of ``Streams.settings``."""
    return [
        s.repetition_penalty,
        s.frequency_penalty,
        s.presence_penalty,
        s.temperature,
        s.top_k,
        s.top_p,
        s.min_p,
    ]


def _part_of(arrays: Any, part: slice) -> Any:
    """Streams or Drawn with the entries of some streams only, as views."""
    if isinstance(arrays, Drawn):
        return Drawn(*(array[part] for array in arrays))
    whole = ("bias_tokens", "bias_values", "end_token")
    fields = {
        name: value if name in whole else value[part] for name, value in arrays._asdict().items()
    }
    fields["bias_bounds"] = arrays.bias_bounds[part.start : part.stop + 1]
    return Streams(**fields)


def _decoded(drawn: Drawn | None, row: int, top: int) -> Decoded:
    """The part of a stream; nothing for a stream that was finished."""
    if drawn is None:
        empty = np.empty((0, top))
        return Decoded(
            np.empty(0, np.int32),
            np.empty(0, np.float32),
            empty.astype(np.int32),
            empty.astype(np.float32),
        )
    n = int(drawn.counts[row])
    return Decoded(
        drawn.tokens[row, :n],
        drawn.logprobs[row, :n],
        drawn.top_tokens[row, :n],
        drawn.top_logprobs[row, :n],
    )


def _fingerprint(config: ModelConfig, parameters: Mapping[str, np.ndarray]) -> str:
    """Digest of a model, from its shape and a sample of each parameter."""
    digest = hashlib.sha256(repr(config).encode())
    for name, values in sorted(parameters.items()):
        flat = values.reshape(-1)
        digest.update(f"{name} {values.shape}".encode())
        digest.update(np.ascontiguousarray(flat[:: max(1, flat.size // 1024)]).tobytes())
    return digest.hexdigest()[:32]
