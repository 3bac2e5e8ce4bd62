"""The sampling kernel against its reference in float64."""

import numpy as np
import pytest

from mmrec.config import SamplingConfig
from mmrec.kernels._jit import compiled_kernel
from mmrec.kernels.decoder.layout import make_sample_scratch
from mmrec.kernels.sampling import kernel, reference


@compiled_kernel
def draw_many(logits, settings, seed, out, scratch):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        number = kernel.uniform(seed, np.uint64(i))
        out[i] = kernel.sample(
            logits,
            settings[0],
            np.int64(settings[1]),
            settings[2],
            settings[3],
            number,
            scratch,
        )


@compiled_kernel
def adjust(logits, settings, recent, counts, tokens, values, seen):  # type: ignore[no-untyped-def]
    kernel.adjust_logits(
        logits, settings[0], settings[1], settings[2], recent, counts, tokens, values, seen
    )


@compiled_kernel
def numbers(seed, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = kernel.uniform(seed, np.uint64(i))


@compiled_kernel
def scores(logits, tokens, logprobs, values):  # type: ignore[no-untyped-def]
    normaliser = kernel.log_sum_exp(logits, values)
    kernel.largest(logits, normaliser, tokens, logprobs)
    return normaliser


def kernel_draws(logits: np.ndarray, sampling: SamplingConfig, seed: int, count: int) -> np.ndarray:
    out = np.zeros(count, np.int64)
    settings = np.array([sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p])
    draw_many(logits, settings, np.uint64(seed), out, make_sample_scratch(len(logits)))
    return out


def reference_draws(
    logits: np.ndarray, sampling: SamplingConfig, seed: int, count: int
) -> np.ndarray:
    p = reference.next_token_probabilities(logits, sampling)
    return np.array([reference.draw(p, reference.uniform(seed, i)) for i in range(count)])


@pytest.mark.parametrize("seed", [0, 1, 12345, (1 << 63) - 1])
def test_random_numbers_are_those_of_the_reference(seed: int) -> None:
    out = np.zeros(50)
    numbers(np.uint64(seed), out)
    assert out.tolist() == [reference.uniform(seed, i) for i in range(50)]


def test_random_numbers_are_uniform() -> None:
    out = np.zeros(100_000)
    numbers(np.uint64(7), out)
    counts = np.histogram(out, 100, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 150  # chi-squared with 99 degrees: 99 ± 14
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("trial", range(60))
def test_draws_are_those_of_the_reference(trial: int) -> None:
    rng = np.random.default_rng(trial)
    logits = (rng.standard_normal(rng.integers(1, 600)) * rng.choice([0.1, 1, 5])).astype("f4")
    sampling = SamplingConfig(
        temperature=float(rng.choice([0, 0.3, 1, 2])),
        top_k=int(rng.choice([0, 0, 1, 5, 50])),
        top_p=float(rng.choice([1, 0.9, 0.5, 0.1])),
        min_p=float(rng.choice([0, 0, 0.05, 0.5])),
    )
    got = kernel_draws(logits, sampling, trial, 200)
    np.testing.assert_array_equal(got, reference_draws(logits, sampling, trial, 200))


def test_equal_logits_are_kept_in_the_order_of_ids() -> None:
    logits = np.repeat(np.float32([1, 3, 2]), 40)
    got = kernel_draws(logits, SamplingConfig(temperature=1, top_k=50, top_p=1), 3, 2000)
    assert set(got) == {*range(40, 80), *range(80, 90)}


def test_frequencies_are_the_probabilities() -> None:
    logits = np.float32([0, 1, 2, 3, -1])
    sampling = SamplingConfig(temperature=1.5, top_p=1)
    got = np.bincount(kernel_draws(logits, sampling, 5, 50_000), minlength=5)
    expected = reference.next_token_probabilities(logits, sampling) * 50_000
    assert ((got - expected) ** 2 / expected).sum() < 20  # 4 degrees of freedom


@pytest.mark.parametrize("trial", range(10))
def test_penalties_and_biases(trial: int) -> None:
    rng = np.random.default_rng(trial)
    size = 50
    logits = rng.standard_normal(size).astype(np.float32)
    recent = rng.integers(-1, size, 256).astype(np.int32)
    recent[recent > 30] = -1
    counts = rng.integers(0, 3, size).astype(np.int32)
    sampling = SamplingConfig(
        repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.4, temperature=1
    )
    biases = {3: 2.5, 7: -100.0}
    seen, got = np.zeros(size, np.uint8), logits.copy()
    settings = np.array([1.3, 0.7, -0.4])
    adjust(got, settings, recent, counts, np.int32([3, 7]), np.array([2.5, -100.0]), seen)
    expected = reference.adjust_logits(logits, sampling, recent.tolist(), counts, biases)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert not seen.any()


def test_scores_are_those_of_the_reference() -> None:
    logits = (np.random.default_rng(0).standard_normal(300) * 4).astype(np.float32)
    tokens, logprobs = np.zeros(5, np.int32), np.zeros(5, np.float32)
    scores(logits, tokens, logprobs, np.empty(300, np.float32))
    expected = reference.log_softmax(logits)
    order = np.argsort(-expected)[:5]
    assert tokens.tolist() == order.tolist()
    np.testing.assert_allclose(logprobs, expected[order], rtol=1e-6)
