"""Scores taken apart: against loops that are too simple to be wrong, and laws of the interval."""

import math

import numpy as np
import pytest

from mmrec.data.corpus import Corpus
from mmrec.evaluation.evaluate import TokenScores, evaluate
from mmrec.evaluation.report import bootstrap, make_report
from mmrec.training.trainer import Trainer


def test_token_scores_lie_in_the_order_of_the_tokens(trainer: Trainer, corpus: Corpus) -> None:
    tokens, eot, size = corpus.val.tokens, corpus.tokenizer.eot, corpus.val.n_bytes
    detail = TokenScores.empty(len(tokens))
    made = evaluate(trainer.model, tokens, eot, size, chunk=100, detail=detail)
    assert detail.nats.mean(dtype=np.float64) == pytest.approx(made.loss, rel=1e-5)
    assert detail.right.mean() == pytest.approx(made.accuracy)
    head = TokenScores.empty(500)
    evaluate(trainer.model, tokens[:500], eot, 500, detail=head)
    np.testing.assert_allclose(head.nats, detail.nats[:500], rtol=1e-3, atol=1e-4)


def test_documents_positions_and_calibration_equal_plain_loops() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 3000)
    tokens[rng.random(3000) < 0.02] = 0
    tokens[-1] = 5  # the last document has no end
    sure = rng.random(3000).astype(np.float32)
    scores = TokenScores(rng.random(3000).astype(np.float32), sure, rng.random(3000) < sure)
    made = make_report(tokens, 0, np.array([0, 1, 1, 1, 2, 2, 2, 3, 3]), scores)
    place, bins, documents = 0, dict[int, list[float]](), 1
    for i, token in enumerate(tokens):
        bins.setdefault(place.bit_length(), []).append(float(scores.nats[i]))
        place += 1
        if token == 0:
            place, documents = 0, documents + 1
    assert made.documents == documents
    for b, key in zip(made.positions, sorted(bins), strict=True):
        assert b["from"] == (1 << key >> 1)
        assert b["tokens"] == len(bins[key])
        assert b["loss"] == pytest.approx(np.mean(bins[key]), rel=1e-5)
    assert made.calibration_error < 0.05  # it was made so that it is calibrated
    assert sum(b["tokens"] for b in made.calibration) == 3000


def test_a_model_that_is_too_sure_is_not_calibrated() -> None:
    scores = TokenScores(
        np.ones(100, np.float32), np.full(100, 0.9, np.float32), np.arange(100) < 50
    )
    made = make_report(np.arange(100) % 7, 0, np.ones(7, int), scores)
    assert made.calibration_error == pytest.approx(0.4, abs=1e-6)


def test_the_interval_holds_the_truth_and_narrows() -> None:
    rng = np.random.default_rng(1)

    def interval(count: int) -> tuple[float, float]:
        sizes = rng.integers(50, 500, count)
        made = bootstrap(sizes * math.log(2) * rng.normal(1.5, 0.3, count), sizes)
        assert made is not None
        return made

    hits = sum(low <= 1.5 <= high for low, high in (interval(60) for _ in range(40)))
    assert hits >= 32
    (low, high), (few_low, few_high) = interval(4000), interval(40)
    assert high - low < (few_high - few_low) / 4
    assert bootstrap(np.ones(1), np.ones(1)) is None
