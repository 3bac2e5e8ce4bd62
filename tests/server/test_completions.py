"""Completions: their shape, and that they are what the engine writes."""

import json
import math
import threading
from typing import Any

import numpy as np
import pytest

from mmrec.config import SamplingConfig
from mmrec.data.tokenizer import Tokenizer
from mmrec.inference.decoder import Decoder
from mmrec.inference.engine import Request, complete
from tests.server.conftest import Running, make_decoder, serving

PLAIN = SamplingConfig(temperature=1, top_p=1)
"""What a request without settings means in OpenAI's API."""


def expected(decoder: Decoder, prompt: str, seed: int, **options: Any) -> Any:
    options = {"sampling": PLAIN, "max_tokens": 16} | options
    [completion] = complete(decoder, [Request(prompt, seed=seed, **options)])
    return completion


def test_a_completion_is_that_of_the_engine(running: Running, decoder: Decoder) -> None:
    response = running.post(prompt="once", seed=3, logprobs=2)
    assert response.status_code == 200
    body = response.json()
    want = expected(decoder, "once", 3, logprobs=2)
    assert body["object"] == "text_completion"
    assert body["model"] == "small"
    assert body["id"].startswith("cmpl-")
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": len(want.tokens),
        "total_tokens": 4 + len(want.tokens),
    }
    [choice] = body["choices"]
    assert choice["text"] == want.text
    assert choice["finish_reason"] == want.finish_reason
    assert (choice["index"], choice["seed"]) == (0, 3)
    assert "".join(choice["logprobs"]["tokens"]) == want.text
    assert choice["logprobs"]["token_logprobs"] == want.logprobs
    assert choice["logprobs"]["text_offset"] == list(range(len(want.text)))
    for top, found in zip(want.top_logprobs, choice["logprobs"]["top_logprobs"], strict=True):
        assert list(found.values()) == [value for _, value in top]


def test_the_defaults_are_those_of_openai(running: Running, decoder: Decoder) -> None:
    choice = running.text(prompt="a", seed=1)
    assert choice["text"] == expected(decoder, "a", 1).text
    assert choice["logprobs"] is None
    nulls = dict.fromkeys(("temperature", "n", "stop", "logprobs", "max_tokens", "suffix"))
    assert running.text(prompt="a", seed=1, **nulls)["text"] == choice["text"]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0.5, "top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.1, "repetition_penalty": 1.5},
        {"frequency_penalty": 2, "presence_penalty": -1.5},
    ],
)
def test_settings_of_sampling(
    running: Running, decoder: Decoder, settings: dict[str, float]
) -> None:
    sampling = SamplingConfig(**{"temperature": 1.0, "top_p": 1.0} | settings)  # type: ignore[arg-type]
    want = expected(decoder, "x", 5, sampling=sampling, max_tokens=40).text
    assert running.text(prompt="x", seed=5, max_tokens=40, **settings)["text"] == want


def test_stop_bias_and_limit(running: Running, decoder: Decoder) -> None:
    whole = running.text(prompt="x", seed=2, max_tokens=40)["text"]
    cut = running.text(prompt="x", seed=2, max_tokens=40, stop=[whole[10:12], "no such text"])
    assert cut["text"] == whole[: whole.index(whole[10:12])]
    assert cut["finish_reason"] == "stop"
    snow = decoder.tokenizer.encode("☃")[0]
    only = running.text(prompt="x", logit_bias={str(snow): 100}, max_tokens=5)
    assert (only["text"], only["finish_reason"]) == ("☃☃☃☃☃", "length")
    ends = running.text(prompt="x", logit_bias={str(decoder.tokenizer.eot): 100}, max_tokens=5)
    assert (ends["text"], ends["finish_reason"]) == ("", "stop")
    assert running.text(prompt="x", max_tokens=0)["text"] == ""


def test_prompts_in_every_form(running: Running, decoder: Decoder) -> None:
    ids = decoder.tokenizer.encode("once").tolist()
    want = running.text(prompt="once", seed=4)["text"]
    assert running.text(prompt=ids, seed=4)["text"] == want
    assert running.text(prompt=["once"], seed=4)["text"] == want
    assert running.text(prompt=[ids], seed=4)["text"] == want
    empty = running.text(seed=4)["text"]
    assert running.text(prompt="", seed=4)["text"] == empty
    assert empty == expected(decoder, "", 4).text


def test_several_prompts_and_texts(running: Running) -> None:
    body = running.post(prompt=["ab", "c"], n=3, seed=7, max_tokens=20).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert body["usage"]["prompt_tokens"] == 3
    texts = [choice["text"] for choice in body["choices"]]
    assert len(set(texts)) == 6
    # the first text of each prompt is that of a request for one
    assert texts[0] == running.text(prompt="ab", seed=7, max_tokens=20)["text"]
    assert texts[3] == running.text(prompt="c", seed=7, max_tokens=20)["text"]
    for choice in body["choices"]:  # and each is repeated by the seed that it names
        prompt = ["ab", "c"][choice["index"] // 3]
        again = running.text(prompt=prompt, seed=choice["seed"], max_tokens=20)
        assert again["text"] == choice["text"]


def test_a_seed_that_is_drawn_is_told(running: Running) -> None:
    first = running.text(prompt="x", max_tokens=30)
    second = running.text(prompt="x", max_tokens=30)
    assert first["text"] != second["text"]
    assert running.text(prompt="x", max_tokens=30, seed=first["seed"])["text"] == first["text"]


def test_echo_scores_the_prompt(running: Running, decoder: Decoder) -> None:
    alone = running.text(prompt="once", seed=3, logprobs=1)
    choice = running.text(prompt="once", seed=3, logprobs=1, echo=True)
    assert choice["text"] == "once" + alone["text"]
    found = choice["logprobs"]
    assert found["tokens"][:4] == list("once")
    assert found["text_offset"] == list(range(len(choice["text"])))
    scores = decoder.score(decoder.initial_state(), decoder.tokenizer.encode("once"), top=1)
    assert found["token_logprobs"][:4] == scores.logprobs.tolist()
    assert found["token_logprobs"][4:] == alone["logprobs"]["token_logprobs"]
    only = running.text(prompt="once", max_tokens=0, logprobs=1, echo=True)
    assert only["text"] == "once"
    assert only["logprobs"]["token_logprobs"] == scores.logprobs.tolist()
    assert running.text(prompt="once", echo=True, seed=3)["text"] == choice["text"]
    assert running.text(prompt="", echo=True, logprobs=1, seed=3, max_tokens=1)["text"] != ""


def test_a_stream_is_the_same_text(running: Running) -> None:
    asked = {"prompt": "once", "seed": 9, "logprobs": 1, "n": 2, "echo": True}
    asked |= {"max_tokens": 3000, "logit_bias": {"0": -100}}
    whole = running.post(**asked).json()
    *data, last = running.events(**asked, stream_options={"include_usage": True})
    assert last == "[DONE]"
    events = [json.loads(x) for x in data]
    assert len({event["id"] for event in events}) == 1
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    for i, choice in enumerate(whole["choices"]):
        parts = [c for event in events for c in event["choices"] if c["index"] == i]
        assert len(parts) > 1
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            assert [x for part in parts for x in part["logprobs"][name]] == values


def test_bytes_that_are_no_character_are_tokens_like_others() -> None:
    """Their text is U+FFFD; the token names the bytes; offsets count characters."""
    with serving(make_decoder(Tokenizer("byte", ""))) as running:
        choice = running.text(prompt="é!", echo=True, logprobs=0, max_tokens=0)
    assert choice["text"] == "é!"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]


def test_requests_that_come_together_do_not_change_each_other(running: Running) -> None:
    """Twelve at once with four places, streams and whole answers, each with its own settings."""
    asked = [
        {"prompt": "abc"[i % 3], "seed": i, "max_tokens": 40 + 5 * i, "temperature": 0.5 + i / 10}
        for i in range(12)
    ]
    alone = [running.text(**a)["text"] for a in asked]
    together: list[str] = [""] * 12

    def ask(i: int) -> None:
        if i % 2:
            together[i] = running.text(**asked[i])["text"]
        else:
            *data, _ = running.events(**asked[i])
            together[i] = "".join(json.loads(x)["choices"][0]["text"] for x in data)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_log_probabilities_are_probabilities(running: Running, decoder: Decoder) -> None:
    choice = running.text(prompt="q", seed=1, logprobs=20, max_tokens=3)
    for value, top in zip(
        choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True
    ):
        values = list(top.values())
        assert values == sorted(values, reverse=True)
        assert 0.9 < sum(map(math.exp, values)) + (value not in values) * math.exp(value) < 1.0001
    assert np.isclose(
        sum(np.exp(decoder.score(decoder.initial_state(), [t]).logprobs[0]) for t in range(31)), 1
    )
