"""The ``mmrec`` command: one Typer app, one file a command."""

import contextlib
import ctypes
import os
import sys
from typing import Annotated

import typer

from mmrec.config import VERSION, InputError

# torch and Numba each bring an OpenMP pool whose idle threads spin; while one pool spins the other
# has no core to work on. So let them sleep, which must be said before either is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Training frees and asks for the same tens of megabytes at each step. By default glibc gives them
# back to the system and faults the pages in again: 12,000 a step of tiny, a tenth of its time.
with contextlib.suppress(AttributeError, OSError):  # another C library
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: keep what is freed at the top of the heap
    libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: and take blocks up to 32 MiB from there

from mmrec.cli import bench, data
from mmrec.cli.eval import evaluate
from mmrec.cli.generate import generate
from mmrec.cli.info import info
from mmrec.cli.train import train

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
