"""Reference of the decoder: the model of ``mmrec.model``, one token after another, in NumPy."""

from collections.abc import Mapping, Sequence

import numpy as np

from mmrec.config import NGRAM_HASH, ModelConfig, state_layout

EPSILON = 1e-6  # added to mean squares and to |k|² and |q|²


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def rms_norm(x: np.ndarray) -> np.ndarray:
    """x divided by its root mean square over the last axis."""
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPSILON)


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


def hidden_step(
    config: ModelConfig,
    parameters: Mapping[str, np.ndarray],
    values: np.ndarray,
    tokens: Sequence[int],
) -> np.ndarray:
    """Read one token.

    Args:
        config: the shape of the model.
        parameters: weights by the names that ``mmrec.model.Model`` gives them, of one dtype.
        values: (state_size,) of that dtype, the recurrent state; changed in place.
        tokens: the last max_ngram tokens of the text, the newest, which is read, last; 0 stands
            before the text.

    Returns:
        (D,), the hidden state after the final norm.
    """
    width, heads = config.width, config.heads
    x = parameters["embedding"][tokens[-1]].copy()
    for row in ngram_rows(config, tokens):
        x += parameters["ngram_embedding"][row]
    for i, layer_type in enumerate(config.resolved_layer_types):
        p = {
            name.removeprefix(f"layers.{i}."): value
            for name, value in parameters.items()
            if name.startswith(f"layers.{i}.")
        }
        state = {
            name: values[begin:end].reshape(shape)
            for name, begin, end, shape in state_layout(config)[i]
        }
        normalised = np.concatenate((state["conv_state"], rms_norm(x)[None]))
        state["conv_state"][:] = normalised[1:]
        projected = p["in_proj.weight"] @ (normalised * p["conv_weight"]).sum(0)
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
        x += p["out_proj.weight"] @ (y * output_gate * sigmoid(output_gate))
        up = p["up_proj.weight"] @ (rms_norm(x) * p["ffn_norm.weight"])
        x += p["down_proj.weight"] @ np.maximum(up, 0) ** 2
    return rms_norm(x) * parameters["norm.weight"]
