"""``mmrec info``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mmrec.cli.options import PRESET_HELP, VocabSize, one_model, settings_options
from mmrec.cli.streams import print_json
from mmrec.config import PRESETS, TrainConfig, preset_train_settings
from mmrec.config import preset as preset_config
from mmrec.errors import InputError
from mmrec.pretrained import names_pretrained


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


OWN_SETTINGS = ("batch_size", "seq_len", "replicas", "ema_decay")
"""Settings of a run that its cost depends on."""


@settings_options(("batch_size", "seq_len", "precision", "replicas", "ema_decay"))
def info(
    preset: Annotated[
        str | None, typer.Argument(metavar="PRESET|RUN|CHECKPOINT", help=PRESET_HELP)
    ] = None,
    where: Annotated[
        Path | None,
        typer.Option("--model", metavar="RUN|CHECKPOINT", help="A trained model."),
    ] = None,
    vocab: VocabSize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **settings: Any,
) -> None:
    """Show what a preset or a model costs: parameters, FLOPs, memory, time. Allocates nothing."""
    name = one_model(None if preset is None else Path(preset), where)
    if name is None:
        raise InputError("name a preset or a model: mmrec info tiny, mmrec info runs/tiny-stdlib")
    if where is None and (preset in PRESETS or not (name.exists() or names_pretrained(name))):
        kind = "preset"
        model, own_settings = preset_config(str(name)), preset_train_settings(str(name))
    else:
        from mmrec.checkpoint.header import read_metadata
        from mmrec.checkpoint.manager import find_checkpoint

        kind = "model"
        _, metadata, model = read_metadata(find_checkpoint(name))
        settings_of_run = TrainConfig.from_dict(metadata.get("train", {})).flat()
        own_settings = {key: settings_of_run[key] for key in OWN_SETTINGS}
    if vocab is not None:
        model = dataclasses.replace(model, vocab_size=vocab)
    train = TrainConfig.from_flat(own_settings | settings)
    from mmrec.profiling.cost import estimate_cost
    from mmrec.runtime.hardware import bfloat16_instructions, resolve_precision

    precision, reason = resolve_precision(train.optimizer.precision, bfloat16_instructions())
    cost = estimate_cost(model, train.replace(precision=precision))
    batch_size, seq_len = train.data.batch_size, train.data.seq_len
    if as_json:
        about = {kind: str(name), "batch_size": batch_size, "seq_len": seq_len}
        print_json(about | {"precision": precision, "precision_reason": reason} | cost)
        return
    typer.echo(
        f"{name}: width {model.width}, {model.depth} layers ({model.resolved_layer_types}), "
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
