"""Models as ONNX graphs: tokens and the states before them to logits and new states.

The graph is written operator by operator. onnxruntime has operators of its own for the delta rule,
the recurrence and the convolution of a layer. Plain ONNX has none that are fast: there the
convolution is a sum, and a Scan takes the recurrences token by token. (Opset 27 has the same
operators, but onnxruntime 1.32 computes them from smaller ones, four times slower than the Scan.)

Axes: B batch, T tokens, D width, H heads, P = D / H, K convolution width, G blocks of the recurrent
weight. Between the parts of a layer that look at several tokens, B and T are one axis.
"""

from collections.abc import Callable
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
OPSET = 20
RUNTIME_DOMAIN = "com.microsoft"
"""The operators of onnxruntime itself."""
IR_VERSION = 10
MAX_BYTES = 2_000_000_000
"""Largest model: a graph with its weights is one message of protobuf, which holds 2 GiB."""
EPSILON = 1e-6
"""Added to mean squares, and to |k|² and |q|², as in the kernels."""


def export_onnx(loaded: LoadedModel, folder: Path, *, is_plain: bool = False) -> None:
    """Write a model as ``model.onnx`` and ``tokenizer.json``.

    The graph has the inputs ``tokens`` (B, T) int64 and one per state, and the outputs ``logits``
    (B, T, V) and one per state, ``new_`` and its name, in the same order. States are zeros before
    the first token.

    Args:
        loaded: the model.
        folder: where to write; it is made if it is not there.
        is_plain: whether to use ONNX's operators only, and not those of onnxruntime.

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
    data = build_graph(loaded.model.config, weights, is_plain)
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


def build_graph(config: ModelConfig, weights: dict[str, np.ndarray], is_plain: bool) -> bytes:
    """Build the graph of a model.

    Args:
        config: the shape of the model.
        weights: float32 arrays by the names of ``mmrec.model.Model``.
        is_plain: whether to use ONNX's operators only.

    Returns:
        The model in ONNX's format.
    """
    onnx = import_library("onnx")
    graph = Graph(is_plain)
    parameters = {name: graph.constant(array, name) for name, array in weights.items()}
    shapes = state_shapes(config)
    states = {name: Value(graph, name) for name in shapes}
    tokens, new = Value(graph, "tokens"), {}
    sizes = graph("Shape", tokens)
    x = parameters["embedding"].gather(tokens)
    if config.ngram_buckets:
        window = graph("Concat", states["recent_tokens"], tokens, axis=1)
        x = x + embed_ngrams(config, parameters["ngram_embedding"], window)
        new["recent_tokens"] = window.slice(1 - config.max_ngram)
    x = x.reshape(-1, config.width)
    for i, layer_type in enumerate(config.resolved_layer_types):
        prefix = f"layers.{i}."
        x, after = run_layer(
            config, layer_type, x, sizes, below(parameters, prefix), below(states, prefix)
        )
        new |= {f"{prefix}{name}": value for name, value in after.items()}
    hidden = normalise(x) * parameters["norm.weight"]
    logits = unflatten(hidden.linear(parameters["embedding"]), sizes, config.vocab_size)
    types = {"recent_tokens": onnx.TensorProto.INT64, "tokens": onnx.TensorProto.INT64}

    def describe(name: str, shape: tuple[Any, ...]) -> Any:
        kind = types.get(name.removeprefix("new_"), onnx.TensorProto.FLOAT)
        return onnx.helper.make_tensor_value_info(name, kind, ["batch", *shape])

    outputs: dict[str, tuple[Value, tuple[Any, ...]]]
    outputs = {"logits": (logits, ("length", config.vocab_size))}
    outputs |= {f"new_{name}": (new[name], shape) for name, shape in shapes.items()}
    for name, (value, _) in outputs.items():
        graph.nodes.append(onnx.helper.make_node("Identity", [value.name], [name]))
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "mmrec",
            [describe(name, shape) for name, shape in {"tokens": ("length",), **shapes}.items()],
            [describe(name, shape) for name, (_, shape) in outputs.items()],
            graph.constants,
        ),
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            *([] if is_plain else [onnx.helper.make_opsetid(RUNTIME_DOMAIN, 1)]),
        ],
        ir_version=IR_VERSION,
        producer_name="mmrec",
        producer_version=VERSION,
    )
    return bytes(model.SerializeToString())


def unflatten(x: "Value", sizes: "Value", *shape: int) -> "Value":
    """Reshape x (B T, …) to (B, T) and a shape; ``sizes`` holds B and T."""
    return x.graph("Reshape", x, x.graph("Concat", sizes, np.array(shape), axis=0))


def below(values: dict[str, "Value"], prefix: str) -> dict[str, "Value"]:
    """The values whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): value for n, value in values.items() if n.startswith(prefix)}


def embed_ngrams(config: ModelConfig, table: "Value", window: "Value") -> "Value":
    """Sums of the embeddings (B, T, D) of the n-grams that end at each token.

    table (buckets, D); window (B, max_ngram - 1 + T), the tokens after those before them.
    """
    before = config.max_ngram - 1
    key, rows = window.slice(before), []
    for n in range(before):
        multiplier, mixer = NGRAM_HASH[n]
        key = window.slice(before - 1 - n, -1 - n) * multiplier + key
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
    sizes: "Value",
    weights: dict[str, "Value"],
    states: dict[str, "Value"],
) -> tuple["Value", dict[str, "Value"]]:
    """Apply a layer.

    Args:
        config: the shape of the model.
        layer_type: the letter of the layer.
        x: (B T, D), the residual stream.
        sizes: (2,), B and T.
        weights: those of the layer by name.
        states: those of the layer by name.

    Returns:
        The new residual stream and the new states.
    """
    graph, width, heads, new = x.graph, config.width, config.heads, {}
    has_recurrence, has_delta_rule = layer_type in "sbn", layer_type in "lb"
    u = normalise(x)
    if "conv_state" in states:
        u, new["conv_state"] = convolve(
            unflatten(u, sizes, width), weights["conv_weight"], states["conv_state"], config
        )
        u = u.reshape(-1, width)
    else:
        u = u * weights["conv_weight"]
    parts_sizes = [width] * 3 * has_recurrence
    parts_sizes += ([width] * 3 + [heads] * 2) * has_delta_rule + [width]
    *parts, output_gate = u.linear(weights["in_proj.weight"]).split(parts_sizes)
    outputs = []
    if has_recurrence:
        candidate, forget, gate = parts[:3]
        h, new["hidden_state"] = recur(
            candidate,
            forget + weights["forget_bias"],
            gate,
            states["hidden_state"],
            sizes,
            config,
            weights.get("recurrent_weight"),
        )
        scale = weights.get("recurrence_norm.weight")
        outputs.append(normalise(h) if scale is None else normalise(h) * scale)
    if has_delta_rule:
        q, k = (
            normalise(part.reshape(0, heads, -1), mean=False).reshape(0, -1)
            for part in parts[-5:-3]
        )
        decay = parts[-2] + weights["delta_decay_bias"]
        o, new["delta_state"] = delta_rule(
            [q, k, parts[-3]], decay, parts[-1].sigmoid(), states["delta_state"], sizes, config
        )
        outputs.append(normalise(o) * weights["delta_norm.weight"])
    y = outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
    x = x + (y * output_gate * output_gate.sigmoid()).linear(weights["out_proj.weight"])
    normalised = normalise(x) * weights["ffn_norm.weight"]
    up = graph("Relu", normalised.linear(weights["up_proj.weight"]))
    return x + (up * up).linear(weights["down_proj.weight"]), new


def convolve(
    x: "Value", weight: "Value", state: "Value", config: ModelConfig
) -> tuple["Value", "Value"]:
    """Causal convolution of each channel of x (B, T, D) with weight (K, D), the newest token last.

    Returns:
        The result (B, T, D) and the last K - 1 rows (B, K - 1, D), which are the next state.
    """
    graph, taps = x.graph, config.conv_width
    if not graph.is_plain:
        y, after = graph.add_node(
            "CausalConvWithState",
            (
                x.transpose(0, 2, 1),
                weight.transpose(1, 0).unsqueeze(1),
                None,
                state.transpose(0, 2, 1),
            ),
            2,
            domain=RUNTIME_DOMAIN,
        )
        return y.transpose(0, 2, 1), after.transpose(0, 2, 1)
    window = graph("Concat", state, x, axis=1)  # (B, K - 1 + T, D)
    rows = [
        window.slice(n, n + 1 - taps if n + 1 < taps else None) * weight.gather(n)
        for n in range(taps)
    ]
    return graph("Sum", *rows), window.slice(1 - taps)


def recur(
    candidate: "Value",
    forget: "Value",
    gate: "Value",
    state: "Value",
    sizes: "Value",
    config: ModelConfig,
    weight: "Value | None",
) -> tuple["Value", "Value"]:
    """h_t = γ_t h_{t-1} + (1 - γ_t) σ(gate_t + h_{t-1} W) candidate_t with γ_t = σ(forget_t).

    Args:
        candidate: (B T, D).
        forget: (B T, D).
        gate: (B T, D).
        state: (B, D), h before the first token.
        sizes: (2,), B and T.
        config: the shape of the model.
        weight: (G, D / G, D / G), the blocks of W, or None if the gate does not look at h.

    Returns:
        All h (B T, D), and the last one (B, D).
    """
    graph, width = candidate.graph, config.width
    written = graph("Sub", np.float32(1), forget.sigmoid()) * candidate
    if weight is None and not graph.is_plain:
        # a state of 1 × 1 per channel, written and read with 1
        v = unflatten(written * gate.sigmoid(), sizes, width)
        ones = graph("Expand", np.float32(1), graph("Shape", v))
        log_decay = unflatten(forget.log_sigmoid(), sizes, width)
        h, last = graph.add_node(
            "LinearAttention",
            (ones, ones, v, state.reshape(0, -1, 1, 1), log_decay),
            2,
            domain=RUNTIME_DOMAIN,
            update_rule="gated",
            q_num_heads=width,
            kv_num_heads=width,
            scale=1.0,
        )
        return h.reshape(-1, width), last.reshape(0, -1)

    def step(h: "Value", written: "Value", forget: "Value", gate: "Value") -> list["Value"]:
        if weight is not None:
            blocks = h.reshape(0, config.recurrent_blocks, 1, -1)  # (B, G, 1, D / G)
            gate = gate + (blocks @ Value(h.graph, weight.name)).reshape(0, -1)
        h = written * gate.sigmoid() + forget.sigmoid() * h
        return [h, h.graph("Identity", h)]

    inputs = [unflatten(x, sizes, width) for x in (written, forget, gate)]
    last, h = graph.scan(step, [state], inputs, 1)
    return h.reshape(-1, width), last


def delta_rule(
    qkv: list["Value"],
    decay: "Value",
    beta: "Value",
    state: "Value",
    sizes: "Value",
    config: ModelConfig,
) -> tuple["Value", "Value"]:
    """The gated delta rule: S = α S + β k (v - kᵀ α S)ᵀ, o = Sᵀ q, with α = σ(decay).

    Args:
        qkv: three of (B T, D); the norm of q and k is 1 in each head.
        decay: (B T, H).
        beta: (B T, H).
        state: (B, H, P, P), S before the first token.
        sizes: (2,), B and T.
        config: the shape of the model.

    Returns:
        o (B T, D), and the last S (B, H, P, P).
    """
    graph, heads, width = beta.graph, config.heads, config.width
    q, k, v = (unflatten(x, sizes, width) for x in qkv)
    beta = unflatten(beta, sizes, heads)
    if not graph.is_plain:
        o, last = graph.add_node(
            "LinearAttention",
            (q, k, v, state, unflatten(decay.log_sigmoid(), sizes, heads), beta),
            2,
            domain=RUNTIME_DOMAIN,
            update_rule="gated_delta",
            q_num_heads=heads,
            kv_num_heads=heads,
            scale=1.0,
        )
        return o.reshape(-1, width), last

    def step(
        s: "Value", q: "Value", k: "Value", v: "Value", alpha: "Value", beta: "Value"
    ) -> list["Value"]:
        q, k, v = (x.reshape(0, heads, -1) for x in (q, k, v))  # (B, H, P)
        s = alpha.reshape(0, heads, 1, 1) * s
        recalled = (k.unsqueeze(2) @ s).reshape(0, heads, -1)
        error = beta.unsqueeze(2) * s.graph("Sub", v, recalled)
        s = s + k.unsqueeze(3) * error.unsqueeze(2)
        return [s, (q.unsqueeze(2) @ s).reshape(0, -1)]

    alpha = unflatten(decay.sigmoid(), sizes, heads)
    last, o = graph.scan(step, [state], [q, k, v, alpha, beta], 1)
    return o.reshape(-1, width), last


class Graph:
    """Nodes and constants of a graph that is being written."""

    def __init__(self, is_plain: bool, prefix: str = "") -> None:
        """Create an empty graph; ``prefix`` begins the names of a graph within another one."""
        self.is_plain = is_plain
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._prefix = prefix
        self._onnx = import_library("onnx")

    def constant(self, array: Any, name: str | None = None) -> "Value":
        """A number or an array as a value; whole numbers are int64."""
        array = np.asarray(array)
        array = array.astype(np.int64) if array.dtype.kind == "i" else array
        name = name or f"{self._prefix}constant_{len(self.constants)}"
        self.constants.append(self._onnx.numpy_helper.from_array(array, name))
        return Value(self, name)

    def add_node(
        self, operator: str, inputs: tuple[Any, ...], outputs: int, **attributes: Any
    ) -> Any:
        """Add a node. Inputs are values, numbers, arrays and None; return its outputs."""
        values = [
            x if isinstance(x, Value) else Value(self, "") if x is None else self.constant(x)
            for x in inputs
        ]
        names = [f"{self._prefix}{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        node = self._onnx.helper.make_node(operator, [v.name for v in values], names, **attributes)
        self.nodes.append(node)
        return [Value(self, name) for name in names]

    def __call__(self, operator: str, *inputs: Any, **attributes: Any) -> "Value":
        """Add a node that has one output; return it."""
        [output] = self.add_node(operator, inputs, 1, **attributes)
        return output

    def scan(
        self,
        step: Callable[..., "list[Value]"],
        states: "list[Value]",
        inputs: "list[Value]",
        outputs: int,
    ) -> "list[Value]":
        """Apply a step token by token.

        Args:
            step: takes the states and one token of each input; returns the new states and outputs.
            states: before the first token.
            inputs: (B, T, …).
            outputs: how many the step has beside the states.

        Returns:
            The states after the last token, and the outputs (B, T, …).
        """
        body = Graph(self.is_plain, f"{self._prefix}scan_{len(self.nodes)}_")
        names = [f"{body._prefix}input_{i}" for i in range(len(states) + len(inputs))]
        results = step(*(Value(body, name) for name in names))
        info = self._onnx.helper.make_tensor_value_info
        kind = self._onnx.TensorProto.FLOAT
        graph = self._onnx.helper.make_graph(
            body.nodes,
            "step",
            [info(name, kind, None) for name in names],
            [info(value.name, kind, None) for value in results],
            body.constants,
        )
        return list(
            self.add_node(
                "Scan",
                (*states, *inputs),
                len(states) + outputs,
                body=graph,
                num_scan_inputs=len(inputs),
                scan_input_axes=[1] * len(inputs),
                scan_output_axes=[1] * outputs,
            )
        )


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

    def log_sigmoid(self) -> "Value":
        """log(1 / (1 + exp(-x)))."""
        return self.graph("Neg", self.graph("Softplus", self.graph("Neg", self)))

    def transpose(self, *axes: int) -> "Value":
        """The same with its axes in another order."""
        return self.graph("Transpose", self, perm=axes)

    def gather(self, indices: Any, axis: int = 0) -> "Value":
        """The entries at some indices of an axis."""
        return self.graph("Gather", self, indices, axis=axis)

    def unsqueeze(self, axis: int) -> "Value":
        """The same with one more axis, of length 1."""
        return self.graph("Unsqueeze", self, np.array([axis]))

    def reshape(self, *shape: int) -> "Value":
        """The same in another shape; 0 keeps the length of an axis, -1 is what is left."""
        return self.graph("Reshape", self, np.array(shape))

    def slice(self, begin: int, end: int | None = None) -> "Value":
        """The entries of axis 1 from ``begin`` on, before ``end``; numbers below 0 count back."""
        ends = np.array([np.iinfo(np.int64).max if end is None else end])
        return self.graph("Slice", self, np.array([begin]), ends, np.array([1]))

    def split(self, sizes: list[int]) -> "list[Value]":
        """Parts along the last axis."""
        parts: list[Value] = self.graph.add_node(
            "Split", (self, np.array(sizes)), len(sizes), axis=-1
        )
        return parts
