"""What the training commands share: run a trainer to its end, and print the result."""

import shlex
import sys
from typing import TYPE_CHECKING, Any, TextIO

import typer

from mmrec.cli.retry import ask_to_free_space
from mmrec.cli.torchrun import command_line
from mmrec.errors import TrainingDivergedError
from mmrec.runtime.names import printable

if TYPE_CHECKING:
    from mmrec.runtime.locking import FolderLock
    from mmrec.training.trainer import Trainer


def say(line: str, file: TextIO | None = None) -> None:
    """Print one line at once. A control character in a name does not reach the terminal."""
    print(printable(line), file=file, flush=True)


TRAINER_OPTIONS: dict[str, Any] = {"echo": say, "retry": ask_to_free_space}
"""Arguments of every trainer that a command builds."""
NOTHING_TO_SAVE = "stopped before training began: there was nothing to save"


def run_to_end(
    trainer: "Trainer",
    lock: "FolderLock | None",
    *,
    resume: bool = False,
    parallel: str | None = None,
    continue_with: str | None = None,
) -> None:
    """Train to the end and print the result.

    Args:
        trainer: ready to train.
        lock: the lock of its folder, on rank 0.
        resume: continue from the newest checkpoint.
        parallel: ``ddp`` or ``fsdp``, for the command that continues the run.
        continue_with: the command that continues the run, if it is not ``mmrec train --resume``.

    Raises:
        typer.Exit: code 1 if training diverged, 128 + n after signal n.
    """
    folder = trainer.run_dir
    quoted = shlex.quote(str(folder))  # commands can be copied into a shell
    resume_command = command_line(f"train --resume --out {quoted}", parallel)
    try:
        summary = trainer.fit(resume=resume, lock=lock)
    except TrainingDivergedError as error:
        from mmrec.checkpoint.manager import list_checkpoints

        good = list_checkpoints(folder)
        saved = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        say(
            f"error: {error}, which never reached the weights; {saved}; start again with a lower "
            f"--lr and --matrix-lr, or continue with {resume_command} --on-nan skip (or rollback)",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    if summary["ended"] == "signal":
        say(
            f"stopped at step {summary['steps']:,} and saved; continue with: "
            f"{continue_with or resume_command}",
            file=sys.stderr,
        )
        raise typer.Exit(128 + trainer.stop_signal.signal_number)
    if summary["ended"] == "early":
        patience = trainer.config.evaluation.patience
        say(f"stopped early: no better validation loss in {patience} validations")
    say(
        f"trained {summary['tokens']:,} tokens in {summary['seconds']:.0f} s "
        f"({summary['tokens_per_second']:,} tokens/s)"
    )
    best = f"best model {folder / 'best.h5'}, of step {summary['best_step']:,}"
    say(f"{best}: {summary['best_reason']}")
    curve = f"curve {folder / 'loss.png'}; " if (folder / "loss.png").exists() else ""
    say(f'{curve}next: mmrec generate --model {quoted} --prompt "..."')
