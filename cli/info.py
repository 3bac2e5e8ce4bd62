"""``mmrec info``."""

import dataclasses
import json
from typing import Annotated

import typer

from mmrec.config import TrainConfig, from_dict, preset, train_settings

MOST = 1 << 32


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def info(
    name: Annotated[str, typer.Argument(metavar="PRESET", help="tiny, mini, … 7b.")],
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Windows in a batch.")] = 16,
    seq_len: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Tokens in a window.")
    ] = None,
    vocab: Annotated[
        int | None, typer.Option(min=2, max=MOST, help="Tokens of the vocabulary.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16 products.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a preset costs: parameters, FLOPs, memory, time. Allocates nothing."""
    config = preset(name)
    if vocab is not None:
        config = dataclasses.replace(config, vocab_size=vocab)
    given = {"batch": batch, "precision": precision} | ({"seq_len": seq_len} if seq_len else {})
    train: TrainConfig = from_dict(TrainConfig, train_settings(name) | given)
    from mmrec.profiling.cost import describe
    from mmrec.runtime.hardware import bfloat16_is_faster

    if precision == "auto":
        precision = "bfloat16" if bfloat16_is_faster() else "float32"
    made = describe(config, dataclasses.replace(train, precision=precision))
    if as_json:
        about = {"preset": name, "batch": batch, "seq_len": train.seq_len, "precision": precision}
        typer.echo(json.dumps(about | made, indent=1))
        return
    typer.echo(
        f"{name}: width {config.width}, {config.depth} layers ({config.kinds}), "
        f"{config.heads} heads, vocabulary {config.vocab_size:,}\n"
    )
    total = made["parameters"]["total"]
    for part, count in made["parameters"].items():
        typer.echo(f"  {part:<20}{count:>15,}{count / total:>8.1%}")
    flops, size = made["flops_per_token"], made["bytes"]
    heading = f"batch {batch} × {train.seq_len:,} tokens, {precision}"
    typer.echo(f"\n  {heading:<38}{'training':>13}{'--recompute':>13}")
    typer.echo(
        f"  {'FLOPs a token':<38}{flops['training'] / 1e6:>11,.0f} M"
        f"{flops['recompute'] / 1e6:>11,.0f} M"
    )
    for part in size["training"]:
        cells = "".join(f"{_size(size[how][part]):>13}" for how in ("training", "recompute"))
        typer.echo(f"  {part if part != 'total' else 'memory to train':<38}{cells}")
    parts = ", ".join(
        f"{part} {_size(n)}" for part, n in size["generation"].items() if part != "total"
    )
    typer.echo(f"\n  memory to generate  {_size(size['generation']['total'])} ({parts})")
    typer.echo(f"  FLOPs to generate   {flops['forward'] / 1e6:,.0f} M a token")
    typer.echo(
        f"  time here           at least {_time(made['seconds_per_million_tokens'])} per "
        "million training tokens"
    )
