"""Time per token against the length of the sequence: ours stays flat, attention does not.

    python benchmarks/length.py [--longest T]

Forward and backward at batch 4, width 128. Peers stop where one run would take longer than
seconds. Writes results/length.json and docs/length.png.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from mmrec.kernels import gated_delta_rule, gated_recurrence, scan
from mmrec.profiling.kernel_bench import machine

BATCH, WIDTH, HEADS = 4, 128, 4
PATIENCE = 4.0  # seconds that one run of a peer may take
RESULTS = Path(__file__).parent / "results" / "length.json"
PICTURE = Path(__file__).parent.parent / "docs" / "length.png"
Run = Callable[[int], tuple[Callable[[], Tensor], list[Tensor]]]


def inputs(time: int, count: int, *last: int) -> list[Tensor]:
    shape = (BATCH, time, *(last or (WIDTH,)))
    return [torch.randn(shape, requires_grad=True) for _ in range(count)]


def ours_scan(time: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    a, b = torch.rand(BATCH, time, WIDTH, requires_grad=True), *inputs(time, 1)
    return lambda: scan(a, b)[0], [a, b]


def ours_recurrence(time: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    x = [*inputs(time, 3), (torch.randn(WIDTH, WIDTH) * WIDTH**-0.5).requires_grad_()]
    return lambda: gated_recurrence(*x)[0], x


def ours_memory(time: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    x = inputs(time, 3, HEADS, WIDTH // HEADS) + inputs(time, 2, HEADS)
    return lambda: gated_delta_rule(*x)[0], x


def attention(time: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    x = inputs(time, 3, HEADS, WIDTH // HEADS)
    turned = [y.transpose(1, 2) for y in x]
    return lambda: F.scaled_dot_product_attention(*turned, is_causal=True), x


def layer(kind: type[torch.nn.RNNBase]) -> Run:
    def run(time: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        module, (x,) = kind(WIDTH, WIDTH, batch_first=True), inputs(time, 1)
        return lambda: module(x)[0], [x, *module.parameters()]

    return run


RUNS: dict[str, Run] = {
    "mmrec scan": ours_scan,
    "mmrec gated recurrence": ours_recurrence,
    "mmrec associative memory": ours_memory,
    "torch causal attention": attention,
    "torch.nn.GRU": layer(torch.nn.GRU),
    "torch.nn.LSTM": layer(torch.nn.LSTM),
}


def seconds(make: Run, length: int) -> float:
    """Median time of forward and backward."""
    call, leaves = make(length)
    upstream = torch.randn(call().shape)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 1.0 and len(times) < 25):
        begin = time.perf_counter()
        torch.autograd.grad(call(), leaves, upstream)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--longest", type=int, default=131072)
    longest = parser.parse_args().longest
    lengths = [256 * 2**i for i in range(20) if 256 * 2**i <= longest]
    table: dict[str, dict[int, float]] = {}
    print(f"{'nanoseconds a token':26}" + "".join(f"{n:>9,}" for n in lengths))
    for name, make in RUNS.items():
        took, row = 0.0, table.setdefault(name, {})
        for length in lengths:
            growth = 4 if name == "torch causal attention" else 2
            if not name.startswith("mmrec") and took * growth > PATIENCE:
                break
            took = seconds(make, length)
            row[length] = took / (BATCH * length) * 1e9
        print(f"{name:26}" + "".join(f"{x:>9.0f}" for x in row.values()), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    made = {"machine": machine(), "batch": BATCH, "width": WIDTH, "ns_per_token": table}
    RESULTS.write_text(json.dumps(made, indent=1) + "\n")
    draw(table)


def draw(table: dict[str, dict[int, float]]) -> None:
    figure = Figure(figsize=(7.2, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, row in table.items():
        axes.plot([*row], [*row.values()], "o-" if name.startswith("mmrec") else "o--", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens in a sequence",
        ylabel="ns a token, both ways",
        title=f"batch {BATCH}, width {WIDTH}",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
