"""Chat templates: what they get, what they refuse, and a model that has none."""

from collections.abc import Iterator

import httpx
import pytest

from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.inference.decoder import Decoder
from mmrec.server.chat import chat_renderer
from tests.server.conftest import Running, serving
from tests.server.test_errors import error_of

TEMPLATE = """
{%- for message in messages %}
    {%- if message.role == "system" %}{{ raise_exception("no system, please") }}{% endif %}
    {{- message.role }} {{ message.content }}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}assistant {% endif %}"""
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_the_end_token_is_one_and_its_letters_in_a_message_are_letters() -> None:
    tokenizer = Tokenizer("byte", "")
    render = chat_renderer(TEMPLATE, tokenizer, "the template")
    want = [*b"user hi", 256, *b"assistant ho", 256, *b"assistant "]
    assert render(TALK) == want
    letters = render([{"role": "user", "content": "<|endoftext|>"}])
    assert letters == [*b"user <|endoftext|>", 256, *b"assistant "]


@pytest.mark.parametrize("template", ["{% for %}", "{{ (", "{% endif %}"])
def test_what_is_no_template(template: str) -> None:
    with pytest.raises(InputError, match="the template must be a Jinja template"):
        chat_renderer(template, Tokenizer("byte", ""), "the template")


def chat(running: Running, **body: object) -> httpx.Response:
    body = {"model": "small", "messages": TALK} | body
    return running.client.post("/v1/chat/completions", json=body)


def test_a_model_without_a_template(running: Running) -> None:
    assert error_of(chat(running), 400)["code"] == "no_chat_template"


@pytest.fixture(scope="module")
def chatting(decoder: Decoder) -> Iterator[Running]:
    render = chat_renderer(TEMPLATE, decoder.tokenizer, "the template")
    with serving(decoder, render_chat=render) as started:
        yield started


def test_a_chat_goes_on_where_its_prompt_ends(chatting: Running, decoder: Decoder) -> None:
    answer = chat(chatting, seed=3, max_tokens=12, n=2)
    body = answer.json()
    assert body["object"] == "chat.completion"
    ids = chat_renderer(TEMPLATE, decoder.tokenizer, "x")(TALK)
    same = chatting.post(prompt=ids, seed=3, max_tokens=12, n=2).json()
    assert body["usage"] == same["usage"]
    for found, want in zip(body["choices"], same["choices"], strict=True):
        assert found["message"]["content"] == want["text"]
        assert found["message"]["role"] == "assistant"
        assert found["finish_reason"] == want["finish_reason"]


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("messages", {"messages": None}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hi"}),
        ("messages[0]", {"messages": ["hi"]}),
        ("messages[0]", {"messages": [{"role": "user"}]}),
        ("messages[1].role", {"messages": [TALK[0], {"role": "cat", "content": "meow"}]}),
        ("messages[0].role", {"messages": [{"role": ["user"], "content": "a"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("messages", {"messages": [{"role": "user", "content": "é"}]}),
        ("messages", {"messages": [{"role": "user", "content": "a" * 100}]}),
        ("messages", {"messages": [{"role": "system", "content": "a"}]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("logprobs", {"logprobs": 2}),
        ("prompt", {"prompt": "a"}),
        ("max_completion_tokens", {"max_completion_tokens": -1}),
    ],
)
def test_mistakes(chatting: Running, param: str, body: dict[str, object]) -> None:
    assert error_of(chat(chatting, **body), 400)["param"] == param
