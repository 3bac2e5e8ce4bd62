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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrec.kernels import gated_recurrence, scan
from mmrec.kernels.gated_recurrence import reference as recurrence_reference
from mmrec.kernels.scan import reference as scan_reference
from mmrec.profiling import baselines
from mmrec.profiling.baselines import Call, HardwareLimit, Implementation

SCAN_SHAPES = [(8, 256, 128), (4, 2048, 512), (64, 512, 64), (1, 131072, 4)]
RECURRENCE_SHAPES = [(8, 256, 128), (16, 512, 512)]
DELTA_RULE_SHAPES = [(8, 256, 4, 32), (1, 512, 4, 64)]
MAX_SECONDS = 3.0
"""Total time of one implementation in a case, after which it is not timed again."""
NAN = float("nan")


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
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
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


def _median_times(calls: list[Callable[[], object]], repeats: list[int]) -> list[float]:
    """Median milliseconds of each call. The calls take turns; a slow one takes fewer."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(max(repeats)):
        for call, durations, count in zip(calls, times, repeats, strict=True):
            if turn < count and sum(durations) < MAX_SECONDS * 1e3:
                begin = time.perf_counter()
                call()
                durations.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(durations) for durations in times]


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

    Yields:
        One row for the limit, if there is one, and one row per implementation. An implementation
        that is wrong or fails has NaN times.
    """
    exact = [x.double() for x in inputs]
    upstream = torch.randn(reference(*exact).shape)
    want = _output_and_gradients(reference, exact, upstream.double())
    errors = {}
    for implementation in implementations:
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
    limit_calls = [limit.call] if limit else []
    with torch.no_grad():
        forward_ms = _median_times(
            [*map(forward, right), *limit_calls], [*counts, *[repeats] * len(limit_calls)]
        )
    both_ms = _median_times([both(i) for i in right], counts)
    limit_rate = limit.work[0] / forward_ms[-1] / 1e6 if limit else None
    if limit:
        yield Row(op, shape, limit.name, forward_ms[-1], NAN, limit_rate, None, limit_rate)
    for implementation in implementations:
        name = implementation.name
        if implementation not in right:
            yield Row(op, shape, name, NAN, NAN, error=errors[name])
            continue
        index = right.index(implementation)
        forward_rate = limit.work[1] / forward_ms[index] / 1e6 if limit else None
        both_rate = limit.work[2] / both_ms[index] / 1e6 if limit else None
        yield Row(
            op,
            shape,
            name,
            forward_ms[index],
            both_ms[index],
            forward_rate,
            both_rate,
            limit_rate,
            errors[name],
        )


def _memory_limit(shape: tuple[int, ...], forward_arrays: int, both_arrays: int) -> HardwareLimit:
    """torch.add on arrays of the shape, beside an op that moves so many of them."""
    x, y = torch.randn(shape), torch.randn(shape)
    size = 4 * x.numel()
    return HardwareLimit(
        "torch.add", lambda: torch.add(x, y), (3 * size, forward_arrays * size, both_arrays * size)
    )


def bench_scan(shapes: list[tuple[int, ...]] | None = None, repeats: int = 15) -> Iterator[Row]:
    """Benchmark the first-order scan and the cumulative product.

    Args:
        shapes: shapes (B, T, D); None for SCAN_SHAPES.
        repeats: calls that are timed.
    """
    for shape in shapes or SCAN_SHAPES:
        a, b = torch.rand(shape) * 0.5 + 0.5, torch.randn(shape)
        # where a loop takes too long, the op itself in float64, which tests compare with the loop
        reference: Call = lambda a, b: scan(a, b)[0]  # noqa: E731
        if baselines.loop_is_feasible(shape):
            reference = lambda a, b: scan_reference.scan(a, b, torch.zeros_like(b[:, 0]))[0]  # noqa: E731
        yield from compare(
            "scan",
            shape,
            baselines.scan_baselines(shape),
            reference,
            [a, b],
            limit=_memory_limit(shape, 3, 8),
            repeats=repeats,
        )
    for shape in shapes or SCAN_SHAPES:
        # factors near one, so that the product neither vanishes nor overflows
        gamma = 1 + 0.02 * (torch.rand(shape) - 0.5) * min(1.0, 2048 / shape[1])
        yield from compare(
            "cumprod",
            shape,
            baselines.cumprod_baselines(),
            lambda gamma: torch.cumprod(gamma, 1),
            [gamma],
            limit=_memory_limit(shape, 2, 6),
            repeats=repeats,
        )


def bench_gated_recurrence(
    shapes: list[tuple[int, ...]] | None = None, repeats: int = 15
) -> Iterator[Row]:
    """Benchmark the gated recurrence against torch.nn.GRU and LSTM of the same width.

    GRU and LSTM include their input projections, which torch does not offer separately; their
    weights get gradients too. mmrec has rows for the recurrence alone and with its projection.

    Args:
        shapes: shapes (B, T, D); None for RECURRENCE_SHAPES.
        repeats: calls that are timed.
    """
    for shape in shapes or RECURRENCE_SHAPES:
        width = shape[2]
        z, gate, decay = (torch.randn(shape) for _ in range(3))
        weight = torch.randn(width, width) * width**-0.5

        def reference(z: Tensor, gate: Tensor, decay: Tensor, weight: Tensor) -> Tensor:
            initial_state = torch.zeros_like(z[:, 0])
            return recurrence_reference.gated_recurrence(
                z, gate, decay, weight[None], initial_state
            )[0]

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
            repeats=repeats,
        )
        yield from _recurrent_layers(shape, repeats)


def _recurrent_layers(shape: tuple[int, ...], repeats: int) -> Iterator[Row]:
    """Time whole layers: projection and recurrence, with gradients of the input and all weights."""
    width, x, upstream = shape[2], torch.randn(shape, requires_grad=True), torch.randn(shape)
    projection = torch.nn.Linear(width, 3 * width)
    weight = torch.nn.Parameter(torch.randn(width, width) * width**-0.5)
    gru = torch.nn.GRU(width, width, batch_first=True)
    lstm = torch.nn.LSTM(width, width, batch_first=True)

    def layer() -> Tensor:
        z, gate, decay = projection(x).chunk(3, -1)
        return gated_recurrence(z, gate, decay, weight)[0]

    layers: list[tuple[str, Callable[[], Tensor], list[Tensor]]] = [
        ("mmrec with projection", layer, [x, weight, *projection.parameters()]),
        ("torch.nn.GRU", lambda: gru(x)[0], [x, *gru.parameters()]),
        ("torch.nn.LSTM", lambda: lstm(x)[0], [x, *lstm.parameters()]),
    ]

    def both(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, upstream)

    counts = [repeats] * len(layers)
    with torch.no_grad():
        forward_ms = _median_times([call for _, call, _ in layers], counts)
    both_ms = _median_times([both(call, leaves) for _, call, leaves in layers], counts)
    for (name, _, _), f, b in zip(layers, forward_ms, both_ms, strict=True):
        yield Row("recurrent layer", shape, name, f, b)


def bench_gated_delta_rule(
    shapes: list[tuple[int, ...]] | None = None, repeats: int = 15
) -> Iterator[Row]:
    """Benchmark the gated delta rule against the forms that a torch user could run.

    Args:
        shapes: shapes (B, T, H, P); None for DELTA_RULE_SHAPES.
        repeats: calls that are timed.
    """
    for shape in shapes or DELTA_RULE_SHAPES:
        inputs = [torch.randn(shape) for _ in range(3)] + [torch.randn(shape[:3]) for _ in range(2)]
        yield from compare(
            "gated_delta_rule",
            shape,
            baselines.delta_rule_baselines(shape),
            baselines.delta_rule_loop,
            inputs,
            repeats=repeats,
        )


BENCHMARKS = {
    "scan": bench_scan,
    "gated_recurrence": bench_gated_recurrence,
    "gated_delta_rule": bench_gated_delta_rule,
}
"""By name of the op."""


def to_json(rows: list[Row]) -> dict[str, Any]:
    """Return the rows, and the machine that they were measured on, as plain values."""
    return {"machine": describe_machine(), "rows": [asdict(row) for row in rows]}
