"""Chat templates: from the messages of a chat to the prompt that a model was fine-tuned on."""

import uuid
from collections.abc import Callable

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError

RenderChat = Callable[[list[dict[str, str]]], list[int]]
"""From roles and texts to the token ids of the prompt."""


def chat_renderer(template: str, tokenizer: Tokenizer, name: str) -> RenderChat:
    """Compile a chat template, in the form that transformers uses.

    The template gets ``messages``, ``add_generation_prompt`` (true) and ``eos_token``, which
    becomes the end token. The same letters in a message stay letters.

    Args:
        template: in the language of Jinja.
        tokenizer: that of the model.
        name: what an error calls the template.

    Raises:
        InputError: it is no template.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise InputError(f"{name} must be a Jinja template: {error}") from None

    def render(messages: list[dict[str, str]]) -> list[int]:
        end = uuid.uuid4().hex  # no message can hold it
        try:
            text = compiled.render(messages=messages, add_generation_prompt=True, eos_token=end)
        except Exception as error:  # of the program that a template is
            raise InputError(f"the chat template refuses the messages: {error}") from None
        ids: list[int] = []
        for i, part in enumerate(text.split(end)):
            ids += [tokenizer.eot] * (i > 0) + tokenizer.encode(part, "the messages").tolist()
        return ids

    return render


def _refuse(message: str) -> None:
    raise TemplateError(message)
