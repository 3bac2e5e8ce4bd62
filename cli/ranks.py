"""Several processes under torchrun: one of them reads the command line, the others are told."""

import contextlib
import dataclasses
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmrec.config import ModelConfig, TrainConfig
from mmrec.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from mmrec.runtime.distributed import ProcessGroup
    from mmrec.training.trainer import Trainer

KINDS = ["ddp", "fsdp"]
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Order:
    """What rank 0 tells the others to train."""

    folder: Path
    title: str
    model: ModelConfig
    config: TrainConfig
    corpus: Path
    fingerprint: str
    tokenizer: str
    """As JSON."""
    resume: bool


def check_launch(kind: str | None) -> None:
    """Raise InputError unless this process was started as ``--parallel`` wants it."""
    count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if kind is None:
        if count > 1:
            raise InputError(
                f"torchrun started {count} processes, which would all write the same "
                "run: train takes --parallel ddp or --parallel fsdp, finetune works "
                "in one process"
            )
        return
    if kind not in KINDS:
        raise InputError(
            f"parallel must be one of {', '.join(KINDS)}; got {kind!r}{did_you_mean(kind, KINDS)}"
        )
    if not all(name in os.environ for name in TORCHRUN):
        raise InputError(
            "--parallel needs the processes that torchrun starts: torchrun "
            f"--nproc-per-node 2 -m mmrec {shlex.join(sys.argv[1:])}"
        )


def command(arguments: str, kind: str | None) -> str:
    """A command line of mmrec's for as many processes as there are now."""
    if kind is None:
        return f"mmrec {arguments}"
    here, count = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ["WORLD_SIZE"]
    where = f"--nproc-per-node {here}" if here == count else "…"  # each machine has its own
    return f"torchrun {where} -m mmrec {arguments} --parallel {kind}"


@contextlib.contextmanager
def together(kind: str | None) -> Iterator["ProcessGroup | None"]:
    """The processes that train together; None if this one is alone. All but rank 0 are mute: what
    is wrong with one of them is an exception, and the first to have one says it."""
    if kind is None:
        yield None
        return
    ended: typer.Exit | None = None
    lost = ""
    with _mute() if os.environ["RANK"] != "0" else contextlib.nullcontext():
        from mmrec.errors import ProcessLostError
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
        end = "\n" * (os.environ["RANK"] != "0")  # of the bar that a lost rank 0 leaves
        print(
            f"{end}error: {lost}; the checkpoints are whole: go on from them with --resume",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    if ended:
        raise ended


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def lead(trainer: "Trainer", *, resume: bool) -> None:
    """Tell the other processes what is trained here."""
    corpus, model = trainer.corpus, trainer.model.config
    trainer.process_group.broadcast_object(
        Order(
            trainer.folder,
            trainer.preset,
            model,
            trainer.config,
            corpus.path.resolve(),
            corpus.info["fingerprint"],
            corpus.tokenizer.to_json(),
            resume,
        )
    )
    trainer.process_group.local_rank_zero_first(lambda: corpus)


def follow(process_group: "ProcessGroup") -> tuple["Trainer", bool]:
    """The trainer of a process that is told what to train, and whether it resumes a run.

    Raises InputError if the text is not to be had here, or is another one.
    """
    from mmrec.data.corpus import Corpus
    from mmrec.data.prepare import prepare, reading
    from mmrec.data.tokenizer import Tokenizer
    from mmrec.training.trainer import Trainer

    order: Order = process_group.broadcast_object(None)  # type: ignore[assignment]
    config, path = order.config, order.corpus

    def read() -> Corpus:  # one that was prepared here, or on a disk that machines share
        known = Tokenizer.from_json(order.tokenizer)
        return Corpus.open(
            path if path.exists() else prepare(config.data, known, how=reading(config))
        )

    corpus = process_group.local_rank_zero_first(read)
    if corpus.info["fingerprint"] != order.fingerprint:
        raise InputError(
            f"the text of {config.data} on {platform.node()} must be that of rank 0; "
            "it is another one"
        )
    made = Trainer(
        order.folder, corpus, order.model, config, order.title, process_group=process_group
    )
    return made, order.resume
