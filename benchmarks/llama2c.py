"""llama2.c as a contender: its model files with random weights, its programs, and a check of both.

The formats and the network were read off ``run.c`` and ``runq.c`` of
https://github.com/karpathy/llama2.c, which stays outside this repository.

Axes: L layers, D width, F feed-forward width, H heads, P = D / H, V vocabulary, T time.
"""

import math
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BOS = 1  # the token that a text begins with; where it is drawn, the program ends
GROUP_SIZE = 64  # weights that share a scale in int8
FLAGS = ["-Ofast", "-march=native"]
Weights = dict[str, np.ndarray]
"""By name: ``embedding`` (V, D); ``attention_norm``, ``ffn_norm`` (L, D); ``final_norm`` (D,);
``wq``, ``wk``, ``wv``, ``wo`` (L, D, D); ``w1``, ``w3`` (L, F, D); ``w2`` (L, D, F). A matrix maps
its last axis to the one before."""
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@dataclass(frozen=True)
class Shape:
    """The shape of a model. Embedding and output weights are tied."""

    dim: int
    layers: int
    heads: int
    hidden: int
    vocab: int
    seq_len: int = 1024

    @property
    def parameters(self) -> int:
        """All weights. A token reads every one of them."""
        layer = 4 * self.dim**2 + 3 * self.dim * self.hidden + 2 * self.dim
        return self.vocab * self.dim + self.layers * layer + self.dim


EQUAL_PARAMETERS = {
    "tiny": Shape(128, 5, 4, 512, 5_000),
    "mini": Shape(256, 6, 4, 1216, 8_192),
    "small": Shape(512, 8, 8, 2688, 16_384),
}
"""By preset: the shape with the most parameters that do not exceed the preset's. Width, heads and
vocabulary are the preset's, the depth is its own or one more, and F a multiple of GROUP_SIZE."""
EQUAL_READS = {
    "tiny": Shape(128, 3, 4, 512, 5_000),
    "mini": Shape(256, 6, 4, 768, 8_192),
    "small": Shape(512, 8, 8, 2048, 16_384),
}
"""The same with as many parameters as the preset reads per token: a token needs two rows of its
n-gram embedding, which is a quarter of tiny's parameters and a sixth of small's."""


def random_weights(shape: Shape, logit_std: float, seed: int) -> Weights:
    """Draw weights.

    Args:
        shape: the shape of the model.
        logit_std: standard deviation of the logits, which decides how many tokens top-p keeps.
        seed: of the draw.

    Returns:
        Weights in float32. The embedding of BOS is zero, so that it is hardly ever drawn.
    """
    rng = np.random.default_rng(seed)

    def normal(std: float, *size: int) -> np.ndarray:
        return rng.standard_normal(size, np.float32) * np.float32(std)

    layers, dim, hidden = shape.layers, shape.dim, shape.hidden
    weights = {"embedding": normal(logit_std * dim**-0.5, shape.vocab, dim)}
    weights["embedding"][BOS] = 0
    weights |= {name: normal(dim**-0.5, layers, dim, dim) for name in ("wq", "wk", "wv", "wo")}
    weights |= {name: normal(dim**-0.5, layers, hidden, dim) for name in ("w1", "w3")}
    weights["w2"] = normal(hidden**-0.5, layers, dim, hidden)
    for name in ("attention_norm", "ffn_norm"):
        weights[name] = np.ones((layers, dim), np.float32)
    weights["final_norm"] = np.ones(dim, np.float32)
    return weights


def _header(shape: Shape) -> bytes:
    sizes = (shape.dim, shape.hidden, shape.layers, shape.heads, shape.heads, shape.vocab)
    return struct.pack("<7i", *sizes, shape.seq_len)  # the heads of keys are those of queries


def write_float32(path: Path, shape: Shape, weights: Weights) -> None:
    """Write the model file of ``run.c`` (version 0): seven sizes, then float32."""
    order = ["embedding", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3"]
    with path.open("wb") as file:
        file.write(_header(shape))  # a positive vocabulary size says that the output is tied
        for name in [*order, "final_norm"]:
            file.write(weights[name].astype("<f4").tobytes())
        # tables of rotations, which the program skips
        file.write(bytes(4 * shape.seq_len * (shape.dim // shape.heads)))


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round to int8 with a scale per GROUP_SIZE numbers of the last axis, as ``runq.c`` does.

    Args:
        x: (…, n) float32, n a multiple of GROUP_SIZE.

    Returns:
        (…, n / GROUP_SIZE, GROUP_SIZE) int8, and scales (…, n / GROUP_SIZE, 1) float32.
    """
    groups = x.reshape(*x.shape[:-1], -1, GROUP_SIZE)
    scales = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    ratio = groups / np.where(scales == 0, np.float32(1), scales)
    return (np.sign(ratio) * np.floor(np.abs(ratio) + np.float32(0.5))).astype(np.int8), scales


def write_int8(path: Path, shape: Shape, weights: Weights) -> None:
    """Write the model file of ``runq.c`` (version 2): a header of 256 bytes, norms, then int8."""
    with path.open("wb") as file:
        header = struct.pack("<Ii", 0x616B3432, 2) + _header(shape)
        file.write((header + struct.pack("<Bi", 1, GROUP_SIZE)).ljust(256, b"\0"))
        for name in ("attention_norm", "ffn_norm", "final_norm"):
            file.write(weights[name].astype("<f4").tobytes())
        for name in ("embedding", *MATRICES):
            for matrix in weights[name] if name in MATRICES else [weights[name]]:
                values, scales = quantize(matrix)
                file.write(values.tobytes() + scales.astype("<f4").tobytes())


def write_tokenizer(path: Path, vocab: int) -> None:
    """Write a vocabulary whose tokens are their own numbers, such as " 17"."""
    pieces = [f" {i}".encode() for i in range(vocab)]
    with path.open("wb") as file:
        file.write(struct.pack("<i", max(map(len, pieces))))
        for piece in pieces:
            file.write(struct.pack("<fi", 0.0, len(piece)) + piece)


def _rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * weight


def _product(x: np.ndarray, matrix: np.ndarray, *, int8: bool) -> np.ndarray:
    """Map x (T, n) by a matrix (m, n) to (T, m); with ``int8`` both are rounded first."""
    if not int8:
        return x @ matrix.T
    return _rounded(x) @ _rounded(matrix).T


def _rounded(x: np.ndarray) -> np.ndarray:
    values, scales = quantize(x)
    return (values * scales).reshape(x.shape)


def forward(shape: Shape, weights: Weights, tokens: np.ndarray, *, int8: bool) -> np.ndarray:
    """Logits (T, V) of tokens (T,): the network of ``run.c``, or of ``runq.c`` if ``int8``."""
    heads, width, time = shape.heads, shape.dim // shape.heads, len(tokens)
    angle = np.arange(time)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    rotation = np.exp(1j * angle).astype(np.complex64)[:, None]  # (T, 1, P / 2)

    def rotate(x: np.ndarray) -> np.ndarray:
        pairs = x.reshape(time, heads, width).view(np.complex64) * rotation
        return pairs.view(np.float32)  # (T, H, P)

    embedding = _rounded(weights["embedding"]) if int8 else weights["embedding"]
    x = embedding[tokens]
    future = np.triu(np.full((time, time), -np.inf, np.float32), 1)
    for n in range(shape.layers):
        matrix = {name: weights[name][n] for name in MATRICES}
        u = _rms_norm(x, weights["attention_norm"][n])
        q, k, v = (_product(u, matrix[name], int8=int8) for name in ("wq", "wk", "wv"))
        scores = np.einsum("thp,shp->hts", rotate(q), rotate(k)) / math.sqrt(width) + future
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        o = np.einsum("hts,shp->thp", scores, v.reshape(time, heads, width))
        x = x + _product(o.reshape(time, shape.dim), matrix["wo"], int8=int8)
        u = _rms_norm(x, weights["ffn_norm"][n])
        gate, up = (_product(u, matrix[name], int8=int8) for name in ("w1", "w3"))
        x = x + _product(gate / (1 + np.exp(-gate)) * up, matrix["w2"], int8=int8)
    return _product(_rms_norm(x, weights["final_norm"]), weights["embedding"], int8=int8)


@dataclass(frozen=True)
class Program:
    """A compiled program with its model."""

    binary: Path
    model: Path
    tokenizer: Path
    threads: int

    def generate(
        self, steps: int, *, temperature: float, top_p: float, seed: int = 1
    ) -> tuple[np.ndarray, float]:
        """Generate from an empty text.

        Args:
            steps: tokens to draw.
            temperature: 0 takes the most likely token.
            top_p: tokens are kept up to this sum of probabilities.
            seed: of the draw.

        Returns:
            The tokens (n,), and the tokens per second that the program reports of itself: it counts
            from its second token.
        """
        command = [str(self.binary), str(self.model), "-z", str(self.tokenizer), "-n", str(steps)]
        command += ["-t", str(temperature), "-p", str(top_p), "-s", str(seed)]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with tempfile.TemporaryFile("w+") as text:  # a reader at a pipe would take time of a core
            run = subprocess.run(
                command, stdout=text, stderr=subprocess.PIPE, text=True, check=True, env=environment
            )
            text.seek(0)
            tokens = np.array(text.read().split(), np.int64)
        found = re.search(r"achieved tok/s: ([\d.]+|inf)", run.stderr)
        if found is None:
            raise SystemExit(f"{self.binary.name} reports no speed: {run.stderr.strip()!r}")
        return tokens, float(found[1])


def compile_program(source: Path, binary: Path, *, openmp: bool) -> None:
    """Compile ``run.c`` or ``runq.c`` as its Makefile does; with OpenMP it runs on threads."""
    command = ["gcc", *FLAGS, *["-fopenmp"] * openmp, "-o", str(binary), str(source), "-lm"]
    subprocess.run(command, check=True)


def programs(
    source: Path, folder: Path, shape: Shape, weights: Weights, *, int8: bool
) -> Iterator[Program]:
    """Compile and write all that one shape needs.

    Args:
        source: the folder of ``run.c`` and ``runq.c``.
        folder: where programs and models are written.
        shape: the shape of the model.
        weights: its weights.
        int8: ``runq.c`` instead of ``run.c``.

    Yields:
        The program without OpenMP, then with OpenMP on one thread and on two.
    """
    name = "runq" if int8 else "run"
    model = folder / f"{shape.dim}-{shape.layers}-{shape.hidden}-{name}.bin"
    (write_int8 if int8 else write_float32)(model, shape, weights)
    tokenizer = folder / f"tokenizer-{shape.vocab}.bin"
    write_tokenizer(tokenizer, shape.vocab)
    for openmp, threads in ((False, 1), (True, 1), (True, 2)):
        binary = folder / f"{name}{'-openmp' if openmp else ''}"
        if not binary.exists():
            compile_program(source / f"{name}.c", binary, openmp=openmp)
        yield Program(binary, model, tokenizer, threads)


def check(
    program: Program, shape: Shape, weights: Weights, *, int8: bool, steps: int = 16
) -> float:
    """Compare the program's greedy tokens with those of ``forward`` on the same weights.

    Args:
        program: what is checked.
        shape: the shape of its model.
        weights: its weights, as they were before they were written.
        int8: whether it is ``runq.c``.
        steps: tokens that are compared.

    Returns:
        The largest amount by which the logit of a token that the program took lies below the
        largest logit.
    """
    tokens, _ = program.generate(steps, temperature=0, top_p=0.9)
    logits = forward(shape, weights, np.array([BOS, *tokens[:-1]]), int8=int8)
    return float((logits.max(-1) - np.take_along_axis(logits, tokens[:, None], -1)[:, 0]).max())
