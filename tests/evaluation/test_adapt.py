"""Dynamic evaluation against an independent computation, and what must stay as it is."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from mmrec.config import AdaptationConfig
from mmrec.data.corpus import Corpus, Split
from mmrec.errors import InputError
from mmrec.evaluation.adapt import SEGMENT_TOKENS, evaluate_dynamically
from mmrec.evaluation.evaluate import DynamicEvaluation, evaluate
from mmrec.model import Model
from tests.conftest import SMALL


def make_model() -> Model:
    """A small model whose weights are not those that it is initialised to, with dropout."""
    torch.manual_seed(1)
    model = Model(dataclasses.replace(SMALL, dropout=0.1, ngram_buckets=64))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05
    return model


def first_tokens(corpus: Corpus, count: int) -> Split:
    return Split(corpus.val.tokens[:count], np.array([0, count]), np.array([count]))


def adapt(split: Split, eot: int, lr: float, **options: Any) -> DynamicEvaluation:
    return evaluate_dynamically(make_model(), split, eot, AdaptationConfig(lr), **options)


def test_scores_equal_a_plain_computation(corpus: Corpus) -> None:
    """Score a segment, then one step of RMSProp on it, written out."""
    split, lr = first_tokens(corpus, 5 * SEGMENT_TOKENS + 20), 3e-3
    scores = adapt(split, corpus.tokenizer.eot, lr)
    model = make_model().eval()
    parameters = [*model.parameters()]
    mean_squares = [torch.zeros_like(p) for p in parameters]
    text = torch.from_numpy(np.append(corpus.tokenizer.eot, split.tokens).astype(np.int64))
    state, nats, steps = None, [], 0
    for begin in range(0, split.n_tokens, SEGMENT_TOKENS):
        part = text[begin : begin + SEGMENT_TOKENS + 1]
        logits, state = model(part[None, :-1], state)
        logp = torch.log_softmax(logits[0], -1).gather(1, part[1:, None])
        nats.append(-logp.sum().item())
        grads = torch.autograd.grad(-logp.sum() / SEGMENT_TOKENS, parameters)
        steps += 1
        for p, g, square in zip(parameters, grads, mean_squares, strict=True):
            square.mul_(0.999).add_(g * g, alpha=0.001)
            p.data -= lr * g / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
        layers = [type(s)(*(x if x is None else x.detach() for x in s)) for s in state.layers]
        state = state._replace(layers=layers)
    assert scores.updates == steps == 6
    assert scores.loss == pytest.approx(sum(nats) / split.n_tokens, rel=1e-5)
    assert scores.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / split.n_bytes, rel=1e-5)
    plain = evaluate(make_model(), split.tokens, corpus.tokenizer.eot, split.n_bytes)
    assert scores.loss < plain.loss  # the text is unlike anything that the model knows
    assert (
        nats[0]
        == pytest.approx(  # the first segment is predicted by the plain model
            evaluate(make_model(), split.tokens[:SEGMENT_TOKENS], corpus.tokenizer.eot, 1).loss
            * SEGMENT_TOKENS,
            rel=1e-5,
        )
    )


@pytest.mark.parametrize("reset", [False, True])
def test_without_a_rate_the_scores_are_plain_ones(corpus: Corpus, reset: bool) -> None:
    """Also where the state is reset at documents."""
    eot, text = corpus.tokenizer.eot, corpus.val.tokens
    tokens = np.concatenate([np.append(text[:100], eot), np.append(text[100:250], eot)])
    split = Split(tokens, np.array([0, 101, 252]), np.array([100, 150]))
    counts: list[int] = []
    scores = adapt(split, eot, 1e-12, reset_at_documents=reset, progress=counts.append)
    plain = evaluate(make_model(), tokens, eot, 250, reset_at_documents=reset)
    assert scores.loss == pytest.approx(plain.loss, rel=1e-6)
    assert scores.accuracy == plain.accuracy
    assert sum(counts) == 252


def test_equal_calls_give_equal_bits(corpus: Corpus) -> None:
    split = first_tokens(corpus, 300)
    first, second = (adapt(split, corpus.tokenizer.eot, 1e-2) for _ in range(2))
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(second, seconds=0)


def test_a_text_that_cannot_be_adapted_to(corpus: Corpus) -> None:
    eot = corpus.tokenizer.eot
    with pytest.raises(InputError, match=rf"longer than a segment of {SEGMENT_TOKENS} .*got 64"):
        adapt(first_tokens(corpus, SEGMENT_TOKENS), eot, 1e-2)
    with pytest.raises(InputError, match=r"stay finite; .*adapt_lr must be lower than 1e\+30"):
        adapt(first_tokens(corpus, 300), eot, 1e30)
