"""``mmrec info``."""

import dataclasses
import json
from typing import Annotated, Any

import typer

from mmrec.cli.options import PRESET_HELP, VocabSize, settings_options
from mmrec.config import TrainConfig, preset_train_settings
from mmrec.config import preset as preset_config


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


@settings_options(("batch_size", "seq_len", "precision"))
def info(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help=PRESET_HELP)],
    vocab: VocabSize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **settings: Any,
) -> None:
    """Show what a preset costs: parameters, FLOPs, memory, time. Allocates nothing."""
    model = preset_config(preset)
    if vocab is not None:
        model = dataclasses.replace(model, vocab_size=vocab)
    train = TrainConfig.from_flat(preset_train_settings(preset) | settings)
    from mmrec.profiling.cost import estimate_cost
    from mmrec.runtime.hardware import bfloat16_instructions, resolve_precision

    precision, reason = resolve_precision(train.optimizer.precision, bfloat16_instructions())
    cost = estimate_cost(model, train.replace(precision=precision))
    batch_size, seq_len = train.data.batch_size, train.data.seq_len
    if as_json:
        about = {"preset": preset, "batch_size": batch_size, "seq_len": seq_len}
        about |= {"precision": precision, "precision_reason": reason}
        typer.echo(json.dumps(about | cost, indent=1))
        return
    typer.echo(
        f"{preset}: width {model.width}, {model.depth} layers ({model.resolved_layer_types}), "
        f"{model.heads} heads, vocabulary {model.vocab_size:,}\n"
    )
    total = cost["parameters"]["total"]
    for part, count in cost["parameters"].items():
        typer.echo(f"  {part:<20}{count:>15,}{count / total:>8.1%}")
    flops, memory = cost["flops_per_token"], cost["bytes"]
    columns = {"training": "training", "activation_checkpointing": "with activation checkpointing"}
    heading = f"batch of {batch_size} × {seq_len:,} tokens, {precision}"
    typer.echo(f"\n  {heading:<38}{'training':>13}  with activation checkpointing")
    flops_cells = "".join(f"{flops[column] / 1e6:>11,.0f} M" for column in columns)
    typer.echo(f"  {'FLOPs per token':<38}{flops_cells}")
    for part in memory["training"]:
        cells = "".join(f"{_bytes(memory[column][part]):>13}" for column in columns)
        typer.echo(f"  {part if part != 'total' else 'memory to train':<38}{cells}")
    parts = [f"{p} {_bytes(n)}" for p, n in memory["generation"].items() if p != "total"]
    total_bytes = _bytes(memory["generation"]["total"])
    typer.echo(f"\n  memory to generate  {total_bytes} ({', '.join(parts)})")
    typer.echo(f"  FLOPs to generate   {flops['forward'] / 1e6:,.0f} M per token")
    seconds = _duration(cost["seconds_per_million_tokens"])
    typer.echo(f"  time here           at least {seconds} per million training tokens")
    typer.echo(f"  precision           {precision} ({reason})")
