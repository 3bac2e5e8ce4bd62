"""The benchmark of generation, and llama2.c's model files for its race."""

import importlib
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mmrec.config import PRESETS, ModelConfig, SamplingConfig
from mmrec.inference.decoder import Decoder, DecoderState
from mmrec.model import parameter_counts
from mmrec.profiling import generate_bench

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def llama2c(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("llama2c")


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("generate_race")


def test_shapes_of_llama2c_have_as_many_parameters(llama2c: ModuleType) -> None:
    for name in ("tiny", "mini", "small"):
        config = PRESETS[name]
        equal, reads = llama2c.EQUAL_PARAMETERS[name], llama2c.EQUAL_READS[name]
        for shape in (equal, reads):
            assert (shape.dim, shape.heads, shape.vocab) == (
                *(config.width, config.heads, config.vocab_size),
            )
            assert shape.hidden % llama2c.GROUP_SIZE == shape.dim % llama2c.GROUP_SIZE == 0
        assert 0.98 < equal.parameters / parameter_counts(config)["total"] <= 1
        read = sum(rows * columns for rows, columns in generate_bench.matrix_sizes(config))
        assert 0.999 < reads.parameters / read <= 1


def read_float32(path: Path) -> dict[str, np.ndarray]:
    """Read a model file by the pointers of run.c's ``memory_map_weights``."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = struct.unpack_from("<7i", data)
    assert kv_heads == heads
    offset, found = 28, {}
    for name, shape in (
        ("embedding", (vocab, dim)),
        ("attention_norm", (layers, dim)),
        ("wq", (layers, dim, dim)),
        ("wk", (layers, dim, dim)),
        ("wv", (layers, dim, dim)),
        ("wo", (layers, dim, dim)),
        ("ffn_norm", (layers, dim)),
        ("w1", (layers, hidden, dim)),
        ("w2", (layers, dim, hidden)),
        ("w3", (layers, hidden, dim)),
        ("final_norm", (dim,)),
    ):
        count = int(np.prod(shape))
        found[name] = np.frombuffer(data, "<f4", count, offset).reshape(shape)
        offset += 4 * count
    assert offset + 4 * seq_len * (dim // heads) == len(data)
    return found


def test_float32_file_of_llama2c(llama2c: ModuleType, tmp_path: Path) -> None:
    shape = llama2c.Shape(64, 2, 2, 128, 300, seq_len=16)
    weights = llama2c.random_weights(shape, 4.0, seed=1)
    assert sum(x.size for x in weights.values()) == shape.parameters
    llama2c.write_float32(tmp_path / "model.bin", shape, weights)
    stored = read_float32(tmp_path / "model.bin")
    assert stored.keys() == weights.keys()
    assert all(np.array_equal(stored[name], weights[name]) for name in weights)


def test_int8_file_of_llama2c(llama2c: ModuleType, tmp_path: Path) -> None:
    """By the pointers of runq.c: the header, the norms, then values and scales of each matrix."""
    shape = llama2c.Shape(64, 2, 2, 128, 300, seq_len=16)
    weights = llama2c.random_weights(shape, 4.0, seed=1)
    llama2c.write_int8(tmp_path / "model.bin", shape, weights)
    data = (tmp_path / "model.bin").read_bytes()
    assert struct.unpack_from("<Ii7iBi", data) == (
        *(0x616B3432, 2),
        *(64, 128, 2, 2, 2, 300, 16),
        *(1, 64),
    )
    offset = 256 + 4 * (2 * 64 + 2 * 64 + 64)
    for name in ("embedding", "wq", "wk", "wv", "wo", "w1", "w2", "w3"):
        for matrix in weights[name].reshape(-1, *weights[name].shape[-2:]):
            values = np.frombuffer(data, np.int8, matrix.size, offset)
            scales = np.frombuffer(data, "<f4", matrix.size // 64, offset + matrix.size)
            offset += matrix.size + 4 * (matrix.size // 64)
            groups = matrix.reshape(-1, 64)
            assert np.array_equal(scales, np.abs(groups).max(1) / np.float32(127))
            error = np.abs(values.reshape(-1, 64) * scales[:, None] - groups)
            assert (error <= 0.5001 * scales[:, None]).all()
    assert offset == len(data)


def test_tokens_of_llama2c_are_their_numbers(llama2c: ModuleType, tmp_path: Path) -> None:
    llama2c.write_tokenizer(tmp_path / "tokenizer.bin", 12)
    data = (tmp_path / "tokenizer.bin").read_bytes()
    assert struct.unpack_from("<i", data) == (3,)  # the longest
    assert struct.unpack_from("<fi", data, 4) == (0.0, 2)
    assert data[12:14] == b" 0"
    assert data.endswith(b" 11")


def test_numpy_network_of_llama2c(llama2c: ModuleType) -> None:
    """It is causal; rounding to int8 changes the logits, but not much."""
    shape = llama2c.Shape(64, 2, 2, 128, 300, seq_len=16)
    weights = llama2c.random_weights(shape, 4.0, seed=1)
    tokens = np.array([1, 7, 200, 9, 13])
    logits = llama2c.forward(shape, weights, tokens, int8=False)
    shorter = llama2c.forward(shape, weights, tokens[:3], int8=False)
    np.testing.assert_allclose(logits[:3], shorter, atol=1e-4)
    assert 3 < logits.std() < 5
    difference = np.abs(llama2c.forward(shape, weights, tokens, int8=True) - logits).max()
    assert 1e-3 < difference < 1


def test_the_bound_reads_the_matrices_that_a_token_meets() -> None:
    config = ModelConfig(64, 4, 2, 100, "nslb", ngram_buckets=50)
    counts = parameter_counts(config)
    met = sum(counts[g] for g in ("embedding", "projections", "recurrent weights", "feed-forward"))
    sizes = generate_bench.matrix_sizes(config)
    assert sum(rows * columns for rows, columns in sizes) == met


def test_products_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal(s).astype(np.float32) for s in ((5, 3), (2, 4)))
    x, y = rng.standard_normal(4).astype(np.float32), np.zeros(5, np.float32)
    weights = np.concatenate((first.ravel(), second.ravel()))
    generate_bench.products(weights, np.array([[5, 3], [2, 4]]), x, y)
    np.testing.assert_allclose(y[:2], second @ x, rtol=1e-5)
    np.testing.assert_allclose(y[2:], (first @ x[:3])[2:], rtol=1e-5)


def test_a_text_goes_on_after_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """All the tokens that were asked for are drawn, also by a model that often ends."""
    subject = generate_bench.random_subject("small", ModelConfig(32, 1, 1, 4, "n", ngram_buckets=8))
    decoder = Decoder.from_model(subject.model, subject.tokenizer, threads=1)
    drawn, ends = [], []
    real = decoder.decode

    def decode(streams: Any, steps: int, **options: Any) -> Any:
        results = real(streams, steps, **options)
        drawn.extend(len(r.tokens) for r in results)
        ends.extend(s.finished == "stop" for s in streams)
        return results

    monkeypatch.setattr(decoder, "decode", decode)
    state: DecoderState = decoder.initial_state()
    sampling = SamplingConfig(temperature=100, top_p=1)
    assert generate_bench.write_tokens(decoder, sampling, 200, state=state) == 200
    assert sum(ends) > 10
    assert sum(drawn) + sum(ends) == state.length == 200


def test_goals_of_the_race(race: ModuleType) -> None:
    """The best of all programs and threads counts, on both sides."""

    def row(group: str, name: str, what: str, weights: str, threads: int, rate: float) -> Any:
        return vars(race.Row(group, name, what, weights, threads, 1, 1, rate, rate, rate, 1, 0.0))

    tiny = "tiny, one stream"
    rows = [
        row(tiny, "mmrec", "greedy", "float32", 1, 900.0),
        row(tiny, "mmrec", "greedy", "float32", 2, 800.0),
        row(tiny, "mmrec", "greedy", "int8", 1, 990.0),
        row(tiny, "run", "greedy", "float32", 1, 300.0),
        row(tiny, "run-openmp", "greedy", "float32", 2, 500.0),
        row(tiny, "runq-openmp", "greedy", "int8", 2, 5000.0),
        row(tiny, race.BOUND, "", "float32", 1, 1000.0),
    ]
    process = {"seconds": 0.5, "resident_bytes": 3e8}
    found = {
        what: (figure, ok)
        for what, _, figure, ok in race.goals({"rows": rows, "whole_process": process})
    }
    assert found["tiny, float32, greedy, against run"] == (pytest.approx(1.8), True)
    assert found["tiny, float32, greedy, one thread, against its products"] == (0.9, True)
    assert found["tiny, bfloat16 or int8 against float32"] == (pytest.approx(1.1), True)
    assert found["mmrec generate --max-tokens 1, whole process"] == (0.5, True)
    assert found["the same, resident"] == (300.0, False)
    assert len(found) == 5  # what was not measured is left out
