"""``mmrec finetune``."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from mmrec.cli.options import ModelOption, required_model, settings_options
from mmrec.cli.session import NOTHING_TO_SAVE, TRAINER_OPTIONS, run_to_end, say
from mmrec.cli.torchrun import check_launch
from mmrec.config import TRAIN_SETTINGS
from mmrec.runtime.interrupts import exit_on_signal, tolerate_closed_output

KEPT = ("tokenizer", "vocab", "initialize_from", "replay_data")
"""Settings that the model decides."""
SETTINGS = [*(name for name in TRAIN_SETTINGS if name not in KEPT), "dropout"]


@settings_options(SETTINGS, required=["data"])
def finetune(
    where: Annotated[
        Path | None,
        typer.Argument(metavar="RUN|CHECKPOINT", help="The model that is trained on."),
    ] = None,
    model: ModelOption = None,
    old_data: Annotated[
        str | None,
        typer.Option(help="The model's earlier text; by default what its run trained on."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the run in --out.")] = False,
    **settings: Any,
) -> None:
    """Continue training with another text: mmrec finetune runs/tiny-stdlib --data book.txt."""
    check_launch(None)
    source = required_model(where, model, "finetune runs/tiny-stdlib --data book.txt")
    with tolerate_closed_output(), contextlib.ExitStack() as stack:
        with exit_on_signal(NOTHING_TO_SAVE):
            from mmrec.training.finetuning import begin_finetuning

            run = begin_finetuning(
                source, settings, old_data=old_data, force=force, **TRAINER_OPTIONS
            )
            stack.enter_context(run.lock)
        run_to_end(run.trainer, run.lock)
    for name, scores in run.score_best().items():
        text = run.corpora[name].info["source"]
        say(
            f"{name} text {text}: {scores['before']:.4f} bits per byte before, "
            f"{scores['after']:.4f} after"
        )
