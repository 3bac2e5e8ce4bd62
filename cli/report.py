"""``mmrec report``."""

from pathlib import Path
from typing import Annotated

import typer

from mmrec.cli.session import say


def report(
    where: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="Run folder, or a folder of runs, of which the newest is taken."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; by default RUN/report.html.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a file that is no such page.")
    ] = False,
) -> None:
    """Write a page about a run, also while it trains: mmrec report RUN --out run.html."""
    from mmrec.training.report import write_report
    from mmrec.training.status import REPORT_FILE, find_run

    run = find_run(where)
    path = run / REPORT_FILE if out is None else out
    write_report(run, path, force=force)
    say(f"report  {path}")
