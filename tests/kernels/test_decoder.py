"""The decoder: against its reference in float64 and the torch model, and its laws bit for bit."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mmrec.config import ModelConfig, SamplingConfig, parameter_shapes
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.inference.decoder import Decoder, DecoderState, Stream
from mmrec.kernels.decoder.layout import quantize
from mmrec.kernels.decoder.reference import hidden_step, split_parameters, split_state
from mmrec.kernels.sampling.reference import (
    adjust_logits,
    draw,
    log_softmax,
    next_token_probabilities,
    uniform,
)
from mmrec.model import Model

BYTES = Tokenizer("byte", "")
SHAPES = {
    "tiny": ModelConfig(32, 4, 4, 257, "nnnl", ngram_buckets=64, max_ngram=4),
    "all": ModelConfig(40, 4, 2, 257, "sbln", recurrent_blocks=2, conv_width=1, ngram_buckets=9),
    "both": ModelConfig(24, 2, 3, 257, "b", conv_width=3),
    "odd": ModelConfig(7, 3, 7, 257, "snl", conv_width=2, ffn_multiplier=1.5, ngram_buckets=1),
}


def make_parameters(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: (rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1))
        .astype(np.float32)
        .copy()
        for name, shape in parameter_shapes(config).items()
    }


def make_decoder(name: str, *, weights: str = "float32", threads: int | None = 1) -> Decoder:
    config = SHAPES[name]
    return Decoder(config, make_parameters(config), BYTES, weights=weights, threads=threads)


def dequantized(values: np.ndarray, weights: str) -> np.ndarray:
    stored, scales = quantize(values, weights)
    if weights == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored * scales[:, None].astype(np.float64) if scales.size else stored.astype(np.float64)


def reference_logits(config: ModelConfig, weights: str, tokens: list[int]) -> Iterator[np.ndarray]:
    """The logits in float64 after each token, with the weights as they are stored."""
    parameters = make_parameters(config)
    is_matrix = ("embedding", "ngram_embedding", "in_proj.weight", "out_proj.weight")
    for name, values in parameters.items():
        if name.endswith((*is_matrix, "up_proj.weight", "down_proj.weight")):
            parameters[name] = dequantized(values, weights)
        elif name.endswith("recurrent_weight"):
            parts = [dequantized(np.ascontiguousarray(v.T), weights).T for v in values]
            parameters[name] = np.stack(parts)
        else:
            parameters[name] = values.astype(np.float64)
    size = make_decoder_state_size(config)
    states, context = split_state(config, np.zeros(size)), [0] * 5
    layers = split_parameters(config, parameters)
    for token in tokens:
        context = [*context[1:], token]
        hidden = hidden_step(config, parameters, layers, states, context)
        yield parameters["embedding"] @ hidden


def make_decoder_state_size(config: ModelConfig) -> int:
    from mmrec.config import state_layout

    return state_layout(config)[-1][-1][2]


def random_tokens(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", SHAPES)
def test_scores_are_those_of_the_reference(name: str, weights: str) -> None:
    decoder, tokens = make_decoder(name, weights=weights), random_tokens(70)
    scores = decoder.score(decoder.initial_state(), tokens, top=3)
    logits = reference_logits(SHAPES[name], weights, [256, *tokens[:-1].tolist()])
    expected = [log_softmax(x) for x in logits]
    np.testing.assert_allclose(
        scores.logprobs, [x[t] for x, t in zip(expected, tokens, strict=True)], atol=2e-5
    )
    best = np.array([np.sort(x)[::-1][:3] for x in expected])
    np.testing.assert_allclose(scores.top_logprobs, best, atol=2e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_the_torch_model(name: str) -> None:
    torch.manual_seed(0)
    model = Model(SHAPES[name]).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    decoder, tokens = Decoder.from_model(model, BYTES), random_tokens(300)
    state = decoder.initial_state()
    decoder.read(state, tokens)
    with torch.no_grad():
        logits, _ = model(torch.tensor([[256, *tokens]]))
    np.testing.assert_allclose(decoder.next_token_logits(state), logits[0, -1], atol=1e-4)


def equal_states(a: DecoderState, b: DecoderState) -> bool:
    return bool(
        (a.values == b.values).all() and (a.recent == b.recent).all() and a.length == b.length
    )


@pytest.mark.parametrize("name", SHAPES)
def test_cuts_and_threads_change_no_bit(name: str) -> None:
    tokens = random_tokens(150)
    alone = make_decoder(name)
    one = alone.initial_state()
    for token in tokens:
        alone.read(one, [token])
    for threads in (None, 1, 2, 3):
        decoder = make_decoder(name, threads=threads)
        state, cut = decoder.initial_state(), decoder.initial_state()
        decoder.read(state, tokens)
        for part in np.split(tokens, [1, 3, 4, 60, 149]):
            decoder.read(cut, part)
        assert equal_states(state, one)
        assert equal_states(cut, one)
        scored = decoder.initial_state()
        whole = decoder.score(scored, tokens)
        assert equal_states(scored, one)
        parts = decoder.initial_state()
        logprobs = [decoder.score(parts, t).logprobs for t in np.split(tokens, [1, 50, 51])]
        np.testing.assert_array_equal(np.concatenate(logprobs), whole.logprobs)


SAMPLINGS = (
    SamplingConfig(temperature=0),
    SamplingConfig(temperature=1.2, top_p=0.9, repetition_penalty=1.2),
    SamplingConfig(temperature=0.7, top_k=20, frequency_penalty=0.5),
    SamplingConfig(temperature=1, top_p=1, min_p=0.05, presence_penalty=1.0),
    SamplingConfig(temperature=1, top_p=1),
)


def make_streams(decoder: Decoder) -> list[Stream]:
    streams = []
    for i, sampling in enumerate(SAMPLINGS):
        state = decoder.initial_state()
        decoder.read(state, random_tokens(4 * i, seed=i))
        streams.append(Stream(state, sampling, 100 + i, 10 + 7 * i, {i: 3.0, 256: -2.0}))
    return streams


@pytest.mark.parametrize("name", ["tiny", "all"])
@pytest.mark.parametrize("threads", [1, 2])
def test_streams_do_not_depend_on_each_other(name: str, threads: int) -> None:
    decoder = make_decoder(name, threads=threads)
    alone, together = make_streams(decoder), make_streams(decoder)
    expected = [decoder.decode([stream], 50, top=2)[0] for stream in alone]
    parts = [decoder.decode(together, steps, top=2) for steps in (1, 2, 5, 40, 3)]
    for i, stream in enumerate(together):
        for field, values in zip(expected[i]._fields, expected[i], strict=True):
            pieces = [getattr(part[i], field) for part in parts]
            np.testing.assert_array_equal(np.concatenate(pieces), values)
        assert stream.finished == alone[i].finished in ("length", "stop")
        assert equal_states(stream.state, alone[i].state)
        again = decoder.initial_state()
        decoder.read(again, random_tokens(4 * i, seed=i))
        decoder.read(again, expected[i].tokens)
        assert equal_states(again, stream.state)


def test_text_is_that_of_the_reference() -> None:
    decoder = make_decoder("tiny")
    for stream in make_streams(decoder):
        tokens = [256, *(int(t) for t in stream.state.recent if 0 <= t < 256)]
        sampling, seed, bias, limit = stream.sampling, stream.seed, stream.logit_bias, stream.limit
        got = decoder.decode([stream], limit)[0].tokens
        counts = np.zeros(257, np.int32)
        steps = reference_logits(SHAPES["tiny"], "float32", tokens)  # sees what is appended, too
        for _ in tokens[:-1]:
            next(steps)
        for i in range(limit):
            adjusted = adjust_logits(next(steps), sampling, tokens, counts, bias)
            token = draw(next_token_probabilities(adjusted, sampling), uniform(seed, i))
            if token == 256:
                break
            counts[token] += 1
            tokens.append(token)
        assert got.tolist() == tokens[len(tokens) - len(got) :]
        assert stream.drawn == len(got) == i + (token != 256)


def test_end_token_leaves_the_state_before_it() -> None:
    decoder = make_decoder("tiny")
    stream = Stream(decoder.initial_state(), SamplingConfig(), 1, 100, {256: 100.0})
    (decoded,) = decoder.decode([stream], 10)
    assert stream.finished == "stop"
    assert len(decoded.tokens) == 0
    assert equal_states(stream.state, decoder.initial_state())
    assert decoder.decode([stream], 10)[0].tokens.size == 0


def test_bad_arguments() -> None:
    decoder = make_decoder("tiny")
    state = decoder.initial_state()
    with pytest.raises(InputError, match="token ids must lie in 0 to 256; got 257"):
        decoder.read(state, [1, 257])
    with pytest.raises(InputError, match="tokens must be a list of token ids"):
        decoder.read(state, [0.5])  # type: ignore[list-item]
    with pytest.raises(InputError, match="most likely tokens must lie in 0 to 257"):
        decoder.score(state, [1], top=258)
    with pytest.raises(InputError, match="weights must be one of float32, bfloat16, int8; got 'f'"):
        make_decoder("tiny", weights="f")
    with pytest.raises(InputError, match="threads must be >= 1; got 0"):
        make_decoder("tiny", threads=0)
    assert equal_states(state, decoder.initial_state())


def test_logits_that_are_not_finite() -> None:
    config = SHAPES["both"]
    parameters = make_parameters(config)
    parameters["norm.weight"][0] = np.nan
    decoder = Decoder(config, parameters, BYTES)
    stream = Stream(decoder.initial_state(), SamplingConfig(), 1, 5)
    with pytest.raises(InputError, match="the logits of the model must be finite"):
        decoder.decode([stream], 5)


def test_fingerprint_tells_models_apart() -> None:
    config = SHAPES["both"]
    parameters = make_parameters(config)
    one = Decoder(config, dict(parameters), BYTES)
    same = Decoder(config, dict(reversed(parameters.items())), BYTES, weights="int8")
    assert one.fingerprint == same.fingerprint
    parameters["norm.weight"] = parameters["norm.weight"] + 1
    assert Decoder(config, parameters, BYTES).fingerprint != one.fingerprint
