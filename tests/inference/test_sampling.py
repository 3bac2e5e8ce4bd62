"""Sampling: filters against brute force, the penalty, and settings out of range."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec.config import SamplingConfig
from mmrec.errors import InputError
from mmrec.kernels.sampling.reference import adjust_logits, next_token_probabilities


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
    st.integers(0, 12),
)
def test_filters_equal_brute_force(
    values: list[float], top_p: float, min_p: float, top_k: int
) -> None:
    logits = np.array(values)
    p = softmax(logits / 0.7)
    ranked = sorted(range(len(values)), key=lambda i: (-p[i], i))
    if top_k:
        ranked = ranked[:top_k]
    mass = sum(p[i] for i in ranked)
    kept, total = [], 0.0
    for i in ranked:
        if total >= top_p - 1e-12 and total > 0:
            break
        kept.append(i)
        total += p[i] / mass
    kept = [i for i in kept if p[i] >= min_p * p[ranked[0]] * (1 - 1e-12)]
    sampling = SamplingConfig(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    got = next_token_probabilities(logits, sampling)
    assert got.sum() == pytest.approx(1)
    want = np.zeros_like(p)
    want[kept] = p[kept] / p[kept].sum()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


def test_penalty_and_temperature_zero() -> None:
    logits = np.array([2.0, 1.5, -1.0])
    greedy = SamplingConfig(temperature=0)
    assert next_token_probabilities(logits, greedy).tolist() == [1, 0, 0]
    sampling = SamplingConfig(repetition_penalty=2.0, temperature=1.0, top_p=1.0)
    assert adjust_logits(logits, sampling, [0, 0]).tolist() == [1, 1.5, -1]
    assert adjust_logits(logits, sampling, [2]).tolist() == [2, 1.5, -2]
    often = SamplingConfig(frequency_penalty=0.5, presence_penalty=0.25)
    adjusted = adjust_logits(logits, often, counts=np.array([2, 0, 1]), logit_bias={1: -100.0})
    assert adjusted.tolist() == [0.75, -98.5, -1.75]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("min_p", 2),
        ("top_k", -3),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name} must"):
        SamplingConfig(**{name: value})  # type: ignore[arg-type]
