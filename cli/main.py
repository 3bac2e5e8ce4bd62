"""The ``mmrec`` command: one Typer app, one file a command."""

import itertools
import os
import sys
from typing import Annotated, Any

import typer

from mmrec.cli import bench, data
from mmrec.cli.chain import chain
from mmrec.cli.compare import compare
from mmrec.cli.eval import evaluate
from mmrec.cli.finetune import finetune
from mmrec.cli.generate import generate
from mmrec.cli.grow import grow
from mmrec.cli.info import info
from mmrec.cli.startup import prepare_process
from mmrec.cli.train import train
from mmrec.config import VERSION
from mmrec.errors import InputError

app = typer.Typer(
    help="Train and run recurrent language models on a CPU.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("generate")(generate)
app.command("grow")(grow)
app.command("finetune")(finetune)
app.command("chain")(chain)
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


USAGE: Any = typer.BadParameter.__mro__[1]  # UsageError, of click or of Typer's copy of it


def run() -> None:
    """Run the command line. Exit codes: 0 done, 1 training failed, 2 bad input, 128 + n signal."""
    prepare_process(sys.argv[1:3])
    command = typer.main.get_command(app)
    try:
        with command.make_context("mmrec", sys.argv[1:] or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except USAGE as error:
        _fail(_usage(error))
    except InputError as error:
        _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a reader such as head left
        sys.exit(0)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        _fail(
            "not enough memory: smaller sizes (--batch, --seq-len, --shape, the preset) need less"
        )
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _usage(error: Any) -> str:
    """Typer's complaint, with what came (it leaves that out) and where help is."""
    message = error.format_message().rstrip(".")
    for option in getattr(getattr(error, "param", None), "opts", []):
        came = [b for a, b in itertools.pairwise(sys.argv) if a == option]
        came += [a.split("=", 1)[1] for a in sys.argv if a.startswith(f"{option}=")]
        message += f"; got {came[-1]!r}" if came else ""
    return f"{message} (see {error.ctx.command_path if error.ctx else 'mmrec'} --help)"


def _fail(message: str) -> None:
    if _speaks():
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _speaks() -> bool:
    """Whether this process is the one to say it: of those that torchrun started alike, the first;
    once they work together, the one that has something to say (see mmrec.runtime.distributed)."""
    dist: Any = sys.modules.get("torch.distributed")
    together = dist is not None and dist.is_available() and dist.is_initialized()
    return together or os.environ.get("RANK", "0") == "0"
