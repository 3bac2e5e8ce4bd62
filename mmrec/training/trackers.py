"""Callbacks that send a run to programs that show runs: TensorBoard, and trackio (W&B's API)."""

import abc
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrec.config import config_to_toml
from mmrec.errors import InputError
from mmrec.training.callbacks import Callback
from mmrec.training.run_dir import EVENTS_SUFFIX

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from mmrec.evaluation.evaluate import Evaluation
    from mmrec.training.trainer import Trainer

TRAIN_CURVES = ("loss", "lr", "grad_norm", "tokens_per_second")
"""What is sent of each step."""
VALIDATION_CURVES = ("loss", "perplexity", "bits_per_byte", "accuracy")
"""What is sent of each validation."""


def make_trackers(names: Iterable[str]) -> list[Callback]:
    """Make the callbacks that ``--log`` names.

    Args:
        names: some of ``mmrec.config.TRACKERS``.

    Raises:
        InputError: a package is missing.
    """
    kinds: dict[str, type[Callback]] = {"tensorboard": TensorBoard, "trackio": Trackio}
    return [kinds[name]() for name in names]


class _Tracker(Callback, abc.ABC):
    """What both trackers do: they take curves and texts, and drop what was sent too much."""

    package = ""
    """The package that is needed, and the name of the extra that brings it."""

    def __init__(self) -> None:
        if importlib.util.find_spec(self.package) is None:
            name = self.package
            raise InputError(f"log {name} needs a package: pip install 'mmrec[{name}]'")

    @abc.abstractmethod
    def _open(self, trainer: "Trainer") -> None:
        """Begin, or go on after ``trainer.progress.step``: drop what is there of later steps."""

    @abc.abstractmethod
    def _send(self, step: int, curves: dict[str, float]) -> None:
        """Send values of a step by name."""

    @abc.abstractmethod
    def _send_text(self, step: int, text: str) -> None:
        """Send a text in Markdown."""

    def on_start(self, trainer: "Trainer") -> None:
        self._open(trainer)

    def on_rollback(self, trainer: "Trainer") -> None:
        self._open(trainer)

    def on_step(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        step = trainer.progress.step
        self._send(step, {f"train/{name}": metrics[name] for name in TRAIN_CURVES})

    def on_validation(self, trainer: "Trainer", scores: "Evaluation") -> None:
        values = {f"val/{name}": getattr(scores, name) for name in VALIDATION_CURVES}
        self._send(trainer.progress.step, values)

    def on_sample(self, trainer: "Trainer", sample: dict[str, Any]) -> None:
        self._send_text(sample["step"], as_code(sample["prompt"] + sample["text"]))


class TensorBoard(_Tracker):
    """Writes the curves and texts of a run for TensorBoard: ``tensorboard --logdir runs``.

    The event files lie in the run folder. A resumed run goes on in the same curves, and no step
    is there twice. Needs ``pip install 'mmrec[tensorboard]'``.

    >>> mmrec.train("book.txt", callbacks=[mmrec.TensorBoard()])  # doctest: +SKIP
    """

    package = "tensorboard"

    def __init__(self, folder: str | Path | None = None) -> None:
        """Choose the folder.

        Args:
            folder: where the event files go; None is the run folder.

        Raises:
            InputError: the package tensorboard is missing.
        """
        super().__init__()
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def _open(self, trainer: "Trainer") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._close()
        step = trainer.progress.step
        folder = Path(self._folder or trainer.run_dir)
        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(
            str(folder),
            purge_step=step + 1 if step else 0,  # earlier files do not count from there on
            filename_suffix=EVENTS_SUFFIX,
        )
        settings = config_to_toml(trainer.model.config, trainer.config, trainer.preset)
        self._writer.add_text("settings", as_code(settings), step)

    def _send(self, step: int, curves: dict[str, float]) -> None:
        assert self._writer is not None
        for name, value in curves.items():
            self._writer.add_scalar(name, value, step)

    def _send_text(self, step: int, text: str) -> None:
        assert self._writer is not None
        self._writer.add_text("sample", text, step)

    def on_checkpoint(self, trainer: "Trainer", path: Path) -> None:
        # a kill loses what is not written yet, and a resume does not send it again
        if self._writer is not None:  # there is a checkpoint before the start, too
            self._writer.flush()

    def on_end(self, trainer: "Trainer", summary: dict[str, Any]) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Trackio(_Tracker):
    """Sends the curves and texts of a run to trackio, which keeps them on this machine.

    ``trackio show --project mmrec`` opens the page. A resumed run goes on in the same curves, and
    no step is there twice. Needs ``pip install 'mmrec[trackio]'``.

    >>> mmrec.train("book.txt", callbacks=[mmrec.Trackio("books")])  # doctest: +SKIP
    """

    package = "trackio"

    def __init__(self, project: str = "mmrec", name: str | None = None) -> None:
        """Choose the names.

        Args:
            project: the project, which may hold many runs.
            name: the run in the project. None is the name of the run folder and a few digits made
                from its path, since trackio knows a run by its name alone.

        Raises:
            InputError: the package trackio is missing.
        """
        super().__init__()
        self._project, self._name = project, name
        self._run: Any = None

    def _open(self, trainer: "Trainer") -> None:
        import trackio

        self._close()
        name = self._name or _unique_name(trainer.run_dir)
        settings = dataclasses.asdict(trainer.model.config) | trainer.config.flat()
        with contextlib.redirect_stdout(io.StringIO()):  # it would print through the progress bar
            self._forget(name, trainer)
            self._run = trackio.init(
                self._project, name, config=settings, resume="allow", embed=False
            )

    def _forget(self, name: str, trainer: "Trainer") -> None:
        """Remove what trackio has of later steps of a run. It has no function for that."""
        from trackio.sqlite_storage import SQLiteStorage

        path = Path(SQLiteStorage.get_project_db_path(self._project))
        if not path.exists():
            return
        # the table is described on https://huggingface.co/docs/trackio/storage_schema
        remove = "DELETE FROM metrics WHERE run_name = ? AND step > ?"
        try:
            with contextlib.closing(sqlite3.connect(path)) as database, database:
                database.execute(remove, (name, trainer.progress.step or -1))
        except sqlite3.Error as error:
            trainer.echo(f"warning: trackio may show some steps twice: {error}")

    def _send(self, step: int, curves: dict[str, float]) -> None:
        self._run.log(curves, step=step)

    def _send_text(self, step: int, text: str) -> None:
        import trackio

        self._run.log({"sample": trackio.Markdown(text)}, step=step)

    def on_end(self, trainer: "Trainer", summary: dict[str, Any]) -> None:
        self._close()

    def _close(self) -> None:
        """Wait until trackio has stored everything."""
        if self._run is not None:
            import trackio

            with contextlib.redirect_stdout(io.StringIO()):
                trackio.finish()  # of the current run, which is this one
            self._run = None


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait, for a second at most, until a new event file comes after those of a folder.

    TensorBoard reads event files in the order of their names, ``events.out.tfevents.SECONDS.…``.
    Within one second the rest of the name decides, which is no order in time.
    """
    names = [path.name.split(".") for path in folder.glob(f"events.out.tfevents.*{EVENTS_SUFFIX}")]
    newest = max((int(parts[3]) for parts in names), default=0)
    now = time.time()
    if int(now) == newest:
        time.sleep(newest + 1 - now)


def as_code(text: str) -> str:
    """A text as a block of code in Markdown, in which nothing is markup."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _unique_name(folder: Path) -> str:
    """A name for the run of a folder that a run of another folder does not have."""
    digest = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()
    return f"{folder.resolve().name}-{digest[:6]}"
