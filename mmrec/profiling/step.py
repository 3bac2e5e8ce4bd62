"""Where the time of a training step goes: every part run alone at a preset's sizes, and the whole.

FLOPs count a multiply and an add as two. A part's time is that of its forward and backward pass for
all layers, in every lane at once, each with its share of the batch; what the parts do not explain
(residual sums, casts, autograd, Python, gradients of lanes added up) is the rest.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mmrec.config import ModelConfig, TrainConfig
from mmrec.data.dataloader import WindowLoader
from mmrec.kernels import (
    associative_memory,
    gated_recurrence,
    gated_scan,
    norm_conv,
    squared_relu,
)
from mmrec.kernels.fused_linear_cross_entropy.loss import HeadLoss
from mmrec.model import Layer, Model
from mmrec.optimizer import MuonAdamW, parameter_groups
from mmrec.runtime.hardware import probe_bfloat16
from mmrec.training.replicas import gradients, lanes_for

REPEATS = 9


@dataclass(frozen=True)
class Part:
    """A part of a training step."""

    name: str
    seconds: float
    flops: float = 0.0
    """Floating-point operations of its matrix products."""


@dataclass(frozen=True)
class Profile:
    """A training step and its parts."""

    parts: list[Part]
    seconds: float
    """The whole step."""
    tokens: int
    flops: float
    """Of the matrix products of the whole step, without the optimizer's."""
    peak: float
    """FLOP/s of a large matrix product on this machine, in the dtype of the model's products."""
    precision: str

    @property
    def share(self) -> float:
        """Share of the peak rate that the step reaches."""
        return self.flops / self.seconds / self.peak


def median_seconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median duration of a call, after two that are not counted."""
    times = []
    for i in range(repeats + 2):
        begin = time.perf_counter()
        call()
        if i >= 2:
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def peak_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of large square matrices."""
    a, b = torch.randn(2, 2048, 2048).to(dtype).unbind()
    return 2 * 2048**3 / median_seconds(lambda: a @ b, 5)


def _both(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """Forward and backward of a function, its leaves' gradients thrown away."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    gradient: list[Tensor] = []

    def run() -> None:
        out = call(*leaves)
        if not gradient:
            gradient.append(torch.randn_like(out))
        out.backward(gradient[0])
        for x in leaves:
            x.grad = None

    return run


def _layer_parts(layer: Layer, x: Tensor, half: bool) -> list[Part]:
    """The parts of one layer for x (B, T, D)."""
    dtype = torch.bfloat16 if half else torch.float32
    batch, length, width = x.shape
    parts = []

    def add(name: str, call: Callable[..., Tensor], *inputs: Tensor, flops: float = 0.0) -> None:
        parts.append(Part(name, median_seconds(_both(call, *inputs)), flops))

    for linear in (layer.in_proj, layer.out_proj, layer.up_proj, layer.down_proj):
        rows = torch.randn(batch, length, linear.weight.shape[1]).to(dtype)
        flops = 6.0 * batch * length * linear.weight.numel()
        # the cast of the weight and the gradient of it belong to the product
        add(
            "projections",
            lambda u, w: torch.nn.functional.linear(u, w.to(u.dtype)),
            rows,
            linear.weight,
            flops=flops,
        )
    add("norm and convolution", lambda x, w: norm_conv(x, w, half=half)[0], x, layer.conv_weight)
    add(
        "norm and convolution",
        lambda x, w: norm_conv(x, w[None], half=half)[0],
        x,
        layer.ffn_norm.weight,
    )
    hidden = torch.randn(batch, length, layer.up_proj.weight.shape[0]).to(dtype)
    add("activation", squared_relu, hidden)
    if layer.layer_type == "n":
        p = torch.randn(batch, length, 4 * width).to(dtype)
        add("recurrence", lambda p, b: gated_scan(p, b)[0], p, layer.forget_bias)
        return parts
    p = torch.randn(batch, length, sum(layer.projection_sizes))
    if layer.has_recurrence:
        z, f, g = (p[..., i * width : (i + 1) * width] for i in range(3))
        weight = [] if layer.recurrent_weight is None else [layer.recurrent_weight]
        flops = 6.0 * batch * length * sum(w.numel() for w in weight)
        add("recurrence", lambda *t: gated_recurrence(*t)[0], z, g, f, *weight, flops=flops)
    if layer.has_delta_rule:
        q, k, v = torch.randn(3, batch, length, layer.heads, width // layer.heads).unbind()
        a, b = torch.randn(2, batch, length, layer.heads).unbind()
        add("memory", lambda *t: associative_memory(*t)[0], q, k, v, a, b)

    whole = _both(lambda p: layer.mix_tokens(p, layer.initial_state(batch))[0], p.to(dtype))
    inside = sum(x.seconds for x in parts if x.name in ("recurrence", "memory"))
    parts.append(Part("norms and gates", max(0.0, median_seconds(whole) - inside)))
    return parts


def profile(config: ModelConfig, train: TrainConfig) -> Profile:
    """Measure a training step of a model of that shape on random tokens, and its parts."""
    batch, length = train.batch, train.seq_len
    model = Model(config)
    half = train.precision == "bfloat16" or (train.precision == "auto" and probe_bfloat16())
    model.set_precision("bfloat16" if half else "float32")
    lanes = lanes_for(model, batch)
    optimizer = MuonAdamW(
        parameter_groups(model, 0.1), lr=1e-4, betas=(0.9, 0.95), matrix_lr=1e-4, lanes=lanes
    )
    rng = np.random.default_rng(0)
    batches = WindowLoader(rng.integers(0, config.vocab_size, 64 * batch * length), batch, length, 0)

    def update() -> None:
        lanes.run([lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)])
        optimizer.step()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients(model, lanes, *batches.batch_at(0))
        update()

    whole = median_seconds(step)
    parts = [Part("optimizer", median_seconds(update))]
    parts.append(Part("data", median_seconds(lambda: batches.batch_at(0))))
    tokens, targets = (t[: -(-batch // lanes.count)] for t in batches.batch_at(0))
    measure = partial(_model_parts, model, config, tokens, targets, half)
    parts += lanes.run([measure] * lanes.count)[0]
    sums: dict[str, list[float]] = {}
    for p in parts:
        total = sums.setdefault(p.name, [0.0, 0.0])
        total[0] += p.seconds
        total[1] += p.flops * lanes.count  # only what the model does has any
    made = [Part(name, *total) for name, total in sums.items()]
    made.sort(key=lambda p: -p.seconds)
    made.append(Part("rest", max(0.0, whole - sum(p.seconds for p in made))))
    flops = sum(p.flops for p in made)
    peak = peak_rate(torch.bfloat16 if half else torch.float32)
    name = "bfloat16" if half else "float32"
    return Profile(made, whole, batch * length, flops, peak, name)


def _model_parts(
    model: Model, config: ModelConfig, tokens: Tensor, targets: Tensor, half: bool
) -> list[Part]:
    """The parts of the model for the tokens (B, T) of one lane."""
    parts: list[Part] = []
    x = torch.randn(*tokens.shape, config.width)
    known: dict[str, list[Part]] = {}
    for layer, kind in zip(model.layers, config.resolved_layer_types, strict=True):
        assert isinstance(layer, Layer)
        if kind not in known:
            known[kind] = _layer_parts(layer, x, half)
        parts += known[kind]
    parts.append(Part("norm and convolution", median_seconds(_both(model.norm, x))))
    tables = [model.embedding] + ([model.ngram_embedding] if config.ngram_buckets else [])
    before = model.initial_state(len(tokens)).recent
    parts.append(
        Part(
            "embedding",
            median_seconds(lambda: torch.autograd.grad(model.embed(tokens, before).sum(), tables)),
        )
    )
    flat = x.flatten(0, 1)
    head = _both(lambda x, e: HeadLoss.apply(x, e, targets.flatten(), half), flat, model.embedding)
    flops = 6.0 * tokens.numel() * model.embedding.numel()
    parts.append(Part("loss", median_seconds(head), flops))
    return parts
