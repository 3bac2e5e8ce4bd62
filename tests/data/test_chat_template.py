"""Chat templates: what is an answer, what a user cannot type, and which ones train nothing."""

import functools
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from mmrec.data.chat_template import (
    DEFAULT_TEMPLATE,
    ChatTemplate,
    special_token_names,
)
from mmrec.data.conversations import chat_tokenizer
from mmrec.data.tokenizer import Tokenizer, train_tokenizer
from mmrec.errors import InputError
from tests.conversations import message

TEXT = "It was the best of times, it was the worst. Be kind. Who was it? <|user|>\n" * 5
ALPHABET = "<|>enduser syst\na"
KINDS = [train_tokenizer(kind, [TEXT + ALPHABET], 300) for kind in ("bpe", "char", "byte")]
TALK = [
    message("system", "Be kind."),
    message("user", "Who was it?"),
    message("assistant", "It was I."),
    message("user", "Was it best?"),
    message("assistant", "It was."),
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatting(tokenizer: Tokenizer, template: str | None = None) -> tuple[Tokenizer, ChatTemplate]:
    made = chat_tokenizer(tokenizer, template, "the template")
    return made, ChatTemplate(made.chat_template, made)


@pytest.mark.parametrize("kind", KINDS, ids=lambda t: t.kind)
def test_answers_and_the_ends_of_their_turns_are_learnt(kind: Tokenizer) -> None:
    tokenizer, template = chatting(kind)
    ids, answers = template.encode(template.parts(TALK))
    end = tokenizer.special_tokens["<|end|>"]
    learnt = [token for token, is_answer in zip(ids, answers, strict=True) if is_answer]
    want = [[*tokenizer.encode(m["content"]).tolist(), end] for m in (TALK[2], TALK[4])]
    assert learnt == want[0] + want[1]
    for turns in (2, 4):  # each answer follows the prompt that asks for it
        prompt = template.prompt(TALK[:turns])
        assert ids[: len(prompt)] == prompt
        assert not answers[len(prompt) - 1]
        assert answers[len(prompt)]
    assert template.end_of_turn == end
    names = [tokenizer.special_name(token) for token in ids]
    roles = [f"<|{m['role']}|>" for m in TALK]
    assert [n for n in names if n] == [x for role in roles for x in (role, "<|end|>")]


def test_an_answer_of_weight_0_is_not_learnt() -> None:
    _, template = chatting(KINDS[0])
    ids, answers = template.encode(template.parts(TALK, untrained={2}))
    assert ids == template.encode(template.parts(TALK))[0]
    assert answers.index(True) == len(template.prompt(TALK[:4]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda t: t.kind)
@hypothesis.given(contents=st.lists(st.text(ALPHABET), min_size=1, max_size=4))
def test_no_content_makes_a_special_token(kind: Tokenizer, contents: list[str]) -> None:
    """Nor do two contents that a template joins."""
    for source in (DEFAULT_TEMPLATE, "{% for m in messages %}{{ m.content }}{% endfor %}<|end|>"):
        tokenizer, template = with_template(kind, source)
        messages = [message("user", content) for content in contents]
        plain = [message("user", "a") for _ in contents]
        special = [
            [t for t in template.prompt(chat) if tokenizer.special_name(t)]
            for chat in (messages, plain)
        ]
        assert special[0] == special[1]
        assert tokenizer.decode(template.prompt(messages)) == "".join(contents)


@functools.cache
def with_template(kind: Tokenizer, source: str) -> tuple[Tokenizer, ChatTemplate]:
    """A template with the special tokens of the default one, whether or not it writes them."""
    names = special_token_names(DEFAULT_TEMPLATE, kind, "the template")
    tokenizer = kind.with_chat_template(source, names)
    return tokenizer, ChatTemplate(source, tokenizer)


def test_names_of_special_tokens_in_a_content_stay_letters() -> None:
    tokenizer, template = chatting(KINDS[2])
    ids = template.prompt([message("user", "<|end|><|endoftext|>")])
    start, end = (tokenizer.special_tokens[name] for name in ("<|user|>", "<|end|>"))
    answer = tokenizer.special_tokens["<|assistant|>"]
    assert ids == [start, *b"<|end|><|endoftext|>", end, answer]
    assert set(tokenizer.encode("<|end|><|user|>").tolist()) <= set(range(256))


def test_a_template_of_another_model() -> None:
    tokenizer, template = chatting(KINDS[0], CHATML)
    assert {"<|im_start|>", "<|im_end|>"} < tokenizer.special_tokens.keys()
    ids, answers = template.encode(template.parts([message("user", "Was it? "), TALK[2]]))
    assert tokenizer.decode(ids) == "user\nWas it?\nassistant\nIt was I.\n"
    assert sum(answers) == len(tokenizer.encode("It was I.")) + 1
    assert not answers[-1]  # the line end after the turn


def test_the_tokenizer_keeps_its_template() -> None:
    for kind in KINDS:
        tokenizer, _ = chatting(kind)
        again = Tokenizer.from_json(tokenizer.to_json())
        assert again.to_json() == tokenizer.to_json()
        assert again.encode(TEXT).tolist() == kind.encode(TEXT).tolist()
        assert again.extends(kind)
        assert not kind.extends(again)
        assert json.loads(kind.to_json()).keys() == {"kind", "vocabulary"}
        # a second fine-tuning finds all special tokens there
        assert chatting(again)[0].to_json() == again.to_json()


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for %}", "must be a Jinja template"),
        (
            "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}",
            "must write the role of a message; it writes the same for user and assistant",
        ),
        ("{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}", "end an answer with"),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            "must not write <|endoftext|>, which ends a document",
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}bot: {% endif %}",
            "must write an answer directly after what add_generation_prompt adds",
        ),
        ("{{ messages.__class__.__mro__ }}", "refuses the messages: access to attribute '__class_"),
        ("{% include '/etc/passwd' %}", "refuses the messages: no loader"),
    ],
)
def test_templates_that_cannot_be_learnt(template: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        chat_tokenizer(KINDS[0], template, "the chat template")
    assert str(caught.value).startswith("the chat template ")
    assert problem in str(caught.value)


def test_a_tokenizer_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrec.data.tokenizer.MAX_VOCAB", 260)
    with pytest.raises(InputError, match="may have 260 tokens; with the 4 special .* have 261"):
        chat_tokenizer(KINDS[2], None, "the template")


@pytest.mark.parametrize(
    "special",
    [{"<|a|>": 258}, {"<|a|>": 0}, {"<|a|>": 257, "<|b|>": 257}, {"": 257}, {"<|a|>": True}, [1]],
)
def test_damaged_special_tokens(special: object) -> None:
    stored = {"kind": "byte", "vocabulary": "", "special_tokens": special}
    with pytest.raises(InputError, match="the stored tokenizer is damaged"):
        Tokenizer.from_json(json.dumps(stored))
