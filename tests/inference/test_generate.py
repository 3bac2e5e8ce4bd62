"""Generation with a torch model: determinism, streams, lists of prompts, weights that change."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.data.corpus import Corpus
from mmrec.data.tokenizer import KINDS, Tokenizer, train_tokenizer
from mmrec.errors import InputError
from mmrec.inference.decoder import Decoder
from mmrec.inference.engine import Request
from mmrec.inference.generate import generate
from mmrec.model import Model
from tests.conftest import SMALL


@pytest.fixture
def loaded(corpus: Corpus) -> LoadedModel:
    model = Model(SMALL).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return LoadedModel(Path("model.h5"), model, corpus.tokenizer, 0, {})


def text_of(loaded: LoadedModel, prompt: str = "def ", **settings: Any) -> str:
    text = loaded.generate(prompt, max_tokens=40, **settings)
    assert isinstance(text, str)
    return text


def test_same_seed_same_text(loaded: LoadedModel) -> None:
    assert text_of(loaded, seed=3) == text_of(loaded, seed=3)
    assert text_of(loaded, seed=3) != text_of(loaded, seed=4)
    assert text_of(loaded) != text_of(loaded)
    greedy = text_of(loaded, seed=1, temperature=0)
    assert greedy == text_of(loaded, seed=2, top_k=1)


def test_greedy_text_is_that_of_the_torch_model(loaded: LoadedModel) -> None:
    """The most likely token at each place, of all logits computed at once."""
    tokenizer = loaded.tokenizer
    ids = [tokenizer.eot, *tokenizer.encode("def ").tolist()]
    with torch.inference_mode():
        for _ in range(30):
            ids.append(int(loaded.model(torch.tensor([ids]))[0][0, -1].argmax()))
    text = loaded.generate("def ", max_tokens=30, temperature=0)
    assert text == tokenizer.decode(ids[5:])


def test_an_empty_prompt_starts_a_document(loaded: LoadedModel) -> None:
    assert text_of(loaded, "", seed=5)


def test_a_list_of_prompts(loaded: LoadedModel) -> None:
    """Each text is the one that its seed gives alone."""
    prompts = ["def ", "import", "def "]
    alone = [text_of(loaded, prompt, seed=7 + i) for i, prompt in enumerate(prompts)]
    assert loaded.generate(prompts, max_tokens=40, seed=7) == alone
    assert alone[0] != alone[2]
    assert loaded.generate([], seed=7) == []
    last = (1 << 63) - 1
    whole = loaded.generate(["a", "a"], max_tokens=9, seed=last)
    assert whole == [loaded.generate("a", max_tokens=9, seed=seed) for seed in (last, 0)]
    with pytest.raises(InputError, match="the prompt, line 1, character 1: .*'b'"):
        LoadedModel(Path(), loaded.model, train_tokenizer("char", ["a"]), 0, {}).generate(
            ["a", "b"]
        )


def test_weights_that_change_change_the_text(loaded: LoadedModel) -> None:
    p = loaded.model.embedding
    changes: list[Callable[[], object]] = [
        lambda: torch.no_grad()(p.neg_)(),
        lambda: p.data.mul_(3),
        lambda: p.detach().numpy().__imul__(-3),
    ]
    for change in changes:
        decoder, text = loaded.decoder, text_of(loaded, seed=3)
        assert loaded.decoder is decoder
        change()
        assert loaded.decoder is not decoder
        assert text_of(loaded, seed=3) != text


def test_a_bias_by_token(loaded: LoadedModel) -> None:
    assert loaded.generate("a", max_tokens=3, logit_bias={ord("x"): 100}) == "xxx"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be >= 0; got -1"),
        ({"stop": [""]}, "a stop text must not be empty"),
        ({"prompt": "ab\ud800"}, "prompt must be of characters; '.ud800' at position 2 is half"),
        ({"prompt": b"def"}, "prompt must be a text or a list of texts; got b'def'"),
        ({"prompt": ["a", 3]}, "prompt must be a text or a list of texts; got \\['a', 3\\]"),
        ({"prompt": ["a"], "stream": True}, "stream needs one prompt, not a list"),
        ({"seed": -1}, "seed must be .*; got -1"),
        ({"seed": "a"}, "seed must be .*; got 'a'"),
        ({"logit_bias": {-1: 3}}, "token ids of logit_bias must lie in 0 to 256; got -1"),
    ],
)
@pytest.mark.parametrize("tokenizer", [train_tokenizer(k, ["abc"], 257) for k in KINDS])
def test_a_wrong_argument_is_refused_by_the_call(
    loaded: LoadedModel, tokenizer: Tokenizer, settings: dict[str, object], message: str
) -> None:
    """The iterator is not asked for a piece."""
    model = LoadedModel(loaded.path, loaded.model, tokenizer, 0, {})
    with pytest.raises(InputError, match=message):
        model.generate(**({"prompt": "", "stream": True} | settings))  # type: ignore[arg-type]


def test_logits_that_are_not_finite_are_an_error(loaded: LoadedModel) -> None:
    loaded.model.embedding.data[:] = float("nan")
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(InputError, match="logits of the model must be finite"),
    ):
        text_of(loaded, seed=1)


def test_pieces_come_while_the_text_is_generated(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    decode = Decoder.decode

    def counting(*arguments: Any, **options: Any) -> Any:
        results = decode(*arguments, **options)
        drawn.append(len(results[0].tokens))
        return results

    monkeypatch.setattr(Decoder, "decode", counting)
    request = Request("a", max_tokens=300, seed=1)
    pieces = generate(loaded.decoder, request)
    first = next(pieces)
    assert sum(drawn) < 300
    assert first + "".join(pieces) == loaded.generate("a", max_tokens=300, seed=1)
    assert list(generate(loaded.decoder, replace(request, max_tokens=0))) == []
