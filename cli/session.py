"""What the training commands share: run a trainer to its end, and print the result."""

import shlex
import sys
from typing import TYPE_CHECKING, Any, TextIO

import typer

from mmrec.cli.retry import ask_to_free_space
from mmrec.cli.torchrun import command_line
from mmrec.cli.warmup import compiling_side_by_side
from mmrec.errors import TrainingDivergedError, WeightsDivergedError
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
    resume_command = command_line(shlex.join(["train", "--resume", str(folder)]), parallel)
    try:
        with compiling_side_by_side("train", "eval", "generate"):
            summary = trainer.fit(resume=resume, lock=lock)
    except TrainingDivergedError as error:
        say(
            f"error: {error}; {_divergence_advice(trainer, error, resume_command)}", file=sys.stderr
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
    if trainer.corpus.train.answers is not None:
        say(f"{curve}next: {shlex.join(['mmrec', 'chat', str(folder)])}")
        return
    generate_command = shlex.join(["mmrec", "generate", "--model", str(folder), "--prompt"])
    say(f'{curve}next: {generate_command} "..."')


def _divergence_advice(
    trainer: "Trainer", error: TrainingDivergedError, resume_command: str
) -> str:
    """Which checkpoint is good, and what to do.

    Each checkpoint of an earlier step is good, since a step was taken from it. That of the newest
    step is good unless its weights are what diverged.
    """
    from mmrec.checkpoint.header import read_metadata
    from mmrec.checkpoint.manager import list_checkpoints

    found = list_checkpoints(trainer.run_dir)
    good, is_lost = found, isinstance(error, WeightsDivergedError)
    if is_lost:
        good = [path for path in found if read_metadata(path).step < trainer.progress.step]
    saved = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"
    advice = "start again with a lower --lr and --matrix-lr"
    policies = "rollback" if is_lost else "skip (or rollback)"
    if good and good[-1] == found[-1] and trainer.config.evaluation.on_nan != policies:
        advice += f", or continue with {resume_command} --on-nan {policies}"  # from that checkpoint
    taken = "" if is_lost else "the weights are those before that step; "
    return f"{taken}{saved}; {advice}"
