"""The short text that a model writes at each validation, so that people see what it has learnt.

A run writes it from the same prompt with the same random numbers each time, so only the weights
differ between two texts. The numbers are those of ``mmrec.kernels.sampling.reference``: torch's
generators are not touched, and a run takes the same steps with texts and without.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrec.config import EvaluationConfig, SamplingConfig
from mmrec.data.chat_template import ChatTemplate
from mmrec.data.corpus import Corpus, Split
from mmrec.data.tokenizer import Tokenizer
from mmrec.kernels.sampling.reference import draw, next_token_probabilities, uniform
from mmrec.model import Model
from mmrec.runtime.atomic import Retry, never_retry
from mmrec.runtime.names import printable, shorten
from mmrec.training.metrics import JsonLinesLog

SAMPLING = SamplingConfig()
"""As ``mmrec generate`` draws by default."""
PROMPT_BYTES = 32
"""Bytes of the validation text that a prompt has by default."""
SHOWN_LINES = 8
"""Lines of a text that are printed; the file has all of it."""
SHOWN_CHARS = 60
"""Characters of the prompt that are printed."""


class SampleLog(JsonLinesLog):
    """``samples.jsonl``: the texts of a run, one per line, oldest first."""

    def __init__(self, folder: Path, resumed_step: int | None, retry: Retry = never_retry) -> None:
        """Open the log of a run folder.

        Args:
            folder: the run folder.
            resumed_step: keep the texts up to this step, and append after them; None begins a new
                file.
            retry: asked whether to write again after a failure; see ``write_with_retry``.
        """
        super().__init__(folder / "samples.jsonl", retry)
        if resumed_step is not None:
            self._read(None, resumed_step)
        self._rewrite()

    def rewind(self, step: int) -> None:
        """Remove the texts after a step."""
        self.lines = [x for x in self.lines if x["step"] <= step]
        self._file.close()
        self._rewrite()

    def write(self, sample: dict[str, Any]) -> None:
        """Append a text.

        Raises:
            StorageError: it could not be written.
        """
        self._append(sample)


class Sampler:
    """Lets a model continue a prompt.

    Attributes:
        prompt: what the model continues, for people; names stand for special tokens.
    """

    def __init__(self, corpus: Corpus, config: EvaluationConfig, seed: int) -> None:
        """Choose the prompt.

        Args:
            corpus: the text that the model is trained on.
            config: prompt and number of tokens.
            seed: equal seeds give equal random numbers.

        Raises:
            InputError: the prompt holds a character that the tokenizer does not know.
        """
        tokenizer, self._seed = corpus.tokenizer, seed
        self._tokenizer, self._count = tokenizer, config.sample_tokens
        self._stop_tokens = {tokenizer.eot}
        if corpus.val.answers is None:
            if config.sample_prompt:
                ids = tokenizer.encode(config.sample_prompt, "sample_prompt").tolist()
            else:
                ids = beginning_of_text(corpus.val, tokenizer)
        else:
            template = ChatTemplate(tokenizer.chat_template, tokenizer)
            if template.end_of_turn is not None:
                self._stop_tokens.add(template.end_of_turn)
            if config.sample_prompt:
                ids = template.prompt([{"role": "user", "content": config.sample_prompt}])
            else:
                ids = beginning_of_conversation(corpus.val)
        self._context = [tokenizer.eot, *ids]
        self.prompt = readable(tokenizer, ids)

    def write(self, model: Model) -> str:
        """Return the text that the model writes after the prompt.

        Args:
            model: left in the mode (training or evaluation) that it is in.
        """
        training = model.training
        model.eval()
        try:
            return self._tokenizer.decode(self._draw(model))
        finally:
            model.train(training)

    @torch.inference_mode()
    def _draw(self, model: Model) -> list[int]:
        tokens: list[int] = []
        hidden, state = model.hidden_states(torch.tensor([self._context]))
        while len(tokens) < self._count:
            logits = model.lm_head(hidden[0, -1]).numpy()
            if not np.isfinite(logits).all():
                break
            p = next_token_probabilities(logits, SAMPLING)
            token = draw(p, uniform(self._seed, len(tokens)))
            if token in self._stop_tokens:
                break
            tokens.append(token)
            hidden, state = model.hidden_states(torch.tensor([[token]]), state)
        return tokens


def beginning_of_text(split: Split, tokenizer: Tokenizer) -> list[int]:
    """The first tokens of the first document: ``PROMPT_BYTES`` or a few more, in whole characters.

    Of a short document at most one half is taken, so that something is left to write.
    """
    most = min(int(split.doc_offsets[1]) // 2, 2 * PROMPT_BYTES)
    tokens = split.tokens[:most].tolist()
    text, count = b"", 0
    for number, token in enumerate(tokens, 1):
        text += tokenizer.token_bytes(token)
        if _is_whole(text):
            count = number
            if len(text) >= PROMPT_BYTES:
                break
    return list(tokens[:count])


def _is_whole(text: bytes) -> bool:
    """Whether bytes end with a character that is complete."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def beginning_of_conversation(split: Split) -> list[int]:
    """The tokens of the first conversation up to its first answer."""
    assert split.answers is not None
    answer = int(np.argmax(split.answers))
    begin = int(split.doc_offsets[np.searchsorted(split.doc_offsets, answer, side="right") - 1])
    return list(split.tokens[begin:answer].tolist())


def readable(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids, with the names of special tokens in their places."""
    parts = ((tokenizer.special_name(i) or "").encode() or tokenizer.token_bytes(i) for i in ids)
    return b"".join(parts).decode("utf-8", "replace")


def describe_prompt(prompt: str) -> str:
    """What is printed of a prompt before a run."""
    if not prompt:
        return "sample  at each validation the model writes a text"
    return f'sample  at each validation the model continues "{shorten(prompt, SHOWN_CHARS)}"'


def describe_sample(sample: dict[str, Any], loss: float) -> list[str]:
    """The lines that are printed of a text.

    Args:
        sample: a line of ``samples.jsonl``.
        loss: the validation loss, in nats per token.
    """
    text = sample["text"].strip("\n") or "(the model ends the text at once)"
    lines = text.split("\n")
    shown = [f"        {printable(line.expandtabs(4))}".rstrip() for line in lines[:SHOWN_LINES]]
    more = ["        …"] if len(lines) > SHOWN_LINES else []
    return [f"sample  step {sample['step']:,}, validation loss {loss:.4f}:", *shown, *more]
