"""``mmrec info``."""

import json
from typing import Annotated

import typer

from mmrec.config import preset


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a preset costs: parameters, FLOPs, memory, time. Allocates nothing."""
    config = preset(name)
    from mmrec.info import describe

    made = describe(config)
    if as_json:
        typer.echo(json.dumps({"preset": name} | made, indent=1))
        return
    typer.echo(f"{name}: width {config.width}, {config.depth} layers ({config.kinds}), "
               f"{config.heads} heads, vocabulary {config.vocab_size:,}\n")  # fmt: skip
    total = made["parameters"]["total"]
    for part, count in made["parameters"].items():
        typer.echo(f"  {part:<20}{count:>15,}{count / total:>8.1%}")
    flops, size = made["flops_per_token"], made["bytes"]
    pace = _time(made["seconds_per_million_tokens"])
    lines = {
        "FLOPs a token": f"{flops['forward'] / 1e6:,.1f} M forward, "
        f"{flops['training'] / 1e6:,.1f} M in training",
        "memory to train": f"{_size(size['training'])} (batch 8 × 256 tokens, AdamW)",
        "memory to generate": f"{_size(size['generation'])}, of which state {_size(size['state'])}",
        "time here": f"at least {pace} per million training tokens",
    }  # fmt: skip
    typer.echo("")
    for key, text in lines.items():
        typer.echo(f"  {key:<20}{text}")
