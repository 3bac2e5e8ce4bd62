"""A neural cache: the newest tokens of a text, looked up by the hidden states that preceded them.

The recurrent state of a model has a fixed size, and what it keeps of a text fades within some
hundred tokens. A cache keeps the newest N tokens themselves. Each entry is a token and its key, the
unit vector of the hidden state from which the model predicted that token. To predict the next
token, the hidden state there is compared with all keys. Where it is like the state of an earlier
place, what followed that place becomes more likely. So names, phrases and identifiers of a text are
expected again. Nothing is trained, and no token is predicted from a later one.

Let s_i be the cosine of the hidden state and the key i, x_i the token of that entry, and m the
largest s_i. The distribution of the next token v is

    w_i = exp(SHARPNESS (s_i - m)),   λ = μ exp(FALLOFF (m - 1))
    p(v) = (1 - λ) p_model(v) + λ Σ_i w_i [x_i = v] / Σ_i w_i

How far a cache can be trusted differs between texts. So μ is the mean of WEIGHTS under a posterior
over them: after each token of the text, the probability of a weight is multiplied by what the
distribution with this weight alone gave to the token, and a part SWITCH is shared out evenly. Since
0 is among the weights, a cache of no use is soon left out.

Sources: Grave, Joulin and Usunier 2017, "Improving neural language models with a continuous cache"
(arXiv:1612.04426, eqs. 3 to 5), where λ is a constant; a λ that depends on the best match is due to
Drozdov et al. 2022 (arXiv:2210.15859); the posterior is the fixed-share forecaster of Herbster and
Warmuth 1998, "Tracking the best expert". docs/development/decisions/043-neural-cache.md has how the
constants were chosen.

Axes: n tokens, N entries, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmrec.config import NeuralCacheConfig
from mmrec.errors import InputError
from mmrec.inference.decoder import (
    SCORE_CHUNK,
    Activations,
    Decoded,
    Decoder,
    DecoderState,
    Stream,
    TokenScores,
    advance,
    broken_logits,
    fill_top,
    is_penalised,
)
from mmrec.kernels.decoder.arguments import LOGITS
from mmrec.kernels.sampling.reference import (
    adjust_logits,
    draw,
    log_softmax,
    next_token_probabilities,
    uniform,
)
from mmrec.runtime.numeric import cdiv

SHARPNESS = 30.0
"""How fast the weight of an entry falls with its cosine."""
FALLOFF = 8.0
"""How fast the share of the cache falls with the cosine of the best match."""
WEIGHTS = np.array([0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9])
"""Shares of the cache, where an earlier hidden state was the same, that are weighed up."""
SWITCH = 0.01
"""Part of their posterior that is shared out evenly after each token."""
MOST_PAIRS = 2_000_000
"""Pairs of a place and an entry that are compared at once; each takes some 30 bytes meanwhile."""


class _Matches(NamedTuple):
    """What the cache says at n places."""

    tokens: np.ndarray
    """(m,) int32, the tokens of the entries."""
    weights: np.ndarray
    """(n, m) float32, w_i; 0 where a place does not know an entry."""
    total: np.ndarray
    """(n,) float64, the sums of the weights; 0 where there is no entry."""
    closeness: np.ndarray
    """(n,) float64, exp(FALLOFF (m - 1)); 0 where there is no entry."""


class NeuralCache:
    """The newest tokens of one text and their keys."""

    def __init__(self, entries: int, width: int) -> None:
        """Begin empty.

        Args:
            entries: N, the most tokens that are kept.
            width: D.
        """
        self.keys = np.zeros((entries, width), np.float32)
        """(N, D). Entry number i of the text lies in row i % N."""
        self.tokens = np.zeros(entries, np.int32)
        """(N,)."""
        self.count = 0
        """Tokens of the text that were added so far."""
        self.posterior = np.full(len(WEIGHTS), 1 / len(WEIGHTS))
        """(len(WEIGHTS),) float64."""

    def copy(self) -> "NeuralCache":
        """Return a cache with the same entries, independent of this one."""
        cache = NeuralCache.__new__(NeuralCache)
        cache.keys, cache.tokens, cache.count = self.keys.copy(), self.tokens.copy(), self.count
        cache.posterior = self.posterior.copy()
        return cache

    def mix(
        self, logits: np.ndarray, keys: np.ndarray, tokens: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Predict tokens of the text by model and cache; each of them is then an entry.

        Args:
            logits: (n, V) of the model, for n consecutive places.
            keys: (n, D) float32, the keys of these places; see ``unit_keys``.
            tokens: the tokens at these places, n of them; or none, if they are not known.

        Returns:
            (n, V) float32, logits of the mixed distribution. Those of a token that the cache does
            not hold are those of the model, plus log(1 - λ).
        """
        known, result = np.asarray(tokens, np.int32), np.empty(logits.shape, np.float32)
        for part in self._parts(len(logits)):
            result[part] = self._mix(logits[part], keys[part], known[part])
        return result

    def observe(self, logits: np.ndarray, keys: np.ndarray, tokens: np.ndarray) -> None:
        """As ``mix`` of tokens that are known, where the distribution is not needed."""
        known = np.asarray(tokens, np.int32)
        for part in self._parts(len(logits)):
            matches = self._look_up(keys[part], known[part])
            normaliser = log_sum_exp(logits[part])
            self._learn(logits[part], normaliser, matches, keys[part], known[part])

    def _parts(self, rows: int) -> Iterator[slice]:
        """Cut places into parts that need memory for MOST_PAIRS at once."""
        size = max(1, MOST_PAIRS // (len(self.tokens) + rows))
        return (slice(begin, begin + size) for begin in range(0, rows, size))

    def _mix(self, logits: np.ndarray, keys: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        matches, normaliser = self._look_up(keys, tokens), log_sum_exp(logits)
        means = self._learn(logits, normaliser, matches, keys, tokens)
        if not len(matches.tokens):
            return logits
        share = means * matches.closeness
        cells = (np.arange(len(logits))[:, None] * logits.shape[1] + matches.tokens).ravel()
        cached = np.bincount(cells, matches.weights.ravel(), logits.size).reshape(logits.shape)
        cached *= (share / np.maximum(matches.total, _TINY))[:, None]
        with np.errstate(divide="ignore"):
            from_cache = np.log(cached) + normaliser[:, None]
        mixed: np.ndarray = np.logaddexp(logits + np.log1p(-share)[:, None], from_cache)
        return mixed

    def _look_up(self, keys: np.ndarray, known: np.ndarray) -> _Matches:
        """Compare places with the entries, and with those of known tokens before them."""
        size, held = len(self.tokens), min(self.count, len(self.tokens))
        order: Any = slice(held)  # the oldest entry first, where the order matters
        if self.count > size and len(known):
            order = np.arange(self.count - held, self.count) % size
        cosines = np.concatenate((keys @ self.keys[order].T, keys @ keys[: len(known)].T), axis=1)
        place, entry = held + np.arange(len(keys))[:, None], np.arange(held + len(known))
        cosines[(entry >= place) | (entry < place - size)] = -np.inf  # it knows the N before it
        best = cosines.max(axis=1, initial=-1.0)
        weights = np.exp(SHARPNESS * (cosines - best[:, None]), dtype=np.float32)
        total = weights.sum(axis=1, dtype=np.float64)
        closeness = np.where(total > 0, np.exp(FALLOFF * (best.astype(np.float64) - 1.0)), 0.0)
        return _Matches(
            np.concatenate((self.tokens[order], known)), weights, total, closeness.clip(max=1.0)
        )

    def _learn(
        self,
        logits: np.ndarray,
        normaliser: np.ndarray,
        matches: _Matches,
        keys: np.ndarray,
        known: np.ndarray,
    ) -> np.ndarray:
        """Add tokens and what they say of WEIGHTS; return μ at each place, before its token."""
        rows = np.arange(len(logits))
        means = np.full(len(logits), self.posterior @ WEIGHTS)
        if not len(known):
            return means
        by_model = np.exp(logits[rows, known] - normaliser)
        is_token = matches.tokens == known[:, None]
        by_cache = np.where(is_token, matches.weights, 0).sum(axis=1, dtype=np.float64)
        by_cache /= np.maximum(matches.total, _TINY)
        shares = matches.closeness[:, None] * WEIGHTS
        likelihoods = (1 - shares) * by_model[:, None] + shares * by_cache[:, None] + _TINY
        for row, likelihood in enumerate(likelihoods):
            means[row] = self.posterior @ WEIGHTS
            posterior = self.posterior * likelihood
            posterior *= (1 - SWITCH) / posterior.sum()
            self.posterior = posterior + SWITCH / len(WEIGHTS)
        self._add(keys, known)
        return means

    def _add(self, keys: np.ndarray, tokens: np.ndarray) -> None:
        """Add tokens of the text in order; the oldest entries make room."""
        size = len(self.tokens)
        places = (self.count + np.arange(len(tokens)))[-size:] % size
        self.keys[places], self.tokens[places] = keys[-size:], tokens[-size:]
        self.count += len(tokens)


_TINY = 1e-300


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """log Σ_v exp(logits) of logits (n, V), (n,) float64."""
    top = logits.max(axis=1)
    total = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
    result: np.ndarray = top + np.log(total)
    return result


def unit_keys(hidden: np.ndarray) -> np.ndarray:
    """Hidden states (n, D) as unit vectors, float32."""
    norm = np.sqrt(np.einsum("nd,nd->n", hidden, hidden, dtype=np.float64))
    keys: np.ndarray = (hidden / np.maximum(norm, 1e-30)[:, None]).astype(np.float32)
    return keys


class CachingDecoder(Decoder):
    """As ``Decoder``, and each text has a neural cache beside its recurrent state.

    What is read and scored becomes an entry. What the model writes does not: it would be expected
    again and again, and the text would run in circles.

    The model is run by the same kernel. Looking up and sampling are in NumPy, so a token that is
    written takes about a quarter of a millisecond more with tiny and 4,096 entries.
    """

    def __init__(self, *args: Any, neural_cache: int, **options: Any) -> None:
        """Lay out the weights.

        Args:
            args: As for ``Decoder``.
            neural_cache: Newest tokens of a text that are kept, at least 1.
            options: As for ``Decoder``.

        Raises:
            InputError: An argument is out of its range.
        """
        super().__init__(*args, **options)
        self.neural_cache = NeuralCacheConfig(neural_cache).neural_cache
        if not self.neural_cache:
            raise InputError("neural_cache must be >= 1 here; got 0: Decoder has no cache")
        begin = self._weights.final_norm
        self._final_norm = self._weights.vectors[begin : begin + self.config.width]

    def initial_state(self) -> DecoderState:
        """Return the state of an empty text, which begins after an end token."""
        state = super().initial_state()
        state.cache = NeuralCache(self.neural_cache, self.config.width)
        return state

    def next_token_logits(self, state: DecoderState) -> np.ndarray:
        """Return the logits (V,) float32 of the token that follows; the state stays as it is."""
        ahead = DecoderState(state.values.copy(), state.recent)
        logits, keys = self._predict(ahead)
        return _cache_of(state).mix(logits, keys, ())[0]

    def read(self, state: DecoderState, tokens: Sequence[int] | np.ndarray) -> None:
        """Append tokens to the text of a state and to its cache, in place."""
        ids = self._check_tokens(tokens)
        for begin in range(0, len(ids), SCORE_CHUNK):
            part = ids[begin : begin + SCORE_CHUNK]
            unused = np.empty((len(part), 0), np.int32)
            scores = TokenScores(np.empty(len(part), np.float32), unused, unused.astype(np.float32))
            activations = super()._score_part(state, part, scores)
            _cache_of(state).observe(*self._rows_of(activations, len(part)), part)

    def _score_part(
        self, state: DecoderState, tokens: np.ndarray, scores: TokenScores
    ) -> Activations:
        activations = super()._score_part(state, tokens, scores)
        mixed = _cache_of(state).mix(*self._rows_of(activations, len(tokens)), tokens)
        for i, (row, token) in enumerate(zip(mixed, tokens, strict=True)):
            logprobs = log_softmax(row)
            scores.logprobs[i] = logprobs[token]
            fill_top(logprobs, scores.top_tokens[i], scores.top_logprobs[i])
        return activations

    def decode(
        self, streams: Sequence[Stream], steps: int, *, top: int = 0, logprobs: bool = True
    ) -> list[Decoded]:
        """Draw up to ``steps`` tokens for each of several texts; see ``Decoder.decode``."""
        self._check_top(top)
        for stream in streams:
            self._check_tokens(list(stream.logit_bias))
        drafts = [self._write(stream, steps, top, logprobs) for stream in streams]
        for stream, (changed, _) in zip(streams, drafts, strict=True):  # now nothing can fail
            stream.__dict__.update(changed.__dict__)
        return [decoded for _, decoded in drafts]

    def _write(
        self, stream: Stream, steps: int, top: int, has_logprobs: bool
    ) -> tuple[Stream, Decoded]:
        """Write a part of one text.

        Returns:
            The stream afterwards, while ``stream`` stays as it is; and what was drawn.

        Raises:
            InputError: The logits are not finite.
        """
        sampling, limit = stream.sampling, min(stream.limit, max(0, steps))
        draft = replace(stream)
        if stream.finished is not None:
            limit = 0
        if limit:
            state = stream.state  # writing leaves the cache as it is
            draft.state = replace(state, values=state.values.copy(), recent=state.recent.copy())
        if is_penalised(sampling):
            before = stream.counts
            draft.counts = (
                np.zeros(self.config.vocab_size, np.int32) if before is None else before.copy()
            )
        tokens: list[int] = []
        told, top_tokens = np.empty(limit, np.float32), np.empty((limit, top), np.int32)
        top_logprobs = np.empty((limit, top), np.float32)
        is_too_cold = 0 < sampling.temperature < 1 / np.finfo(np.float32).max
        for n in range(limit):
            values = draft.state.values.copy()
            logits, key = self._predict(draft.state)
            if is_too_cold or not np.isfinite(logits).all():
                raise InputError(broken_logits(sampling))
            mixed = _cache_of(draft.state).mix(logits, key, ())[0]
            adjusted = adjust_logits(
                mixed, sampling, draft.state.recent, draft.counts, stream.logit_bias
            )
            number = uniform(stream.seed, draft.drawn)
            token = draw(next_token_probabilities(adjusted, sampling), number)
            if token in (self.tokenizer.eot, stream.stop_token):
                draft.state.values, draft.finished = values, "stop"
                break
            if has_logprobs:
                logprobs = log_softmax(mixed)
                told[n] = logprobs[token]
                fill_top(logprobs, top_tokens[n], top_logprobs[n])
            tokens.append(token)
            advance(draft.state, np.append(draft.state.recent, np.int32(token)), 1)
            if draft.counts is not None:
                draft.counts[token] += 1
            draft.drawn, draft.limit = draft.drawn + 1, draft.limit - 1
        if draft.finished is None and draft.limit <= 0:
            draft.finished = "length"
        width = len(tokens) if has_logprobs else 0
        return draft, Decoded(
            np.array(tokens, np.int32), told[:width], top_tokens[:width], top_logprobs[:width]
        )

    def _predict(self, state: DecoderState) -> tuple[np.ndarray, np.ndarray]:
        """Read the pending token; return the model's logits (1, V) and the key (1, D) after it."""
        activations = self._run(LOGITS, state.values[None], state.recent[None], 1, 1)
        return self._rows_of(activations, 1)

    def _rows_of(self, activations: Activations, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The logits (rows, V) and keys (rows, D) of a call of the kernel."""
        logits = _unpadded(activations.logits, rows, self.config.vocab_size)
        hidden = _unpadded(activations.hidden, rows, self.config.width)
        # the final norm divides by the RMS, which a unit vector does not need
        return logits, unit_keys(hidden * self._final_norm)


def load_with_cache(path: Path, neural_cache: int, **options: Any) -> Decoder:
    """Read the model of a checkpoint; ``CachingDecoder``, unless ``neural_cache`` is 0.

    Args:
        path: The checkpoint.
        neural_cache: Newest tokens of a text that are looked up.
        options: As for ``Decoder.load``.

    Raises:
        InputError: There is no complete checkpoint of this version at ``path``, or an argument is
            out of its range.
    """
    if neural_cache:
        return CachingDecoder.load(path, neural_cache=neural_cache, **options)
    return Decoder.load(path, **options)


def _cache_of(state: DecoderState) -> NeuralCache:
    assert state.cache is not None, "the state is of a decoder without a cache"
    return state.cache


def _unpadded(padded: np.ndarray, rows: int, width: int) -> np.ndarray:
    """The first rows of a flat array of the kernel, (rows, width), without the padding."""
    from mmrec.kernels._panels import PANEL

    stride = cdiv(width, PANEL) * PANEL
    return padded[: rows * stride].reshape(rows, stride)[:, :width]
