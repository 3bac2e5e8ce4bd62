"""Generation: determinism, stop texts, and the prompt read in parallel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.config import SamplingConfig
from mmrec.data.corpus import Corpus
from mmrec.data.tokenizer import KINDS, Tokenizer, train_tokenizer
from mmrec.errors import InputError
from mmrec.inference.generate import generate, stop_at
from mmrec.model import Model
from tests.conftest import SMALL


@pytest.fixture
def model() -> Model:
    model = Model(SMALL).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return model


def text_of(model: Model, corpus: Corpus, prompt: str = "def ", **settings: object) -> str:
    return "".join(generate(model, corpus.tokenizer, prompt, max_tokens=40, **settings))  # type: ignore[arg-type]


def test_same_seed_same_text(model: Model, corpus: Corpus) -> None:
    assert text_of(model, corpus, seed=3) == text_of(model, corpus, seed=3)
    assert text_of(model, corpus, seed=3) != text_of(model, corpus, seed=4)
    assert text_of(model, corpus) != text_of(model, corpus)
    greedy = text_of(model, corpus, seed=1, sampling=SamplingConfig(temperature=0))
    assert greedy == text_of(model, corpus, seed=2, sampling=SamplingConfig(top_k=1))


def test_reading_the_prompt_in_chunks_changes_nothing(model: Model, corpus: Corpus) -> None:
    prompt = "def decode(self, s):\n    return 1\n"
    want = text_of(model, corpus, prompt, seed=5)
    assert text_of(model, corpus, prompt, seed=5, prompt_chunk=7) == want


def test_an_empty_prompt_starts_a_document(model: Model, corpus: Corpus) -> None:
    assert text_of(model, corpus, "", seed=5)


@given(
    st.lists(st.text("ab.", max_size=4), max_size=8), st.sampled_from([["b."], ["aa", "ab."], []])
)
def test_stop_texts(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    ends = [text.find(s) for s in stop if s in text]
    assert "".join(stop_at(iter(pieces), stop)) == text[: min(ends, default=len(text))]


def test_text_comes_as_soon_as_it_cannot_be_a_stop_text() -> None:
    assert list(stop_at(iter(["one", " t", "wo", "!"]), ["two"])) == ["one", " "]
    assert list(stop_at(iter(["a", "b", "c"]), ["bd"])) == ["a", "bc"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be >= 0; got -1"),
        ({"max_tokens": True}, "max_tokens must be of type int; got True"),
        ({"stop": [""]}, "a stop text must not be empty"),
        ({"stop": "end"}, "stop must be a list of texts; got 'end'"),
        ({"stop": None}, "stop must be a list of texts; got None"),
        ({"stop": [1]}, "stop must be a list of texts; got \\[1\\]"),
        ({"stop": ["a\udcff"]}, "stop must be of characters; '.udcff' at position 1 is half of a"),
        ({"prompt": "ab\ud800"}, "prompt must be of characters; '.ud800' at position 2 is half"),
        ({"prompt": b"def"}, "prompt must be of type str; got b'def'"),
        ({"seed": -1}, "seed must be .*; got -1"),
    ],
)
@pytest.mark.parametrize("tokenizer", [train_tokenizer(k, ["abc"], 257) for k in KINDS])
def test_a_wrong_argument_is_refused_by_the_call(
    model: Model, tokenizer: Tokenizer, settings: dict[str, object], message: str
) -> None:
    """The iterator is not asked for a piece."""
    with pytest.raises(InputError, match=message):
        generate(model, tokenizer, **({"prompt": ""} | settings))  # type: ignore[arg-type]


def test_logits_that_are_not_finite_are_an_error(model: Model, corpus: Corpus) -> None:
    model.embedding.data[:] = float("nan")
    with pytest.raises(InputError, match="logits of the model must be finite"):
        text_of(model, corpus, seed=1)
