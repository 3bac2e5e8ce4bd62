"""``mmrec finetune``."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mmrec.cli.options import ALL_SETTINGS, ModelOption, required_model, settings_options
from mmrec.cli.session import NOTHING_TO_SAVE, TRAINER_OPTIONS, run_to_end, say
from mmrec.cli.torchrun import check_launch
from mmrec.config import TRAIN_SETTINGS
from mmrec.errors import InputError
from mmrec.runtime.interrupts import exit_on_signal, tolerate_closed_output

KEPT = ("tokenizer", "vocab", "initialize_from", "from_scratch", "replay_data")
"""Settings that the model decides."""
SETTINGS = [*(name for name in TRAIN_SETTINGS if name not in KEPT), "dropout"]
DATA = dataclasses.replace(TRAIN_SETTINGS["data"], default="")
"""Fine-tuning has no text by default."""


@settings_options(SETTINGS, declared={**ALL_SETTINGS, "data": DATA})
def finetune(
    where: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN|CHECKPOINT",
            help="The model that is trained; or a name of 'mmrec models'.",
        ),
    ] = None,
    model: ModelOption = None,
    chat: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Instead of --data, conversations in JSON lines: messages, or prompt and "
            "completion. The answers are learnt.",
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Jinja template of the chats; by default the model's own, or mmrec's.",
        ),
    ] = None,
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
    if (chat is None) == ("data" not in settings):
        got = "neither" if chat is None else "both"
        raise InputError(
            f"give --data, a text, or --chat, a file of conversations; got {got} of them"
        )
    if chat_template is not None and chat is None:
        raise InputError(f"--chat-template has no effect without --chat; got {chat_template}")
    if chat is not None:
        settings["data"] = chat
    with tolerate_closed_output(), contextlib.ExitStack() as stack:
        with exit_on_signal(NOTHING_TO_SAVE):
            from mmrec.training.finetuning import begin_finetuning

            run = begin_finetuning(
                source,
                settings,
                is_chat=chat is not None,
                chat_template=chat_template,
                old_data=old_data,
                force=force,
                **TRAINER_OPTIONS,
            )
            stack.enter_context(run.lock)
        run_to_end(run.trainer, run.lock)
    for name, scores in run.score_best().items():
        corpus = run.corpora[name]
        kind = "text" if corpus.val.answers is None else "answers of"
        say(
            f"{name} {kind} {run.names[name]}: {scores['before']:.4f} bits per byte before, "
            f"{scores['after']:.4f} after"
        )
