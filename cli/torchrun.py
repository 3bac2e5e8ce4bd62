"""Distributed runs under torchrun: rank 0 reads the command line and sends the others its plan."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmrec.errors import InputError, ProcessLostError, did_you_mean

if TYPE_CHECKING:
    from mmrec.runtime.distributed import ProcessGroup

KINDS = ["ddp", "fsdp"]
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets in the environment of each process."""


def check_launch(kind: str | None) -> None:
    """Check that this process was started as ``--parallel`` needs it.

    Args:
        kind: the value of ``--parallel``; None in a single process.

    Raises:
        InputError: torchrun is missing, or started processes that would write the same run.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if kind is None:
        if count > 1:
            raise InputError(
                f"torchrun started {count} processes, which would all write the same run: train "
                "takes --parallel ddp or --parallel fsdp, finetune works in one process"
            )
        return
    if kind not in KINDS:
        raise InputError(
            f"parallel must be one of {', '.join(KINDS)}; got {kind!r}{did_you_mean(kind, KINDS)}"
        )
    if not all(name in os.environ for name in VARIABLES):
        raise InputError(
            "--parallel needs the processes that torchrun starts: torchrun --nproc-per-node 2 "
            f"-m mmrec {shlex.join(sys.argv[1:])}"
        )


def command_line(arguments: str, kind: str | None) -> str:
    """An mmrec command line for as many processes as run now."""
    if kind is None:
        return f"mmrec {arguments}"
    local_count, count = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ["WORLD_SIZE"]
    # with several machines each has launch options of its own
    launch = f"--nproc-per-node {local_count}" if local_count == count else "…"
    return f"torchrun {launch} -m mmrec {arguments} --parallel {kind}"


@contextlib.contextmanager
def open_process_group(kind: str | None) -> Iterator["ProcessGroup | None"]:
    """Join the processes of a distributed run; yield None in a single process.

    All processes but rank 0 print nothing, except that the first process to fail prints its error.

    Args:
        kind: ``ddp`` or ``fsdp``; None for a single process.

    Raises:
        typer.Exit: a process was lost, or the block raised it.
    """
    if kind is None:
        yield None
        return
    ended: typer.Exit | None = None
    lost = ""
    with _silence() if os.environ["RANK"] != "0" else contextlib.nullcontext():
        from mmrec.runtime.distributed import TorchrunGroup

        try:
            with TorchrunGroup(kind) as process_group:
                try:
                    yield process_group
                except typer.Exit as error:  # all processes end with it
                    ended = error
        except ProcessLostError as error:
            lost = str(error)
    if lost:
        line_end = "\n" * (os.environ["RANK"] != "0")  # after the progress bar of a lost rank 0
        print(
            f"{line_end}error: {lost}; the checkpoints are intact: continue with --resume",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    if ended:
        raise ended


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
