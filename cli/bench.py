"""``mmrec bench``: the kernels against what torch users run today."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from mmrec.config import TrainConfig, from_dict, preset, train_settings
from mmrec.errors import InputError

if TYPE_CHECKING:
    from mmrec.profiling.kernel_bench import Row

app = typer.Typer(
    help="Time the kernels beside other implementations; each is checked before it is timed."
)

Shapes = Annotated[list[str] | None, typer.Option("--shape", help="Sizes such as 4x2048x512.")]
Repeats = Annotated[int, typer.Option(min=3, help="Timed runs of each; the median is shown.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _parse(text: str, axes: int) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if len(parts) != axes or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise InputError(
            f"--shape must be {axes} sizes joined by 'x', such as 8x256x128; got {text!r}"
        )
    return tuple(int(p) for p in parts)


def _milliseconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _print_row(row: "Row", ours: float) -> None:
    if math.isnan(row.forward_ms):
        why = "failed" if math.isnan(row.error) else f"wrong by {row.error:.1g}"
        typer.echo(f"  {row.name:<26}{'not timed: ' + why:>20}")
        return
    shares = [r / row.bound if r and row.bound else None for r in (row.forward_rate, row.both_rate)]
    rates = "".join(f"{share:8.0%}" if share else f"{'':8}" for share in shares)
    times = "" if math.isnan(row.both_ms) else f"{row.both_ms / ours:9.1f}×"
    cells = f"{_milliseconds(row.forward_ms):>10}{_milliseconds(row.both_ms):>12}"
    typer.echo(f"  {row.name:<26}{cells}{rates}{times}")


def _run(name: str, axes: int, shapes: list[str] | None, repeats: int, as_json: bool) -> None:
    sizes = [_parse(s, axes) for s in shapes] if shapes else None
    import torch

    from mmrec.profiling.kernel_bench import BENCHMARKS, describe_machine, to_json

    torch.manual_seed(0)
    rows, case, ours = [], None, 1.0
    if not as_json:
        m = describe_machine()
        typer.echo(
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, load {m['load']}; ", nl=False
        )
        typer.echo(f"torch {m['torch']}, numba {m['numba']}")
        typer.echo("%: share of the rate of torch.add or torch.mm; time: both, beside mmrec")
    for row in BENCHMARKS[name](sizes, repeats):
        rows.append(row)
        if as_json:
            continue
        if (row.op, row.shape) != case:
            case = row.op, row.shape
            head = f"{row.op} {row.shape}"
            typer.echo(
                f"\n{head:<28}{'fwd ms':>10}{'fwd+bwd ms':>12}{'fwd %':>8}{'both %':>8}{'time':>10}"
            )
        if row.name.startswith("mmrec"):  # comes before its baselines
            ours = row.both_ms
        _print_row(row, ours)
    if as_json:
        typer.echo(json.dumps(to_json(rows), indent=1))


@app.command()
def scan(shape: Shapes = None, repeats: Repeats = 15, as_json: Json = False) -> None:
    """First-order scan and product scan, shapes BxTxD."""
    _run("scan", 3, shape, repeats, as_json)


@app.command()
def recurrence(shape: Shapes = None, repeats: Repeats = 15, as_json: Json = False) -> None:
    """Gated recurrence beside torch.nn.GRU and LSTM, shapes BxTxD."""
    _run("gated_recurrence", 3, shape, repeats, as_json)


@app.command()
def memory(shape: Shapes = None, repeats: Repeats = 15, as_json: Json = False) -> None:
    """Associative memory beside a loop in torch, shapes BxTxHxP."""
    _run("gated_delta_rule", 4, shape, repeats, as_json)


@app.command()
def train(
    name: Annotated[str, typer.Argument(metavar="PRESET", help="tiny, mini, … 7b.")] = "tiny",
    vocab: Annotated[
        int | None, typer.Option(min=2, max=1 << 32, help="Tokens of the vocabulary.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=1 << 32, help="Windows in a batch.")] = 16,
    seq_len: Annotated[
        int | None, typer.Option(min=1, max=1 << 32, help="Tokens a window.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show the time by part.")] = False,
    as_json: Json = False,
) -> None:
    """A training step of a preset on random tokens: tokens/s, and with --profile where they go."""
    config = preset(name)
    if vocab is not None:
        config = dataclasses.replace(config, vocab_size=vocab)
    from mmrec.profiling.kernel_bench import describe_machine
    from mmrec.profiling.step import profile_step

    given = {"batch": batch} | ({"seq_len": seq_len} if seq_len else {})
    plan: TrainConfig = from_dict(TrainConfig, train_settings(name) | given)
    made = profile_step(config, plan)
    if as_json:
        about = {"machine": describe_machine(), "preset": name, "vocab": config.vocab_size}
        about |= {"peak_fraction": made.peak_fraction, **dataclasses.asdict(made)}
        typer.echo(json.dumps(about, indent=1))
        return
    typer.echo(
        f"{name}, vocabulary {config.vocab_size:,}, {batch} x {plan.seq_len} tokens a step, "
        f"products in {made.precision}"
    )
    if profile:
        typer.echo(f"{'part':<24}{'ms':>8}{'of step':>9}{'GFLOP':>9}{'GFLOP/s':>9}{'of peak':>9}")
        for part in made.parts:
            line = f"{part.name:<24}{part.seconds * 1e3:8.2f}{part.seconds / made.seconds:9.0%}"
            if part.flops:
                rate = part.flops / part.seconds
                line += f"{part.flops / 1e9:9.2f}{rate / 1e9:9.0f}{rate / made.peak_flops:9.0%}"
            typer.echo(line)
    typer.echo(
        f"step {made.seconds * 1e3:.1f} ms, {made.tokens / made.seconds:,.0f} tokens/s, "
        f"{made.flops / made.seconds / 1e9:.0f} GFLOP/s = {made.peak_fraction:.0%} of the "
        f"{made.peak_flops / 1e9:.0f} that a large product reaches here"
    )
