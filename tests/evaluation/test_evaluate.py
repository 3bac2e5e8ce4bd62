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
from mmrec.evaluation.evaluate import evaluate, evaluate_split, read_context
from mmrec.model import Model
from tests.conftest import SMALL


@pytest.fixture
def model() -> Model:
    """A small model whose weights are not those that it is initialised to, in training mode."""
    model = Model(replace(SMALL, dropout=0.1))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05
    return model


def test_scores_equal_a_plain_computation(model: Model, corpus: Corpus) -> None:
    tokens, eot = corpus.val.tokens[:1500], corpus.tokenizer.eot  # short: one stream, so one state
    scores = evaluate(model, tokens, eot, 1500)
    model.eval()
    stream = torch.from_numpy(np.concatenate(([eot], tokens)).astype(np.int64))[None]
    with torch.no_grad():
        logits, _ = model(stream[:, :-1])
    logp = torch.log_softmax(logits.double(), -1)[0]
    nats = -logp.gather(1, stream[0, 1:, None]).sum().item()
    assert scores.loss == pytest.approx(nats / 1500, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(nats / 1500), rel=1e-4)
    assert scores.bits_per_byte == pytest.approx(nats / math.log(2) / 1500, rel=1e-5)
    accuracy = (logp.argmax(-1) == stream[0, 1:]).double().mean().item()
    assert scores.accuracy == pytest.approx(accuracy, abs=2 / 1500)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_bits_per_byte_are_of_the_text_under_any_tokenizer(kind: str, text_file: Path) -> None:
    """Against a sum token by token in float64, over the bytes of the text itself."""
    text = text_file.read_text()[:1500] + "é 日本語 😀"  # short: one stream
    tokenizer = train_tokenizer(kind, [text], 300)
    model = Model(replace(SMALL, vocab_size=tokenizer.vocab_size)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05
    split = encode_documents(tokenizer, [Document("a", text)])
    scores = evaluate_split(model, split, tokenizer, reset_at_documents=False)
    ids = torch.tensor([tokenizer.eot, *tokenizer.encode(text).tolist(), tokenizer.eot])
    exact, state, nats = model.double(), None, 0.0
    with torch.no_grad():
        for token, target in pairwise(ids):
            logits, state = exact(token.view(1, 1), state)
            nats -= torch.log_softmax(logits[0, 0], 0)[target].item()
    assert scores.bytes == len(text.encode())
    assert scores.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_chunks_do_not_matter_and_progress_counts_every_token(model: Model, corpus: Corpus) -> None:
    counts: list[int] = []
    args = (model, corpus.val.tokens, corpus.tokenizer.eot, corpus.val.n_bytes)
    scores = evaluate(*args, progress=counts.append)
    assert sum(counts) == corpus.val.n_tokens == scores.tokens
    assert evaluate(*args, chunk=37).loss == pytest.approx(scores.loss, rel=1e-6)
    assert model.training  # left as it was


def test_a_split_is_scored_by_its_documents_or_as_one_text(model: Model, corpus: Corpus) -> None:
    args = (model, corpus.val.tokens, corpus.tokenizer.eot, corpus.val.n_bytes)
    for reset in (False, True):
        scores = evaluate_split(model, corpus.val, corpus.tokenizer, reset_at_documents=reset)
        want = evaluate(*args, reset_at_documents=reset)
        assert replace(scores, seconds=0) == replace(want, seconds=0)


def test_documents_may_start_from_the_empty_state(model: Model, corpus: Corpus) -> None:
    text, eot = corpus.val.tokens, corpus.tokenizer.eot
    documents = [np.append(text[lo : lo + n], eot) for lo, n in ((0, 40), (50, 300), (400, 7))]
    separate = [evaluate(model, d, eot, len(d)) for d in documents]
    stream = np.concatenate(documents)
    together = evaluate(model, stream, eot, len(stream), reset_at_documents=True, chunk=32)
    want = sum(scores.loss * scores.tokens for scores in separate) / len(stream)
    assert together.loss == pytest.approx(want, rel=1e-5)
    carried = evaluate(model, stream, eot, len(stream), chunk=32)
    assert carried.loss != pytest.approx(want, rel=1e-5)


def test_a_continuation_is_scored_given_its_context(model: Model, corpus: Corpus) -> None:
    """In chunks, and like the whole text at once."""
    model.eval()
    ids = [corpus.tokenizer.eot, *corpus.val.tokens[:1300].tolist()]
    context = read_context(model, ids[:600])
    nats, correct = context.score(ids[600:])
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0][0].double(), -1)[599:]
    targets = torch.tensor(ids[600:])
    want = -logp.gather(1, targets[:, None])[:, 0].numpy()
    np.testing.assert_allclose(nats, want, rtol=1e-4, atol=1e-4)
    assert (correct == (logp.argmax(-1) == targets).numpy()).mean() > 0.99
    assert len(context.score([])[0]) == 0


def test_nothing_to_evaluate(model: Model) -> None:
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(model, np.empty(0, np.uint16), 256, 0)
