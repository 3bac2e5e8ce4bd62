"""Reference of the decoder: the model of ``mmrec.model``, one token after another, in NumPy."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from mmrec.config import NGRAM_HASH, ModelConfig, state_layout

EPSILON = 1e-6  # added to mean squares and to |k|² and |q|²
UNSHARED = 8192
"""Elements of a matrix whose product OpenBLAS leaves to one thread; it shares those from 9,216."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def rms_norm(x: np.ndarray) -> np.ndarray:
    """x (D,) divided by its root mean square."""
    return x / np.sqrt(x @ x / x.size + EPSILON)


def product(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """matrix @ x, in parts that BLAS does not share among threads.

    Such products are over before another thread is awake, and wait for it on a busy machine.
    """
    rows, depth = matrix.shape
    return (matrix.reshape(-1, _rows_of_part(rows, depth), depth) @ x).reshape(rows)


@functools.cache
def _rows_of_part(rows: int, depth: int) -> int:
    """The largest divisor of ``rows`` whose part of a matrix has at most UNSHARED elements."""
    return next(n for n in range(max(1, min(rows, UNSHARED // depth)), 0, -1) if rows % n == 0)


def ngram_rows(config: ModelConfig, tokens: Sequence[int]) -> list[int]:
    """Rows of the n-gram embedding of the n-grams, n = 2 … max_ngram, that end at the last token.

    Args:
        config: the shape of the model.
        tokens: at least max_ngram tokens; 0 stands before the text.
    """
    if not config.ngram_buckets:
        return []
    key, rows = int(tokens[-1]), []
    for n in range(2, config.max_ngram + 1):
        multiplier, mixer = NGRAM_HASH[n - 2]
        key = int(tokens[-n]) * multiplier + key
        # 64-bit arithmetic that wraps, as torch's int64
        mixed = (key * mixer + (1 << 63)) % (1 << 64) - (1 << 63)
        rows.append((mixed >> 7 ^ mixed) % config.ngram_buckets)
    return rows


Layers = list[dict[str, np.ndarray]]
"""Arrays of each layer, by their names in it."""


def split_parameters(config: ModelConfig, parameters: Mapping[str, np.ndarray]) -> Layers:
    """The parameters of each layer, as views."""
    layers: Layers = [{} for _ in range(config.depth)]
    for name, values in parameters.items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            layers[int(number)][rest] = values
    return layers


def split_state(config: ModelConfig, values: np.ndarray) -> Layers:
    """The recurrent state of each layer, as views of all of it, (state_size,)."""
    return [
        {name: values[begin:end].reshape(shape) for name, begin, end, shape in layer}
        for layer in state_layout(config)
    ]


def hidden_step(
    config: ModelConfig,
    parameters: Mapping[str, np.ndarray],
    layers: Layers,
    states: Layers,
    tokens: Sequence[int],
) -> np.ndarray:
    """Read one token.

    Args:
        config: the shape of the model.
        parameters: weights by the names that ``mmrec.model.Model`` gives them, of one dtype.
        layers: those of each layer.
        states: the recurrent state of each layer, of that dtype; changed in place.
        tokens: the last max_ngram tokens of the text, the newest, which is read, last; 0 stands
            before the text.

    Returns:
        (D,), the hidden state after the final norm.
    """
    width, heads = config.width, config.heads
    x = parameters["embedding"][tokens[-1]].copy()
    for row in ngram_rows(config, tokens):
        x += parameters["ngram_embedding"][row]
    for layer_type, p, state in zip(config.resolved_layer_types, layers, states, strict=True):
        normalised = np.concatenate((state["conv_state"], rms_norm(x)[None]))
        state["conv_state"][:] = normalised[1:]
        projected = product(p["in_proj.weight"], (normalised * p["conv_weight"]).sum(0))
        output_gate, y = projected[-width:], np.zeros_like(x)
        if layer_type in "sbn":
            candidate, forget, gate = projected[: 3 * width].reshape(3, width)
            h = state["hidden_state"]
            if "recurrent_weight" in p:
                blocks = h.reshape(len(p["recurrent_weight"]), 1, -1)
                gate = gate + (blocks @ p["recurrent_weight"]).reshape(width)
            gamma = sigmoid(forget + p["forget_bias"])
            h[:] = (1 - gamma) * candidate * sigmoid(gate) + gamma * h
            y += rms_norm(h) * p.get("recurrence_norm.weight", 1)
        if layer_type in "lb":
            begin = 3 * width * (layer_type == "b")
            q, k, v = projected[begin : begin + 3 * width].reshape(3, heads, -1)
            decay, beta = projected[begin + 3 * width :][: 2 * heads].reshape(2, heads)
            q, k = (z / np.sqrt((z * z).sum(-1, keepdims=True) + EPSILON) for z in (q, k))
            s = state["delta_state"]
            s *= sigmoid(decay + p["delta_decay_bias"])[:, None, None]
            error = sigmoid(beta)[:, None] * (v - np.einsum("hij,hi->hj", s, k))
            s += k[:, :, None] * error[:, None, :]
            o = np.einsum("hij,hi->hj", s, q).reshape(width)
            y += rms_norm(o) * p["delta_norm.weight"]
        x += product(p["out_proj.weight"], y * output_gate * sigmoid(output_gate))
        up = product(p["up_proj.weight"], rms_norm(x) * p["ffn_norm.weight"])
        x += product(p["down_proj.weight"], np.maximum(up, 0) ** 2)
    return rms_norm(x) * parameters["norm.weight"]
