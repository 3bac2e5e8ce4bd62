"""The ``mmrec`` command: one Typer app, one file a command."""

import os
import sys
from typing import Annotated

import typer

from mmrec.cli import bench, data
from mmrec.cli.eval import evaluate
from mmrec.cli.generate import generate
from mmrec.cli.info import info
from mmrec.cli.startup import prepare_process
from mmrec.cli.train import train
from mmrec.config import VERSION, InputError

app = typer.Typer(
    help="Train and run recurrent language models on a CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("info")(info)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmrec {VERSION}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train and run recurrent language models on a CPU."""


def run() -> None:
    """Run the command line. Exit codes: 0 done, 1 training failed, 2 bad input, 130 interrupted."""
    prepare_process(sys.argv[1:3])
    try:
        app()
    except InputError as error:
        _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a reader such as head left
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
