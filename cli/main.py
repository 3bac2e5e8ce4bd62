"""The ``mmrec`` command: one Typer app, one file per command."""

import contextlib
import itertools
import os
import re
import sys
from typing import Annotated, Any

import typer

from mmrec.cli import bench, data
from mmrec.cli.chain import chain
from mmrec.cli.chat import chat
from mmrec.cli.compare import compare
from mmrec.cli.distill import distill
from mmrec.cli.eval import evaluate
from mmrec.cli.export import export, import_
from mmrec.cli.finetune import finetune
from mmrec.cli.generate import generate
from mmrec.cli.grow import grow
from mmrec.cli.info import info
from mmrec.cli.models import models
from mmrec.cli.options import App, misplaced_path_hint
from mmrec.cli.report import report
from mmrec.cli.score import score
from mmrec.cli.serve import serve
from mmrec.cli.startup import prepare_process
from mmrec.cli.status import status
from mmrec.cli.streams import OutputError, standard_streams
from mmrec.cli.train import train
from mmrec.cli.tune import tune
from mmrec.cli.warmup import warmup
from mmrec.config import VERSION
from mmrec.errors import InputError, did_you_mean
from mmrec.runtime.interrupts import end_at_second_signal
from mmrec.runtime.names import printable

app = App(
    help="Train and run recurrent language models on a CPU.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},  # of every command
)
app.command("train")(train)
app.command("tune")(tune)
app.command("distill")(distill)
app.command("status")(status)
app.command("report")(report)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("score")(score)
app.command("serve")(serve)
app.command("grow")(grow)
app.command("finetune")(finetune)
app.command("chain")(chain)
app.command("export")(export)
app.command("import")(import_)
app.command("models")(models)
app.command("info")(info)
app.command("warmup")(warmup)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmrec {VERSION}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Train and run recurrent language models on a CPU."""


TOO_LARGE = ("allocate memory", "size calculation overflowed", "multiplication overflow")
"""What torch says of tensors that do not fit in memory, or whose size is no 64-bit number."""
PLAIN_WORDS = {
    "Value error, ": "",
    "Input should be a valid integer.*": "must be a whole number",
    "Input should be a valid number.*": "must be a number",
    "Input should be (greater|less) than or equal to": r"must be \1 than or equal to",
}
"""Patterns in Typer's messages, and what is said instead."""
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # of click, or of Typer's own copy of it


def build_command() -> Any:
    """Build the command line from the app. Its help texts are shown as they are written."""
    command = typer.main.get_command(app)
    if typer.core.HAS_RICH:
        _escape_markup(command)
    return command


def _escape_markup(command: Any) -> None:
    """Escape square brackets in help texts, which Typer would read as markup and leave out."""
    for described in (command, *command.params):
        if described.help:
            described.help = described.help.replace("[", r"\[")
    for member in getattr(command, "commands", {}).values():
        _escape_markup(member)


def run() -> None:
    """Run the command line. Exit codes: 0 done, 1 training failed, 2 bad input, 128 + n signal."""
    # torchrun sends each of its processes several signals, one of which stops all of them together
    is_distributed = "RANK" in os.environ
    with standard_streams(), contextlib.nullcontext() if is_distributed else end_at_second_signal():
        prepare_process(sys.argv[1:3])
        _run()


def _run() -> None:
    try:
        arguments = sys.argv[1:] or ["--help"]
        code = build_command().main(arguments, "mmrec", standalone_mode=False)
        sys.stdout.flush()
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except USAGE_ERROR as error:
        _fail(_usage_message(error))
    except InputError as error:
        _fail(str(error))
    except OutputError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            sys.exit(0)  # the reader of a pipe, such as head, has ended
        _fail(f"cannot write standard output: {error}")
    except (MemoryError, RuntimeError) as error:
        is_too_large = any(words in str(error) for words in TOO_LARGE)
        if not (isinstance(error, MemoryError) or is_too_large):
            raise
        _fail(
            "not enough memory: smaller sizes (--batch-size, --seq-len, --shape, PRESET) need less"
        )
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror}")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_message(error: Any) -> str:
    """Typer's message, with the value that was given, which Typer leaves out, and where help is."""
    message = " ".join(error.format_message().split()).rstrip(".")
    for pattern, words in PLAIN_WORDS.items():
        message = re.sub(pattern, words, message)
    if option := getattr(error, "option_name", None):
        message = message.split(" (Possible options")[0]
        message += did_you_mean(option, getattr(error, "possibilities", None) or [])
    for option in getattr(getattr(error, "param", None), "opts", []):
        values = [b for a, b in itertools.pairwise(sys.argv) if a == option]
        values += [a.split("=", 1)[1] for a in sys.argv if a.startswith(f"{option}=")]
        message += f"; got {values[-1]!r}" if values else ""
    if match := re.match("No such command '(.*?)'", message):
        message += misplaced_path_hint(match[1])
    return f"{message} (see {_command_path()} --help)"


def _command_path() -> str:
    """The command that the arguments name, such as ``mmrec data inspect``."""
    path, command = "mmrec", typer.main.get_command(app)
    for word in sys.argv[1:]:
        members = getattr(command, "commands", {})
        if word not in members:
            break
        path, command = f"{path} {word}", members[word]
    return path


def _fail(message: str) -> None:
    if _may_print():
        print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


def _may_print() -> bool:
    """Whether this process prints its error.

    Until the processes that torchrun started have formed a group, only rank 0 prints. Afterwards
    the process that fails prints (see ``mmrec.runtime.distributed``).
    """
    dist: Any = sys.modules.get("torch.distributed")
    is_distributed = dist is not None and dist.is_available() and dist.is_initialized()
    return is_distributed or os.environ.get("RANK", "0") == "0"
