"""Evaluation against an independent computation."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrec.data.corpus import Corpus
from mmrec.data.readers import Document
from mmrec.data.tokenize import encode_documents
from mmrec.data.tokenizer import train_tokenizer
from mmrec.errors import InputError
from mmrec.evaluation.evaluate import evaluate
from mmrec.model import Model
from mmrec.training.trainer import Trainer
from tests.conftest import SMALL


def test_scores_equal_a_plain_computation(trainer: Trainer, corpus: Corpus) -> None:
    for p in trainer.model.parameters():
        p.data += torch.randn_like(p) * 0.05
    tokens, eot = corpus.val.tokens[:1500], corpus.tokenizer.eot  # short: one lane, so one state
    made = evaluate(trainer.model, tokens, eot, 1500)
    trainer.model.eval()
    stream = torch.from_numpy(np.concatenate(([eot], tokens)).astype(np.int64))[None]
    with torch.no_grad():
        logits, _ = trainer.model(stream[:, :-1])
    logp = torch.log_softmax(logits.double(), -1)[0]
    nats = -logp.gather(1, stream[0, 1:, None]).sum().item()
    assert made.loss == pytest.approx(nats / 1500, rel=1e-5)
    assert made.perplexity == pytest.approx(math.exp(nats / 1500), rel=1e-4)
    assert made.bits_per_byte == pytest.approx(nats / math.log(2) / 1500, rel=1e-5)
    right = (logp.argmax(-1) == stream[0, 1:]).double().mean().item()
    assert made.accuracy == pytest.approx(right, abs=2 / 1500)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_bits_per_byte_are_of_the_text_under_any_tokenizer(kind: str, text_file: Path) -> None:
    """Against a sum token by token in float64, over the bytes of the text itself."""
    text = text_file.read_text()[:1500] + "é 日本語 😀"  # short: one lane, so one state
    tokenizer = train_tokenizer(kind, [text], 300)
    model = Model(replace(SMALL, vocab_size=tokenizer.vocab_size)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05
    split = encode_documents(tokenizer, [Document("a", text)])
    made = evaluate(model, split.tokens, tokenizer.eot, split.n_bytes)
    ids = torch.tensor([tokenizer.eot, *tokenizer.encode(text).tolist(), tokenizer.eot])
    exact, state, nats = model.double(), None, 0.0
    with torch.no_grad():
        for token, target in pairwise(ids):
            logits, state = exact(token.view(1, 1), state)
            nats -= torch.log_softmax(logits[0, 0], 0)[target].item()
    assert made.bytes == len(text.encode())
    assert made.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_chunks_do_not_matter_and_progress_counts_every_token(
    trainer: Trainer, corpus: Corpus
) -> None:
    counts: list[int] = []
    args = (trainer.model, corpus.val.tokens, corpus.tokenizer.eot, corpus.val.n_bytes)
    whole = evaluate(*args, progress=counts.append)
    assert sum(counts) == corpus.val.n_tokens == whole.tokens
    assert evaluate(*args, chunk=37).loss == pytest.approx(whole.loss, rel=1e-6)
    assert trainer.model.training  # left as it was


def test_documents_may_start_without_those_before_them(trainer: Trainer, corpus: Corpus) -> None:
    for p in trainer.model.parameters():
        p.data += torch.randn_like(p) * 0.05
    text, eot = corpus.val.tokens, corpus.tokenizer.eot
    documents = [np.append(text[lo : lo + n], eot) for lo, n in ((0, 40), (50, 300), (400, 7))]
    alone = [evaluate(trainer.model, d, eot, len(d)) for d in documents]
    stream = np.concatenate(documents)
    together = evaluate(trainer.model, stream, eot, len(stream), resets=True, chunk=32)
    want = sum(a.loss * a.tokens for a in alone) / len(stream)
    assert together.loss == pytest.approx(want, rel=1e-5)
    carried = evaluate(trainer.model, stream, eot, len(stream), chunk=32)
    assert carried.loss != pytest.approx(want, rel=1e-5)


def test_nothing_to_evaluate(trainer: Trainer) -> None:
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(trainer.model, np.empty(0, np.uint16), 256, 0)
