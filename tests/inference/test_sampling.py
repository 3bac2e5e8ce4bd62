"""Sampling: filters against brute force, the penalty, and settings out of range."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.config import SamplingConfig
from mmrec.errors import InputError
from mmrec.inference.sampling import next_token_probabilities


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
    st.integers(0, 12),
)
def test_filters_equal_brute_force(
    values: list[float], top_p: float, min_p: float, top_k: int
) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    p = torch.softmax(logits / 0.7, 0)
    ranked = sorted(range(len(values)), key=lambda i: (-p[i].item(), i))
    if top_k:
        ranked = ranked[:top_k]
    mass = sum(p[i].item() for i in ranked)
    kept, total = [], 0.0
    for i in ranked:
        if total >= top_p - 1e-12 and total > 0:
            break
        kept.append(i)
        total += p[i].item() / mass
    kept = [i for i in kept if p[i] >= min_p * p[ranked[0]] * (1 - 1e-12)]
    got = next_token_probabilities(logits, SamplingConfig(1.0, 0.7, top_k, top_p, min_p))
    assert got.sum().item() == pytest.approx(1)
    want = torch.zeros_like(p)
    want[kept] = p[kept] / p[kept].sum()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_penalty_and_temperature_zero() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0])
    greedy = SamplingConfig(temperature=0)
    assert next_token_probabilities(logits, greedy).tolist() == [1, 0, 0]
    assert next_token_probabilities(logits, SamplingConfig(2.0, 0), [0, 0]).tolist() == [0, 1, 0]
    penalised = next_token_probabilities(logits, SamplingConfig(2.0, 1.0, top_p=1.0), [2])
    assert penalised[2] < torch.softmax(logits.double(), 0)[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("min_p", 2),
        ("top_k", -3),
        ("repetition_penalty", 0),
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name} must"):
        SamplingConfig(**{name: value})  # type: ignore[arg-type]
