"""Benchmarks of the kernels against what a torch user could run today, on the same work.

Every contender is first held against the float64 reference: a wrong one gets no timing. Contenders
of one case take turns, run after run, so that a noisy neighbour meets all of them; the median of
each is reported. Bytes are counted as the least an operation must move: 3 arrays forward (two read,
one written), 8 forward and backward; ``torch.add`` on arrays of the same size, run in the same
turns, gives the bandwidth to compare with.
"""

import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrec.kernels import associative_memory, cumprod, gated_recurrence, scan
from mmrec.kernels.memory import reference as memory_reference
from mmrec.kernels.recurrence import reference as recurrence_reference
from mmrec.kernels.scan import reference as scan_reference

Call = Callable[..., Tensor]

SCAN_SHAPES = [(8, 256, 128), (4, 2048, 512), (1, 32768, 256), (64, 512, 64)]
RECURRENCE_SHAPES = [(8, 256, 128), (16, 512, 512)]
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
    gb_s: float | None = None
    """Least bytes of forward and backward over their time; None where bytes do not bound it."""
    of_add: float | None = None
    """That bandwidth as a share of torch.add's."""
    error: float = 0.0
    """Largest difference from the reference, results and gradients, as a share of the largest."""


@dataclass(frozen=True)
class Contender:
    """A way to compute an op: ``call(*inputs)`` gives the output tensor."""

    name: str
    call: Call
    slow: bool = False
    """Timed fewer times."""


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


def _optional(module: str, attribute: str) -> Any | None:
    """The attribute of a module that may not be installed."""
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


def _scan_contenders(long: bool) -> list[Contender]:
    def loop(a: Tensor, b: Tensor) -> Tensor:
        return scan_reference.scan(a, b, torch.zeros_like(b[:, 0]))[0]

    found = [Contender("mmrec", lambda a, b: scan(a, b)[0])]
    if not long:
        found.append(Contender("Python loop", loop, slow=True))
    associative = _optional("torch._higher_order_ops", "associative_scan")
    if associative is not None:

        def combine(left: Any, right: Any) -> Any:
            return left[0] * right[0], right[0] * left[1] + right[1]

        def torch_scan(a: Tensor, b: Tensor) -> Tensor:
            return associative(combine, (a, b), dim=1, combine_mode="generic")[1]

        found.append(Contender("torch associative_scan", torch_scan, slow=True))
    pscan = _optional("mambapy.pscan", "pscan")
    if pscan is not None:

        def mamba(a: Tensor, b: Tensor) -> Tensor:
            return pscan(a[..., None], b[..., None])[..., 0]

        found.append(Contender("mambapy pscan", mamba, slow=True))
    accelerated = _optional("accelerated_scan.ref", "scan")
    if accelerated is not None:

        def tree(a: Tensor, b: Tensor) -> Tensor:
            turned = (x.transpose(1, 2).contiguous() for x in (a, b))
            return accelerated(*turned).transpose(1, 2)

        found.append(Contender("accelerated-scan ref", tree, slow=True))
    return found


def _product_contenders() -> list[Contender]:
    return [
        Contender("mmrec", lambda g: cumprod(g)[0]),
        Contender("torch.cumprod", lambda g: torch.cumprod(g, 1), slow=True),
        Contender("exp(torch.cumsum(log))", lambda g: g.log().cumsum(1).exp(), slow=True),
    ]


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
    """Median milliseconds of each call, the calls taking turns."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(max(repeats)):
        for call, mine, times_wanted in zip(calls, times, repeats, strict=True):
            if turn < times_wanted:
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
    arrays: tuple[int, int] | None = None,
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
        except (RuntimeError, ValueError, AssertionError, TypeError):
            errors[c.name] = float("nan")
    right = [c for c in contenders if errors[c.name] <= tolerance]
    leaves = [x.detach().requires_grad_() for x in inputs]
    plain = [x.detach() for x in inputs]

    def both(c: Contender) -> Callable[[], object]:
        return lambda: torch.autograd.grad(c.call(*leaves), leaves, upstream)

    def forward(c: Contender) -> Callable[[], object]:
        return lambda: c.call(*plain)

    counts = [max(3, repeats // 5) if c.slow else repeats for c in right]
    big = torch.randn(shape), torch.randn(shape)
    with torch.no_grad():
        *f_times, add = _turns([*map(forward, right), lambda: torch.add(*big)], [*counts, repeats])
    b_times = _turns([both(c) for c in right], counts)
    size = big[0].numel() * 4 / 1e6  # MB, which over ms is GB/s
    add_rate = 3 * size / add
    if arrays:
        yield Row(op, shape, "torch.add", add, float("nan"), add_rate, 1.0)
    for c in contenders:
        if c not in right:
            yield Row(op, shape, c.name, float("nan"), float("nan"), error=errors[c.name])
            continue
        i = right.index(c)
        rate = arrays[1] * size / b_times[i] if arrays else None
        share = rate / add_rate if rate else None
        yield Row(op, shape, c.name, f_times[i], b_times[i], rate, share, errors[c.name])


def bench_scan(shapes: list[tuple[int, ...]] | None = None, repeats: int = 15) -> Iterator[Row]:
    """First-order scan and product scan over several shapes (B, T, D)."""
    for shape in shapes or SCAN_SHAPES:
        long = shape[1] > 4096
        a, b = torch.rand(shape) * 0.5 + 0.5, torch.randn(shape)
        truth: Call = lambda a, b: scan(a, b)[0]  # noqa: E731 - in float64; the tests hold it to the loop
        if not long:
            truth = lambda a, b: scan_reference.scan(a, b, torch.zeros_like(b[:, 0]))[0]  # noqa: E731
        contenders = _scan_contenders(long)
        yield from compare("scan", shape, contenders, truth, [a, b], arrays=(3, 8), repeats=repeats)
    for shape in shapes or SCAN_SHAPES:
        # products near one, so that every contender has something to get right to the end
        gamma = 1 + 0.02 * (torch.rand(shape) - 0.5) * min(1.0, 2048 / shape[1])
        contenders = _product_contenders()
        truth = lambda g: torch.cumprod(g, 1)  # noqa: E731
        yield from compare("product scan", shape, contenders, truth, [gamma], arrays=(2, 6),
                           repeats=repeats)  # fmt: skip


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
        yield from compare("recurrence", shape, ours, truth, [z, g, f, weight], repeats=repeats)
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
    """Associative memory (B, T, H, P) against the plain loop in torch."""
    for shape in shapes or MEMORY_SHAPES:
        inputs = [torch.randn(shape) for _ in range(3)] + [torch.randn(shape[:3]) for _ in range(2)]

        def truth(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
            batch, _, heads, size = q.shape
            start = q.new_zeros(batch, heads, size, size)
            return memory_reference.associative_memory(q, k, v, a, b, start)[0]

        def ours(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return associative_memory(q, k, v, a, b)[0]

        contenders = [
            Contender("mmrec", ours),
            Contender("Python loop", truth, slow=True),
        ]
        yield from compare("memory", shape, contenders, truth, inputs, repeats=repeats)


BENCHES = {"scan": bench_scan, "recurrence": bench_recurrence, "memory": bench_memory}


def to_json(rows: list[Row]) -> dict[str, Any]:
    """The rows with the machine they ran on."""
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}
