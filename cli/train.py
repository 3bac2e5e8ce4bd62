"""``mmrec train``."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from mmrec.cli.options import ALL_SETTINGS, PRESET_HELP, misplaced_path_hint, settings_options
from mmrec.cli.session import NOTHING_TO_SAVE, TRAINER_OPTIONS, run_to_end, say
from mmrec.cli.torchrun import KINDS, check_launch, open_process_group
from mmrec.config import AUTO, PRESETS, RESUMABLE_SETTINGS
from mmrec.errors import InputError
from mmrec.runtime.interrupts import exit_on_signal, tolerate_closed_output


@settings_options()
def train(
    preset: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET",
            help=f"{PRESET_HELP} auto chooses by text and time. With --resume, the run folder.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with preset and tables such as [data], [model], [optimizer]."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue RUN, or the newest run: mmrec train --resume RUN."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what auto chooses, and train nothing.")
    ] = False,
    parallel: Annotated[
        str | None,
        typer.Option(metavar="|".join(KINDS), help="Distributed training, under torchrun."),
    ] = None,
    **settings: Any,
) -> None:
    """Train a model, for example: mmrec train tiny --data book.txt.

    Settings come from the preset, then from --config, then from the options. auto chooses what is
    not given. A run that is resumed takes a longer length, such as --minutes +60, which is added to
    what it has trained; and with --data its text to which more was added.
    """
    if resume:
        _check_resume(preset, config, force, dry_run, settings)
        settings |= {} if preset is None else {"out": preset}
    elif (
        preset is not None
        and preset not in (AUTO, *PRESETS)
        and (hint := misplaced_path_hint(preset))
    ):
        raise InputError(f"PRESET must be one of {', '.join(PRESETS)}; got {preset!r}{hint}")
    if dry_run and parallel:
        raise InputError(f"--dry-run trains nothing; leave out --parallel; got {parallel}")
    check_launch(parallel)
    with tolerate_closed_output(), contextlib.ExitStack() as stack:
        with exit_on_signal(NOTHING_TO_SAVE):
            process_group = stack.enter_context(open_process_group(parallel))
            from mmrec.runtime.distributed import SINGLE_PROCESS
            from mmrec.training import setup

            options = TRAINER_OPTIONS | {"process_group": process_group or SINGLE_PROCESS}
            lock = None
            if process_group and process_group.rank:
                trainer, resume = setup.receive_plan(process_group)
            elif resume:
                takes_additions = "data" in settings
                lock, trainer = setup.resume_run(
                    settings, takes_additions=takes_additions, **options
                )
            else:
                processes = process_group.size if process_group else 1
                plan = setup.plan_run(preset, config, settings, processes=processes)
                if dry_run:
                    _show_choice(plan.note)
                    return
                lock, trainer = setup.begin_run(plan, force=force, **options)
            if lock:
                stack.enter_context(lock)
                if process_group:
                    setup.broadcast_plan(trainer, resume=resume)
        run_to_end(trainer, lock, resume=resume, parallel=parallel)


def _show_choice(note: str) -> None:
    if not note:
        raise InputError("--dry-run shows what auto chooses: mmrec train auto --dry-run")
    say(note)


def _check_resume(
    preset: str | None, config: Path | None, force: bool, dry_run: bool, settings: dict[str, Any]
) -> None:
    if preset is not None and "out" in settings:
        raise InputError(
            f"give the run once, as RUN or as --out; got {preset} and --out {settings['out']}"
        )
    is_preset = preset in (AUTO, *PRESETS) and not Path(preset).is_dir()
    wrong = ["PRESET"] * is_preset + ["--config"] * (config is not None)
    wrong += ["--force"] * force + ["--dry-run"] * dry_run
    wrong += [ALL_SETTINGS[name].flag for name in settings if name not in RESUMABLE_SETTINGS]
    if wrong:
        raise InputError(f"--resume keeps the settings of its run; {wrong[0]} cannot be given")
