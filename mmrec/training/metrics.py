"""What a run records: its progress, ``metrics.jsonl``, and the messages that explain them."""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from mmrec.errors import InputError, StorageError
from mmrec.runtime.atomic import (
    append_all_or_nothing,
    atomic_write_text,
    never_retry,
    write_with_retry,
)
from mmrec.training.plots import draw_loss_curve

SECONDS_BETWEEN_DRAWINGS = 10.0
EPOCH_HEADER = (
    f"{'epoch':>6} {'mean':>8} {'first':>8} {'last':>8} {'better':>7} "
    f"{'val':>8} {'perplexity':>11} {'bits/byte':>10} {'time':>8}"
)


@dataclasses.dataclass
class Progress:
    """Where a run stands: all that a resume needs besides weights, moments and random state."""

    step: int = 0
    """Optimizer steps taken."""
    data_offset: int = 0
    """Steps whose data was skipped: the next step takes the data of ``step + data_offset``."""
    missing_batches: int = 0
    """Batches that the last step of a length in epochs read less than others."""
    seconds: float = 0.0
    """Training time so far; validation and saving are not counted."""
    metrics_lines: int = 0
    """Lines of metrics.jsonl."""
    best_loss: float | None = None
    """Lowest loss on the validation subset, in nats per token."""
    best_step: int = 0
    evals_since_best: int = 0
    """Validations since the one with the lowest loss."""
    lr_scale: float = 1.0
    """Product of the factors by which rollbacks have reduced the learning rates."""
    consecutive_skips: int = 0
    """Steps skipped since the last step that was taken."""
    skipped_steps: int = 0
    rollbacks: int = 0
    optimizer_step_offset: int = 0
    """Steps of the earlier run that the optimizer's moments come from; 0 if they began at zero."""
    first_new_token: int = 0
    """First of the token ids that were added to the vocabulary of the model that training began
    from; 0 if there are none."""
    earlier_batches: int = 0
    """Batches that were read before text was added to the text of the run."""
    earlier_epochs: float = 0.0
    """Passes over the text before that."""
    last_spike_step: int = 0
    """Step of the last warning of a loss spike."""
    current_epoch: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The current epoch: sum and count of its losses, the first and the last loss, and the
    training time at which it began."""
    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """One row per finished epoch."""
    validations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Step, validation loss, and mean training loss since the validation before."""
    losses_since_validation: list[float] = dataclasses.field(default_factory=list)

    def batches(self, batches_per_step: int) -> int:
        """Batches that were read."""
        return self.step * batches_per_step - self.missing_batches

    def epochs_after(self, batches: float, batches_per_epoch: float) -> float:
        """Passes over the text, as it was at the time, in so many batches of the run."""
        return self.earlier_epochs + (batches - self.earlier_batches) / batches_per_epoch

    def batches_of(self, epochs: float, batches_per_epoch: float) -> int:
        """Whole batches of the run that make so many passes, at least 1."""
        since = round((epochs - self.earlier_epochs) * batches_per_epoch)
        return max(1, self.earlier_batches + since)

    def begin_longer_text(self, batches_per_step: int, batches_per_epoch: float) -> None:
        """Begin a pass over a text to which more was added.

        Losses on the longer validation text compare with none from before.

        Args:
            batches_per_step: batches of a step.
            batches_per_epoch: batches in one pass over the text as it was.
        """
        batches = self.batches(batches_per_step)
        self.earlier_epochs = self.epochs_after(batches, batches_per_epoch)
        self.earlier_batches, self.data_offset = batches, 0
        self.current_epoch, self.losses_since_validation, self.validations = {}, [], []
        self.best_loss, self.best_step, self.evals_since_best = None, 0, 0

    def add_loss(self, loss: float) -> None:
        """Add the loss of a step to the current epoch."""
        self.losses_since_validation.append(loss)
        if not self.current_epoch:
            self.current_epoch = {"sum": 0.0, "count": 0, "first": loss, "began": self.seconds}
        epoch = self.current_epoch
        epoch.update(sum=epoch["sum"] + loss, count=epoch["count"] + 1, last=loss)


Record = TypeVar("Record")


def from_plain(cls: type[Record], values: dict[str, Any]) -> Record:
    """Build a dataclass of plain values from the JSON object that a checkpoint holds.

    Raises:
        InputError: a key is unknown or missing, or a value is of another type.
    """
    hints = get_type_hints(cls)
    for name, value in values.items():
        hint = hints.get(name)
        types = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
        allowed = (*types, int) if float in types else types
        if hint is None or not isinstance(value, allowed):
            raise InputError(f"{name} does not belong in {cls.__name__}; got {value!r}")
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"the stored {cls.__name__} is incomplete: {error}") from None


class JsonLinesLog:
    """A file of a run with one JSON object per line, whose lines are kept in memory too.

    Every line has ``step``.
    """

    def __init__(self, path: Path, retry: Callable[[StorageError], bool] = never_retry) -> None:
        """Name the file; nothing is read or written yet.

        Args:
            path: the file.
            retry: asked whether to write again after a failure; see ``write_with_retry``.
        """
        self.lines: list[dict[str, Any]] = []
        self._path, self._retry = path, retry

    def _read(self, count: int | None, step: int) -> None:
        """Keep the lines of an earlier file.

        Args:
            count: at most so many; None for all.
            step: only those up to this step.
        """
        lines: list[dict[str, Any]] = []
        if self._path.exists():
            for text in self._path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line, if its writer was killed
                    lines.append(json.loads(text))
        self.lines = [x for x in lines[:count] if x["step"] <= step]

    def _rewrite(self) -> None:
        atomic_write_text(self._path, "".join(json.dumps(x) + "\n" for x in self.lines))
        self._file = self._path.open("ab", buffering=0)

    def _append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        data = f"{json.dumps(line)}\n".encode()
        write_with_retry(lambda: append_all_or_nothing(self._file, self._path, data), self._retry)

    def sync(self) -> int:
        """Wait until all lines are on the disk; return their number."""
        os.fsync(self._file.fileno())
        return len(self.lines)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsLog(JsonLinesLog):
    """``metrics.jsonl``: what the loss curve is drawn from.

    A line has ``kind`` (``train``, ``val``, ``epoch``, ``skip``, ``rollback`` or ``callback``) and
    ``step``. It holds no clock, so that equal runs write equal files.
    """

    def __init__(
        self,
        folder: Path,
        resumed: Progress | None = None,
        *,
        retry: Callable[[StorageError], bool] = never_retry,
        draw_curve: bool = True,
        warn: Callable[[str], None] = print,
    ) -> None:
        """Open the log of a run folder.

        Args:
            folder: the run folder.
            resumed: keep the lines that were there at this point, and append after them; None
                begins a new file.
            retry: asked whether to write again after a failure; see ``write_with_retry``.
            draw_curve: whether to draw ``loss.png``.
            warn: called with a line of text if the curve cannot be drawn; training goes on.
        """
        super().__init__(folder / "metrics.jsonl", retry)
        self.folder = folder
        self._last_drawing = 0.0
        self._draw_curve, self._warn = draw_curve, warn
        self._warnings: set[str] = set()
        if resumed is not None:
            self._read(resumed.metrics_lines or None, resumed.step)
        self._rewrite()

    def rewind(self, count: int) -> None:
        """Remove the lines after the first ``count``, except those of skips and rollbacks."""
        kept = [x for x in self.lines[count:] if x["kind"] in ("skip", "rollback")]
        self.lines[count:] = kept
        self._file.close()
        self._rewrite()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line, and draw the curve again if the last drawing is old.

        Args:
            kind: ``train``, ``val``, ``epoch``, ``skip``, ``rollback`` or ``callback``.
            step: optimizer steps taken.
            values: numbers and strings.

        Raises:
            StorageError: the line could not be written.
        """
        self._append({"kind": kind, "step": step, **values})
        if time.monotonic() - self._last_drawing > SECONDS_BETWEEN_DRAWINGS:
            write_with_retry(self._check_folder, self._retry)
            self.draw()

    def _check_folder(self) -> None:
        """Raise StorageError if the run folder vanished: appending to an open file does not."""
        if not self.folder.is_dir():
            raise StorageError(f"could not write {self._path}: the folder vanished")

    def last_losses(self, count: int) -> list[float]:
        """Training losses among the last ``count`` lines."""
        return [x["loss"] for x in self.lines[-count:] if x["kind"] == "train"]

    def draw(self) -> None:
        """Write loss.png. A failure is one warning: no picture ends a run."""
        if self._draw_curve:
            try:
                draw_loss_curve(self.lines, self.folder / "loss.png", self.folder.name)
            except StorageError as error:
                if str(error) not in self._warnings:
                    self._warn(f"warning: {error}; training goes on")
                self._warnings.add(str(error))
        self._last_drawing = time.monotonic()

    def close(self) -> None:
        """Draw the curve a last time and close the file."""
        if self.folder.is_dir():  # else the error that ended the run says so
            self.draw()
        super().close()


class NullMetricsLog(MetricsLog):
    """The log of a process that leaves the writing to rank 0."""

    def __init__(self) -> None:
        self.lines = []

    def rewind(self, count: int) -> None:
        """Do nothing."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Do nothing."""

    def sync(self) -> int:
        """Return 0."""
        return 0

    def close(self) -> None:
        """Do nothing."""


def format_duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    total = max(0, round(seconds))
    hours, remainder = divmod(total, 3600)
    minutes, seconds = divmod(remainder, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_tokens(count: int) -> str:
    """Tokens as ``16,384`` or ``4.51 M``."""
    return f"{count:,}" if count < 1_000_000 else f"{count / 1e6:.2f} M"


def epoch_row(epoch: dict[str, Any]) -> str:
    """Format one line of the table under ``EPOCH_HEADER``; a dash stands for a missing score."""
    val_loss = epoch.get("val_loss")
    first, last = epoch["first_loss"], epoch["last_loss"]
    improvement = 100 * (first - last) / first if first else 0.0
    if val_loss is None:
        scores = f"{'-':>8} {'-':>11} {'-':>10}"
    else:
        perplexity = math.exp(min(val_loss, 700))
        scores = f"{val_loss:8.4f} {perplexity:11.2f} {epoch['bits_per_byte']:10.4f}"
    losses = f"{epoch['mean_loss']:8.4f} {first:8.4f} {last:8.4f} {improvement:6.1f}%"
    return f"{round(epoch['epoch'], 2):>6} {losses} {scores} {format_duration(epoch['seconds']):>8}"


def overfitting_warning(validations: list[dict[str, float]], window: int = 3) -> str | None:
    """Warn that the training loss falls while the validation loss rises.

    Args:
        validations: as in ``Progress``.
        window: number of validations without a new best after which to warn.

    Returns:
        The warning, at exactly the validation that completes the window; otherwise None, so that a
        run is warned once per best model.
    """
    if len(validations) <= window:
        return None
    best = min(validations, key=lambda v: v["val"])
    since_best = len(validations) - 1 - validations.index(best)
    newest = validations[-1]
    if since_best != window or newest["train"] >= best["train"]:
        return None
    return (
        f"overfitting: since step {best['step']:.0f} the training loss fell {best['train']:.3f} -> "
        f"{newest['train']:.3f} while the validation loss rose {best['val']:.3f} -> "
        f"{newest['val']:.3f}; the best model is kept. More text, --dropout or --patience help"
    )


def _count(validations: list[dict[str, float]]) -> str:
    return f"{len(validations)} validation{'s' * (len(validations) != 1)}"


def explain_best_model(validations: list[dict[str, float]], best_loss: float, step: int) -> str:
    """Explain in a sentence why the best model is the one of a step.

    Args:
        validations: as in ``Progress``.
        best_loss: its validation loss, in nats per token.
        step: the step that it was saved at.
    """
    later = [v for v in validations if v["step"] > step]
    reason = f"validation loss {best_loss:.4f}, the lowest of {_count(validations)}"
    if not later:
        improvement = validations[-2]["val"] - best_loss if len(validations) > 1 else 0.0
        still_falling = ", and the loss was still falling" if improvement > 0 else ""
        return f"{reason}; it was the last one{still_falling}"
    last, best = later[-1], next((v for v in validations if v["step"] == step), None)
    reason += f"; it was {last['val']:.4f} at step {last['step']:,.0f}"
    if best is not None and last["train"] < best["train"]:
        reason += (
            f", while the training loss fell {best['train']:.4f} -> {last['train']:.4f}: after "
            f"step {step:,} the model memorised its text"
        )
    return reason
