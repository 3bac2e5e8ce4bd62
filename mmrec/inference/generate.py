"""Generate text: read the prompt in parallel, then draw one token after another.

The recurrent state has a fixed size, so every token takes the same time and memory.
"""

from collections.abc import Iterator, Sequence

import torch

from mmrec.config import DEFAULT_MAX_TOKENS, TRAIN_SETTINGS
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.inference.sampling import (
    REPETITION_WINDOW,
    SamplingConfig,
    next_token_probabilities,
)
from mmrec.model import Model, State

PROMPT_CHUNK = 1024  # tokens of the prompt that one forward pass reads


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    sampling: SamplingConfig | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    stop: Sequence[str] = (),
    seed: int | None = None,
    prompt_chunk: int = PROMPT_CHUNK,
) -> Iterator[str]:
    """Generate the text that follows a prompt.

    Args:
        model: in evaluation mode.
        tokenizer: the tokenizer of the model.
        prompt: text to continue; may be empty.
        sampling: how tokens are drawn; None takes the defaults.
        max_tokens: largest number of tokens to generate.
        stop: texts that end the generation. They are not part of the output.
        seed: equal seeds give equal text on the same machine; None differs at every call.
        prompt_chunk: tokens of the prompt per forward pass. It changes speed and memory only.

    Returns:
        An iterator over pieces of the text, which end between characters. It raises an InputError
        if the logits are not finite.

    Raises:
        InputError: an argument is of another type, max_tokens or the seed is out of range, a stop
            text is empty, a text holds half of a surrogate pair, or the prompt a character that a
            ``char`` tokenizer does not know.
    """
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be of type str; got {prompt!r}")
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool):
        raise InputError(f"max_tokens must be of type int; got {max_tokens!r}")
    is_list = isinstance(stop, Sequence) and not isinstance(stop, str)
    if not is_list or not all(isinstance(text, str) for text in stop):
        raise InputError(f"stop must be a list of texts; got {stop!r}")
    for name, text in (("prompt", prompt), *(("stop", text) for text in stop)):
        _check_characters(name, text)
    if seed is not None:
        TRAIN_SETTINGS["seed"].check(seed)
    if max_tokens < 0:
        raise InputError(f"max_tokens must be >= 0; got {max_tokens}")
    if not all(stop):
        raise InputError("a stop text must not be empty")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    prompt_ids = [tokenizer.eot, *tokenizer.encode(prompt, "the prompt").tolist()]
    ids = _generate_ids(
        model,
        prompt_ids,
        sampling or SamplingConfig(),
        max_tokens,
        generator,
        tokenizer.eot,
        prompt_chunk,
    )
    return stop_at(tokenizer.stream(ids), stop)


def _check_characters(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} must be of characters; {text[error.start]!r} at position {error.start} is "
            "half of a surrogate pair"
        ) from None


@torch.inference_mode()
def _generate_ids(
    model: Model,
    prompt_ids: list[int],
    sampling: SamplingConfig,
    max_tokens: int,
    generator: torch.Generator,
    eot: int,
    prompt_chunk: int,
) -> Iterator[int]:
    """Yield token ids until the end token (``eot``), which is not yielded, or ``max_tokens``."""
    state: State | None = None
    for tokens in torch.tensor([prompt_ids]).split(prompt_chunk, 1):
        hidden, state = model.hidden_states(tokens, state)
    recent = prompt_ids[-REPETITION_WINDOW:]
    for _ in range(max_tokens):
        p = next_token_probabilities(model.lm_head(hidden[0, -1]), sampling, recent)
        if not p.isfinite().all():
            raise InputError(
                "the logits of the model must be finite; its weights are damaged, or the "
                f"temperature {sampling.temperature} is too small"
            )
        token = int(torch.multinomial(p, 1, generator=generator))
        if token == eot:
            return
        yield token
        recent = [*recent[1 - REPETITION_WINDOW :], token]
        hidden, state = model.hidden_states(torch.tensor([[token]]), state)


def stop_at(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass text on until the first of the stop texts, which is left out.

    Args:
        pieces: the text, in pieces of any size.
        stop: texts to stop at, none of them empty.

    Yields:
        Text as early as possible: only an end that may be the start of a stop text is held back.
    """
    longest = max(map(len, stop), default=0)
    pending = ""
    for piece in pieces:
        pending += piece
        found = [at for text in stop if (at := pending.find(text)) >= 0]
        if found:
            if min(found):
                yield pending[: min(found)]
            return
        hold_back = next(
            (
                n
                for n in range(min(longest - 1, len(pending)), 0, -1)
                if any(text.startswith(pending[-n:]) for text in stop)
            ),
            0,
        )
        if len(pending) > hold_back:
            yield pending[: len(pending) - hold_back]
            pending = pending[len(pending) - hold_back :]
    if pending:
        yield pending
