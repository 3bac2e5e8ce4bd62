"""Where a run stands: what it tells people while it trains, and what ``mmrec status`` reads.

Nothing here imports torch, and nothing asks for the lock of a run: reading disturbs no writer.
"""

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmrec.config import VERSION, LengthConfig, read_config_file
from mmrec.errors import InputError, StorageError
from mmrec.runtime import machine
from mmrec.runtime.atomic import atomic_write_text
from mmrec.runtime.locking import lock_owner
from mmrec.training.metrics import format_duration

REPORT_FILE = "report.html"
"""The page of ``mmrec report``."""
STATUS_FILE = "status.json"
"""What a run says about its speed. Its log holds no clock, so that equal runs write equal logs."""
SECONDS_BETWEEN_FILES = 10.0
BAR_SECONDS = 0.5
"""Seconds between two states of the bar."""
SECONDS_BETWEEN_LINES = 60.0
WINDOW_SECONDS = 60.0
"""The speed is that of about the last so many seconds, validations included."""
MAX_CURVE_LINES = 5000
"""Lines of training that are read of a long log, evenly spaced."""
LAST_LOSSES = 20
"""The training loss is the mean of so many steps."""
RUNS = Path("runs")
"""Where run folders are by default."""
ENDED = {
    "done": "ended: its length was reached",
    "early": "ended early: the validation loss got no better",
    "stopped": "ended: a callback stopped it",
    "signal": "ended: a signal stopped it; it was saved",
    "killed": "not running, and it did not end by itself",
}
"""What the states of a run that does not train mean."""


class _Mark(NamedTuple):
    """Sums over the steps of this process, at a time."""

    seconds: float
    steps: int
    tokens: int
    losses: float


class StatusReporter:
    """Tells where a run stands.

    A terminal shows a progress bar. Where standard output is none, such as a file or a pipe, a line
    a minute goes to ``echo``. The run folder gets ``status.json``.
    """

    def __init__(
        self,
        folder: Path | None,
        total_steps: int | None,
        step: int,
        seconds_left: Callable[[float], float],
        *,
        echo: Callable[[str], None],
        show: bool = True,
    ) -> None:
        """Show the bar.

        Args:
            folder: the run folder; None writes no file.
            total_steps: length of the run; None if the time sets it.
            step: steps taken before.
            seconds_left: tells from steps per second how long the run still takes.
            echo: called with each line.
            show: whether to show a bar or lines.
        """
        from tqdm import tqdm

        self._folder, self._total, self._seconds_left = folder, total_steps, seconds_left
        self._print, self._shows_lines = echo, show and not os.isatty(1)
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            mininterval=BAR_SECONDS,
            smoothing=0.05,
            disable=not (show and os.isatty(2)),
        )
        self._machine = machine.describe()
        self._step, self._seconds = step, 0.0
        now = _Mark(time.monotonic(), 0, 0, 0.0)
        self._newest = self._last_line = now
        self._last_score_line = self._last_refresh = now.seconds
        self._marks = deque([now])

    def echo(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.clear()
        self._print(line)
        self._bar.refresh()

    def step(
        self, step: int, seconds: float, *, loss: float, lr: float, tokens: int, rate: float
    ) -> None:
        """Report a step that was taken.

        Args:
            step: steps taken so far.
            seconds: training time so far.
            loss: its loss, in nats per token.
            lr: its learning rate.
            tokens: its tokens.
            rate: its tokens per second.
        """
        self._step, self._seconds, last = step, seconds, self._newest
        now = self._newest = _Mark(
            time.monotonic(), last.steps + 1, last.tokens + tokens, last.losses + loss
        )
        self._bar.set_postfix_str(f"loss {loss:.3f} lr {lr:.1e} {rate:,.0f} tok/s", refresh=False)
        self._bar.update(step - self._bar.n)  # after a rollback backwards
        if now.seconds - self._marks[-1].seconds >= SECONDS_BETWEEN_FILES:
            self._write()
        if now.seconds - self._last_line.seconds >= SECONDS_BETWEEN_LINES:
            self._log()

    def score(self, scored: int, total: int) -> None:
        """Report how much of the validation text was scored.

        Args:
            scored: its tokens scored so far.
            total: all of its tokens.
        """
        words = f"scoring the validation text, {min(1.0, scored / max(1, total)):.0%}"
        now = time.monotonic()
        if now - self._last_refresh >= BAR_SECONDS:
            self._last_refresh = now
            self._bar.set_postfix_str(words)
        if now - max(self._last_line.seconds, self._last_score_line) >= SECONDS_BETWEEN_LINES:
            self._last_score_line = now
            if self._shows_lines:
                self._print(f"step    {self._step:,}, {words}")

    def _log(self) -> None:
        last, now = self._last_line, self._newest
        self._last_line = now
        if self._shows_lines:
            steps, seconds = now.steps - last.steps, max(1e-9, now.seconds - last.seconds)
            of = "" if self._total is None else f" of {self._total:,}"
            self._print(
                f"step    {self._step:,}{of}, loss {(now.losses - last.losses) / steps:.3f}, "
                f"{(now.tokens - last.tokens) / seconds:,.0f} tokens/s, "
                f"{format_duration(self._seconds_left(steps / seconds))} left"
            )

    def _write(self) -> None:
        now, first = self._newest, self._marks[0]
        steps, seconds = now.steps - first.steps, max(1e-9, now.seconds - first.seconds)
        self._marks.append(now)
        while now.seconds - self._marks[1].seconds >= WINDOW_SECONDS:
            self._marks.popleft()
        if self._folder is None or not steps:
            return
        status = {
            "step": self._step,
            "total_steps": self._total,
            "tokens_per_second": round((now.tokens - first.tokens) / seconds),
            "seconds": round(self._seconds, 1),
            "seconds_left": round(self._seconds_left(steps / seconds), 1),
            "machine": self._machine,
            "mmrec_version": VERSION,
        }
        with contextlib.suppress(StorageError):  # the log says so too, and is needed
            atomic_write_text(self._folder / STATUS_FILE, json.dumps(status) + "\n")

    def __enter__(self) -> "StatusReporter":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._write()


# ---- reading


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands. What is not known is None."""

    run: str
    state: str
    """``running``; why it ended: ``done``, ``early``, ``stopped`` or ``signal``; or ``killed``."""
    writer: str | None
    """The process that trains it."""
    step: int
    total_steps: int | None
    length: str | None
    """What ends the run, such as ``60 minutes``; None for the default length."""
    fraction_done: float | None
    train_loss: float | None
    """Mean training loss of the newest steps, in nats per token."""
    val_loss: float | None
    """Newest loss on the validation subset."""
    val_bits_per_byte: float | None
    val_step: int | None
    best_val_loss: float | None
    best_step: int | None
    tokens_per_second: int | None
    seconds: float | None
    """Training time so far."""
    seconds_left: float | None
    checkpoint: str | None
    """Name of the newest checkpoint to resume from."""
    checkpoint_age: float | None
    """Seconds since it was written."""
    last_step_age: float
    """Seconds since the log was written."""

    @property
    def state_in_words(self) -> str:
        """``state``, as a sentence for people."""
        if self.state == "running":
            return f"running, {self.writer}"
        return ENDED.get(self.state, self.state)


class Curve(NamedTuple):
    """Losses by step, in nats per token."""

    train: list[tuple[int, float]]
    val: list[tuple[int, float]]


class RunLog(NamedTuple):
    """What ``metrics.jsonl`` says."""

    step: int
    """The newest step."""
    recent_losses: list[float]
    """Those of the newest ``LAST_LOSSES`` steps, in nats per token."""
    curve: Curve
    """Of a long run with only some of its steps."""
    validations: list[dict[str, Any]]
    """The lines of validations on the fixed subset."""
    epochs: list[dict[str, Any]]
    """The lines of ended epochs."""


def find_run(where: Path | None) -> Path:
    """Return a run folder: the one that is named, or the newest one in or below a folder.

    Args:
        where: a run folder, the folder of a chain, or a folder of runs; None is ``runs``.

    Raises:
        InputError: there is none.
    """
    folder = RUNS if where is None else where
    depths = ("", "*/", "*/*/", "*/*/*/")
    logs = (
        []
        if not folder.is_dir()
        else [path for depth in depths for path in folder.glob(f"{depth}metrics.jsonl")]
    )
    if not logs:
        hint = "; train a model first: mmrec train tiny" if where is None else ""
        raise InputError(f"no run in {folder}: expected a folder with a metrics.jsonl{hint}")
    own = folder / "metrics.jsonl"
    return own.parent if own in logs else max(logs, key=lambda p: p.stat().st_mtime_ns).parent


def read_status(run: Path) -> tuple[RunStatus, RunLog]:
    """Read where a run stands, and its log, from the small files of its folder.

    Raises:
        InputError: the folder holds no log of a run.
    """
    writer = lock_owner(run)  # before the log, which then is at least as new
    path = run / "metrics.jsonl"
    try:
        data, changed = path.read_bytes(), path.stat().st_mtime
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    try:
        log = _read_log(data)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} is not the log of a run") from None
    newest = log.validations[-1] if log.validations else None
    best = min(log.validations, key=lambda v: float(v["loss"]), default=None)
    status, summary = read_json(run / STATUS_FILE), read_json(run / "summary.json")
    length = LengthConfig()
    with contextlib.suppress(InputError):
        settings = read_config_file(run / "config.toml").train
        length = LengthConfig(**{n: settings[n] for n in LengthConfig.settings() if n in settings})
    state = "running"
    if writer is None:
        # the summary of an earlier end is older than the steps after it
        ended = str(summary.get("ended", ""))
        state = ended if ended and summary.get("steps", -1) >= log.step else "killed"
    is_over = state not in ("running", "killed")
    total, seconds, left = status.get("total_steps"), status.get("seconds"), None
    speed = status.get("tokens_per_second")
    if is_over:
        seconds, speed = summary.get("seconds"), summary.get("tokens_per_second")
    elif state == "running" and "seconds_left" in status:
        left = max(0.0, status["seconds_left"] - _age(run / STATUS_FILE))
    checkpoint = _newest_checkpoint(run)
    return RunStatus(
        run=str(run),
        state=state,
        writer=writer,
        step=log.step,
        total_steps=total,
        length=None if length == LengthConfig() else length.describe(),
        fraction_done=_fraction_done(length, log.step, total, seconds, left),
        train_loss=sum(log.recent_losses) / len(log.recent_losses) if log.recent_losses else None,
        val_loss=newest["loss"] if newest else None,
        val_bits_per_byte=newest.get("bits_per_byte") if newest else None,
        val_step=newest["step"] if newest else None,
        best_val_loss=best["loss"] if best else None,
        best_step=best["step"] if best else None,
        tokens_per_second=speed,
        seconds=seconds,
        seconds_left=left,
        checkpoint=checkpoint.name if checkpoint else None,
        checkpoint_age=_age(checkpoint) if checkpoint else None,
        last_step_age=max(0.0, time.time() - changed),
    ), log


def _read_log(data: bytes) -> RunLog:
    """Read a log. Of a long one some lines of training are left out."""
    lines = data.split(b"\n")[:-1]  # a run may be writing the last one
    is_train = [b'"kind": "train"' in line for line in lines]
    numbers = [i for i, train in enumerate(is_train) if train]
    stride = max(1, len(numbers) // MAX_CURVE_LINES)
    chosen = {*numbers[::stride], *numbers[-LAST_LOSSES:]}
    train = [_line(lines[i]) for i in sorted(chosen)]
    others = [_line(line) for line, train in zip(lines, is_train, strict=True) if not train]
    val, epochs = ([x for x in others if x["kind"] == kind] for kind in ("val", "epoch"))
    curve = Curve(*([(x["step"], float(x["loss"])) for x in kind] for kind in (train, val)))
    recent = [loss for _, loss in curve.train[-LAST_LOSSES:]]
    return RunLog(train[-1]["step"] if train else 0, recent, curve, val, epochs)


def _line(text: bytes) -> dict[str, Any]:
    line = json.loads(text)
    line["kind"], int(line["step"])  # KeyError and TypeError for another file's line
    return dict(line)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no whole one."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def _age(path: Path) -> float:
    """Seconds since a file was written."""
    with contextlib.suppress(OSError):
        return max(0.0, time.time() - path.stat().st_mtime)
    return 0.0


def _newest_checkpoint(run: Path) -> Path | None:
    files: Iterable[Path] = (*run.glob("step-*.h5"), *run.glob("last.h5"))
    with contextlib.suppress(OSError):  # one was removed just now
        return max(files, key=lambda p: p.stat().st_mtime_ns, default=None)
    return None


def _fraction_done(
    length: LengthConfig, step: int, total: int | None, seconds: float | None, left: float | None
) -> float | None:
    if total:
        return min(1.0, step / total)
    if seconds is None:
        return None
    if length.minutes is not None:
        return min(1.0, seconds / (60 * length.minutes))
    return None if left is None else seconds / max(1e-9, seconds + left)


def text_curve(curve: Curve, width: int, height: int = 12) -> list[str]:
    """Draw a loss curve in plain characters.

    Args:
        curve: the losses. Those of the first tenth of the steps may lie above the picture.
        width: characters per line.
        height: lines of the picture, without its axis.

    Returns:
        The lines; none if there is nothing to draw or no room.
    """
    points = [p for p in (*curve.train, *curve.val) if math.isfinite(p[1])]
    columns = width - 9
    if len(points) < 2 or columns < 12:
        return []
    end = max(step for step, _ in points)

    def column(step: int) -> int:
        return min(columns - 1, step * columns // max(1, end))

    means: dict[int, list[float]] = {}
    for step, loss in curve.train:
        if math.isfinite(loss):
            means.setdefault(column(step), []).append(loss)
    marks = [(x, sum(losses) / len(losses), "*") for x, losses in means.items()]
    marks += [(column(step), loss, "o") for step, loss in curve.val if math.isfinite(loss)]
    shown = [loss for x, loss, _ in marks if x >= columns // 10] or [loss for _, loss, _ in marks]
    top, bottom = max(shown), min(shown)
    span = max(top - bottom, 1e-9)
    rows = [[" "] * columns for _ in range(height)]
    for x, loss, mark in marks:
        y = round((top - min(loss, top)) / span * (height - 1))
        rows[min(height - 1, max(0, y))][x] = mark
    labelled = {0: top, height // 2: top - span * (height // 2) / (height - 1), height - 1: bottom}
    lines = [
        (f"{labelled[y]:7.3f} |" if y in labelled else "        |") + "".join(row).rstrip()
        for y, row in enumerate(rows)
    ]
    lines.append("        +" + "-" * columns)
    lines.append(f"{'':9}0{f'{end:,}':>{columns - 1}}")
    return [*lines, f"{'':9}loss by step: * training, o validation"[:width]]
