"""The neural cache against its definition, and the decoder that has one."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mmrec
from mmrec.checkpoint.hdf5 import seal, write_array
from mmrec.config import SamplingConfig
from mmrec.errors import InputError
from mmrec.inference import neural_cache
from mmrec.inference.decoder import Decoder, Stream
from mmrec.inference.engine import Request, complete
from mmrec.inference.neural_cache import (
    FALLOFF,
    SHARPNESS,
    SWITCH,
    WEIGHTS,
    CachingDecoder,
    NeuralCache,
    unit_keys,
)
from mmrec.inference.session import Session
from mmrec.kernels.decoder.arguments import LOGITS
from mmrec.kernels.sampling.reference import log_softmax
from mmrec.pretrained import pretrained_models
from tests.inference.test_session import TEXT, make_decoder

ENTRIES, WIDTH, VOCAB = 7, 5, 11


def make_places(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (n, V), hidden states (n, D) some of which are alike, and tokens (n,)."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, count)
    hidden = rng.normal(size=(VOCAB, WIDTH))[tokens] + 0.2 * rng.normal(size=(count, WIDTH))
    return rng.normal(size=(count, VOCAB)) * 2, hidden, tokens


def probabilities(logits: np.ndarray, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The distribution at each place (n, V): the definition, in float64, one place at a time."""
    result, entries = [], []
    posterior = [1 / len(WEIGHTS)] * len(WEIGHTS)
    for row, state, token in zip(logits, hidden, tokens, strict=True):
        by_model = np.exp(row) / np.exp(row).sum()
        key, by_cache, closeness = state / math.sqrt(state @ state), np.zeros(VOCAB), 0.0
        newest = entries[-ENTRIES:]
        if newest:
            best = max(key @ k for k, _ in newest)
            closeness = math.exp(FALLOFF * (best - 1))
            for k, x in newest:
                by_cache[x] += math.exp(SHARPNESS * (key @ k - best))
            by_cache /= by_cache.sum()
        mu = sum(p * w for p, w in zip(posterior, WEIGHTS, strict=True))
        share = mu * closeness
        result.append((1 - share) * by_model + share * by_cache)
        posterior = [
            p * ((1 - w * closeness) * by_model[token] + w * closeness * by_cache[token])
            for p, w in zip(posterior, WEIGHTS, strict=True)
        ]
        total = sum(posterior)
        posterior = [(1 - SWITCH) * p / total + SWITCH / len(WEIGHTS) for p in posterior]
        entries.append((key, token))
    return np.array(result)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.array([np.exp(log_softmax(row)) for row in logits])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10**6), st.lists(st.integers(1, 12), max_size=6))
def test_it_is_its_definition_however_a_text_is_cut(count: int, seed: int, cuts: list[int]) -> None:
    """Also where the oldest entries made room, within one call or between calls."""
    logits, hidden, tokens = make_places(count, seed)
    cache, keys = NeuralCache(ENTRIES, WIDTH), unit_keys(hidden)
    bounds = sorted({0, count, *(c for c in np.cumsum(cuts).tolist() if c < count)})
    found = []
    for number, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        part = slice(lo, hi)
        if number % 3 == 2:  # what is only read counts as what is predicted
            before = cache.copy()
            found.append(before.mix(logits[part], keys[part], tokens[part]))
            cache.observe(logits[part], keys[part], tokens[part])
        else:
            found.append(cache.mix(logits[part], keys[part], tokens[part]))
    expected = probabilities(logits, hidden, tokens)
    assert softmax(np.concatenate(found)) == pytest.approx(expected, rel=2e-4, abs=1e-7)
    assert cache.count == count


def test_a_large_cache_is_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, hidden, tokens = make_places(40, 8)
    keys = unit_keys(hidden)
    at_once = NeuralCache(ENTRIES, WIDTH).mix(logits, keys, tokens)
    monkeypatch.setattr(neural_cache, "MOST_PAIRS", 150)  # three places
    parts, observed = NeuralCache(ENTRIES, WIDTH), NeuralCache(ENTRIES, WIDTH)
    assert parts.mix(logits, keys, tokens) == pytest.approx(at_once, rel=1e-4, abs=1e-5)
    observed.observe(logits, keys, tokens)
    assert observed.posterior == pytest.approx(parts.posterior)
    assert (observed.tokens == parts.tokens).all()


def test_a_token_that_is_not_known_yet() -> None:
    """The prediction is the one that it gets if it is known, and nothing is added."""
    logits, hidden, tokens = make_places(12, 3)
    keys, cache = unit_keys(hidden), NeuralCache(ENTRIES, WIDTH)
    cache.observe(logits[:11], keys[:11], tokens[:11])
    count = cache.count
    one = cache.mix(logits[11:], keys[11:], ())
    assert cache.count == count
    assert (one == cache.copy().mix(logits[11:], keys[11:], tokens[11:])).all()
    assert np.exp(log_softmax(one[0])).sum() == pytest.approx(1)


def test_an_empty_cache_is_the_model() -> None:
    logits, hidden, _ = make_places(1, 0)
    mixed = NeuralCache(ENTRIES, WIDTH).mix(logits, unit_keys(hidden), ())
    assert mixed == pytest.approx(logits, rel=1e-6)


def test_a_later_token_changes_no_earlier_prediction() -> None:
    logits, hidden, tokens = make_places(20, 5)
    keys = unit_keys(hidden)
    other = tokens.copy()
    other[12:] = (other[12:] + 1) % VOCAB
    first, second = (
        NeuralCache(ENTRIES, WIDTH).mix(logits, keys, text) for text in (tokens, other)
    )
    assert (first[:13] == second[:13]).all()
    assert not (first[13:] == second[13:]).all()


@pytest.mark.parametrize("seed", range(3))
def test_what_a_useless_cache_costs(seed: int) -> None:
    """At most log K once, and the price of the fixed share per token (Herbster and Warmuth)."""
    rng = np.random.default_rng(seed)
    count, weights = 400, len(WEIGHTS)
    keys = unit_keys(rng.normal(size=(count, 2)))  # in a plane: everything is alike
    tokens = rng.integers(0, VOCAB, count)
    logits = np.where(np.arange(VOCAB) == tokens[:, None], 4.0, 0.0)  # the model knows them
    mixed = NeuralCache(64, 2).mix(logits, keys, tokens)
    nats = [
        -sum(log_softmax(row)[token] for row, token in zip(rows, tokens, strict=True))
        for rows in (mixed, logits)
    ]
    price = math.log(weights) - count * math.log1p(-SWITCH + SWITCH / weights)
    assert nats[1] < nats[0] <= nats[1] + price


# ---- the decoder


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return make_decoder()


@pytest.fixture(scope="module")
def decoder() -> CachingDecoder:
    return make_decoder(neural_cache=32)  # type: ignore[return-value]


def tokens_of(decoder: Decoder, count: int) -> np.ndarray:
    return decoder.tokenizer.encode(TEXT * 10)[:count]


def test_scores_of_a_decoder_are_the_definition(plain: Decoder, decoder: CachingDecoder) -> None:
    ids = tokens_of(decoder, 150)
    scores = decoder.score(decoder.initial_state(), ids, top=3)
    state, logits, hidden = plain.initial_state(), [], []
    for token in ids:
        ahead = state.values[None].copy()
        activations = plain._run(LOGITS, ahead, state.recent[None], 1, 1)
        logits.append(activations.logits[: plain.config.vocab_size].copy())
        hidden.append(activations.hidden[: plain.config.width].copy())
        plain.read(state, [token])
    begin = plain._weights.final_norm
    norm = plain._weights.vectors[begin : begin + plain.config.width]
    cache = NeuralCache(32, plain.config.width)
    mixed = cache.mix(np.array(logits), unit_keys(np.array(hidden) * norm), ids)
    expected = np.array([log_softmax(row) for row in mixed])
    assert scores.logprobs == pytest.approx(expected[np.arange(len(ids)), ids], rel=1e-3, abs=1e-4)
    assert (scores.top_tokens[:, 0] == expected.argmax(-1)).mean() > 0.98
    assert (plain.score(plain.initial_state(), ids).logprobs != scores.logprobs).any()


def test_reading_and_scoring_leave_the_same_state(decoder: CachingDecoder) -> None:
    ids = tokens_of(decoder, 100)
    read, scored, parts = (decoder.initial_state() for _ in range(3))
    decoder.read(read, ids)
    decoder.score(scored, ids)
    for part in np.split(ids, [1, 40]):
        decoder.read(parts, part)
    logits = decoder.next_token_logits(read)
    for state in (scored, parts):
        assert state.cache is not None
        assert read.cache is not None
        assert (state.cache.tokens == read.cache.tokens).all()
        assert state.cache.posterior == pytest.approx(read.cache.posterior, rel=1e-4)
        assert decoder.next_token_logits(state) == pytest.approx(logits, rel=1e-4, abs=1e-4)


def test_what_is_drawn_has_the_probability_of_its_logits(decoder: CachingDecoder) -> None:
    """The token, its log-probability and the likeliest tokens; the text written is no entry."""
    state = decoder.initial_state()
    decoder.read(state, tokens_of(decoder, 60))
    expected = log_softmax(decoder.next_token_logits(state))
    stream = Stream(state.copy(), SamplingConfig(temperature=0), seed=1, limit=5)
    [decoded] = decoder.decode([stream], 5, top=2)
    assert decoded.tokens[0] == expected.argmax() == decoded.top_tokens[0, 0]
    assert decoded.logprobs[0] == pytest.approx(expected.max(), abs=1e-5)
    assert (stream.drawn, stream.finished) == (5, "length")
    assert stream.state.cache is not None
    assert stream.state.cache.count == 60
    assert stream.state.length == 65


def test_texts_are_the_same_alone_and_together(decoder: CachingDecoder) -> None:
    def requests() -> list[Request]:
        sampling = SamplingConfig(temperature=0.9, top_p=0.9, frequency_penalty=0.1)
        return [
            Request(TEXT * n, sampling, max_tokens=20 + n, seed=n, stop=["\n\n"], logprobs=1)
            for n in range(1, 5)
        ]

    together = [(c.text, c.tokens, c.logprobs) for c in complete(decoder, requests())]
    alone = [(c.text, c.tokens, c.logprobs) for r in requests() for c in complete(decoder, [r])]
    assert together == alone
    assert any(text for text, *_ in together)


def test_broken_weights_change_no_stream(decoder: CachingDecoder) -> None:
    states = [decoder.initial_state() for _ in range(2)]
    states[1].values[:] = np.nan
    streams = [Stream(s, SamplingConfig(), seed=0, limit=3) for s in states]
    with pytest.raises(InputError, match="logits of the model must be finite"):
        decoder.decode(streams, 3)
    assert [s.drawn for s in streams] == [0, 0]
    assert streams[0].state is states[0]


def test_a_state_belongs_to_a_size_of_the_cache(plain: Decoder, decoder: CachingDecoder) -> None:
    with pytest.raises(InputError, match="must have a neural cache of 32 tokens; got one of 0"):
        Request(state=plain.initial_state()).check(decoder)
    with pytest.raises(InputError, match="must have a neural cache of 0 tokens; got one of 32"):
        Request(state=decoder.initial_state()).check(plain)
    with pytest.raises(InputError, match="neural_cache must be >= 1 here; got 0"):
        make_decoder(neural_cache=0)


def test_a_session_keeps_its_cache(decoder: CachingDecoder, plain: Decoder, tmp_path: Path) -> None:
    session = Session(decoder)
    session.read(TEXT * 4)
    session.save(tmp_path / "s.h5")
    loaded = Session.load(tmp_path / "s.h5", decoder)
    texts = ["".join(s.generate(max_tokens=30, seed=2)) for s in (session, loaded)]
    assert texts[0] == texts[1]
    with pytest.raises(InputError, match=r"s.h5 must be continued .*: 32 tokens; got 0"):
        Session.load(tmp_path / "s.h5", plain)
    Session(plain).save(tmp_path / "plain.h5")
    with pytest.raises(InputError, match="plain.h5 must be continued .*: 0 tokens; got 32"):
        Session.load(tmp_path / "plain.h5", decoder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cache_keys", 2.0, "cache_keys must be unit vectors"),
        ("cache_keys", np.nan, "cache_keys must be unit vectors"),
        ("cache_tokens", 1 << 40, "cache_tokens must hold token ids"),
        ("cache_posterior_bits", 0, "must be those of probabilities"),
    ],
)
def test_a_session_with_a_broken_cache(
    name: str, value: float, message: str, decoder: CachingDecoder, tmp_path: Path
) -> None:
    session = Session(decoder)
    session.read(TEXT)
    session.save(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        values = file[name][:]
        values[0] = value
        del file[name]
        write_array(file, name, values)
    seal(tmp_path / "s.h5")
    with pytest.raises(InputError, match=message):
        Session.load(tmp_path / "s.h5", decoder)


# ---- as it is used


def test_the_commands(
    text_file: Path, tmp_path: Path, run_command: Callable[..., tuple[str, str]]
) -> None:
    """eval adds a row and leaves the others; score agrees with it; the API gives the same."""
    small = tmp_path / "small.txt"
    small.write_text(text_file.read_text()[:6_000])
    out, _ = run_command(tmp_path, "eval", "python", "--data", str(small), "--json")
    plain = json.loads(out)
    assert "cached" not in plain
    arguments = ["python", "--data", str(small), "--neural-cache", "512"]
    out, _ = run_command(tmp_path, "eval", *arguments, "--json")
    scores = json.loads(out)
    assert scores["bits_per_byte"] == plain["bits_per_byte"]
    cached = scores["cached"]
    assert cached["neural_cache"] == 512
    assert cached["bits_per_byte"] < plain["bits_per_byte"]  # code repeats its names
    out, _ = run_command(tmp_path, "eval", *arguments)
    row = f"  with a cache    {cached['bits_per_byte']:.4f} bits per byte: the newest 512 tokens"
    assert row in out
    assert mmrec.evaluate("python", small, neural_cache=512).cached.loss == pytest.approx(  # type: ignore[union-attr]
        cached["loss"]
    )
    score = ["score", str(small), "python", "--json", "--neural-cache", "512"]
    out, _ = run_command(tmp_path, *score)
    total = json.loads(out.splitlines()[-1])["total"]
    assert total["bits_per_byte"] == pytest.approx(cached["bits_per_byte"], rel=0.01)


def test_what_was_read_is_expected_again(
    text_file: Path, tmp_path: Path, run_command: Callable[..., tuple[str, str]]
) -> None:
    """A line that stood long before; and generate reads and writes with the cache."""
    line = "velocity = measure_velocity(first_sample, second_sample)\n"
    read = line * 3 + text_file.read_text()[:4_000] + "\n"
    path = pretrained_models()["python"].path
    logprobs = []
    for decoder in (Decoder.load(path), CachingDecoder.load(path, neural_cache=4096)):
        state = decoder.initial_state()
        decoder.read(state, decoder.tokenizer.encode(read))
        logprobs.append(decoder.score(state, decoder.tokenizer.encode(line)).logprobs.sum())
    assert logprobs[1] > logprobs[0] + 10
    (tmp_path / "read.txt").write_text(read)
    common = ["generate", "python", "--read", "read.txt", "--prompt", "velocity", "--seed", "1"]
    plain, found = (
        run_command(tmp_path, *common, "--max-tokens", "30", *options)[0]
        for options in ((), ("--neural-cache", "4096"))
    )
    assert found != plain
    [text] = mmrec.load("python").generate(
        [read + "velocity"], max_tokens=30, neural_cache=4096, seed=1
    )
    assert found == f"velocity{text}\n"
