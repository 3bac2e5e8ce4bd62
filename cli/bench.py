"""``mmrec bench``: time the kernels beside other implementations, generation, a training step."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrec.cli.options import PRESET_HELP, App, ModelOption, VocabSize, one_model, settings_options
from mmrec.cli.streams import print_json
from mmrec.config import PRESETS, ModelConfig, TrainConfig, preset_train_settings
from mmrec.config import preset as preset_config
from mmrec.errors import InputError

if TYPE_CHECKING:
    from tqdm import tqdm

    from mmrec.profiling.generate_bench import Case as GenerateCase
    from mmrec.profiling.generate_bench import Row as GenerateRow
    from mmrec.profiling.kernel_bench import Case as KernelCase
    from mmrec.profiling.kernel_bench import Row
    from mmrec.profiling.step import StepProfile

MAX_SECONDS = 40
"""Without --full no case begins after this many seconds; the longest takes about ten."""
PROGRESS_DELAY = 0.5
"""Seconds after which progress is shown, so that a mistake is reported alone."""

app = App(
    help="Time kernels beside other implementations, generation and training; what is wrong is not "
    "timed."
)

Shapes = Annotated[list[str] | None, typer.Option("--shape", help="Sizes such as 4x2048x512.")]
Repeats = Annotated[int, typer.Option(min=3, help="Timed runs of each; the median is shown.")]
Full = Annotated[
    bool,
    typer.Option("--full", help="All shapes and implementations, which takes minutes."),
]
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
    times = "" if math.isnan(row.both_ms / ours) else f"{row.both_ms / ours:9.1f}×"
    cells = f"{_milliseconds(row.forward_ms):>10}{_milliseconds(row.both_ms):>12}"
    typer.echo(f"  {row.name:<26}{cells}{rates}{times}")


def _progress_bar(total: int) -> "tqdm[Any]":
    """A line on standard error: what is measured, how far it is, and the time left."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        leave=False,
        delay=PROGRESS_DELAY,
        bar_format="{desc} {percentage:3.0f}% [{elapsed}<{remaining}]",
    )


def _run(
    name: str, axes: int, shapes: list[str] | None, repeats: int, full: bool, as_json: bool
) -> None:
    """Time kernels."""
    sizes = [_parse(s, axes) for s in shapes] if shapes else None
    import torch

    from mmrec.profiling.kernel_bench import BENCHMARKS, Effort

    torch.manual_seed(0)
    _run_cases(
        BENCHMARKS[name](sizes, Effort(repeats, full)),
        "%: share of the rate of torch.add or torch.mm; time: both, beside mmrec",
        _print_case,
        full,
        as_json,
    )


def _run_cases(
    cases: "Sequence[KernelCase | GenerateCase]",
    legend: str,
    print_case: Callable[[Any], None],
    full: bool,
    as_json: bool,
) -> None:
    """Run cases with progress, and print the rows of each as soon as they are known.

    Args:
        cases: what is measured.
        legend: what the columns mean.
        print_case: prints the rows of one case.
        full: run all cases, however long that takes.
        as_json: print all rows at the end, as JSON.
    """
    from mmrec.profiling.kernel_bench import describe_machine, to_json

    if not as_json:
        m = describe_machine()
        typer.echo(
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, load {m['load']}; ", nl=False
        )
        typer.echo(f"torch {m['torch']}, numba {m['numba']}")
        typer.echo(legend)
    rows: list[Any] = []
    began = time.monotonic()
    with _progress_bar(len(cases)) as bar:
        try:
            for n, case in enumerate(cases):
                if not full and n and time.monotonic() - began > MAX_SECONDS:
                    left = ", ".join(c.title for c in cases[n:])
                    with bar.external_write_mode():
                        typer.echo(f"left out after {MAX_SECONDS} s: {left} (--full)", err=True)
                    break

                def report(share: float, what: str, n: int = n, title: str = case.title) -> None:
                    bar.set_description_str(f"{title}: {what}", refresh=False)
                    bar.update(max(0.0, n + share - bar.n))

                case_rows: list[Any] = []
                try:
                    for row in case.run(report):
                        case_rows.append(row)
                finally:
                    rows += case_rows
                    if case_rows and not as_json:
                        with bar.external_write_mode():
                            print_case(case_rows)
        except KeyboardInterrupt:
            bar.close()
            if as_json:
                print_json(to_json(rows) | {"interrupted": True})
            done = f"{len(rows)} rows" if rows else "nothing"
            typer.echo(f"interrupted: {done} measured so far", err=True)
            raise
    if as_json:
        print_json(to_json(rows))


def _print_case(rows: "list[Row]") -> None:
    """Print the rows of one op and shape."""
    head = f"{rows[0].op} {rows[0].shape}"
    typer.echo(f"\n{head:<28}{'fwd ms':>10}{'fwd+bwd ms':>12}{'fwd %':>8}{'both %':>8}{'time':>10}")
    ours = next((row.both_ms for row in rows if row.name.startswith("mmrec")), math.nan)
    for row in rows:
        _print_row(row, ours)


@app.command()
def scan(
    shape: Shapes = None, repeats: Repeats = 15, full: Full = False, as_json: Json = False
) -> None:
    """First-order scan and product scan, shapes BxTxD."""
    _run("scan", 3, shape, repeats, full, as_json)


@app.command("gated-recurrence")
def gated_recurrence(
    shape: Shapes = None, repeats: Repeats = 15, full: Full = False, as_json: Json = False
) -> None:
    """Gated recurrence beside torch.nn.GRU and LSTM, shapes BxTxD."""
    _run("gated_recurrence", 3, shape, repeats, full, as_json)


@app.command("gated-delta-rule")
def gated_delta_rule(
    shape: Shapes = None, repeats: Repeats = 15, full: Full = False, as_json: Json = False
) -> None:
    """Gated delta rule beside other implementations, shapes BxTxHxP."""
    _run("gated_delta_rule", 4, shape, repeats, full, as_json)


@app.command("selective-scan")
def selective_scan(
    shape: Shapes = None, repeats: Repeats = 15, full: Full = False, as_json: Json = False
) -> None:
    """Mamba's selective scan beside other implementations, shapes BxTxDxN."""
    _run("selective_scan", 4, shape, repeats, full, as_json)


@app.command()
def ssd(
    shape: Shapes = None, repeats: Repeats = 15, full: Full = False, as_json: Json = False
) -> None:
    """Mamba 2's recurrence beside other implementations, shapes BxTxHxPxN."""
    _run("ssd", 5, shape, repeats, full, as_json)


@app.command("causal-conv1d")
def causal_conv1d(
    shape: Shapes = None, repeats: Repeats = 15, full: Full = False, as_json: Json = False
) -> None:
    """Causal depthwise convolution with SiLU beside torch's, shapes BxTxDxW."""
    _run("causal_conv1d", 4, shape, repeats, full, as_json)


@app.command()
def kda(
    shape: Shapes = None, repeats: Repeats = 15, full: Full = False, as_json: Json = False
) -> None:
    """Kimi Delta Attention beside other implementations, shapes BxTxHxP."""
    _run("kda", 4, shape, repeats, full, as_json)


@app.command()
def gla(
    shape: Shapes = None, repeats: Repeats = 15, full: Full = False, as_json: Json = False
) -> None:
    """Gated linear attention beside other implementations, shapes BxTxHxP."""
    _run("gla", 4, shape, repeats, full, as_json)


@app.command()
def generate(
    preset: Annotated[
        str | None,
        typer.Argument(metavar="[PRESET|RUN|CHECKPOINT]", help=f"{PRESET_HELP} By default tiny."),
    ] = None,
    where: ModelOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 256,
    repeats: Repeats = 15,
    full: Annotated[
        bool, typer.Option("--full", help="Also mini, small and a long text, which takes minutes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Generation beside the products of its weights. A preset gets random weights."""
    name = one_model(None if preset is None else Path(preset), where)
    is_preset = name is None or (where is None and (preset in PRESETS or not name.exists()))
    names = ["tiny", "mini", "small"] if full and name is None else [str(name or "tiny")]
    configs = {n: preset_config(n) for n in names} if is_preset else {}
    from mmrec.profiling.generate_bench import Subject, generate_cases, random_subject
    from mmrec.profiling.kernel_bench import Effort

    if is_preset:
        subjects = [random_subject(n, config) for n, config in configs.items()]
    else:
        from mmrec.checkpoint.checkpoint import load_model
        from mmrec.checkpoint.manager import find_checkpoint

        loaded = load_model(find_checkpoint(name))
        subjects = [Subject(str(name), loaded.model, loaded.tokenizer)]
    effort = Effort(repeats, full)
    _run_cases(
        [case for subject in subjects for case in generate_cases(subject, effort, tokens)],
        "share: of the rate at which one core does the float32 products of a token's weights",
        _print_generation,
        full,
        as_json,
    )


def _print_generation(rows: "list[GenerateRow]") -> None:
    """Print the rows of one model that were timed in turns."""
    head = f"{'weights':>9}{'threads':>9}{'tokens/s':>11}{'share':>8}{'logits differ by':>18}"
    typer.echo(f"\n{rows[0].model:<34}{head}")
    for row in rows:
        start = f"  {row.what:<32}{row.weights:>9}{row.threads:>9}"
        if math.isnan(row.tokens_per_second):
            typer.echo(f"{start}  not timed: wrong by {row.error:.1g}")
            continue
        share = "" if math.isnan(row.bound_share) else f"{row.bound_share:.0%}"
        error = "" if row.error == 0 else f"{row.error:.1g}"
        typer.echo(f"{start}{row.tokens_per_second:11,.0f}{share:>8}{error:>18}")


@app.command()
@settings_options(("batch_size", "seq_len"))
def train(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help=PRESET_HELP)] = "tiny",
    vocab: VocabSize = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show the time of each part of a step.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Repeat slow parts too; else each for about a second.")
    ] = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Time a training step of a preset on random tokens."""
    model = preset_config(preset)
    if vocab is not None:
        model = dataclasses.replace(model, vocab_size=vocab)
    config = TrainConfig.from_flat(preset_train_settings(preset) | settings)
    from mmrec.profiling.step import profile_step

    with _progress_bar(1) as bar:

        def report(share: float, part: str) -> None:
            bar.set_description_str(f"{preset}: timing {part}", refresh=False)
            bar.update(max(0.0, share - bar.n))

        result = profile_step(model, config, full=full, report=report)
    _print_step(preset, model, config, result, profile, as_json)
    if result.interrupted:
        typer.echo("interrupted: only what was measured so far is shown", err=True)
        raise KeyboardInterrupt


def _print_step(
    preset: str,
    model: ModelConfig,
    config: TrainConfig,
    result: "StepProfile",
    profile: bool,
    as_json: bool,
) -> None:
    from mmrec.profiling.kernel_bench import describe_machine

    if as_json:
        about = {"machine": describe_machine(), "preset": preset, "vocab": model.vocab_size}
        about |= {"peak_fraction": result.peak_fraction, **dataclasses.asdict(result)}
        print_json(about)
        return
    typer.echo(
        f"{preset}, vocabulary {model.vocab_size:,}, {config.data.batch_size} x "
        f"{config.data.seq_len} tokens per step, products in {result.precision} "
        f"({result.precision_reason})"
    )
    if profile:
        typer.echo(f"{'part':<24}{'ms':>8}{'of step':>9}{'GFLOP':>9}{'GFLOP/s':>9}{'of peak':>9}")
        for part in result.parts:
            line = f"{part.name:<24}{part.seconds * 1e3:8.2f}{part.seconds / result.seconds:9.0%}"
            if part.flops:
                rate = part.flops / part.seconds
                share = rate / result.peak_flops
                line += f"{part.flops / 1e9:9.2f}{rate / 1e9:9.0f}"
                line += "" if result.interrupted else f"{share:9.0%}"
            typer.echo(line)
    line = f"step {result.seconds * 1e3:.1f} ms, {result.tokens / result.seconds:,.0f} tokens/s"
    if not result.interrupted:
        line += (
            f", {result.flops / result.seconds / 1e9:.0f} GFLOP/s = {result.peak_fraction:.0%} of "
            f"the {result.peak_flops / 1e9:.0f} that a large product reaches here"
        )
    typer.echo(line)
