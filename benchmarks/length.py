"""Time per token against sequence length: flat for the kernels, growing for attention.

    python benchmarks/length.py [--longest T]

Forward and backward at batch 4, width 128. A baseline stops at the length where one call would take
longer than four seconds. Writes results/length.json and docs/images/length.png.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from mmrec.kernels import gated_delta_rule, gated_recurrence, scan
from mmrec.profiling.kernel_bench import describe_machine

BATCH, WIDTH, HEADS = 4, 128, 4
MAX_SECONDS = 4.0  # longest call of a baseline
RESULTS = Path(__file__).parent / "results" / "length.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "length.png"
Case = Callable[[int], tuple[Callable[[], Tensor], list[Tensor]]]
"""From a sequence length to a call and its leaves, which get gradients."""


def inputs(time: int, count: int, *features: int) -> list[Tensor]:
    """Make tensors (BATCH, time, *features) that get gradients; features are WIDTH by default."""
    shape = (BATCH, time, *(features or (WIDTH,)))
    return [torch.randn(shape, requires_grad=True) for _ in range(count)]


def scan_case(time: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    a, b = torch.rand(BATCH, time, WIDTH, requires_grad=True), *inputs(time, 1)
    return lambda: scan(a, b)[0], [a, b]


def recurrence_case(time: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    x = [*inputs(time, 3), (torch.randn(WIDTH, WIDTH) * WIDTH**-0.5).requires_grad_()]
    return lambda: gated_recurrence(*x)[0], x


def delta_rule_case(time: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    x = inputs(time, 3, HEADS, WIDTH // HEADS) + inputs(time, 2, HEADS)
    rule = partial(
        gated_delta_rule,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        use_logsigmoid_in_kernel=True,
    )
    return lambda: rule(*x)[0], x


def attention_case(time: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    x = inputs(time, 3, HEADS, WIDTH // HEADS)
    heads_first = [y.transpose(1, 2) for y in x]
    return lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True), x


def rnn_layer(kind: type[torch.nn.RNNBase]) -> Case:
    def make_case(time: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        module, (x,) = kind(WIDTH, WIDTH, batch_first=True), inputs(time, 1)
        return lambda: module(x)[0], [x, *module.parameters()]

    return make_case


CASES: dict[str, Case] = {
    "mmrec scan": scan_case,
    "mmrec gated recurrence": recurrence_case,
    "mmrec gated delta rule": delta_rule_case,
    "torch causal attention": attention_case,
    "torch.nn.GRU": rnn_layer(torch.nn.GRU),
    "torch.nn.LSTM": rnn_layer(torch.nn.LSTM),
}


def seconds(case: Case, length: int) -> float:
    """Return the median time of forward and backward."""
    call, leaves = case(length)
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
    print(f"{'nanoseconds per token':26}" + "".join(f"{n:>9,}" for n in lengths))
    for name, case in CASES.items():
        duration, row = 0.0, table.setdefault(name, {})
        for length in lengths:
            growth = 4 if name == "torch causal attention" else 2
            if not name.startswith("mmrec") and duration * growth > MAX_SECONDS:
                break
            duration = seconds(case, length)
            row[length] = duration / (BATCH * length) * 1e9
        print(f"{name:26}" + "".join(f"{x:>9.0f}" for x in row.values()), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    result = {"machine": describe_machine(), "batch": BATCH, "width": WIDTH, "ns_per_token": table}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    draw(table)


def draw(table: dict[str, dict[int, float]]) -> None:
    figure = Figure(figsize=(7.2, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, row in table.items():
        axes.plot([*row], [*row.values()], "o-" if name.startswith("mmrec") else "o--", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="sequence length (tokens)",
        ylabel="forward and backward (ns/token)",
        title=f"batch {BATCH}, width {WIDTH}",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
