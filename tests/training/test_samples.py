"""The text that a model writes at each validation: which prompt, which text, what is kept of it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmrec.checkpoint.checkpoint import load_model
from mmrec.config import EvaluationConfig
from mmrec.data.conversations import (
    Conversation,
    chat_tokenizer,
    make_split,
    tokenize_conversations,
)
from mmrec.data.corpus import Corpus, Split
from mmrec.data.tokenizer import Tokenizer, train_tokenizer
from mmrec.errors import InputError
from mmrec.inference.engine import Request, complete
from mmrec.model import Model
from mmrec.runtime.distributed import ProcessGroup
from mmrec.training.samples import SHOWN_LINES, Sampler, describe_sample
from mmrec.training.trainer import Trainer
from tests.conftest import SMALL, make_trainer


def samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def split_of(tokenizer: Tokenizer, *texts: str) -> Split:
    """A split of documents."""
    documents = [np.append(tokenizer.encode(text), tokenizer.eot) for text in texts]
    sizes = np.array([len(text.encode()) for text in texts])
    offsets = np.cumsum([0, *map(len, documents)])
    return Split(np.concatenate(documents).astype(np.uint16), offsets, sizes)


def sampler_of(
    corpus: Corpus, tokenizer: Tokenizer, split: Split, prompt: str = "", seed: int = 0
) -> Sampler:
    changed = dataclasses.replace(corpus, val=split, tokenizer=tokenizer)
    return Sampler(changed, EvaluationConfig(sample_prompt=prompt, sample_tokens=8), seed)


class Scripted(Model):
    """A model that is sure of each next token, whatever it reads; None makes its logits NaN."""

    def __init__(self, vocab_size: int, script: list[int | None]) -> None:
        super().__init__(dataclasses.replace(SMALL, vocab_size=vocab_size))
        self.script = list(script)

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits, token = torch.zeros(self.config.vocab_size), self.script.pop(0)
        if token is None:
            return logits.fill_(math.nan)
        logits[token] = 1000.0
        return logits


def test_each_validation_writes_the_text_that_the_decoder_would(
    corpus: Corpus, tmp_path: Path
) -> None:
    """With the same prompt, seed and weights, the compiled decoder draws the same tokens."""
    trainer = make_trainer(corpus, tmp_path, sample_tokens=30, seed=3)
    trainer.fit()
    found = samples(tmp_path)
    assert [x["step"] for x in found] == [v["step"] for v in trainer.progress.validations]
    assert [x["tokens"] for x in found] == [x["step"] * 64 for x in found]
    assert [x["seconds"] for x in found] == sorted(x["seconds"] for x in found)
    assert {x["seed"] for x in found} == {3}
    val = corpus.val.tokens
    assert {x["prompt"] for x in found} == {corpus.tokenizer.decode(val[:32])}
    last = load_model(tmp_path / "last.h5")
    assert found[-1]["step"] == last.step == 12
    request = Request(found[-1]["prompt"], max_tokens=30, seed=3)
    [completion] = complete(last.decoder, [request])
    assert found[-1]["text"] == completion.text != found[0]["text"]
    told = trainer.lines  # type: ignore[attr-defined]
    loss = trainer.progress.validations[-1]["val"]
    begin = told.index(f"sample  step 12, validation loss {loss:.4f}:")
    shown = describe_sample(found[-1], loss)
    assert told[begin : begin + len(shown)] == shown
    assert all(line.isprintable() for line in told)


def test_texts_change_nothing_else(corpus: Corpus, tmp_path: Path) -> None:
    """A run takes the same steps with texts and without, with dropout too."""
    runs = [make_trainer(corpus, tmp_path / str(count), sample_tokens=count) for count in (0, 5)]
    for trainer in runs:
        torch.manual_seed(7)
        trainer.fit()
    logs = [(trainer.run_dir / "metrics.jsonl").read_text() for trainer in runs]
    assert logs[0] == logs[1]
    for p, q in zip(*(trainer.model.parameters() for trainer in runs), strict=True):
        assert torch.equal(p, q)
    assert not (tmp_path / "0/samples.jsonl").exists()
    assert not any("sample" in line for line in runs[0].lines)  # type: ignore[attr-defined]
    assert len(samples(tmp_path / "5")) == 3


def test_a_rollback_takes_texts_back(corpus: Corpus, tmp_path: Path) -> None:
    """Those of steps that are taken again, with other data: each step has one text."""
    trainer = make_trainer(corpus, tmp_path, on_nan="rollback", eval_every=3)
    compute_gradients = trainer.compute_gradients

    def fail_at_step_9(data_step: int) -> float:
        return math.nan if data_step == 8 else compute_gradients(data_step)

    trainer.compute_gradients = fail_at_step_9  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.progress.rollbacks == 1
    assert [x["step"] for x in samples(tmp_path)] == [3, 6, 9, 12]
    told = [x for x in trainer.lines if x.startswith("sample  step")]  # type: ignore[attr-defined]
    assert [int(line.split()[2].strip(",")) for line in told] == [3, 6, 6, 9, 12]


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_the_prompt_is_the_beginning_of_the_validation_text(corpus: Corpus, kind: str) -> None:
    """In whole tokens and characters, and of a short document at most one half."""
    long, short = "Es war einmal ein König über dem großen Wald. " * 20, "日本語の本"
    tokenizer = train_tokenizer(kind, [long, short] * 20, 300)
    prompt = sampler_of(corpus, tokenizer, split_of(tokenizer, long)).prompt
    assert long.startswith(prompt)
    assert 32 <= len(prompt.encode()) < 48
    prompt = sampler_of(corpus, tokenizer, split_of(tokenizer, short, long)).prompt
    assert short.startswith(prompt)
    assert 0 < len(prompt) <= 3
    one = Split(np.array([tokenizer.eot], np.uint16), np.array([0, 1]), np.array([0]))
    assert sampler_of(corpus, tokenizer, one).prompt == ""
    assert sampler_of(corpus, tokenizer, split_of(tokenizer, long), "König").prompt == "König"
    if kind == "char":
        with pytest.raises(InputError, match="sample_prompt, line 1, character 2: .*'☃'"):
            sampler_of(corpus, tokenizer, split_of(tokenizer, long), "K☃")


def test_a_model_that_chats_answers(corpus: Corpus) -> None:
    """The first question of the validation text, or a message; its turn ends the text."""
    tokenizer = chat_tokenizer(Tokenizer("byte", ""), None, "template")
    chats = [
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}],
        [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "see you"}],
    ]
    conversations = [Conversation("chat", messages, frozenset()) for messages in chats]
    _, tokens = tokenize_conversations(conversations, tokenizer)
    split = make_split(tokens, tokenizer)
    prompt = sampler_of(corpus, tokenizer, split).prompt
    asked = sampler_of(corpus, tokenizer, split, "bye").prompt
    assert asked == prompt.replace("hello", "bye") != prompt
    assert "good day" not in prompt
    end = tokenizer.special_tokens["<|end|>"]
    scripted = Scripted(tokenizer.vocab_size, [*b"good day", end, *b"and more"])
    assert sampler_of(corpus, tokenizer, split).write(scripted) == "good day"
    eot = Scripted(tokenizer.vocab_size, [*b"ab", tokenizer.eot, *b"and more"])
    assert sampler_of(corpus, tokenizer, split).write(eot) == "ab"
    endless = Scripted(tokenizer.vocab_size, [*b"0123456789"])
    assert sampler_of(corpus, tokenizer, split).write(endless) == "01234567"
    lost = Scripted(tokenizer.vocab_size, [*b"ab", None, *b"cd"])
    assert sampler_of(corpus, tokenizer, split).write(lost) == "ab"


def test_shards_write_no_text_and_say_why(corpus: Corpus, tmp_path: Path) -> None:
    class ShardedGroup(ProcessGroup):
        sharded = True

    trainer = make_trainer(corpus, tmp_path, steps=4)
    trainer.process_group = ShardedGroup()
    trainer.fit()
    assert samples(tmp_path) == []
    told = "\n".join(trainer.lines)  # type: ignore[attr-defined]
    assert "no text is written at validations: each process has a part of the weights" in told


def test_long_texts_and_control_characters_are_shown_safely() -> None:
    sample = {"step": 1000, "text": "a\tb\n\x1b[31mred\n" + "line\n" * 20}
    lines = describe_sample(sample, 2.5)
    assert lines[:3] == [
        "sample  step 1,000, validation loss 2.5000:",
        "        a   b",
        "        \\x1b[31mred",
    ]
    assert len(lines) == 1 + SHOWN_LINES + 1
    assert lines[-1].strip() == "…"
    assert "ends the text at once" in describe_sample({"step": 1, "text": "\n"}, 1.0)[1]


def test_the_mode_and_weights_of_the_model_stay(trainer: Trainer, corpus: Corpus) -> None:
    sampler = Sampler(corpus, EvaluationConfig(sample_tokens=3), 0)
    before = [p.clone() for p in trainer.model.parameters()]
    state = torch.get_rng_state()
    for mode in (True, False):
        trainer.model.train(mode)
        assert sampler.write(trainer.model) == sampler.write(trainer.model)
        assert trainer.model.training == mode
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))
