"""Chat templates: from the messages of a chat to token ids, for training and for answers.

A template is a program in Jinja, in the form that transformers uses (``chat_template``). It runs in
Jinja's sandbox, which lets it reach nothing but the messages.
"""

import contextlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrec.data.tokenizer import EOT, Tokenizer
from mmrec.errors import InputError

ROLES = ("system", "user", "assistant")
"""Who may say something in a chat."""
DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
<|{{ message.role | replace("developer", "system") }}|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
"""The template that fine-tuning gives to a model which has none."""
SPECIAL_TOKEN = re.compile(r"<\|[^\s<>|]+\|>")
"""What a template writes in this form becomes a special token when a model is fine-tuned on it."""
PRIVATE_CHARACTERS = range(0xF0000, 0xFFFFE)

Message = dict[str, str]
"""``role`` and ``content``."""


@dataclass(frozen=True)
class Part:
    """A piece of what a template writes."""

    text: str
    """A text, or the name of a special token."""
    is_special: bool
    is_answer: bool
    """Whether an assistant writes it: a part of the content, or the token that ends the answer."""


class ChatTemplate:
    """A chat template, compiled.

    It gets ``messages``, ``add_generation_prompt`` and ``eos_token``, the letters of the end token.
    Names of special tokens that the template writes become those tokens. The same letters in the
    content of a message stay letters.

    Attributes:
        end_of_turn: id of the special token that ends an answer; None if the template writes none.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "the chat template") -> None:
        """Compile a template.

        Args:
            source: in the language of Jinja.
            tokenizer: that of the model.
            name: what an error calls the template.

        Raises:
            InputError: it is no template.
        """
        from jinja2 import TemplateError

        self._tokenizer, self._name = tokenizer, name
        try:
            self._compiled = _environment().from_string(source)
        except TemplateError as error:
            raise InputError(f"{name} must be a Jinja template: {error}") from None
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})")
        # a marker after each first and before each last character hides names in a content
        self._first = re.compile(f"([{re.escape(''.join({n[0] for n in names}))}])")
        self._last = re.compile(f"([{re.escape(''.join({n[-1] for n in names}))}])")
        self.end_of_turn = self._find_end_of_turn()

    def _find_end_of_turn(self) -> int | None:
        try:
            parts = self.parts(_probe("user", "assistant"))
        except InputError:
            return None
        ends = [part.text for part in parts if part.is_special and part.is_answer]
        return self._tokenizer.special_tokens[ends[0]] if ends else None

    def check_for_training(self) -> None:
        """Check that a model can learn chats in this form.

        Raises:
            InputError: the template does not tell roles apart, an answer has no end, or the end of
                a document lies within a chat.
        """
        text = self._render(_probe("user", "assistant"))
        swapped = ""
        with contextlib.suppress(InputError):  # of a template that wants the user to begin
            swapped = self._render(_probe("assistant", "user"))
        if swapped == text:
            raise InputError(
                f"{self._name} must write the role of a message; it writes the same for user and "
                "assistant"
            )
        parts = self.parts(_probe("user", "assistant", "user", "assistant"))
        if any(part.is_special and part.text == EOT for part in parts):
            raise InputError(
                f"{self._name} must not write {EOT}, which ends a document; end a turn with a "
                "token of its own, such as <|end|>"
            )
        if self.end_of_turn is None:
            raise InputError(
                f"{self._name} must end an answer with a special token, such as <|end|>"
            )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids after which the model writes the next answer.

        Args:
            messages: the chat so far.

        Raises:
            InputError: the template refuses the messages, or the tokenizer a character.
        """
        marker = _unused_character(messages)
        text = self._render(messages, marker, add_generation_prompt=True)
        ids, _ = self.encode(self._split(text, marker, is_answer=False))
        return ids

    def parts(self, messages: Sequence[Message], untrained: Collection[int] = ()) -> list[Part]:
        """Divide what the template writes for a whole chat.

        An answer is what follows the prompt at its place, up to the first special token.

        Args:
            messages: the chat.
            untrained: indices of messages of the assistant that do not count as answers.

        Raises:
            InputError: the template refuses the messages, or writes something else before an answer
                than it writes to ask for it.
        """
        marker = _unused_character(messages)
        text, parts, done = self._render(messages, marker), list[Part](), 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i in untrained:
                continue
            prompt = self._render(messages[:i], marker, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise InputError(
                    f"{self._name} must write an answer directly after what add_generation_prompt "
                    "adds to the messages before it"
                )
            end = self._special.search(text, len(prompt))
            stop = len(text) if end is None else end.end()
            parts += self._split(text[done : len(prompt)], marker, is_answer=False)
            parts += self._split(text[len(prompt) : stop], marker, is_answer=True)
            done = stop
        return parts + self._split(text[done:], marker, is_answer=False)

    def encode(
        self, parts: Sequence[Part], name: str = "the messages"
    ) -> tuple[list[int], list[bool]]:
        """Return the token ids of parts, and whether each belongs to an answer.

        Args:
            parts: the parts.
            name: what an error calls them.

        Raises:
            InputError: a ``char`` tokenizer does not know a character.
        """
        ids, answers = list[int](), list[bool]()
        for part in parts:
            if part.is_special:
                new = [self._tokenizer.special_tokens[part.text]]
            else:
                new = self._tokenizer.encode(part.text, name).tolist()
            ids += new
            answers += [part.is_answer] * len(new)
        return ids, answers

    def _render(
        self, messages: Sequence[Message], marker: str = "", *, add_generation_prompt: bool = False
    ) -> str:
        hidden = [m | {"content": self._hide(m["content"], marker)} for m in messages]
        try:
            return self._compiled.render(
                messages=hidden, add_generation_prompt=add_generation_prompt, eos_token=EOT
            )
        except Exception as error:  # of the program that a template is
            raise InputError(f"the chat template refuses the messages: {error}") from None

    def _hide(self, content: str, marker: str) -> str:
        """A content in which no special token begins or ends."""
        return self._last.sub(rf"{marker}\1", self._first.sub(rf"\1{marker}", content))

    def _split(self, text: str, marker: str, *, is_answer: bool) -> list[Part]:
        """Divide a text at special tokens, which have the odd indices of the division."""
        pieces = [piece.replace(marker, "") for piece in self._special.split(text)]
        return [Part(p, i % 2 == 1, is_answer) for i, p in enumerate(pieces) if p]


def read_template(path: Path) -> str:
    """Read the file of ``--chat-template``.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"--chat-template must be UTF-8 text; {path} is not") from None


def special_token_names(template: str, tokenizer: Tokenizer, name: str) -> list[str]:
    """Return the special tokens that a template writes, in the order in which they come.

    Args:
        template: its source.
        tokenizer: that of the model.
        name: what an error calls the template.

    Raises:
        InputError: it is no template, or refuses a chat of a user and an assistant.
    """
    compiled = ChatTemplate(template, tokenizer, name)
    texts = [compiled._render(_probe("user", "assistant"), add_generation_prompt=True)]
    with contextlib.suppress(InputError):  # of a template that knows no system
        texts.append(compiled._render(_probe("system", "user")))
    return list(dict.fromkeys(SPECIAL_TOKEN.findall("".join(texts))))


def _probe(*roles: str) -> list[Message]:
    """A chat of these roles, each of which says a letter."""
    return [{"role": role, "content": chr(ord("a") + i)} for i, role in enumerate(roles)]


def _unused_character(messages: Sequence[Message]) -> str:
    """A private character that no message holds."""
    text = "".join(message["content"] for message in messages)
    return next(c for c in map(chr, PRIVATE_CHARACTERS) if c not in text)


def _environment() -> Any:
    """The sandbox, with what transformers gives to templates."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    return environment
