"""``mmrec chain``."""

import contextlib
import shlex
from pathlib import Path
from typing import Annotated

import typer

from mmrec.cli.session import TRAINER_OPTIONS, run_to_end, say
from mmrec.runtime.interrupts import exit_on_signal, tolerate_closed_output


def chain(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="TOML file with [[stage]] tables.")
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Start over; overwrite the stages.")
    ] = False,
) -> None:
    """Train models of growing size, each from the one before: mmrec chain recipe.toml.

    The same command continues an interrupted chain.
    """
    from mmrec.training import staged

    continue_with = shlex.join(["mmrec", "chain", str(recipe)])
    lock, stages, start_scores = staged.open_stages(recipe, force=force)
    folder = lock.folder
    with tolerate_closed_output(), lock:
        for index, stage in enumerate(stages):
            if stage.is_finished:
                say(f"stage   {stage.folder}: finished before")
                continue
            say(f"stage   {stage.folder}: {index + 1} of {len(stages)}")
            with contextlib.ExitStack() as stack:
                with exit_on_signal(
                    f"stopped before the stage began; continue with: {continue_with}"
                ):
                    stage_lock, trainer, resume = staged.begin_stage(
                        stages, index, start_scores, **TRAINER_OPTIONS
                    )
                    stack.enter_context(stage_lock)
                run_to_end(trainer, stage_lock, resume=resume, continue_with=continue_with)
        rows = staged.write_report(folder, stages, start_scores, say)
    say(staged.HEADER)
    for row in rows:
        say(staged.report_row(row))
    written = [
        f"; {title} {folder / name}"
        for title, name in (("report", "report.json"), ("curve", "chain.png"))
        if (folder / name).exists()
    ]
    total = {name: sum(row[name] for row in rows) for name in ("tokens", "seconds", "flops")}
    say(
        f"in all {total['tokens'] / 1e6:.2f} M tokens, {total['seconds']:,.0f} s, "
        f"{total['flops']:.2e} FLOPs{''.join(written)}"
    )
