"""The engine: a request comes out the same alone and in any company; its state fits its text."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec.config import ModelConfig, SamplingConfig, parameter_shapes
from mmrec.data.tokenizer import Tokenizer, train_tokenizer
from mmrec.errors import InputError
from mmrec.inference.decoder import Decoder, DecoderState
from mmrec.inference.engine import Completion, Engine, Request, complete
from mmrec.inference.text import TextStream

TEXT = "the cat sat on the mat; the hat of the cat: é, 日本\n" * 3
CONFIG = ModelConfig(
    width=16,
    depth=2,
    heads=2,
    vocab_size=257,
    layer_types="sb",
    ffn_multiplier=2.0,
    ngram_buckets=32,
    max_timescale=32,
)


def random_decoder(tokenizer: Tokenizer) -> Decoder:
    random = np.random.default_rng(0)
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size)
    parameters = {
        name: (random.normal(size=shape) * 0.4).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    return Decoder(config, parameters, tokenizer)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Its tokens are words and parts of words."""
    return random_decoder(train_tokenizer("bpe", [TEXT], 290))


def run(decoder: Decoder, *requests: Request) -> list[Completion]:
    return list(complete(decoder, requests))


def facts(completion: Completion) -> tuple[object, ...]:
    """All of a completion, to be compared bit by bit."""
    state = completion.state
    assert state is not None
    return (
        *(getattr(completion, name) for name in completion.__dataclass_fields__ if name != "state"),
        state.values.tobytes(),
        state.recent.tobytes(),
        state.length,
    )


def state_after(
    decoder: Decoder, tokens: Sequence[int], state: DecoderState | None = None
) -> DecoderState:
    state = decoder.initial_state() if state is None else state.copy()
    decoder.read(state, tokens)
    return state


def assert_same(a: DecoderState | None, b: DecoderState) -> None:
    assert a is not None
    assert np.array_equal(a.values, b.values)
    assert np.array_equal(a.recent, b.recent)
    assert a.length == b.length


def varied_requests(decoder: Decoder) -> list[Request]:
    """Requests of every kind, each with its own seed."""
    eot = decoder.tokenizer.eot
    return [
        Request("the cat", max_tokens=9, seed=1, logprobs=0),
        Request("", max_tokens=12, seed=2, stop=["t", "q"], logprobs=3),
        Request([5, 6, 7] * 9, SamplingConfig(temperature=0), max_tokens=7, seed=3),
        Request("é", SamplingConfig(frequency_penalty=2.0, top_p=1), max_tokens=15, seed=4),
        Request("the cat", SamplingConfig(top_k=3, presence_penalty=-1), max_tokens=6, seed=5),
        Request("mat", max_tokens=60, seed=6, logit_bias={eot: 4.0}),
        Request("日本", max_tokens=0, seed=7),
        Request("x", max_tokens=8, seed=8, state=state_after(decoder, [9, 10])),
        Request("the cat", SamplingConfig(repetition_penalty=1.5), max_tokens=8, seed=9),
        Request("y", max_tokens=1, seed=10, logit_bias={20: 100.0}),
    ]


@pytest.mark.parametrize("max_streams", [1, 3, 32])
@pytest.mark.parametrize("step_seconds", [1e-6, 0.01])
def test_a_request_comes_out_the_same_in_any_company(
    decoder: Decoder, max_streams: int, step_seconds: float
) -> None:
    """Admitted early or late, beside requests that end, are cancelled, or share a prompt."""
    requests = varied_requests(decoder)
    alone = [facts(run(decoder, request)[0]) for request in requests]
    engine = Engine(decoder, max_streams=max_streams, step_seconds=step_seconds)
    handles, others = [], []
    for request in requests:
        handles.append(engine.submit(request))
        others.append(engine.submit(replace(request, seed=99, max_tokens=500)))
        engine.step()
        others[-1].cancel()
    while engine.step():
        pass
    assert [facts(handle.result()) for handle in handles] == alone
    assert {other.result().finish_reason for other in others} <= {"cancelled", "stop", "length"}
    assert any(other.result().finish_reason == "cancelled" for other in others)


def test_the_state_is_that_after_reading_the_tokens(decoder: Decoder) -> None:
    requests = varied_requests(decoder)
    for request, completion in zip(requests, run(decoder, *requests), strict=True):
        prompt = request.prompt
        ids = decoder.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
        assert completion.prompt_tokens == len(ids)
        assert_same(
            completion.state, state_after(decoder, [*ids, *completion.tokens], request.state)
        )


def test_a_completion_without_a_state_is_the_same_text_and_reads_nothing_again(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = varied_requests(decoder)
    wanted = run(decoder, *requests)
    prompts: list[int] = []
    read = Decoder.read

    def count(self: Decoder, state: DecoderState, tokens: np.ndarray) -> None:
        prompts.append(len(tokens))
        read(self, state, tokens)

    monkeypatch.setattr(Decoder, "read", count)
    found = run(decoder, *(replace(request, return_state=False) for request in requests))
    assert [c.state for c in found] == [None] * len(requests)
    assert [replace(c, state=None) for c in wanted] == found
    assert {"stop", "length"} <= {c.finish_reason for c in found}
    assert sum(prompts) <= sum(c.prompt_tokens for c in found)  # equal prompts are read once


def test_log_probabilities_are_those_of_the_text(decoder: Decoder) -> None:
    request = Request("the cat", SamplingConfig(temperature=2, top_k=9), 20, seed=1, logprobs=4)
    [completion] = run(decoder, request)
    state = state_after(decoder, decoder.tokenizer.encode("the cat"))
    scores = decoder.score(state, completion.tokens, top=4)
    assert completion.logprobs is not None
    assert completion.top_logprobs is not None
    assert np.allclose(completion.logprobs, scores.logprobs, atol=1e-4)
    assert [[t for t, _ in row] for row in completion.top_logprobs] == scores.top_tokens.tolist()
    assert np.allclose([[x for _, x in r] for r in completion.top_logprobs], scores.top_logprobs)
    [without] = run(decoder, replace(request, logprobs=None))
    assert (without.logprobs, without.top_logprobs) == (None, None)
    assert without.tokens == completion.tokens


def test_the_pieces_are_the_completion(decoder: Decoder) -> None:
    for request in varied_requests(decoder):
        engine, calls = Engine(decoder, step_seconds=1e-6), []
        handle = engine.submit(replace(request, logprobs=2), on_update=calls.append)
        pieces = []
        while engine.step():
            pieces += handle.pieces()
        pieces += handle.pieces()
        completion = handle.result()
        assert "".join(piece.text for piece in pieces) == completion.text
        for name in ("tokens", "logprobs", "top_logprobs"):
            parts = [x for piece in pieces for x in getattr(piece, name)]
            assert parts == getattr(completion, name)
        assert set(calls) == {handle}
        assert len(pieces) >= request.max_tokens // 2 or completion.finish_reason == "stop"


def test_a_stop_text_ends_the_text_within_and_across_tokens(decoder: Decoder) -> None:
    """The tokens are the whole ones before it, and the state is the one after them."""
    request = Request("the", SamplingConfig(temperature=1.5, top_p=1), max_tokens=30, seed=2)
    [whole] = run(decoder, request)
    within = across = 0
    for begin in range(0, len(whole.text) - 3, 3):
        for size in (1, 2, 5):
            stop = whole.text[begin : begin + size]
            [cut] = run(decoder, replace(request, stop=[stop, "\x00never"], logprobs=0))
            assert cut.finish_reason == "stop"
            assert cut.text == whole.text[: whole.text.find(stop)]
            assert cut.tokens == whole.tokens[: len(cut.tokens)]
            assert len(cut.logprobs or []) == len(cut.tokens)
            kept = decoder.tokenizer.decode(cut.tokens)
            longer = decoder.tokenizer.decode(whole.tokens[: len(cut.tokens) + 1])
            within += kept != cut.text
            across += size > len(longer) - len(cut.text)
            ids = [*decoder.tokenizer.encode("the").tolist(), *cut.tokens]
            assert_same(cut.state, state_after(decoder, ids))
    assert within
    assert across


def plain_cut(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop text that is complete, character by character."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@given(
    st.lists(st.sampled_from([*b"ab.\n", *"é日".encode(), 0xFF]), max_size=24),
    st.sampled_from(
        [["b."], ["aa", "ab."], [], ["é", "a日"], ["\ufffd"], ["abab.a", "ba"], ["ba", "bb\naa"]]
    ),
    st.lists(st.integers(0, 24), max_size=5),
)
def test_text_does_not_depend_on_how_tokens_come(
    tokens: list[int], stop: list[str], cuts: list[int]
) -> None:
    """Bytes as tokens: stop texts within and across characters, and characters that are cut."""
    tokenizer = train_tokenizer("byte", [])
    stream, text = TextStream(tokenizer, stop), ""
    edges = sorted({0, len(tokens), *(min(cut, len(tokens)) for cut in cuts)})
    for begin, end in pairwise(edges):
        if not stream.is_stopped:
            text += stream.feed(tokens[begin:end])
            assert stream.settled_tokens <= end
    if not stream.is_stopped:
        text += stream.finish()
    whole = tokenizer.decode(tokens)
    wanted = plain_cut(whole, stop)
    assert stream.is_stopped == (wanted is not None)
    assert text == (whole if wanted is None else wanted)
    counts = range(len(tokens) + 1)
    kept = max(n for n in counts if len(tokenizer.decode(tokens[:n])) <= len(text))
    assert stream.settled_tokens == kept


def test_text_comes_as_soon_as_it_cannot_be_a_stop_text() -> None:
    stream = TextStream(train_tokenizer("byte", []), ["two", "wool"])
    assert [stream.feed(part) for part in (b"one", b" t", b"wo")] == ["one", " ", ""]
    assert stream.is_stopped
    assert stream.settled_tokens == 4
    stream = TextStream(train_tokenizer("byte", []), ["bd"])
    assert [stream.feed(part) for part in (b"a", b"b", b"c")] == ["a", "", "bc"]


def test_half_a_character_is_held_back() -> None:
    for stop in ([], ["never"]):
        stream = TextStream(train_tokenizer("byte", []), stop)
        assert [stream.feed([byte]) for byte in "a🙂".encode()] == ["a", "", "", "", "🙂"]
        assert stream.feed([0xF0, 0x9F]) == ""
        assert stream.finish() == "\ufffd"
        assert stream.settled_tokens == 7


def test_a_bias_forbids_and_forces_tokens(decoder: Decoder) -> None:
    free = SamplingConfig(temperature=2.0, top_p=1)
    forbidden = list(range(1, 200))
    request = Request("the", free, 60, seed=1, logit_bias=dict.fromkeys(forbidden, -100.0))
    [completion] = run(decoder, request)
    assert completion.tokens
    assert not set(completion.tokens) & set(forbidden)
    [forced] = run(decoder, replace(request, max_tokens=5, logit_bias={42: 100.0}))
    assert forced.tokens == [42] * 5
    [ended] = run(decoder, replace(request, logit_bias={decoder.tokenizer.eot: 100.0}))
    assert (ended.tokens, ended.text, ended.finish_reason) == ([], "", "stop")
    assert_same(ended.state, state_after(decoder, decoder.tokenizer.encode("the")))


def test_penalties_count_the_generated_tokens_only(decoder: Decoder) -> None:
    """A bias makes one token the likeliest by far, until a penalty outweighs it."""
    greedy = SamplingConfig(temperature=0)
    state = state_after(decoder, [42] * 5)
    gap = decoder.next_token_logits(state)
    bias = float(gap.max() - gap[42]) + 1.0
    request = Request([42] * 5, greedy, 30, seed=1, logit_bias={42: bias})
    [plain] = run(decoder, request)
    assert plain.tokens[0] == 42
    for name in ("frequency_penalty", "presence_penalty"):
        [penalised] = run(decoder, replace(request, sampling=replace(greedy, **{name: 2.0})))
        assert penalised.tokens[0] == 42
        assert penalised.tokens.count(42) < plain.tokens.count(42)


def test_no_tokens_and_no_prompt(decoder: Decoder) -> None:
    [nothing] = run(decoder, Request("the cat", max_tokens=0, logprobs=1))
    assert (nothing.text, nothing.tokens, nothing.finish_reason) == ("", [], "length")
    assert (nothing.logprobs, nothing.top_logprobs) == ([], [])
    assert_same(nothing.state, state_after(decoder, decoder.tokenizer.encode("the cat")))
    [empty] = run(decoder, Request(max_tokens=9, seed=3))
    assert len(empty.tokens) == 9
    assert_same(empty.state, state_after(decoder, empty.tokens))


def test_prompts_may_be_token_ids_and_continue_a_state(decoder: Decoder) -> None:
    first, second = decoder.tokenizer.encode("the cat"), decoder.tokenizer.encode(" sat")
    together = np.concatenate((first, second))
    [by_text] = run(decoder, Request("the cat", seed=4, max_tokens=9))
    [by_ids] = run(decoder, Request(first.tolist(), seed=4, max_tokens=9))
    assert facts(by_ids) == facts(by_text)
    [whole] = run(decoder, Request(together, seed=4, max_tokens=9))  # type: ignore[arg-type]
    state = state_after(decoder, first)
    [continued] = run(decoder, Request(second.tolist(), seed=4, max_tokens=9, state=state))
    assert continued.tokens == whole.tokens
    assert continued.prompt_tokens == len(second)
    assert_same(continued.state, whole.state)  # type: ignore[arg-type]
    assert_same(state, state_after(decoder, first))  # the one that was given stays as it was


def test_a_seed_that_is_drawn_repeats_the_text(decoder: Decoder) -> None:
    request = Request("the", SamplingConfig(temperature=1.5), max_tokens=20)
    first, second = run(decoder, request, request)
    assert first.tokens != second.tokens
    [again] = run(decoder, replace(request, seed=first.seed))
    assert facts(again) == facts(first)


def test_equal_prompts_are_read_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    read = Decoder.read

    def counting(self: Decoder, state: DecoderState, tokens: np.ndarray) -> None:
        counts.append(len(tokens))
        read(self, state, tokens)

    monkeypatch.setattr(Decoder, "read", counting)
    prompt = [5, 6, 7] * 30
    endless = {decoder.tokenizer.eot: -100.0}
    requests = [Request(prompt, max_tokens=3, seed=i, logit_bias=endless) for i in range(7)]
    texts = list(complete(decoder, requests, max_streams=2))
    assert sum(counts) == len(prompt)
    assert len({tuple(completion.tokens) for completion in texts}) > 1
    state = state_after(decoder, [1])
    other = replace(requests[0], prompt=prompt[1:])
    counts.clear()
    run(decoder, *(replace(request, state=state) for request in requests), other)
    assert sum(counts) == 2 * len(prompt) - 1


def test_a_long_prompt_does_not_hold_up_the_others(decoder: Decoder) -> None:
    engine = Engine(decoder, step_seconds=1e-6)
    long = engine.submit(Request([5] * 400, max_tokens=2))
    engine.step()
    short = engine.submit(Request("the", max_tokens=4))
    while not short.is_finished:
        engine.step()
    assert not long.pieces()
    assert (engine.active, engine.waiting) == (1, 0)
    while engine.step():
        pass
    assert len(long.result().tokens) == 2


def test_a_text_that_cannot_be_generated_fails_alone(decoder: Decoder) -> None:
    bad_state = decoder.initial_state()
    bad_state.values[:] = np.nan
    sampling = SamplingConfig(frequency_penalty=1.0, temperature=1.5)
    good = [Request("the", sampling, 12, seed=i, stop=["q"]) for i in range(3)]
    alone = [facts(run(decoder, request)[0]) for request in good]
    engine = Engine(decoder)
    handles = [engine.submit(request) for request in good[:2]]
    for _ in range(2):
        engine.step()
    bad = engine.submit(Request("the", state=bad_state))
    handles.append(engine.submit(good[2]))
    with np.errstate(invalid="ignore"):
        while engine.step():
            pass
    assert [facts(handle.result()) for handle in handles] == alone
    assert bad.is_finished
    with pytest.raises(InputError, match="logits of the model must be finite"):
        bad.result()


def test_cancelling(decoder: Decoder) -> None:
    engine = Engine(decoder, max_streams=2, step_seconds=1e-6)
    running = engine.submit(Request("the", max_tokens=10**6, seed=1, stop=["\x00never"]))
    unread = engine.submit(Request([5] * 400))
    waiting = engine.submit(Request("cat"))
    for _ in range(3):
        engine.step()
    for handle in (running, unread, waiting):
        handle.cancel()
    assert not engine.step()
    for handle in (unread, waiting):
        assert (handle.result().finish_reason, handle.result().state) == ("cancelled", None)
    cancelled = running.result()
    assert cancelled.finish_reason == "cancelled"
    assert cancelled.tokens
    [same] = run(decoder, Request("the", max_tokens=len(cancelled.tokens), seed=1))
    assert (same.tokens, same.text) == (cancelled.tokens, cancelled.text)
    assert_same(cancelled.state, same.state)  # type: ignore[arg-type]
    running.cancel()  # has no effect any more
    assert not engine.step()


def test_requests_from_many_threads(decoder: Decoder) -> None:
    requests = [Request("the cat", max_tokens=3, seed=i) for i in range(24)]
    alone = [facts(run(decoder, request)[0]) for request in requests]
    engine, handles = Engine(decoder, max_streams=4), {}

    def submit(start: int) -> None:
        for i in range(start, len(requests), 4):
            handles[i] = engine.submit(requests[i])
            engine.submit(requests[i]).cancel()

    threads = [threading.Thread(target=submit, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.step():
        engine.step()
    for thread in threads:
        thread.join()
    while engine.step():
        pass
    assert [facts(handles[i].result()) for i in range(len(requests))] == alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": 3}, "prompt must be a text or token ids; got 3"),
        ({"prompt": b"def"}, "prompt must be a text or token ids; got b'def'"),
        ({"prompt": [1, "a"]}, "prompt must be a text or token ids; got \\[1, 'a'\\]"),
        ({"prompt": [1, True]}, "prompt must be a text or token ids; got"),
        ({"prompt": [5, 290]}, "token ids of prompt must lie in 0 to 279; got 290"),
        ({"prompt": [-1]}, "token ids of prompt must lie in 0 to 279; got -1"),
        ({"prompt": "ab\ud800"}, "prompt must be of characters; '.ud800' at position 2 is half"),
        ({"sampling": {}}, "sampling must be of type SamplingConfig; got {}"),
        ({"max_tokens": -1}, "max_tokens must be >= 0; got -1"),
        ({"max_tokens": True}, "max_tokens must be of type int; got True"),
        ({"max_tokens": 1 << 70}, "max_tokens must be at most 10.15; got"),
        ({"stop": [""]}, "a stop text must not be empty"),
        ({"stop": "end"}, "stop must be a list of texts; got 'end'"),
        ({"stop": None}, "stop must be a list of texts; got None"),
        ({"stop": [1]}, "stop must be a list of texts; got \\[1\\]"),
        ({"stop": ["a\udcff"]}, "stop must be of characters; '.udcff' at position 1 is half of a"),
        ({"seed": -1}, "seed must be .*; got -1"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers; got \\[1\\]"),
        ({"logit_bias": {"a": 1}}, "logit_bias must map token ids to numbers; got the id 'a'"),
        ({"logit_bias": {290: 1}}, "token ids of logit_bias must lie in 0 to 279; got 290"),
        ({"logit_bias": {1: 101}}, "a logit_bias must lie in \\[-100, 100\\]; got 101"),
        ({"logit_bias": {1: float("nan")}}, "a logit_bias must lie in .*; got nan"),
        ({"logit_bias": {1: "x"}}, "a logit_bias must lie in .*; got 'x'"),
        ({"logprobs": -1}, "logprobs must be None or a whole number >= 0; got -1"),
        ({"logprobs": True}, "logprobs must be None or a whole number >= 0; got True"),
        ({"logprobs": 291}, "logprobs must be at most 280, the vocabulary; got 291"),
        ({"state": 3}, "state must be of type DecoderState; got 3"),
        (
            {"state": DecoderState(np.zeros(3, np.float32), np.zeros(256, np.int32))},
            "state must be of this model: values of float32 \\(.*,\\); got float32 \\(3,\\)",
        ),
    ],
)
def test_wrong_requests_are_refused(
    decoder: Decoder, settings: dict[str, Any], message: str
) -> None:
    engine = Engine(decoder)
    with pytest.raises(InputError, match=message):
        engine.submit(Request(**settings))
    assert not engine.step()
    with pytest.raises(InputError, match="max_streams must be a whole number >= 1; got 0"):
        Engine(decoder, max_streams=0)


def test_a_state_of_another_model_is_refused(decoder: Decoder) -> None:
    for change, message in (
        (lambda s: s.recent.fill(280), "recent tokens up to 279; got others"),
        (lambda s: s.recent.fill(-1), "recent tokens up to 279; got others"),
        (lambda s: setattr(s, "values", s.values.astype(float)), "values of float32 .*; got float"),
    ):
        state = decoder.initial_state()
        change(state)  # type: ignore[no-untyped-call]
        with pytest.raises(InputError, match=f"state must be of this model: {message}"):
            Engine(decoder).submit(Request(state=state))


def test_characters_that_a_tokenizer_does_not_know() -> None:
    decoder = random_decoder(train_tokenizer("char", ["abc "]))
    with pytest.raises(InputError, match="the prompt, line 1, character 2: .*'☃'"):
        Engine(decoder).submit(Request("a☃"))
    [completion] = run(decoder, Request("ab", max_tokens=9, seed=1))
    assert set(completion.text) <= set("abc ")
