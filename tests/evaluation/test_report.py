"""Reports: against plain loops, and laws of the interval."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrec.data.corpus import Corpus
from mmrec.evaluation.evaluate import TokenScores, evaluate
from mmrec.evaluation.report import (
    RESAMPLED_AT_ONCE,
    RESAMPLES,
    bootstrap_interval,
    draw_report,
    make_report,
)
from mmrec.model import Model
from tests.conftest import SMALL


def test_token_scores_lie_in_the_order_of_the_tokens(corpus: Corpus) -> None:
    model = Model(replace(SMALL, dropout=0.1))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05
    tokens, eot, size = corpus.val.tokens, corpus.tokenizer.eot, corpus.val.n_bytes
    scores = TokenScores.empty(len(tokens))
    evaluation = evaluate(model, tokens, eot, size, chunk=100, token_scores=scores)
    assert scores.nats.mean(dtype=np.float64) == pytest.approx(evaluation.loss, rel=1e-5)
    assert scores.correct.mean() == pytest.approx(evaluation.accuracy)
    first = TokenScores.empty(500)
    evaluate(model, tokens[:500], eot, 500, token_scores=first)
    np.testing.assert_allclose(first.nats, scores.nats[:500], rtol=1e-3, atol=1e-4)


def test_documents_positions_and_calibration_equal_plain_loops() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 3000)
    tokens[rng.random(3000) < 0.02] = 0
    tokens[-1] = 5  # the last document has no end token
    confidence = rng.random(3000).astype(np.float32)
    scores = TokenScores(
        rng.random(3000).astype(np.float32), confidence, rng.random(3000) < confidence
    )
    report = make_report(tokens, 0, np.array([0, 1, 1, 1, 2, 2, 2, 3, 3]), scores)
    position, bins, documents = 0, dict[int, list[float]](), 1
    for i, token in enumerate(tokens):
        bins.setdefault(position.bit_length(), []).append(float(scores.nats[i]))
        position += 1
        if token == 0:
            position, documents = 0, documents + 1
    assert report.documents == documents
    for b, key in zip(report.positions, sorted(bins), strict=True):
        assert b["from"] == (1 << key >> 1)
        assert b["tokens"] == len(bins[key])
        assert b["loss"] == pytest.approx(np.mean(bins[key]), rel=1e-5)
    assert report.calibration_error < 0.05  # the scores are calibrated by construction
    assert sum(b["tokens"] for b in report.calibration) == 3000


def test_an_overconfident_model_is_not_calibrated() -> None:
    scores = TokenScores(
        np.ones(100, np.float32), np.full(100, 0.9, np.float32), np.arange(100) < 50
    )
    report = make_report(np.arange(100) % 7, 0, np.ones(7, int), scores)
    assert report.calibration_error == pytest.approx(0.4, abs=1e-6)
    [bin_] = report.calibration
    assert (bin_["confidence"], bin_["correct"]) == (pytest.approx(0.9), 0.5)


def interval_of(rng: np.random.Generator, count: int) -> tuple[float, float]:
    """The interval of documents whose bits per byte are drawn around 1.5."""
    sizes = rng.integers(50, 500, count)
    interval = bootstrap_interval(sizes * math.log(2) * rng.normal(1.5, 0.3, count), sizes)
    assert interval is not None
    return interval


def test_the_interval_holds_the_truth_and_narrows() -> None:
    rng = np.random.default_rng(1)
    hits = sum(low <= 1.5 <= high for low, high in (interval_of(rng, 60) for _ in range(40)))
    assert hits >= 32
    (low, high), (few_low, few_high) = interval_of(rng, 4000), interval_of(rng, 40)
    assert high - low < (few_high - few_low) / 4


def test_one_document_has_no_interval() -> None:
    assert bootstrap_interval(np.ones(1), np.ones(1)) is None


def test_the_interval_is_that_of_a_plain_recomputation() -> None:
    """A ratio of sums, documents resampled in pairs, percentiles: with other random numbers."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 2000, 200)
    nats = sizes * rng.gamma(4.0, 0.3, 200)
    ratios = []
    for _ in range(4 * RESAMPLES):
        drawn = rng.integers(0, 200, 200)
        ratios.append(nats[drawn].sum() / sizes[drawn].sum() / math.log(2))
    low, high = np.percentile(ratios, [2.5, 97.5])
    interval = bootstrap_interval(nats, sizes)
    assert interval == pytest.approx((low, high), abs=0.1 * (high - low))
    assert interval == bootstrap_interval(nats, sizes)  # the same at every call


def test_the_memory_of_the_interval_is_bounded() -> None:
    import tracemalloc

    documents = 50_000
    nats, sizes = np.ones(documents), np.ones(documents, np.int64)
    bootstrap_interval(nats[:10], sizes[:10])  # imports what is imported once
    tracemalloc.start()
    bootstrap_interval(nats, sizes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 8 * RESAMPLED_AT_ONCE


def test_a_report_is_drawn(tmp_path: Path) -> None:
    scores = TokenScores(np.ones(9, np.float32), np.full(9, 0.5, np.float32), np.arange(9) < 4)
    draw_report(make_report(np.arange(9), 0, np.ones(9, int), scores), tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
