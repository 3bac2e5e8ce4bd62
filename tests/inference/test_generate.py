"""Generation: filters against brute force, determinism, stop texts, reading in parallel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.data.corpus import Corpus
from mmrec.errors import InputError
from mmrec.inference import generate as module
from mmrec.inference.generate import Sampling, generate, probabilities, until
from mmrec.model import Model
from mmrec.training.trainer import Trainer


@pytest.fixture
def model(trainer: Trainer) -> Model:
    for p in trainer.model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return trainer.model.eval()


def run(model: Model, corpus: Corpus, prompt: str = "def ", **settings: object) -> str:
    return "".join(generate(model, corpus.tokenizer, prompt, max_tokens=40, **settings))  # type: ignore[arg-type]


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
    st.integers(0, 12),
)
def test_filters_against_brute_force(
    values: list[float], top_p: float, min_p: float, k: int
) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    p = torch.softmax(logits / 0.7, 0)
    ranked = sorted(range(len(values)), key=lambda i: (-p[i].item(), i))
    if k:
        ranked = ranked[:k]
    mass = sum(p[i].item() for i in ranked)
    kept, total = [], 0.0
    for i in ranked:
        if total >= top_p - 1e-12 and total > 0:
            break
        kept.append(i)
        total += p[i].item() / mass
    kept = [i for i in kept if p[i] >= min_p * p[ranked[0]] * (1 - 1e-12)]
    got = probabilities(logits, Sampling(1.0, 0.7, k, top_p, min_p))
    assert got.sum().item() == pytest.approx(1)
    want = torch.zeros_like(p)
    want[kept] = p[kept] / p[kept].sum()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_penalty_and_temperature_zero() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0])
    assert probabilities(logits, Sampling(temperature=0)).tolist() == [1, 0, 0]
    assert probabilities(logits, Sampling(2.0, 0), [0, 0]).tolist() == [0, 1, 0]
    low = probabilities(logits, Sampling(2.0, 1.0, top_p=1.0), [2])
    assert low[2] < torch.softmax(logits.double(), 0)[2]


def test_same_seed_same_text(model: Model, corpus: Corpus) -> None:
    assert run(model, corpus, seed=3) == run(model, corpus, seed=3)
    assert run(model, corpus, seed=3) != run(model, corpus, seed=4)
    assert run(model, corpus) != run(model, corpus)
    greedy = run(model, corpus, seed=1, how=Sampling(temperature=0))
    assert greedy == run(model, corpus, seed=2, how=Sampling(top_k=1))


def test_reading_the_prompt_in_chunks_changes_nothing(
    model: Model, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "def decode(self, s):\n    return 1\n"
    whole = run(model, corpus, prompt, seed=5)
    monkeypatch.setattr(module, "PROMPT_CHUNK", 7)
    assert run(model, corpus, prompt, seed=5) == whole
    assert run(model, corpus, "", seed=5)  # an empty prompt starts a document


@given(
    st.lists(st.text("ab.", max_size=4), max_size=8), st.sampled_from([["b."], ["aa", "ab."], []])
)
def test_stop_texts(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    ends = [text.find(s) for s in stop if s in text]
    assert "".join(until(iter(pieces), stop)) == text[: min(ends, default=len(text))]


def test_text_comes_as_soon_as_it_cannot_be_a_stop() -> None:
    assert list(until(iter(["one", " t", "wo", "!"]), ["two"])) == ["one", " "]
    assert list(until(iter(["a", "b", "c"]), ["bd"])) == ["a", "bc"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be finite and >= 0; got -1"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]; got 0"),
        ({"min_p": 2}, "min_p must be in"),
        ({"top_k": -3}, "top_k must be >= 0; got -3"),
        ({"repetition_penalty": 0}, "repetition_penalty must be finite and > 0"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_bad_limits(model: Model, corpus: Corpus) -> None:
    with pytest.raises(InputError, match="max_tokens must be >= 0"):
        list(generate(model, corpus.tokenizer, "", max_tokens=-1))
    with pytest.raises(InputError, match="stop text must not be empty"):
        list(generate(model, corpus.tokenizer, "", stop=[""]))
