"""The decoder in NumPy writes what the compiled one writes; and which of them is chosen."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmrec.checkpoint.checkpoint import save_checkpoint
from mmrec.config import SamplingConfig
from mmrec.errors import InputError
from mmrec.inference import decoder_choice
from mmrec.inference.decoder import Decoder, Stream
from mmrec.inference.engine import Request, complete
from mmrec.inference.numpy_decoder import NumpyDecoder
from mmrec.kernels._cache_folder import CACHE_FOLDER
from mmrec.model import Model
from tests.conftest import SMALL
from tests.kernels.test_decoder import BYTES, SHAPES, make_decoder, make_parameters

SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0),
    SamplingConfig(temperature=1.2, top_p=0.9, repetition_penalty=1.2),
    SamplingConfig(temperature=0.7, top_k=20, frequency_penalty=0.5),
    SamplingConfig(temperature=1, top_p=1, min_p=0.05, presence_penalty=1.0),
    SamplingConfig(temperature=1, top_p=0.5, top_k=7, min_p=0.1, frequency_penalty=-0.5),
]


def make_numpy_decoder(name: str) -> NumpyDecoder:
    return NumpyDecoder(SHAPES[name], make_parameters(SHAPES[name]), BYTES)


@pytest.mark.parametrize("name", SHAPES)
def test_both_decoders_write_the_same_text(name: str) -> None:
    requests = [
        Request(
            prompt,
            sampling,
            max_tokens=25,
            seed=seed,
            logit_bias={65: 3.0, 66: -100.0} if seed % 2 else {},
            logprobs=2,
            stop=["A"] if seed % 3 == 0 else (),
            stop_token=70 if seed % 5 == 0 else None,
        )
        for sampling in SAMPLINGS
        for seed, prompt in enumerate(["", "It was", "é 1, 2, 3 " * 12, "\n"])
    ]
    compiled, plain = make_decoder(name), make_numpy_decoder(name)
    reasons = set()
    for a, b in zip(complete(compiled, requests), complete(plain, requests), strict=True):
        assert (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.top_logprobs is not None
        assert b.top_logprobs is not None
        np.testing.assert_allclose(a.top_logprobs, b.top_logprobs, atol=1e-4)
        assert a.state is not None
        assert b.state is not None
        np.testing.assert_allclose(a.state.values, b.state.values, atol=1e-4)
        np.testing.assert_array_equal(a.state.recent, b.state.recent)
        assert a.state.length == b.state.length
        reasons.add(a.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("name", SHAPES)
def test_both_decoders_score_the_same(name: str) -> None:
    compiled, plain = make_decoder(name), make_numpy_decoder(name)
    assert plain.fingerprint == compiled.fingerprint
    a, b = compiled.initial_state(), plain.initial_state()
    tokens = np.random.default_rng(1).integers(0, 256, 80)
    for expected, found in zip(
        compiled.score(a, tokens, top=3), plain.score(b, tokens, top=3), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    logits = compiled.next_token_logits(a)
    np.testing.assert_allclose(plain.next_token_logits(b), logits, atol=1e-4)


@pytest.mark.parametrize(("scale", "temperature"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, 1e-39)])
def test_logits_that_are_not_finite_are_an_error(scale: float, temperature: float) -> None:
    parameters = make_parameters(SHAPES["tiny"])
    parameters["norm.weight"] *= np.float32(scale)
    decoder = NumpyDecoder(SHAPES["tiny"], parameters, BYTES)
    sampling = SamplingConfig(temperature=temperature)
    stream = Stream(decoder.initial_state(), sampling, seed=0, limit=5)
    with pytest.raises(InputError, match="must be finite"):
        decoder.decode([stream], 5)
    assert (stream.drawn, stream.state.length) == (0, 0)


def test_weights_are_float32() -> None:
    with pytest.raises(InputError, match="float32; got int8"):
        NumpyDecoder(SHAPES["tiny"], make_parameters(SHAPES["tiny"]), BYTES, weights="int8")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model."""
    path = tmp_path_factory.mktemp("model") / "model.h5"
    save_checkpoint(path, Model(replace(SMALL, vocab_size=BYTES.vocab_size)), BYTES, 1, {})
    return path


def test_large_work_is_for_the_kernel(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_choice, "kernel_is_ready", lambda: False)
    assert type(decoder_choice.load_decoder(path, decoder_choice.MOST_TOKENS)) is NumpyDecoder
    assert type(decoder_choice.load_decoder(path, decoder_choice.MOST_TOKENS + 1)) is Decoder
    monkeypatch.setattr(decoder_choice, "MOST_WEIGHTS", 20_000)
    assert type(decoder_choice.load_decoder(path, 1)) is Decoder
    monkeypatch.undo()
    decoder_choice.call_kernel()  # loads it
    assert decoder_choice.kernel_is_ready()
    assert type(decoder_choice.load_decoder(path, 1)) is Decoder


CHOOSE = """
import sys
from pathlib import Path
from mmrec.inference.decoder_choice import load_decoder
print(type(load_decoder(Path(sys.argv[1]), 1)).__name__, "numba" in sys.modules)
"""


@pytest.mark.parametrize("folder", ["kept", "other"])
def test_a_kernel_that_is_kept_is_used(path: Path, folder: str, tmp_path: Path) -> None:
    """By a process that has not loaded it; and kernels of another version do not count."""
    decoder_choice.call_kernel()  # compiles it if it is not kept yet
    assert CACHE_FOLDER is not None
    environment = {"NUMBA_CACHE_DIR": str(CACHE_FOLDER)}
    if folder == "other":
        (tmp_path / "mmrec-0").mkdir()
        (tmp_path / "mmrec-0" / "kernel.run-1.py311.nbi").write_bytes(b"")
        environment["NUMBA_CACHE_DIR"] = str(tmp_path)
    words = [sys.executable, "-c", CHOOSE, str(path)]
    run = subprocess.run(
        words, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["Decoder" if folder == "kept" else "NumpyDecoder", "True"]
