"""Generation: the prompt is read in parallel, then every token costs the same."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.model import Model, State

PROMPT_CHUNK = 1024  # tokens of the prompt read at once


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Filters apply in the order of the fields."""

    repetition_penalty: float = 1.0
    """Divides (or multiplies, where negative) the logits of tokens in the last 256; 1 is off
    (Keskar et al. 2019, arXiv:1909.05858, section 4.1)."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 is off."""
    top_p: float = 0.95
    """Keep the likeliest tokens that together reach this probability; 1 is off
    (Holtzman et al. 2020, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one; 0 is off
    (Nguyen et al. 2024, arXiv:2407.01082)."""

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "finite and >= 0"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "finite and > 0"),
        ):
            if not good:
                raise InputError(f"{name} must be {rule}; got {getattr(self, name)}")


def probabilities(logits: Tensor, how: Sampling, recent: Sequence[int] = ()) -> Tensor:
    """Distribution (V,) that the next token is drawn from, of logits (V,) and the recent tokens."""
    logits = logits.double()
    if recent and how.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(recent)))
        value = logits[seen]
        penalty = how.repetition_penalty
        logits[seen] = torch.where(value > 0, value / penalty, value * penalty)
    if how.temperature == 0:
        return torch.zeros_like(logits).scatter_(0, logits.argmax(0, keepdim=True), 1.0)
    p = torch.softmax(logits / how.temperature, 0)
    order = p.argsort(descending=True, stable=True)
    ranked = p[order]
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if how.top_k:
        keep[how.top_k :] = False
    ranked = ranked * keep / (ranked * keep).sum()
    keep &= ranked.cumsum(0) - ranked < how.top_p  # what came before had not reached it yet
    keep &= ranked >= how.min_p * ranked[0]
    kept = torch.zeros_like(p, dtype=torch.bool)
    kept[order[keep]] = True
    return p * kept / (p * kept).sum()


def _tokens(
    model: Model, start: list[int], how: Sampling, limit: int, generator: torch.Generator, eot: int
) -> Iterator[int]:
    state: State | None = None
    for lo in range(0, len(start), PROMPT_CHUNK):
        piece = torch.tensor([start[lo : lo + PROMPT_CHUNK]])
        x, state = model.hidden_states(piece, state)
    recent = start[-256:]
    for _ in range(limit):
        p = probabilities(model.lm_head(x[0, -1]), how, recent)
        if not p.isfinite().all():
            raise InputError(
                "the model's scores are not finite: its weights, or a temperature so "
                "near 0, are of no use"
            )
        token = int(torch.multinomial(p, 1, generator=generator))
        if token == eot:
            return
        yield token
        recent = [*recent[-255:], token]
        x, state = model.hidden_states(torch.tensor([[token]]), state)


@torch.inference_mode()
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    how: Sampling | None = None,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the text that follows a prompt, piece by piece, never half a character.

    Args:
        model: in evaluation mode.
        prompt: text to go on from; may be empty.
        how: sampling; the default if None.
        max_tokens: most tokens to generate.
        stop: texts that end generation; they are not part of what is yielded.
        seed: equal seeds give equal text on the same machine; None is different every time.

    Raises:
        InputError: max_tokens is negative, a stop text is empty, or the prompt holds a character
            that a ``char`` tokenizer does not know.
    """
    if max_tokens < 0:
        raise InputError(f"max_tokens must be >= 0; got {max_tokens}")
    if any(not s for s in stop):
        raise InputError("a stop text must not be empty")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    start = [tokenizer.eot, *tokenizer.encode(prompt).tolist()]
    ids = _tokens(model, start, how or Sampling(), max_tokens, generator, tokenizer.eot)
    yield from until(tokenizer.stream(ids), stop)


def until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass text on up to the first of the stop texts, holding back what may be the start of one."""
    longest = max(map(len, stop), default=0)
    held = ""
    for piece in pieces:
        held += piece
        found = [at for s in stop if (at := held.find(s)) >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        back = next(
            (
                n
                for n in range(min(longest - 1, len(held)), 0, -1)
                if any(s.startswith(held[-n:]) for s in stop)
            ),
            0,
        )
        if len(held) > back:
            yield held[: len(held) - back]
            held = held[len(held) - back :]
    if held:
        yield held
