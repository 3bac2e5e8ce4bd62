"""Benchmarks of the kernels against what a torch user could run today, on the same work.

Every implementation is first compared with the float64 reference: a wrong one is not timed. The
implementations of one case take turns, call after call, so that other load on the machine affects
all of them; the median of each is reported. The hardware limit of the op stands beside them, timed
in the same turns: for a scan ``torch.add`` on arrays of the same size, counting the fewest bytes
that must move (3 arrays forward, 8 forward and backward); for a recurrence ``torch.mm``, counting
its recurrent products.

Axes: B batch, T time, D width, H heads, P head width.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from mmrec import nn
from mmrec.kernels import gated_recurrence, scan
from mmrec.kernels.gated_recurrence import reference as recurrence_reference
from mmrec.kernels.scan import reference as scan_reference
from mmrec.profiling import baselines
from mmrec.profiling.baselines import Call, HardwareLimit, Implementation
from mmrec.runtime.machine import processor_name

QUICK_SCAN_SHAPES = [(8, 256, 128), (64, 512, 64)]
SCAN_SHAPES = [(8, 256, 128), (64, 512, 64), (4, 2048, 512), (1, 131072, 4)]
RECURRENCE_SHAPES = [(8, 256, 128), (16, 512, 512)]
DELTA_RULE_SHAPES = [(8, 256, 4, 32), (1, 512, 4, 64), (1, 512, 16, 128)]
LINEAR_ATTENTION_SHAPES = [(8, 256, 4, 32), (1, 512, 4, 128)]
SELECTIVE_SCAN_SHAPES = [(1, 64, 1536, 16), (1, 2048, 1536, 16)]
CAUSAL_CONV1D_SHAPES = [(1, 256, 1536, 4), (1, 1024, 1536, 4), (1, 1024, 6144, 4)]
SSD_SHAPES = [(1, 256, 24, 64, 128), (1, 2048, 24, 64, 128)]
QUICK_SECONDS = 0.4
"""Total time of one implementation in one direction, after which it is not timed again."""
MAX_SECONDS = 3.0
"""The same of a full benchmark."""
NAN = float("nan")

Report = Callable[[float, str], object]
"""Told which share of a case is done, from 0 to 1, and what comes next."""


def ignore(share: float, what: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Row:
    """The times of one implementation on one shape."""

    op: str
    shape: tuple[int, ...]
    name: str
    """Name of the implementation."""
    forward_ms: float
    """Milliseconds of the forward pass; NaN if the implementation is wrong or fails."""
    both_ms: float
    """Milliseconds of forward and backward together."""
    forward_rate: float | None = None
    """GB/s or GFLOP/s of the forward pass; None where neither limits the op."""
    both_rate: float | None = None
    """The same for forward and backward together."""
    bound: float | None = None
    """The rate of the hardware limit, torch.add or torch.mm."""
    error: float = 0.0
    """Largest difference from the reference, over results and gradients, as a fraction of the
    largest value."""


def describe_machine() -> dict[str, Any]:
    """Return what a time depends on: processor, cores, threads, load and versions."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": metadata.version("numba"),
    }


def _output_and_gradients(call: Call, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = call(*leaves)
    gradients = torch.autograd.grad(output, leaves, upstream, materialize_grads=True)
    return [output.detach(), *gradients]


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest difference over all pairs of tensors.

    The difference of a pair is relative to the largest absolute value of its second tensor.
    """
    pairs = zip(got, want, strict=True)
    return max(
        float((g.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)) for g, w in pairs
    )


def _time_in_turns(
    calls: dict[str, Callable[[], object]],
    repeats: list[int],
    times: dict[str, list[float]],
    max_seconds: float,
    report: Callable[[float, str], object],
) -> None:
    """Time calls in turns, after one of each that does not count; a slow one takes fewer turns.

    Args:
        calls: by name.
        repeats: turns of each call.
        times: by name, gets the milliseconds of each call as soon as they are known.
        max_seconds: total time of a call, after which it is not timed again.
        report: told the share that is done.
    """
    for name, call in calls.items():
        report(0, f"timing {name}")
        call()
    turns = max(repeats, default=0)
    for turn in range(turns):
        for (name, call), count in zip(calls.items(), repeats, strict=True):
            durations = times.setdefault(name, [])
            if turn < count and sum(durations) < max_seconds * 1e3:
                report(turn / turns, f"timing {name}")
                begin = time.perf_counter()
                call()
                durations.append((time.perf_counter() - begin) * 1e3)


def _median(durations: list[float] | None) -> float:
    """The median; NaN of nothing."""
    return statistics.median(durations) if durations else NAN


def compare(
    op: str,
    shape: tuple[int, ...],
    implementations: list[Implementation],
    reference: Call,
    inputs: list[Tensor],
    *,
    limit: HardwareLimit | None = None,
    repeats: int = 15,
    tolerance: float = 2e-4,
    max_seconds: float = MAX_SECONDS,
    report: Report = ignore,
) -> Iterator[Row]:
    """Check every implementation against the reference, then time the right ones in turns.

    Args:
        op: name of the op, for the rows.
        shape: shape of the case, for the rows.
        implementations: what is compared.
        reference: the op in torch; it is run in float64.
        inputs: float32 tensors that all of them are called with.
        limit: the hardware limit of the op, if it has a simple one.
        repeats: calls that are timed.
        tolerance: largest relative error of a right implementation.
        max_seconds: total time of an implementation in one direction, after which it is not timed
            again.
        report: told how far this is.

    Yields:
        One row for the limit, if there is one, and one row per implementation. An implementation
        that is wrong or fails has NaN times.

    Raises:
        KeyboardInterrupt: as it came, after the rows of what was timed until then.
    """
    report(0, "reference")
    exact = [x.double() for x in inputs]
    upstream = torch.randn(reference(*exact).shape)
    want = _output_and_gradients(reference, exact, upstream.double())
    errors = {}
    for n, implementation in enumerate(implementations):
        report((n + 1) / (2 * len(implementations) + 2), f"checking {implementation.name}")
        try:
            got = _output_and_gradients(implementation.call, inputs, upstream)
            errors[implementation.name] = relative_error(got, want)
        except Exception:  # another package may fail in any way; that is a result too
            errors[implementation.name] = NAN
    right = [i for i in implementations if errors[i.name] <= tolerance]
    leaves = [x.detach().requires_grad_() for x in inputs]
    plain = [x.detach() for x in inputs]

    def both(implementation: Implementation) -> Callable[[], object]:
        return lambda: torch.autograd.grad(implementation.call(*leaves), leaves, upstream)

    def forward(implementation: Implementation) -> Callable[[], object]:
        return lambda: implementation.call(*plain)

    counts = [max(3, repeats // 5) if i.slow else repeats for i in right]
    forward_calls = {i.name: forward(i) for i in right}
    forward_counts = counts
    if limit:  # timed in the same turns
        forward_calls, forward_counts = {limit.name: limit.call} | forward_calls, [repeats, *counts]
    forward_times: dict[str, list[float]] = {}
    both_times: dict[str, list[float]] = {}
    interrupt: KeyboardInterrupt | None = None
    try:
        with torch.no_grad():
            _time_in_turns(
                forward_calls,
                forward_counts,
                forward_times,
                max_seconds,
                lambda share, what: report(0.5 + share / 4, what),
            )
        _time_in_turns(
            {i.name: both(i) for i in right},
            counts,
            both_times,
            max_seconds,
            lambda share, what: report(0.75 + share / 4, f"{what}, backward"),
        )
    except KeyboardInterrupt as error:
        interrupt = error
    limit_ms = _median(forward_times.get(limit.name)) if limit else NAN
    limit_rate = limit.work[0] / limit_ms / 1e6 if limit else None
    if limit:
        yield Row(op, shape, limit.name, limit_ms, NAN, limit_rate, None, limit_rate)
    for implementation in implementations:
        name = implementation.name
        if implementation not in right:
            yield Row(op, shape, name, NAN, NAN, error=errors[name])
            continue
        forward_ms, both_ms = _median(forward_times.get(name)), _median(both_times.get(name))
        if interrupt and math.isnan(forward_ms):
            continue
        yield Row(
            op,
            shape,
            name,
            forward_ms,
            both_ms,
            limit.work[1] / forward_ms / 1e6 if limit else None,
            limit.work[2] / both_ms / 1e6 if limit and not math.isnan(both_ms) else None,
            limit_rate,
            errors[name],
        )
    if interrupt:
        raise interrupt


def _memory_limit(shape: tuple[int, ...], forward_arrays: int, both_arrays: int) -> HardwareLimit:
    """torch.add on arrays of the shape, beside an op that moves so many of them."""
    x, y = torch.randn(shape), torch.randn(shape)
    size = 4 * x.numel()
    return HardwareLimit(
        "torch.add", lambda: torch.add(x, y), (3 * size, forward_arrays * size, both_arrays * size)
    )


@dataclass(frozen=True)
class Case:
    """An op on one shape."""

    op: str
    shape: tuple[int, ...]
    run: Callable[[Report], Iterator[Row]]
    """Check and time its implementations, see ``compare``."""

    @property
    def title(self) -> str:
        """Op and shape."""
        return f"{self.op} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Effort:
    """How much of a benchmark is done."""

    repeats: int = 15
    """Calls that are timed."""
    full: bool = False
    """All shapes and implementations; without it those that take at most about a second a call."""

    @property
    def max_seconds(self) -> float:
        """See ``compare``."""
        return MAX_SECONDS if self.full else QUICK_SECONDS


def scan_cases(shapes: list[tuple[int, ...]] | None, effort: Effort) -> list[Case]:
    """List the cases of the first-order scan and the cumulative product.

    Args:
        shapes: shapes (B, T, D); None for SCAN_SHAPES, or for QUICK_SCAN_SHAPES if not full.
        effort: how much is done.
    """
    default: list[tuple[int, ...]] = [*(SCAN_SHAPES if effort.full else QUICK_SCAN_SHAPES)]
    return [
        *(Case("scan", s, partial(_compare_scans, s, effort)) for s in shapes or default),
        *(Case("cumprod", s, partial(_compare_cumprods, s, effort)) for s in shapes or default),
    ]


def _compare_scans(shape: tuple[int, ...], effort: Effort, report: Report) -> Iterator[Row]:
    a, b = torch.rand(shape) * 0.5 + 0.5, torch.randn(shape)
    # where a loop takes too long, the op itself in float64, which tests compare with the loop
    reference: Call = lambda a, b: scan(a, b)[0]  # noqa: E731
    if baselines.loop_is_feasible(shape, effort.full):
        reference = lambda a, b: scan_reference.scan(a, b, torch.zeros_like(b[:, 0]))[0]  # noqa: E731
    yield from compare(
        "scan",
        shape,
        baselines.scan_baselines(shape, effort.full),
        reference,
        [a, b],
        limit=_memory_limit(shape, 3, 8),
        repeats=effort.repeats,
        max_seconds=effort.max_seconds,
        report=report,
    )


def _compare_cumprods(shape: tuple[int, ...], effort: Effort, report: Report) -> Iterator[Row]:
    # factors near one, so that the product neither vanishes nor overflows
    gamma = 1 + 0.02 * (torch.rand(shape) - 0.5) * min(1.0, 2048 / shape[1])
    yield from compare(
        "cumprod",
        shape,
        baselines.cumprod_baselines(),
        lambda gamma: torch.cumprod(gamma, 1),
        [gamma],
        limit=_memory_limit(shape, 2, 6),
        repeats=effort.repeats,
        max_seconds=effort.max_seconds,
        report=report,
    )


def recurrence_cases(shapes: list[tuple[int, ...]] | None, effort: Effort) -> list[Case]:
    """List the cases of the gated recurrence, against torch.nn.GRU and LSTM of the same width.

    The recurrence alone has a case of its own. The layers include their input projections, which
    torch does not offer separately; their weights get gradients too.

    Args:
        shapes: shapes (B, T, D); None for RECURRENCE_SHAPES.
        effort: how much is done.
    """
    return [
        case
        for s in shapes or RECURRENCE_SHAPES
        for case in (
            Case("gated_recurrence", s, partial(_compare_recurrences, s, effort)),
            Case("recurrent layer", s, partial(_time_recurrent_layers, s, effort)),
        )
    ]


def _compare_recurrences(shape: tuple[int, ...], effort: Effort, report: Report) -> Iterator[Row]:
    width = shape[2]
    z, gate, decay = (torch.randn(shape) for _ in range(3))
    weight = torch.randn(width, width) * width**-0.5

    def reference(z: Tensor, gate: Tensor, decay: Tensor, weight: Tensor) -> Tensor:
        initial_state = torch.zeros_like(z[:, 0])
        return recurrence_reference.gated_recurrence(z, gate, decay, weight[None], initial_state)[0]

    implementations = [
        Implementation("mmrec gated_recurrence", lambda *x: gated_recurrence(*x)[0]),
        Implementation("Python loop", lambda *x: reference(*x), slow=True),
    ]
    square = torch.randn(1024, 1024)
    flops = 2.0 * math.prod(shape) * width
    limit = HardwareLimit(
        "torch.mm", partial(torch.mm, square, square), (2.0 * 1024**3, flops, 3 * flops)
    )
    yield from compare(
        "gated_recurrence",
        shape,
        implementations,
        reference,
        [z, gate, decay, weight],
        limit=limit,
        repeats=effort.repeats,
        max_seconds=effort.max_seconds,
        report=report,
    )


def _time_recurrent_layers(shape: tuple[int, ...], effort: Effort, report: Report) -> Iterator[Row]:
    """Time whole layers: projection and recurrence, with gradients of the input and all weights."""
    width, x, upstream = shape[2], torch.randn(shape, requires_grad=True), torch.randn(shape)
    modules: dict[str, torch.nn.Module] = {
        "mmrec.nn.GatedRecurrence": nn.GatedRecurrence(width, width, batch_first=True),
        "mmrec.nn.GRU": nn.GRU(width, width, batch_first=True),
        "mmrec.nn.LSTM": nn.LSTM(width, width, batch_first=True),
        "torch.nn.GRU": torch.nn.GRU(width, width, batch_first=True),
        "torch.nn.LSTM": torch.nn.LSTM(width, width, batch_first=True),
    }

    def output(module: torch.nn.Module) -> Callable[[], Tensor]:
        return lambda: module(x)[0]

    layers: list[tuple[str, Callable[[], Tensor], list[Tensor]]] = [
        (name, output(module), [x, *module.parameters()]) for name, module in modules.items()
    ]

    def both(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, upstream)

    forward_calls: dict[str, Callable[[], object]] = {name: call for name, call, _ in layers}
    both_calls = {name: both(call, leaves) for name, call, leaves in layers}
    counts, seconds = [effort.repeats] * len(layers), effort.max_seconds
    forward_times: dict[str, list[float]] = {}
    both_times: dict[str, list[float]] = {}
    interrupt: KeyboardInterrupt | None = None
    try:
        with torch.no_grad():
            _time_in_turns(
                forward_calls, counts, forward_times, seconds, lambda s, w: report(s / 2, w)
            )
        _time_in_turns(both_calls, counts, both_times, seconds, lambda s, w: report(0.5 + s / 2, w))
    except KeyboardInterrupt as error:
        interrupt = error
    for name in forward_times:
        times = _median(forward_times[name]), _median(both_times.get(name))
        if not math.isnan(times[0]):
            yield Row("recurrent layer", shape, name, *times)
    if interrupt:
        raise interrupt


def delta_rule_cases(shapes: list[tuple[int, ...]] | None, effort: Effort) -> list[Case]:
    """List the cases of the gated delta rule, against the forms that a torch user could run.

    Args:
        shapes: shapes (B, T, H, P); None for DELTA_RULE_SHAPES.
        effort: how much is done.
    """
    return [
        Case("gated_delta_rule", s, partial(_compare_delta_rules, s, effort))
        for s in shapes or DELTA_RULE_SHAPES
    ]


def _compare_delta_rules(shape: tuple[int, ...], effort: Effort, report: Report) -> Iterator[Row]:
    log_decay, strength = torch.rand(2, *shape[:3]).unbind()
    inputs = [*(torch.randn(shape) for _ in range(3)), -log_decay, strength]
    yield from compare(
        "gated_delta_rule",
        shape,
        baselines.delta_rule_baselines(shape),
        baselines.delta_rule_reference_call(shape),
        inputs,
        repeats=effort.repeats,
        max_seconds=effort.max_seconds,
        report=report,
    )


def kda_cases(shapes: list[tuple[int, ...]] | None, effort: Effort) -> list[Case]:
    """List the cases of Kimi Delta Attention, against the forms that a torch user could run.

    Args:
        shapes: shapes (B, T, H, P); None for LINEAR_ATTENTION_SHAPES.
        effort: how much is done.
    """
    return [
        Case("kda", s, partial(_compare_kda, s, effort)) for s in shapes or LINEAR_ATTENTION_SHAPES
    ]


def _compare_kda(shape: tuple[int, ...], effort: Effort, report: Report) -> Iterator[Row]:
    inputs = [*(torch.randn(shape) for _ in range(3)), -torch.rand(shape), torch.rand(shape[:3])]
    yield from compare(
        "kda",
        shape,
        baselines.kda_baselines(),
        baselines.kda_loop,
        inputs,
        repeats=effort.repeats,
        max_seconds=effort.max_seconds,
        report=report,
    )


def gla_cases(shapes: list[tuple[int, ...]] | None, effort: Effort) -> list[Case]:
    """List the cases of gated linear attention, with a decay per channel and with one per head.

    Args:
        shapes: shapes (B, T, H, P); None for LINEAR_ATTENTION_SHAPES.
        effort: how much is done.
    """
    return [
        Case(op, s, partial(_compare_gla, op, s, effort))
        for s in shapes or LINEAR_ATTENTION_SHAPES
        for op in ("gla", "simple_gla")
    ]


def _compare_gla(op: str, shape: tuple[int, ...], effort: Effort, report: Report) -> Iterator[Row]:
    per_head = op == "simple_gla"
    g = -torch.rand(shape[:3] if per_head else shape)
    yield from compare(
        op,
        shape,
        baselines.gla_baselines(shape, per_head),
        baselines.gla_loop,
        [*(torch.randn(shape) for _ in range(3)), g],
        repeats=effort.repeats,
        max_seconds=effort.max_seconds,
        report=report,
    )


def selective_scan_cases(shapes: list[tuple[int, ...]] | None, effort: Effort) -> list[Case]:
    """List the cases of the selective scan, against transformers' form and mambapy's.

    Args:
        shapes: shapes (B, T, D, N); None for SELECTIVE_SCAN_SHAPES, if not full the first of them.
        effort: how much is done.
    """
    default = SELECTIVE_SCAN_SHAPES if effort.full else SELECTIVE_SCAN_SHAPES[:1]
    return [
        Case("selective_scan", s, partial(_compare_selective_scans, s, effort))
        for s in shapes or default
    ]


def _compare_selective_scans(
    shape: tuple[int, ...], effort: Effort, report: Report
) -> Iterator[Row]:
    batch, time, width, states = shape
    selections = torch.randn(2, batch, states, time).unbind()
    decay = -torch.arange(1.0, states + 1).repeat(width, 1)
    u, delta = torch.randn(2, batch, width, time).unbind()
    yield from compare(
        "selective_scan",
        shape,
        baselines.selective_scan_baselines(shape),
        baselines.selective_scan_loop,
        [u, delta - 4, decay, *selections],
        repeats=effort.repeats,
        max_seconds=effort.max_seconds,
        report=report,
    )


def ssd_cases(shapes: list[tuple[int, ...]] | None, effort: Effort) -> list[Case]:
    """List the cases of Mamba 2's recurrence, against transformers' form.

    Args:
        shapes: shapes (B, T, H, P, N); None for SSD_SHAPES, if not full the first of them.
        effort: how much is done.
    """
    default = SSD_SHAPES if effort.full else SSD_SHAPES[:1]
    return [Case("ssd", s, partial(_compare_ssd, s, effort)) for s in shapes or default]


def _compare_ssd(shape: tuple[int, ...], effort: Effort, report: Report) -> Iterator[Row]:
    batch, time, heads, width, states = shape
    selections = torch.randn(2, batch, time, 1, states).unbind()
    decay = -torch.arange(1.0, heads + 1)
    x, dt = torch.randn(batch, time, heads, width), torch.randn(batch, time, heads) - 4
    yield from compare(
        "ssd",
        shape,
        baselines.ssd_baselines(shape),
        baselines.ssd_loop,
        [x, dt, decay, *selections],
        repeats=effort.repeats,
        max_seconds=effort.max_seconds,
        report=report,
    )


def causal_conv1d_cases(shapes: list[tuple[int, ...]] | None, effort: Effort) -> list[Case]:
    """List the cases of the causal convolution with SiLU, against torch's convolution.

    Args:
        shapes: shapes (B, T, D, W); None for CAUSAL_CONV1D_SHAPES, if not full the first of them.
        effort: how much is done.
    """
    default = CAUSAL_CONV1D_SHAPES if effort.full else CAUSAL_CONV1D_SHAPES[:1]
    return [
        Case("causal_conv1d", s, partial(_compare_causal_conv1d, s, effort))
        for s in shapes or default
    ]


def _compare_causal_conv1d(shape: tuple[int, ...], effort: Effort, report: Report) -> Iterator[Row]:
    batch, time, width, taps = shape
    yield from compare(
        "causal_conv1d",
        shape,
        baselines.causal_conv1d_baselines(),
        baselines.causal_conv1d_loop,
        [torch.randn(batch, width, time), torch.randn(width, taps), torch.randn(width)],
        repeats=effort.repeats,
        max_seconds=effort.max_seconds,
        report=report,
    )


BENCHMARKS = {
    "scan": scan_cases,
    "gated_recurrence": recurrence_cases,
    "gated_delta_rule": delta_rule_cases,
    "kda": kda_cases,
    "gla": gla_cases,
    "selective_scan": selective_scan_cases,
    "ssd": ssd_cases,
    "causal_conv1d": causal_conv1d_cases,
}
"""The cases of each benchmark, by name."""


def to_json(rows: Sequence[Any]) -> dict[str, Any]:
    """Return dataclass rows, and the machine that they were measured on, as plain values."""
    return {"machine": describe_machine(), "rows": [asdict(row) for row in rows]}
