"""``mmrec compare``."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import typer

from mmrec.cli.options import several_models
from mmrec.cli.streams import print_json
from mmrec.runtime.names import printable

PICTURE = "compare.png"


def compare(
    where: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Run folders.")
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option("--model", metavar="RUN", help="The same as the argument; repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The picture of all curves.", show_default=PICTURE)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; draw nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a file --out that is no picture of mmrec.")
    ] = False,
) -> None:
    """Put runs side by side: a table, and their validation curves in one picture."""
    from mmrec.checkpoint.outputs import check_output
    from mmrec.errors import InputError
    from mmrec.evaluation.compare import READ, draw_curves, read_run

    runs = several_models(where, model)
    if not runs:
        raise InputError("name run folders: mmrec compare runs/tiny-stdlib runs/mini-stdlib")
    if as_json and (out is not None or force):
        raise InputError("--json draws nothing: leave out --out and --force")
    picture = out or Path(PICTURE)
    if not as_json:
        inputs = [run / name for run in runs for name in READ]
        check_output(picture, "picture", inputs=inputs, force=force)
    curves = [read_run(run) for run in runs]
    if as_json:
        print_json([dataclasses.asdict(c) for c in curves])
        return
    names = {c.run: printable(c.run) for c in curves}
    width = max(4, *map(len, names.values()))
    typer.echo(
        f"{'run':<{width}} {'steps':>8} {'tokens':>9} {'time':>8} {'best b/B':>9} "
        f"{'at step':>8} {'whole split':>12}  ended"
    )
    for c in sorted(curves, key=lambda c: c.best[1]):
        time = f"{c.seconds:,.0f} s" if math.isfinite(c.seconds) else "-"
        whole = f"{c.split_bits_per_byte:.4f}" if math.isfinite(c.split_bits_per_byte) else "-"
        step, best = c.best
        tokens = f"{c.tokens / 1e6:.2f} M"
        typer.echo(
            f"{names[c.run]:<{width}} {c.steps:>8,} {tokens:>9} {time:>8} {best:>9.4f} "
            f"{step:>8,} {whole:>12}  {c.ended}"
        )
    if len({c.fingerprint for c in curves if c.fingerprint}) > 1:
        typer.echo(
            "note: these runs were not trained on the same tokens; where their texts "
            "differ, so do the bytes that are scored"
        )
    draw_curves(curves, picture, force=force)  # last: without a picture there is still the table
    typer.echo(f"curves: {printable(picture)}")
