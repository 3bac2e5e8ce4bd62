"""Chat templates: what they get, what they refuse, and a model that has none."""

from collections.abc import Iterator

import httpx
import pytest

from mmrec.data.chat_template import ChatTemplate
from mmrec.data.conversations import chat_tokenizer
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.inference.chat import ChatSession
from mmrec.inference.decoder import Decoder
from tests.server.conftest import ALPHABET, Running, make_decoder, serving
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
    render = ChatTemplate(TEMPLATE, tokenizer).prompt
    want = [*b"user hi", 256, *b"assistant ho", 256, *b"assistant "]
    assert render(TALK) == want
    letters = render([{"role": "user", "content": "<|endoftext|>"}])
    assert letters == [*b"user <|endoftext|>", 256, *b"assistant "]


@pytest.mark.parametrize("template", ["{% for %}", "{{ (", "{% endif %}"])
def test_what_is_no_template(template: str) -> None:
    with pytest.raises(InputError, match="the template must be a Jinja template"):
        ChatTemplate(template, Tokenizer("byte", ""), "the template")


def chat(running: Running, **body: object) -> httpx.Response:
    body = {"model": "small", "messages": TALK} | body
    return running.client.post("/v1/chat/completions", json=body)


def test_a_model_without_a_template(running: Running) -> None:
    assert error_of(chat(running), 400)["code"] == "no_chat_template"


@pytest.fixture(scope="module")
def chatting(decoder: Decoder) -> Iterator[Running]:
    template = ChatTemplate(TEMPLATE, decoder.tokenizer)
    with serving(decoder, chat_template=template) as started:
        yield started


def test_a_chat_goes_on_where_its_prompt_ends(chatting: Running, decoder: Decoder) -> None:
    answer = chat(chatting, seed=3, max_tokens=12, n=2)
    body = answer.json()
    assert body["object"] == "chat.completion"
    ids = ChatTemplate(TEMPLATE, decoder.tokenizer).prompt(TALK)
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


@pytest.fixture(scope="module")
def fine_tuned() -> Decoder:
    """A model with a template and special tokens of its own."""
    return make_decoder(chat_tokenizer(Tokenizer("char", ALPHABET), None, "the template"))


def test_a_model_with_a_template_of_its_own(fine_tuned: Decoder) -> None:
    """Its answers end with their turn, and are those of mmrec chat."""
    tokenizer = fine_tuned.tokenizer
    template, end = ChatTemplate(tokenizer.chat_template, tokenizer), "<|end|>"
    bias = {str(tokenizer.special_tokens[end]): 100}
    said = [{"role": "developer", "content": "be kind"}, *TALK[:1]]
    with serving(fine_tuned, chat_template=template) as running:
        [ended] = chat(running, logit_bias=bias, max_tokens=5).json()["choices"]
        assert (ended["message"]["content"], ended["finish_reason"]) == ("", "stop")
        raw = running.post(prompt="hi", logit_bias=bias, max_tokens=5, logprobs=0).json()
        assert raw["choices"][0]["logprobs"]["tokens"] == [end] * 5
        assert raw["choices"][0]["finish_reason"] == "length"
        [answer] = chat(running, messages=said, seed=3, max_tokens=12).json()["choices"]
    session = ChatSession(fine_tuned, "be kind")
    session.read("hi")
    found = "".join(session.generate(seed=3, max_tokens=12, temperature=1.0, top_p=1.0))
    assert answer["message"]["content"] == found
