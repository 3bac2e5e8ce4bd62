"""Lay out a model for the decoder's kernel, and give the kernel its memory."""

import numpy as np

from mmrec.config import NGRAM_HASH, ModelConfig, state_layout
from mmrec.kernels._panels import BLOCK, PANEL, pad, to_panels
from mmrec.kernels.decoder.kernel import LAYER_FIELDS, Private, Scratch, Weights
from mmrec.kernels.sampling.kernel import SampleScratch

ALIGNMENT = 64
"""Bytes of a cache line, on which large arrays begin."""


def aligned_empty(size: int, dtype: np.dtype) -> np.ndarray:
    """An array (size,) that begins on a cache line."""
    memory = np.empty(size * dtype.itemsize + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size * dtype.itemsize].view(dtype)


def quantize(matrix: np.ndarray, weights: str) -> tuple[np.ndarray, np.ndarray]:
    """Convert a float32 matrix (rows, depth).

    Args:
        matrix: the matrix.
        weights: one of ``WEIGHT_DTYPES``. bfloat16 rounds to nearest, ties to even. int8 divides
            each row by a scale, so that its largest magnitude becomes 127, and rounds.

    Returns:
        The matrix as float32, bfloat16 bits in uint16, or int8; and the scales (rows,) float32,
        empty unless it is int8.
    """
    if weights == "bfloat16":
        bits = matrix.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype(np.uint16), np.empty(0, np.float32)
    if weights == "int8":
        scales = np.abs(matrix).max(1) / np.float32(127)
        divisors = np.where(scales > 0, scales, np.float32(1))
        return np.rint(matrix / divisors[:, None]).astype(np.int8), scales
    return matrix, np.empty(0, np.float32)


class _Layout:
    """Arrays that grow to the end of what they hold."""

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self.matrices: list[np.ndarray] = []
        self.scales: list[np.ndarray] = []
        self.vectors: list[np.ndarray] = []
        self.sizes = [0, 0, 0]

    def add_matrix(self, matrix: np.ndarray) -> tuple[int, int]:
        """Append a matrix (rows, depth); returns where it and its scales begin."""
        begins = self.sizes[0], self.sizes[1]
        values, scales = quantize(np.ascontiguousarray(matrix, np.float32), self.weights)
        self.matrices.append(to_panels(values))
        self.sizes[0] += self.matrices[-1].size
        if scales.size:
            self.scales.append(np.zeros(pad(len(matrix)), np.float32))
            self.scales[-1][: len(scales)] = scales
            self.sizes[1] += self.scales[-1].size
        return begins

    def add_vector(self, vector: np.ndarray) -> int:
        """Append numbers; returns where they begin."""
        begin = self.sizes[2]
        self.vectors.append(np.asarray(vector, np.float32).reshape(-1))
        self.sizes[2] += self.vectors[-1].size
        return begin


def _join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    size = sum(part.size for part in parts)
    joined = aligned_empty(size, np.dtype(parts[0].dtype if parts else dtype))
    begin = 0
    while parts:
        part = parts.pop(0)  # so that a large model is in memory once
        joined[begin : begin + part.size] = part
        begin += part.size
    return joined


def lay_out(config: ModelConfig, parameters: dict[str, np.ndarray], weights: str) -> Weights:
    """Lay out a model.

    Args:
        config: its shape.
        parameters: float32 arrays by the names that ``mmrec.model.Model`` gives them. Emptied, so
            that a large model is in memory about once.
        weights: one of ``WEIGHT_DTYPES``. Convolutions, biases and norms stay float32.
    """
    layout, layers = _Layout(weights), []
    states = state_layout(config)
    for i, layer_type in enumerate(config.resolved_layer_types):
        row = dict.fromkeys(LAYER_FIELDS, 0)
        row["has_recurrence"], row["has_delta_rule"] = layer_type in "sbn", layer_type in "lb"

        def part(name: str, i: int = i) -> np.ndarray:
            return parameters.pop(f"layers.{i}.{name}")

        for field, name in (
            ("conv", "conv_weight"),
            ("forget_bias", "forget_bias"),
            ("recurrence_norm", "recurrence_norm.weight"),
            ("delta_decay_bias", "delta_decay_bias"),
            ("delta_norm", "delta_norm.weight"),
            ("ffn_norm", "ffn_norm.weight"),
        ):
            if f"layers.{i}.{name}" in parameters:
                row[field] = layout.add_vector(part(name))
        for field in ("in_proj", "out_proj", "up_proj", "down_proj"):
            matrix = part(f"{field}.weight")
            row[field], row[f"{field}_scale"] = layout.add_matrix(matrix)
            if field == "in_proj":
                row["in_proj_rows"] = len(matrix)
        if layer_type in "sb":
            blocks = part("recurrent_weight")
            row["recurrent_block"] = blocks.shape[1]
            begins = [layout.add_matrix(block.T) for block in blocks]
            row["recurrent"], row["recurrent_scale"] = begins[0]
        row |= {name: begin for name, begin, _, _ in states[i]}
        layers.append([row[field] for field in LAYER_FIELDS])
    embedding, embedding_scale = layout.add_matrix(parameters.pop("embedding"))
    final_norm = layout.add_vector(parameters.pop("norm.weight"))
    ngrams, ngram_scales = quantize(
        parameters.pop("ngram_embedding", np.empty((0, config.width), np.float32)), weights
    )
    hashes = NGRAM_HASH[: config.max_ngram - 1] if config.ngram_buckets else ()
    return Weights(
        _join(layout.matrices, np.float32),
        _join(layout.scales, np.float32),
        ngrams.reshape(-1),
        ngram_scales,
        np.concatenate(layout.vectors),
        np.array(layers, np.int64),
        np.array(hashes, np.int64).reshape(-1, 2),
        embedding,
        embedding_scale,
        final_norm,
        config.width,
        config.heads,
        config.ffn_width,
        config.vocab_size,
        config.conv_width,
        config.ngram_buckets,
    )


def bytes_per_token(w: Weights) -> int:
    """Bytes of weights that one token of one stream reads; zeros in feed-forward networks count."""
    rows = 1 + len(w.hashes)
    size = w.matrices.nbytes + w.scales.nbytes + w.vectors.nbytes
    return size + rows * w.width * w.matrices.itemsize


def make_scratch(w: Weights, streams: int, rows: int, logits_rows: int) -> Scratch:
    """Memory for calls with up to that many streams, rows, and rows with logits."""
    width = pad(w.width)
    widest = max(pad(int(layer[LAYER_FIELDS.index("in_proj_rows")])) for layer in w.layers)

    def zeros(size: int) -> np.ndarray:
        memory = aligned_empty(size, np.dtype(np.float32))
        memory[:] = 0
        return memory

    return Scratch(
        zeros(rows * width),
        zeros(rows * width),
        zeros(rows * widest),
        zeros(rows * width),
        zeros(rows * width),
        zeros(rows * pad(w.ffn_width)),
        zeros(logits_rows * pad(w.vocab_size)),
        zeros(streams * (w.conv_width - 1) * w.width),
        np.zeros(1, np.int64),
    )


def make_sample_scratch(vocab_size: int) -> SampleScratch:
    """Memory for drawing a token."""
    floats, integers = np.float32, np.int32
    return SampleScratch(
        np.empty(vocab_size, floats),
        np.empty(vocab_size, floats),
        np.empty(vocab_size, integers),
        np.empty(vocab_size, floats),
        np.empty(vocab_size, integers),
        np.empty(1024),
    )


def make_private(w: Weights, rows: int) -> Private:
    """Memory of one member of a team for calls with up to ``rows`` rows."""
    deepest = max(w.width, w.ffn_width)
    largest = pad(max(w.vocab_size, w.width))
    return Private(
        np.empty(max(2, rows) * PANEL, np.float32),
        np.empty(BLOCK * PANEL, np.float32),
        np.empty(deepest, np.int32),
        np.empty(w.conv_width * w.width, np.float32),
        np.empty(max(w.width, 3 * (w.width // w.heads)) + 1, np.float32),
        np.empty(16, np.float32),
        np.empty(largest, np.float32),
        np.empty(w.vocab_size, np.float32),
        make_sample_scratch(w.vocab_size),
        np.zeros(w.vocab_size, np.uint8),
    )
