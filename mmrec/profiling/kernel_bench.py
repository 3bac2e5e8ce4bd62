"""Benchmarks of the kernels against what a torch user could run today, on the same work.

Every contender is first held against the float64 reference: a wrong one gets no timing. Contenders
of one case take turns, run after run, so that a noisy neighbour meets all of them; the median of
each is reported. What bounds an operation stands beside it, run in the same turns: for a scan
``torch.add`` on arrays of the same size, counting the least bytes that must move (3 arrays forward,
8 forward and backward); for a recurrence ``torch.mm``, counting its recurrent products.
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
from mmrec.profiling import baselines as peers
from mmrec.profiling.baselines import Bound, Call, Contender

SCAN_SHAPES = [(8, 256, 128), (4, 2048, 512), (64, 512, 64), (1, 131072, 4)]
RECURRENCE_SHAPES = [(8, 256, 128), (16, 512, 512)]
PATIENCE = 3.0  # seconds after which a contender is not timed again in a case
MEMORY_SHAPES = [(8, 256, 4, 32), (1, 512, 4, 64)]


@dataclass(frozen=True)
class Row:
    """One contender on one shape."""

    op: str
    shape: tuple[int, ...]
    name: str
    forward_ms: float
    both_ms: float
    """Milliseconds of forward and backward together."""
    forward_rate: float | None = None
    """GB/s or GFLOP/s, of the forward pass; None where neither bounds the operation."""
    both_rate: float | None = None
    """The same, of forward and backward together."""
    bound: float | None = None
    """The rate of torch.add or torch.mm in the same turns."""
    error: float = 0.0
    """Largest difference from the reference, results and gradients, as a share of the largest."""


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, load."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": metadata.version("numba"),
    }


def _gradients(call: Call, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream, materialize_grads=True)]


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest difference of any pair, each as a share of the largest value of its second."""
    pairs = zip(got, want, strict=True)
    return max(
        float((g.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)) for g, w in pairs
    )


def _turns(calls: list[Callable[[], object]], repeats: list[int]) -> list[float]:
    """Median milliseconds of each call, the calls taking turns; a slow one takes fewer."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(max(repeats)):
        for call, mine, wanted in zip(calls, times, repeats, strict=True):
            if turn < wanted and sum(mine) < PATIENCE * 1e3:
                begin = time.perf_counter()
                call()
                mine.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(t) for t in times]


def compare(
    op: str,
    shape: tuple[int, ...],
    contenders: list[Contender],
    reference: Call,
    inputs: list[Tensor],
    *,
    bound: Bound | None = None,
    repeats: int = 15,
    tolerance: float = 2e-4,
) -> Iterator[Row]:
    """Check every contender against the float64 reference, then time them in turns.

    A contender that errs by more than the tolerance, or fails, gets a row of NaN times.
    """
    exact = [x.double() for x in inputs]
    upstream = torch.randn(reference(*exact).shape)
    want = _gradients(reference, exact, upstream.double())
    errors = {}
    for c in contenders:
        try:
            errors[c.name] = relative_error(_gradients(c.call, inputs, upstream), want)
        except Exception:  # a peer may fail in any way; that is a result too
            errors[c.name] = float("nan")
    right = [c for c in contenders if errors[c.name] <= tolerance]
    leaves = [x.detach().requires_grad_() for x in inputs]
    plain = [x.detach() for x in inputs]

    def both(c: Contender) -> Callable[[], object]:
        return lambda: torch.autograd.grad(c.call(*leaves), leaves, upstream)

    def forward(c: Contender) -> Callable[[], object]:
        return lambda: c.call(*plain)

    counts = [max(3, repeats // 5) if c.slow else repeats for c in right]
    limit = [bound.call] if bound else []
    with torch.no_grad():
        f_times = _turns([*map(forward, right), *limit], [*counts, *[repeats] * len(limit)])
    b_times = _turns([both(c) for c in right], counts)
    top = bound.work[0] / f_times[-1] / 1e6 if bound else None
    if bound:
        yield Row(op, shape, bound.name, f_times[-1], float("nan"), top, None, top)
    for c in contenders:
        if c not in right:
            nan = float("nan")
            yield Row(op, shape, c.name, nan, nan, error=errors[c.name])
            continue
        f, b = f_times[right.index(c)], b_times[right.index(c)]
        rate = bound.work[1] / f / 1e6 if bound else None
        both_rate = bound.work[2] / b / 1e6 if bound else None
        yield Row(op, shape, c.name, f, b, rate, both_rate, top, errors[c.name])


def _add(shape: tuple[int, ...], forward: int, both: int) -> Bound:
    """torch.add on arrays of the shape, beside an op that moves so many of them."""
    x, y = torch.randn(shape), torch.randn(shape)
    size = 4 * x.numel()
    return Bound("torch.add", lambda: torch.add(x, y), (3 * size, forward * size, both * size))


def bench_scan(shapes: list[tuple[int, ...]] | None = None, repeats: int = 15) -> Iterator[Row]:
    """First-order scan and product scan over several shapes (B, T, D)."""
    for shape in shapes or SCAN_SHAPES:
        a, b = torch.rand(shape) * 0.5 + 0.5, torch.randn(shape)
        truth: Call = lambda a, b: scan(a, b)[0]  # noqa: E731 - in float64; the tests hold it to the loop
        if peers.loops(shape):
            truth = lambda a, b: scan_reference.scan(a, b, torch.zeros_like(b[:, 0]))[0]  # noqa: E731
        yield from compare(
            "scan",
            shape,
            peers.scan(shape),
            truth,
            [a, b],
            bound=_add(shape, 3, 8),
            repeats=repeats,
        )
    for shape in shapes or SCAN_SHAPES:
        # products near one, so that every contender has something to get right to the end
        gamma = 1 + 0.02 * (torch.rand(shape) - 0.5) * min(1.0, 2048 / shape[1])
        truth = lambda g: torch.cumprod(g, 1)  # noqa: E731
        yield from compare(
            "product scan",
            shape,
            peers.product(),
            truth,
            [gamma],
            bound=_add(shape, 2, 6),
            repeats=repeats,
        )


def bench_recurrence(
    shapes: list[tuple[int, ...]] | None = None, repeats: int = 15
) -> Iterator[Row]:
    """Gated recurrence against torch.nn.GRU and LSTM of the same width.

    GRU and LSTM include their input projections, which torch does not offer apart; their weights
    get gradients too. mmrec's rows are given for the recurrence alone and with its projection.
    """
    for shape in shapes or RECURRENCE_SHAPES:
        width = shape[2]
        z, g, f = (torch.randn(shape) for _ in range(3))
        weight = torch.randn(width, width) * width**-0.5

        def truth(z: Tensor, g: Tensor, f: Tensor, w: Tensor) -> Tensor:
            start = torch.zeros_like(z[:, 0])
            return recurrence_reference.gated_recurrence(z, g, f, w[None], start)[0]

        ours = [
            Contender("mmrec gated_recurrence", lambda *x: gated_recurrence(*x)[0]),
            Contender("Python loop", lambda *x: truth(*x), slow=True),
        ]
        side = torch.randn(1024, 1024)
        flops = 2.0 * math.prod(shape) * width
        square = partial(torch.mm, side, side)
        bound = Bound("torch.mm", square, (2.0 * 1024**3, flops, 3 * flops))
        yield from compare(
            "recurrence", shape, ours, truth, [z, g, f, weight], bound=bound, repeats=repeats
        )
        yield from _recurrent_layers(shape, repeats)


def _recurrent_layers(shape: tuple[int, ...], repeats: int) -> Iterator[Row]:
    """Whole layers: projection and recurrence, gradients of input and of every weight."""
    width, x, upstream = shape[2], torch.randn(shape, requires_grad=True), torch.randn(shape)
    project = torch.nn.Linear(width, 3 * width)
    weight = torch.nn.Parameter(torch.randn(width, width) * width**-0.5)
    gru = torch.nn.GRU(width, width, batch_first=True)
    lstm = torch.nn.LSTM(width, width, batch_first=True)

    def layer() -> Tensor:
        z, gate, decay = project(x).chunk(3, -1)
        return gated_recurrence(z, gate, decay, weight)[0]

    runs: list[tuple[str, Callable[[], Tensor], list[Tensor]]] = [
        ("mmrec with projection", layer, [x, weight, *project.parameters()]),
        ("torch.nn.GRU", lambda: gru(x)[0], [x, *gru.parameters()]),
        ("torch.nn.LSTM", lambda: lstm(x)[0], [x, *lstm.parameters()]),
    ]

    def both(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, upstream)

    with torch.no_grad():
        forward = _turns([call for _, call, _ in runs], [repeats] * len(runs))
    times = _turns([both(call, leaves) for _, call, leaves in runs], [repeats] * len(runs))
    for (name, _, _), f, b in zip(runs, forward, times, strict=True):
        yield Row("recurrent layer", shape, name, f, b)


def bench_memory(shapes: list[tuple[int, ...]] | None = None, repeats: int = 15) -> Iterator[Row]:
    """Associative memory (B, T, H, P) against the forms that a torch user could run."""
    for shape in shapes or MEMORY_SHAPES:
        inputs = [torch.randn(shape) for _ in range(3)] + [torch.randn(shape[:3]) for _ in range(2)]
        yield from compare(
            "memory", shape, peers.memory(shape), peers.memory_loop, inputs, repeats=repeats
        )


BENCHES = {"scan": bench_scan, "recurrence": bench_recurrence, "memory": bench_memory}


def to_json(rows: list[Row]) -> dict[str, Any]:
    """The rows with the machine they ran on."""
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}
