"""Chats with a model that has a template: turns, their end, and saved ones."""

from pathlib import Path

import pytest
import torch

from mmrec.config import ModelConfig
from mmrec.data.chat_template import ChatTemplate
from mmrec.data.conversations import chat_tokenizer
from mmrec.data.tokenizer import train_tokenizer
from mmrec.errors import InputError
from mmrec.inference.chat import ChatSession
from mmrec.inference.decoder import Decoder
from mmrec.inference.engine import Request, complete
from mmrec.inference.session import Session
from mmrec.model import Model
from tests.conftest import SMALL
from tests.conversations import message
from tests.inference.test_session import TEXT, make_decoder

END = "<|end|>"


def make_chat_decoder(kind: str = "byte", template: str | None = None) -> Decoder:
    """A random model of a small shape with a chat template."""
    tokenizer = chat_tokenizer(train_tokenizer(kind, [TEXT * 3], 270), template, "the template")
    torch.manual_seed(0)
    shape = SMALL.__dict__ | {"vocab_size": tokenizer.vocab_size, "ngram_buckets": 64}
    model = Model(ModelConfig(**shape)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return Decoder.from_model(model, tokenizer)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_chat_decoder()


def say(chat: ChatSession, text: str, **settings: object) -> str:
    chat.read(text)
    return "".join(chat.generate(**({"max_tokens": 12, "seed": 1} | settings)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_an_answer_is_that_to_the_prompt_of_all_messages(kind: str) -> None:
    """Also where the tokens of an answer are not those that its text has."""
    decoder = make_chat_decoder(kind)
    template = ChatTemplate(decoder.tokenizer.chat_template, decoder.tokenizer)
    chat, messages = ChatSession(decoder, "Be kind."), [message("system", "Be kind.")]
    for text in ("return", "def read", "x"):
        answer = say(chat, text)
        messages.append(message("user", text))
        request = Request(template.prompt(messages), seed=1, max_tokens=12)
        [want] = complete(decoder, [request])
        assert answer == want.text
        messages.append(message("assistant", answer))
        assert chat.messages == messages


def test_an_answer_ends_with_its_turn(decoder: Decoder) -> None:
    end = decoder.tokenizer.special_tokens[END]
    chat = ChatSession(decoder)
    chat.read("return")
    request = Request(logit_bias={end: 100.0}, max_tokens=9)
    assert "".join(chat.stream(request)) == ""
    assert chat.completion is not None
    assert (chat.completion.finish_reason, chat.completion.tokens) == ("stop", [])
    assert chat.is_complete
    # without a turn to end, the token is one like others
    [raw] = complete(decoder, [request])
    assert (raw.finish_reason, raw.tokens) == ("length", [end] * 9)


def test_an_answer_that_was_cut_goes_on(decoder: Decoder) -> None:
    whole, parts = ChatSession(decoder), ChatSession(decoder)
    want = say(whole, "return", max_tokens=20, temperature=0)
    found = say(parts, "return", max_tokens=8, temperature=0)
    assert not parts.is_complete
    found += say(parts, "", max_tokens=12, temperature=0)
    assert found == want
    assert parts.messages == whole.messages
    assert (parts.state.values == whole.state.values).all()


def test_forks_are_independent(decoder: Decoder) -> None:
    chat = ChatSession(decoder)
    say(chat, "return")
    fork, messages = chat.fork(), [dict(m) for m in chat.messages]
    say(fork, "more")
    assert chat.messages == messages
    assert len(fork.messages) == 4
    assert say(chat, "more") == fork.messages[-1]["content"]
    assert chat.fresh().messages == []


def test_a_saved_chat_goes_on(decoder: Decoder, tmp_path: Path) -> None:
    chat = ChatSession(decoder, "Be kind.")
    say(chat, "return")
    chat.save(tmp_path / "chat.h5")
    loaded = ChatSession.load(tmp_path / "chat.h5", decoder)
    assert (loaded.messages, loaded.text) == (chat.messages, chat.text)
    assert say(loaded, "more") == say(chat, "more")
    assert loaded.messages == chat.messages
    assert loaded.fresh().messages == [message("system", "Be kind.")]
    # what generate --state takes is the text
    assert Session.load(tmp_path / "chat.h5", decoder).text.startswith("Be kind.return")
    text = Session(decoder)
    text.read("return")
    text.save(tmp_path / "text.h5")
    with pytest.raises(InputError, match="must be a session of mmrec chat; it holds a text"):
        ChatSession.load(tmp_path / "text.h5", decoder)


def test_mistakes(decoder: Decoder) -> None:
    with pytest.raises(InputError, match="the model has no chat template"):
        ChatSession(make_decoder())
    chat = ChatSession(decoder)
    with pytest.raises(InputError, match="there is no answer to go on with: write a message"):
        chat.read("")
    with pytest.raises(InputError, match="a message must be of type str"):
        chat.read(Path("book.txt"))
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict += "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    strict += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    with pytest.raises(InputError, match="refuses the messages: no system"):
        ChatSession(make_chat_decoder(template=strict), "Be kind.")
