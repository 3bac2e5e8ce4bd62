"""``mmrec distill``."""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmrec.cli.options import ALL_SETTINGS, PRESET_HELP, settings_options
from mmrec.cli.session import TRAINER_OPTIONS, run_to_end, say
from mmrec.cli.torchrun import check_launch
from mmrec.cli.warmup import compiling_side_by_side
from mmrec.config import LENGTHS
from mmrec.runtime.interrupts import exit_on_signal, tolerate_closed_output

SETTINGS = [
    name for name in ALL_SETTINGS if name not in (*LENGTHS, "out", "teachers", "from_scratch")
]
"""Settings of all runs."""


@settings_options(SETTINGS)
def distill(
    preset: Annotated[
        str | None, typer.Argument(metavar="PRESET", help=f"{PRESET_HELP} Default: tiny.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(metavar="N", help="Minutes of all training together.")
    ] = 15.0,
    members: Annotated[int, typer.Option(metavar="N", help="Models that are trained first.")] = 4,
    member_share: Annotated[
        float, typer.Option(metavar="X", help="Share of the minutes for them.")
    ] = 0.55,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of all runs; by default in runs.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew in a folder that holds an ensemble.")
    ] = False,
    **settings: Any,
) -> None:
    """Train several models, then one that learns their mean: mmrec distill --data book.txt.

    For a small text and much time, where a single model memorises. Interrupted, the same command
    continues.
    """
    check_launch(None)
    continue_with = shlex.join(["mmrec", *sys.argv[1:]])
    stopped = f"stopped; continue with: {continue_with}"
    with tolerate_closed_output(), contextlib.ExitStack() as stack:
        with exit_on_signal(stopped):
            from mmrec.training.ensemble import Ensemble, describe_run, is_finished

            ensemble = stack.enter_context(
                Ensemble(
                    preset,
                    settings,
                    minutes=minutes,
                    members=members,
                    member_share=member_share,
                    config_path=config,
                    out=out,
                    force=force,
                    echo=say,
                )
            )
            say(ensemble.describe())
        with compiling_side_by_side("train", "eval"):
            ensemble.train_members()
        if ensemble.signal_number:
            say(stopped, file=sys.stderr)
            raise typer.Exit(128 + ensemble.signal_number)
        if is_finished(ensemble.student):
            say(f"student {ensemble.student}: finished before")
        else:
            with exit_on_signal(stopped):
                lock, trainer, resume = ensemble.begin_student(**TRAINER_OPTIONS)
                stack.enter_context(lock)
            run_to_end(trainer, lock, resume=resume, continue_with=continue_with)
        for run in (*ensemble.members, ensemble.student):
            say(describe_run(run))
