"""``mmrec status``."""

import dataclasses
import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmrec.cli.streams import print_json
from mmrec.errors import InputError
from mmrec.runtime.names import printable

if TYPE_CHECKING:
    from mmrec.training.status import RunStatus

SECONDS_BETWEEN_LOOKS = 2.0
CLEAR = "\x1b[H\x1b[2J"


def status(
    where: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="Run folder, or a folder of runs; by default runs."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again until the run ends.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where a run stands, while it trains or after it ended: mmrec status RUN."""
    from mmrec.training.status import find_run, read_status, text_curve

    if watch and (as_json or not sys.stdout.isatty()):
        raise InputError("--watch needs a terminal; for another program: --json, again and again")
    run = find_run(where)
    while True:
        now, log = read_status(run)
        if as_json:
            print_json(dataclasses.asdict(now))
            return
        width = shutil.get_terminal_size().columns
        lines = [*map(printable, _describe(now)), *text_curve(log.curve, min(width, 100) - 1)]
        typer.echo(CLEAR * watch + "\n".join(lines))
        if not watch or now.state != "running":
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _describe(now: "RunStatus") -> list[str]:
    """The lines of a status, for people."""
    from mmrec.training.metrics import format_duration

    lines = [f"run     {now.run}", f"state   {now.state_in_words}"]
    of = "" if now.total_steps is None else f" of {now.total_steps:,}"
    done = "" if now.fraction_done is None else f", {now.fraction_done:.1%} of the run"
    lines.append(f"step    {now.step:,}{of}{done}; {_age(now.last_step_age)}")
    if now.total_steps is None and now.length is not None:
        lines.append(f"length  {now.length}")
    if now.train_loss is not None:
        lines.append(f"loss    {now.train_loss:.4f} training, the newest steps")
    if now.val_loss is not None and now.val_bits_per_byte is not None:
        lines.append(
            f"        {now.val_loss:.4f} validation at step {now.val_step:,}, "
            f"{now.val_bits_per_byte:.4f} bits per byte"
        )
    if now.best_val_loss is not None:
        lines.append(f"best    {now.best_val_loss:.4f} at step {now.best_step:,}")
    if now.tokens_per_second is not None:
        lines.append(f"speed   {now.tokens_per_second:,} tokens/s")
    times = [f"{format_duration(now.seconds)} of training"] if now.seconds is not None else []
    times += [f"{format_duration(now.seconds_left)} left"] if now.seconds_left is not None else []
    lines += [f"time    {', '.join(times)}"] if times else []
    if now.checkpoint is None or now.checkpoint_age is None:
        return [*lines, "saved   no checkpoint yet"]
    return [*lines, f"saved   {now.checkpoint}, {_age(now.checkpoint_age)}"]


def _age(seconds: float) -> str:
    """An age in words: ``3 minutes ago``."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if (count := math.floor(seconds / size)) or size == 1:
            return f"{count} {unit}{'s' * (count != 1)} ago"
    raise AssertionError
