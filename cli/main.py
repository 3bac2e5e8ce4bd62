"""The ``mmrec`` command: one Typer app, one file per command."""

import contextlib
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
from mmrec.cli.options import App
from mmrec.cli.startup import prepare_process
from mmrec.cli.train import train
from mmrec.config import VERSION
from mmrec.errors import InputError
from mmrec.runtime.interrupts import end_at_second_signal
from mmrec.runtime.names import printable

app = App(help="Train and run recurrent language models on a CPU.", pretty_exceptions_enable=False)
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


USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # of click, or of Typer's own copy of it


def run() -> None:
    """Run the command line. Exit codes: 0 done, 1 training failed, 2 bad input, 128 + n signal."""
    prepare_process(sys.argv[1:3])
    # torchrun sends each of its processes several signals, one of which stops all of them together
    is_distributed = "RANK" in os.environ
    with contextlib.nullcontext() if is_distributed else end_at_second_signal():
        _run_command()


def _run_command() -> None:
    try:
        command = typer.main.get_command(app)
        code = command.main(sys.argv[1:] or ["--help"], "mmrec", standalone_mode=False)
        sys.stdout.flush()
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except USAGE_ERROR as error:
        _fail(_usage_message(error))
    except InputError as error:
        _fail(str(error))
    except BrokenPipeError:
        # the reader of a pipe, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
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
    for option in getattr(getattr(error, "param", None), "opts", []):
        values = [b for a, b in itertools.pairwise(sys.argv) if a == option]
        values += [a.split("=", 1)[1] for a in sys.argv if a.startswith(f"{option}=")]
        message += f"; got {values[-1]!r}" if values else ""
    return f"{message} (see {error.ctx.command_path if error.ctx else 'mmrec'} --help)"


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
