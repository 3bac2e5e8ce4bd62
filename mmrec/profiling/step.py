"""Where the time of a training step goes: each part run alone at its real size, and the whole step.

A multiply and an add are two floating-point operations. The time of a part is that of its forward
and backward pass for all layers, in all replicas at once, each with its share of the batch. What
the parts do not explain (casts, autograd, Python, summing the gradients of replicas)
is the part "other".

Axes: B sequences, T tokens per sequence, D width.
"""

import math
import threading
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
    dropout_add,
    fused_linear_cross_entropy,
    gated_delta_rule,
    gated_recurrence,
    min_gru_mixer,
    relu_squared,
    rmsnorm_conv1d,
)
from mmrec.model import DELTA_RULE_OPTIONS, Layer, Model
from mmrec.optimizer import build_optimizer, clipped_parameters
from mmrec.runtime.hardware import (
    bfloat16_instructions,
    matrix_product_rate,
    resolve_precision,
)
from mmrec.runtime.numeric import cdiv
from mmrec.training.replicas import Replicas, forward_backward, replica_count

REPEATS = 9
QUICK_SECONDS = 1.0
"""Total time of a part that is not measured in full, after which it is not repeated."""
PEAK_SHAPE = (2048, 2048, 2048)  # of the matrix product that sets the peak rate


@dataclass(frozen=True)
class StepPart:
    """A part of a training step."""

    name: str
    seconds: float
    flops: float = 0.0
    """Floating-point operations of its matrix products."""


@dataclass(frozen=True)
class StepProfile:
    """A training step and its parts."""

    parts: list[StepPart]
    seconds: float
    """Duration of the whole step."""
    tokens: int
    """Tokens per step."""
    flops: float
    """Operations of the matrix products of the step, without those of the optimizer."""
    peak_flops: float
    """Operations per second of a large matrix product on this machine, in the precision of the
    step; NaN if interrupted."""
    precision: str
    """``float32`` or ``bfloat16``."""
    precision_reason: str
    """Why that precision was chosen."""
    interrupted: bool = False
    """Whether parts are missing, because Ctrl-C ended the measurement."""

    @property
    def peak_fraction(self) -> float:
        """The step's operations per second as a fraction of ``peak_flops``."""
        return self.flops / self.seconds / self.peak_flops


class Stopwatch:
    """Measures one part after another, tells how far it is, and can be stopped."""

    def __init__(self, total: int, full: bool, report: Callable[[float, str], object]) -> None:
        """
        Args:
            total: parts that will be measured.
            full: repeat each part REPEATS times, however long it takes.
            report: told the share that is done, and the name of the next part.
        """
        self.total, self.report, self.done = total, report, 0
        self.max_seconds = math.inf if full else QUICK_SECONDS
        self.stopped = threading.Event()

    def median_seconds(self, name: str, call: Callable[[], object]) -> float:
        """Return the median duration of a call, after one or two calls that do not count.

        Raises:
            KeyboardInterrupt: ``stopped`` is set; other threads measure at the same time.
        """
        self.report(min(1.0, self.done / self.total), name)
        times: list[float] = []
        while len(times) < REPEATS + 2 and (len(times) < 2 or sum(times) < self.max_seconds):
            if self.stopped.is_set():
                raise KeyboardInterrupt
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        self.done += 1
        counted = sorted(times[2:] or times[1:])
        return counted[len(counted) // 2]


def _forward_backward(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """A function that runs forward and backward of a call and drops the gradients."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    upstream: list[Tensor] = []

    def run() -> None:
        output = call(*leaves)
        if not upstream:
            upstream.append(torch.randn_like(output))
        output.backward(upstream[0])
        for x in leaves:
            x.grad = None

    return run


def _time_layer(layer: Layer, x: Tensor, bf16: bool, watch: Stopwatch) -> list[StepPart]:
    """Time the parts of one layer for x (B, T, D) float32."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    batch, length, width = x.shape
    parts = []

    def add(name: str, call: Callable[..., Tensor], *inputs: Tensor, flops: float = 0.0) -> None:
        seconds = watch.median_seconds(name, _forward_backward(call, *inputs))
        parts.append(StepPart(name, seconds, flops))

    for linear in (layer.in_proj, layer.out_proj, layer.up_proj, layer.down_proj):
        rows = torch.randn(batch, length, linear.weight.shape[1]).to(dtype)
        flops = 6.0 * batch * length * linear.weight.numel()
        # the product includes the cast of the weight and of its gradient
        add(
            "projections",
            lambda u, w: torch.nn.functional.linear(u, w.to(u.dtype)),
            rows,
            linear.weight,
            flops=flops,
        )
    add(
        "norm and convolution",
        lambda x, w: rmsnorm_conv1d(x, w, output_bf16=bf16)[0],
        x,
        layer.conv_weight,
    )
    add(
        "norm and convolution",
        lambda x, w: rmsnorm_conv1d(x, w[None], output_bf16=bf16)[0],
        x,
        layer.ffn_norm.weight,
    )
    hidden = torch.randn(batch, length, layer.up_proj.weight.shape[0]).to(dtype)
    add("activation", relu_squared, hidden)
    for _ in range(2):  # after the memories and after the feed-forward network
        branch, p = torch.randn(batch, length, width).to(dtype), layer.dropout
        add("residual", lambda y, x, p=p: dropout_add(y, x, p), branch, x)
    if layer.layer_type == "n":
        projected = torch.randn(batch, length, 4 * width).to(dtype)
        add("recurrence", lambda p, b: min_gru_mixer(p, b)[0], projected, layer.forget_bias)
        return parts
    projected = torch.randn(batch, length, sum(layer.projection_sizes))
    if layer.has_recurrence:
        z, forget, gate = (projected[..., i * width : (i + 1) * width] for i in range(3))
        weight = [] if layer.recurrent_weight is None else [layer.recurrent_weight]
        flops = 6.0 * batch * length * sum(w.numel() for w in weight)
        add(
            "recurrence",
            lambda *t: gated_recurrence(*t)[0],
            z,
            gate,
            forget,
            *weight,
            flops=flops,
        )
    if layer.has_delta_rule:
        q, k, v = torch.randn(3, batch, length, layer.heads, width // layer.heads).unbind()
        g, beta = torch.randn(2, batch, length, layer.heads).unbind()
        delta_rule = partial(gated_delta_rule, **DELTA_RULE_OPTIONS)
        add("delta rule", lambda *t: delta_rule(*t)[0], q, k, v, g, beta)

    mixer = _forward_backward(
        lambda p: layer.mix_tokens(p, layer.initial_state(batch))[0], projected.to(dtype)
    )
    memories = sum(part.seconds for part in parts if part.name in ("recurrence", "delta rule"))
    mixer_seconds = watch.median_seconds("norms and gates", mixer)
    parts.append(StepPart("norms and gates", max(0.0, mixer_seconds - memories)))
    return parts


def _time_model(
    model: Model,
    config: ModelConfig,
    tokens: Tensor,
    targets: Tensor,
    bf16: bool,
    watch: Stopwatch,
    parts: list[StepPart],
) -> None:
    """Time the parts of the model for the tokens and targets (B, T) int64 of one replica.

    They are appended to ``parts`` as soon as they are known.
    """
    x = torch.randn(*tokens.shape, config.width)
    by_type: dict[str, list[StepPart]] = {}
    for layer, layer_type in zip(model.layers, config.resolved_layer_types, strict=True):
        assert isinstance(layer, Layer)
        if layer_type not in by_type:
            by_type[layer_type] = _time_layer(layer, x, bf16, watch)
        parts += by_type[layer_type]
    norm = watch.median_seconds("final norm", _forward_backward(model.norm, x))
    parts.append(StepPart("norm and convolution", norm))
    tables = [model.embedding] + ([model.ngram_embedding] if config.ngram_buckets else [])
    recent = model.initial_state(len(tokens)).recent_tokens
    embedding = watch.median_seconds(
        "embedding", lambda: torch.autograd.grad(model.embed(tokens, recent).sum(), tables)
    )
    parts.append(StepPart("embedding", embedding))
    loss = _forward_backward(
        lambda x, e: fused_linear_cross_entropy(x, e, targets.flatten(), bf16=bf16),
        x.flatten(0, 1),
        model.embedding,
    )
    flops = 6.0 * tokens.numel() * model.embedding.numel()
    parts.append(StepPart("loss", watch.median_seconds("loss", loss), flops))


def _count_parts(config: ModelConfig, replicas: int) -> int:
    """The number of parts that ``profile_step`` measures: all replicas measure the model's."""
    in_layers = {t: 7 + (1 if t == "n" else 3 if t == "b" else 2) for t in "nslb"}
    types = set(config.resolved_layer_types)
    return 3 + replicas * (3 + sum(in_layers[t] for t in types))


def profile_step(
    config: ModelConfig,
    train: TrainConfig,
    *,
    full: bool = True,
    report: Callable[[float, str], object] = lambda share, part: None,
) -> StepProfile:
    """Measure a training step on random tokens, and its parts.

    Args:
        config: the model.
        train: batch_size, seq_len and precision count.
        full: repeat each part nine times, however long it takes; else for about a second.
        report: told the share that is done, from 0 to 1, and the name of the next part.

    Returns:
        The profile. After Ctrl-C it holds what was measured so far.

    Raises:
        KeyboardInterrupt: Ctrl-C came before the whole step was measured.
    """
    batch, length = train.data.batch_size, train.data.seq_len
    model = Model(config)
    precision, reason = resolve_precision(train.optimizer.precision, bfloat16_instructions())
    bf16 = precision == "bfloat16"
    model.set_precision(precision)
    model.sparse_gradients = True
    replicas = Replicas(replica_count(model, batch))
    optimizer = build_optimizer(model, run_tasks=replicas.run)
    optimizer.scale_lr(0.01)  # random tokens teach nothing: keep the weights where they are
    rng = np.random.default_rng(0)
    loader = WindowLoader(rng.integers(0, config.vocab_size, 64 * batch * length), batch, length, 0)

    def update() -> None:
        replicas.run([lambda: torch.nn.utils.clip_grad_norm_(clipped_parameters(model), 1.0)])
        optimizer.step()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward_backward(model, replicas, *loader.batch_at(0))
        update()

    watch = Stopwatch(_count_parts(config, replicas.count), full, report)
    try:
        replicas.start_processes(model.train(), batch, length, wait=True)
        step_seconds = watch.median_seconds("step", step)
    finally:
        replicas.end_processes()
    parts: list[StepPart] = []
    interrupted = False
    try:
        parts.append(StepPart("optimizer", watch.median_seconds("optimizer", update)))
        seconds = watch.median_seconds("data", lambda: loader.batch_at(0))
        parts.append(StepPart("data", seconds))
        tokens, targets = (t[: cdiv(batch, replicas.count)] for t in loader.batch_at(0))
        time_model = partial(_time_model, model, config, tokens, targets, bf16, watch)
        of_others: list[StepPart] = []
        lists = [parts] + [of_others] * (replicas.count - 1)
        replicas.run([partial(time_model, each) for each in lists])
    except KeyboardInterrupt:
        watch.stopped.set()
        interrupted = True
    sums: dict[str, list[float]] = {}
    for part in parts:
        total = sums.setdefault(part.name, [0.0, 0.0])
        total[0] += part.seconds
        total[1] += part.flops * replicas.count  # parts outside the model have none
    parts = [StepPart(name, *total) for name, total in sums.items()]
    parts.sort(key=lambda part: -part.seconds)
    peak_flops = math.nan
    if not interrupted:
        explained = sum(part.seconds for part in parts)
        parts.append(StepPart("other", max(0.0, step_seconds - explained)))
        dtype = torch.bfloat16 if bf16 else torch.float32
        peak_flops = matrix_product_rate(dtype, PEAK_SHAPE)
    return StepProfile(
        parts,
        step_seconds,
        tokens=batch * length,
        flops=sum(part.flops for part in parts),
        peak_flops=peak_flops,
        precision=precision,
        precision_reason=reason,
        interrupted=interrupted,
    )
