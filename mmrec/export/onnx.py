"""Models as ONNX graphs of one step: a token and the states before it to logits and new states.

The graph is written operator by operator. All of them are plain ones that every runtime has.

Axes: B batch, D width, H heads, P = D / H, K convolution width, G blocks of the recurrent weight.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.config import NGRAM_HASH, VERSION, ModelConfig, state_layout
from mmrec.errors import InputError
from mmrec.export.safetensors import import_library
from mmrec.export.tokenizer import tokenizer_files
from mmrec.runtime.atomic import atomic_path, atomic_write_text

MODEL_FILE = "model.onnx"
OPSET, IR_VERSION = 20, 10
MAX_BYTES = 2_000_000_000
"""Largest model: a graph with its weights is one message of protobuf, which holds 2 GiB."""
EPSILON = 1e-6
"""Added to mean squares, and to |k|² and |q|², as in the kernels."""


def export_onnx(loaded: LoadedModel, folder: Path) -> None:
    """Write a model as ``model.onnx`` and ``tokenizer.json``.

    The graph has the inputs ``token`` (B,) int64 and one per state, and the outputs ``logits``
    (B, V) and one per state, ``new_`` and its name, in the same order. States are zeros before the
    first token.

    Args:
        loaded: the model.
        folder: where to write; it is made if it is not there.

    Raises:
        InputError: the package onnx is missing, or the model is too large.
        StorageError: the system refused.
    """
    import_library("onnx")
    size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    if size > MAX_BYTES:
        raise InputError(
            f"--to onnx writes models of up to {MAX_BYTES / 1e9:g} GB; this one has "
            f"{size / 1e9:.1f} GB"
        )
    weights = {name: p.detach().numpy() for name, p in loaded.model.named_parameters()}
    data = build_graph(loaded.model.config, weights)
    folder.mkdir(exist_ok=True)
    for name, text in tokenizer_files(loaded.tokenizer).items():
        atomic_write_text(folder / name, text)
    with atomic_path(folder / MODEL_FILE) as temporary:
        temporary.write_bytes(data)


def state_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the states of one text by name: those of ``mmrec.model.State``, if not empty."""
    shapes: dict[str, tuple[int, ...]] = {}
    if config.ngram_buckets:
        shapes["recent_tokens"] = (config.max_ngram - 1,)
    for i, layer in enumerate(state_layout(config)):
        shapes |= {f"layers.{i}.{name}": shape for name, begin, end, shape in layer if end > begin}
    return shapes


def build_graph(config: ModelConfig, weights: dict[str, np.ndarray]) -> bytes:
    """Build the graph of one step.

    Args:
        config: the shape of the model.
        weights: float32 arrays by the names of ``mmrec.model.Model``.

    Returns:
        The model in ONNX's format.
    """
    onnx = import_library("onnx")
    graph = Graph()
    parameters = {name: graph.constant(array, name) for name, array in weights.items()}
    shapes = state_shapes(config)
    states = {name: Value(graph, name) for name in shapes}
    token, new = Value(graph, "token"), {}
    x = parameters["embedding"].gather(token)
    if config.ngram_buckets:
        recent = states["recent_tokens"]
        x = x + embed_ngrams(config, parameters["ngram_embedding"], token, recent)
        new["recent_tokens"] = graph("Concat", recent.slice(1), token.unsqueeze(1), axis=1)
    for i, layer_type in enumerate(config.resolved_layer_types):
        x, after = run_layer(
            config, layer_type, x, below(parameters, f"layers.{i}."), below(states, f"layers.{i}.")
        )
        new |= {f"layers.{i}.{name}": value for name, value in after.items()}
    hidden = normalise(x) * parameters["norm.weight"]
    outputs: dict[str, tuple[Value, tuple[int, ...]]]
    outputs = {"logits": (hidden.linear(parameters["embedding"]), (config.vocab_size,))}
    outputs |= {f"new_{name}": (new[name], shape) for name, shape in shapes.items()}
    types = {"recent_tokens": onnx.TensorProto.INT64, "token": onnx.TensorProto.INT64}

    def describe(name: str, shape: tuple[int, ...]) -> Any:
        kind = types.get(name.removeprefix("new_"), onnx.TensorProto.FLOAT)
        return onnx.helper.make_tensor_value_info(name, kind, ["batch", *shape])

    for name, (value, _) in outputs.items():
        graph.nodes.append(onnx.helper.make_node("Identity", [value.name], [name]))
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "mmrec",
            [describe(name, shape) for name, shape in {"token": (), **shapes}.items()],
            [describe(name, shape) for name, (_, shape) in outputs.items()],
            graph.constants,
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mmrec",
        producer_version=VERSION,
    )
    return bytes(model.SerializeToString())


def below(values: dict[str, "Value"], prefix: str) -> dict[str, "Value"]:
    """The values whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): value for n, value in values.items() if n.startswith(prefix)}


def embed_ngrams(config: ModelConfig, table: "Value", token: "Value", recent: "Value") -> "Value":
    """Sum of the embeddings (B, D) of the n-grams that end at token (B,).

    table (buckets, D); recent (B, max_ngram - 1), the tokens before, the newest last.
    """
    key, rows = token, []
    for n in range(config.max_ngram - 1):
        multiplier, mixer = NGRAM_HASH[n]
        earlier = recent.gather(config.max_ngram - 2 - n, axis=1)
        key = earlier * multiplier + key
        mixed = key * mixer
        # mixed >> 7: ONNX shifts unsigned numbers only, and rounds quotients to zero
        shifted = table.graph("Div", table.graph("BitwiseAnd", mixed, -128), 128)
        bucket = table.graph("Mod", table.graph("BitwiseXor", shifted, mixed), config.ngram_buckets)
        rows.append(table.gather(bucket))
    return table.graph("Sum", *rows)


def normalise(x: "Value", *, mean: bool = True) -> "Value":
    """Divide x (…, D) by its root mean square over the last axis, or by its norm."""
    reduced = x.graph("ReduceMean" if mean else "ReduceSum", x * x, np.array([-1]), keepdims=1)
    return x * x.graph("Reciprocal", x.graph("Sqrt", reduced + np.float32(EPSILON)))


def run_layer(
    config: ModelConfig,
    layer_type: str,
    x: "Value",
    weights: dict[str, "Value"],
    states: dict[str, "Value"],
) -> tuple["Value", dict[str, "Value"]]:
    """Apply a layer to one token.

    Args:
        config: the shape of the model.
        layer_type: the letter of the layer.
        x: (B, D), the residual stream.
        weights: those of the layer by name.
        states: those of the layer by name.

    Returns:
        The new residual stream and the new states.
    """
    graph, width, heads, new = x.graph, config.width, config.heads, {}
    has_recurrence, has_delta_rule = layer_type in "sbn", layer_type in "lb"
    window = normalise(x).unsqueeze(1)
    if "conv_state" in states:
        window = graph("Concat", states["conv_state"], window, axis=1)  # (B, K, D)
        new["conv_state"] = window.slice(1)
    u = graph("ReduceSum", window * weights["conv_weight"], np.array([1]), keepdims=0)
    sizes = [width] * 3 * has_recurrence
    sizes += ([width] * 3 + [heads] * 2) * has_delta_rule + [width]
    *parts, output_gate = u.linear(weights["in_proj.weight"]).split(sizes)
    outputs = []
    if has_recurrence:
        (candidate, forget, gate), h = parts[:3], states["hidden_state"]
        if "recurrent_weight" in weights:
            blocks = h.reshape(0, config.recurrent_blocks, 1, -1)  # (B, G, 1, D / G)
            gate = gate + (blocks @ weights["recurrent_weight"]).reshape(0, -1)
        gamma = (forget + weights["forget_bias"]).sigmoid()
        complement = graph("Sub", np.float32(1), gamma)
        h = complement * candidate * gate.sigmoid() + gamma * h
        new["hidden_state"] = h
        scale = weights.get("recurrence_norm.weight")
        outputs.append(normalise(h) if scale is None else normalise(h) * scale)
    if has_delta_rule:
        q, k, v = (part.reshape(0, heads, -1) for part in parts[-5:-2])  # (B, H, P)
        q, k = normalise(q, mean=False), normalise(k, mean=False)
        alpha = (parts[-2] + weights["delta_decay_bias"]).sigmoid().reshape(0, heads, 1, 1)
        beta = parts[-1].sigmoid().unsqueeze(2)
        s = alpha * states["delta_state"]  # (B, H, P, P)
        recalled = (k.unsqueeze(2) @ s).reshape(0, heads, -1)
        error = beta * graph("Sub", v, recalled)
        s = s + k.unsqueeze(3) * error.unsqueeze(2)
        new["delta_state"] = s
        outputs.append(
            normalise((q.unsqueeze(2) @ s).reshape(0, -1)) * weights["delta_norm.weight"]
        )
    y = outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
    x = x + (y * output_gate * output_gate.sigmoid()).linear(weights["out_proj.weight"])
    normalised = normalise(x) * weights["ffn_norm.weight"]
    up = graph("Relu", normalised.linear(weights["up_proj.weight"]))
    return x + (up * up).linear(weights["down_proj.weight"]), new


class Graph:
    """Nodes and constants of a graph that is being written."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._onnx = import_library("onnx")

    def constant(self, array: Any, name: str | None = None) -> "Value":
        """A number or an array as a value; whole numbers are int64."""
        array = np.asarray(array)
        array = array.astype(np.int64) if array.dtype.kind == "i" else array
        name = name or f"constant_{len(self.constants)}"
        self.constants.append(self._onnx.numpy_helper.from_array(array, name))
        return Value(self, name)

    def add_node(
        self, operator: str, inputs: tuple[Any, ...], outputs: int, **attributes: Any
    ) -> Any:
        """Add a node. Inputs are values, numbers and arrays; return its outputs."""
        values = [x if isinstance(x, Value) else self.constant(x) for x in inputs]
        names = [f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        node = self._onnx.helper.make_node(operator, [v.name for v in values], names, **attributes)
        self.nodes.append(node)
        return [Value(self, name) for name in names]

    def __call__(self, operator: str, *inputs: Any, **attributes: Any) -> "Value":
        """Add a node that has one output; return it."""
        [output] = self.add_node(operator, inputs, 1, **attributes)
        return output


class Value:
    """An array that a graph computes."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def __add__(self, other: Any) -> "Value":
        return self.graph("Add", self, other)

    def __mul__(self, other: Any) -> "Value":
        return self.graph("Mul", self, other)

    def __matmul__(self, other: "Value") -> "Value":
        return self.graph("MatMul", self, other)

    def linear(self, weight: "Value") -> "Value":
        """x Wᵀ of x (B, inputs) and W (outputs, inputs)."""
        return self.graph("Gemm", self, weight, transB=1)

    def sigmoid(self) -> "Value":
        """1 / (1 + exp(-x))."""
        return self.graph("Sigmoid", self)

    def gather(self, indices: Any, axis: int = 0) -> "Value":
        """The entries at some indices of an axis."""
        return self.graph("Gather", self, indices, axis=axis)

    def unsqueeze(self, axis: int) -> "Value":
        """The same with one more axis, of length 1."""
        return self.graph("Unsqueeze", self, np.array([axis]))

    def reshape(self, *shape: int) -> "Value":
        """The same in another shape; 0 keeps the length of an axis, -1 is what is left."""
        return self.graph("Reshape", self, np.array(shape))

    def slice(self, begin: int) -> "Value":
        """The entries of axis 1 from ``begin`` on."""
        ends = np.array([np.iinfo(np.int64).max])
        return self.graph("Slice", self, np.array([begin]), ends, np.array([1]))

    def split(self, sizes: list[int]) -> "list[Value]":
        """Parts along the last axis."""
        parts: list[Value] = self.graph.add_node(
            "Split", (self, np.array(sizes)), len(sizes), axis=-1
        )
        return parts
