"""``mmrec tune``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmrec.cli.options import ALL_SETTINGS, PRESET_HELP, settings_options
from mmrec.cli.session import say
from mmrec.cli.torchrun import check_launch
from mmrec.cli.warmup import compiling_side_by_side
from mmrec.config import DataConfig, ModelConfig, OptimizerConfig
from mmrec.errors import InputError, TrainingDivergedError
from mmrec.runtime.interrupts import exit_on_signal, tolerate_closed_output

SECTIONS = (DataConfig.section, OptimizerConfig.section, ModelConfig.section)
SETTINGS = [
    *(name for name, s in ALL_SETTINGS.items() if s.section in SECTIONS),
    "eval_tokens",
]
"""Settings that may be given, and are then not searched."""
CONTINUE = "stopped; the same command continues the search"


@settings_options(SETTINGS)
def tune(
    minutes: Annotated[float, typer.Option(metavar="N", help="Minutes of the search.")] = 30.0,
    final_minutes: Annotated[
        float | None,
        typer.Option(
            "--for",
            metavar="N",
            help="Minutes that you will train with what is found; by default those of the longest "
            "trials.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="PRESET", help=f"{PRESET_HELP} Default: tiny.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with settings, which are not searched."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder of the search; by default in runs.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew in a folder that holds a search.")
    ] = False,
    **settings: Any,
) -> None:
    """Search settings for a text: mmrec tune --minutes 30 --data book.txt.

    Learning rates, weight decay, dropout, batch size and width are searched, except for those that
    are given. Interrupted, the same command continues.
    """
    check_launch(None)
    with tolerate_closed_output(), exit_on_signal(CONTINUE):
        from mmrec.training.tuning import open_search

        with open_search(
            preset,
            minutes,
            final_minutes,
            settings,
            config_path=config,
            out=out,
            force=force,
            echo=say,
        ) as search:
            say(search.describe_plan())
            try:
                with compiling_side_by_side("train", "eval"):
                    search.run()
            except TrainingDivergedError as error:
                say(f"error: {error}, with the settings as they are", file=sys.stderr)
                raise typer.Exit(1) from None
            if search.signal_number:
                say(CONTINUE, file=sys.stderr)
                raise typer.Exit(128 + search.signal_number)
            if not search.best():
                raise InputError("no trial gave a finite loss")
            for line in (*search.table(), *search.conclusion()):
                say(line)
            say(f"train with: {search.train_command()}")
