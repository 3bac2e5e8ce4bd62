"""The run folder: its lock, where the run stands, metrics, loss curve, and the table of epochs."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

from mmrec.errors import InputError, RunLockedError, StorageError
from mmrec.runtime.atomic import (
    append,
    atomic_file,
    keep_trying,
    sweep,
    write_text,
)

FILES = ("config.toml", "metrics.jsonl", "loss.png", "summary.json", "best.h5", "last.h5")
REDRAW_SECONDS = 10.0
COLUMNS = (
    f"{'epoch':>6} {'mean':>8} {'first':>8} {'last':>8} {'better':>7} "
    f"{'val':>8} {'perplexity':>11} {'bits/byte':>10} {'time':>8}"
)


def clock(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


@dataclasses.dataclass
class Progress:
    """Where a run stands: everything besides weights and random state that a resume needs."""

    step: int = 0
    """Optimizer steps taken."""
    moved: int = 0
    """Steps whose data was passed over: the next step takes the data of ``step + moved``."""
    seconds: float = 0.0
    """Training time so far, validation and saving not counted."""
    lines: int = 0
    """Lines of metrics.jsonl."""
    best: float | None = None
    """Lowest loss on the validation subset."""
    best_step: int = 0
    waited: int = 0
    """Checks since the best."""
    rate: float = 1.0
    """What rollbacks left of the learning rates."""
    in_row: int = 0
    """Steps skipped since the last that was taken."""
    skipped: int = 0
    rollbacks: int = 0
    aged: int = 0
    """Steps that the moments of the optimizer had seen when the run took them over."""
    spike: int = 0
    """Step at which a spike was last spoken of."""
    epoch: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The epoch under way: sum and count of losses, first, last."""
    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    checks: list[dict[str, float]] = dataclasses.field(default_factory=list)
    since_check: list[float] = dataclasses.field(default_factory=list)


class Lock:
    """The right to write in a run folder, until it is released or the process ends.

    The system gives up a dead process's lock by itself. Readers ask for none. Where the file system
    knows no locks, there is none.
    """

    def __init__(self, folder: Path) -> None:
        """Take it, making the folder. Raises RunLockedError, naming the owner, if it is taken."""
        self.folder, self._path = folder, folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not self._take():
                pass
        except BlockingIOError:
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise RunLockedError(
                f"{folder} is being written by {owner}: wait for it, stop it, or "
                "choose another --out"
            ) from None
        except OSError as error:
            reason = error.strerror
            raise InputError(f"cannot write in the run folder {folder}: {reason}") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()
        sweep(folder)

    def _take(self) -> bool:
        self._file = self._path.open("a+", encoding="utf-8")
        self._file.seek(0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return True
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return True
        self._file.close()  # its owner has just removed it: what is locked is no longer the file
        return False

    def release(self) -> None:
        """Give it up; once is enough."""
        if self._file.closed:
            return
        self._path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def open_run(out: str, default: Path, *, force: bool) -> Lock:
    """Choose, make and lock the folder of a new run.

    A named folder that holds a run is refused, or with ``force`` cleared of the files that a run
    makes; without a name the default is used, numbered if it is taken.

    Raises:
        RunLockedError: the folder is being written, ``force`` or not.
        InputError: it holds a run, or cannot be written.
    """
    folder, number = Path(out) if out else default, 1
    while True:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"the run folder {folder} must be a folder; it is a file")
        try:
            lock = Lock(folder)
        except RunLockedError:
            if out or force:
                raise
        else:
            if force or not _holds_run(folder):
                break
            lock.release()
            if out:
                raise InputError(
                    f"{folder} already holds a run: choose another --out, continue it with "
                    "--resume, or overwrite it with --force"
                )
        number += 1
        folder = default.with_name(f"{default.name}-{number}")
    clear(folder)
    return lock


def clear(folder: Path) -> None:
    """Remove the files that a run makes."""
    for path in [*(folder / name for name in FILES), *folder.glob("step-*.h5")]:
        path.unlink(missing_ok=True)


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILES) or any(folder.glob("step-*.h5"))


class Log:
    """Metrics of a run: a JSON line each, kept in memory too for the curve."""

    def __init__(self, folder: Path, resumed: Progress | None = None) -> None:
        """``resumed``: keep the lines that were there at that point and go on after them."""
        self.folder = folder
        self.lines: list[dict[str, Any]] = []
        self._drawn = 0.0
        self._path = folder / "metrics.jsonl"
        if resumed is not None and self._path.exists():
            for text in self._path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line, if its writer was killed
                    self.lines.append(json.loads(text))
            known = self.lines[: resumed.lines or None]
            self.lines = [x for x in known if x["step"] <= resumed.step]
        self._rewrite()

    def _rewrite(self) -> None:
        write_text(self._path, "".join(json.dumps(x) + "\n" for x in self.lines))
        self._file = self._path.open("ab", buffering=0)

    def rewind(self, count: int) -> None:
        """Take back what came after the first ``count`` lines, but for skips and rollbacks."""
        kept = [x for x in self.lines[count:] if x["kind"] in ("skip", "rollback")]
        self.lines[count:] = kept
        self._file.close()
        self._rewrite()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line, and redraw the curve if the last drawing is old."""
        line = {"kind": kind, "step": step, **values}
        self.lines.append(line)
        data = f"{json.dumps(line)}\n".encode()
        keep_trying(lambda: append(self._file, self._path, data))
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            keep_trying(self.draw)  # it tells of a folder that vanished, too

    def sync(self) -> int:
        """Wait until all lines are on the disk; return their number."""
        os.fsync(self._file.fileno())
        return len(self.lines)

    def losses(self, count: int) -> list[float]:
        """Training losses of the last ``count`` lines."""
        return [x["loss"] for x in self.lines[-count:] if x["kind"] == "train"]

    def draw(self) -> None:
        """Write loss.png."""
        with atomic_file(self.folder / "loss.png") as temporary:
            draw_curve(self.lines, temporary, self.folder.name)
        self._drawn = time.monotonic()

    def close(self) -> None:
        """Draw a last time and close the file."""
        with contextlib.suppress(StorageError):  # if another one ended the run, that is said
            self.draw()
        self._file.close()


class NoLog(Log):
    """That of a process that leaves the writing to another one."""

    def __init__(self) -> None:
        self.lines = []

    def rewind(self, count: int) -> None:
        pass

    def write(self, kind: str, step: int, **values: Any) -> None:
        pass

    def sync(self) -> int:
        return 0

    def close(self) -> None:
        pass


def draw_curve(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss against steps as a PNG."""
    from matplotlib.figure import Figure

    train = [(x["step"], x["loss"]) for x in lines if x["kind"] == "train"]
    val = [(x["step"], x["loss"]) for x in lines if x["kind"] == "val"]
    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        smooth, mean = [], losses[0]
        for loss in losses:
            mean += 0.1 * (loss - mean)
            smooth.append(mean)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color="tab:blue", label="training")
    if val:
        steps, losses = zip(*val, strict=True)
        axes.plot(steps, losses, "o-", color="tab:orange", markersize=4, label="validation")
        step, loss = min(val, key=lambda pair: pair[1])
        axes.plot([step], [loss], "*", color="tab:red", markersize=12, label=f"best {loss:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats/token)", title=title)
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    figure.savefig(path, format="png")


def epoch_row(epoch: dict[str, Any]) -> str:
    """One line of the table of epochs, under COLUMNS; a dash for what was not measured."""
    val = epoch.get("val_loss")
    better = 100 * (epoch["first"] - epoch["last"]) / epoch["first"] if epoch["first"] else 0.0
    scores = (
        f"{val:8.4f} {math.exp(min(val, 700)):11.2f} {epoch['bits_per_byte']:10.4f}"
        if val is not None
        else f"{'-':>8} {'-':>11} {'-':>10}"
    )
    losses = f"{epoch['mean']:8.4f} {epoch['first']:8.4f} {epoch['last']:8.4f} {better:6.1f}%"
    return f"{epoch['epoch']:>6} {losses} {scores} {clock(epoch['seconds']):>8}"


def overfitting(checks: list[dict[str, float]], window: int = 3) -> str | None:
    """Say in words that the gap opens: validation worse than its best for ``window`` checks while
    the training loss fell. Said once, at the check where it is first true."""
    if len(checks) <= window:
        return None
    best = min(checks, key=lambda c: c["val"])
    since = len(checks) - 1 - checks.index(best)
    if since != window or checks[-1]["train"] >= best["train"]:
        return None
    return (
        f"overfitting: since step {best['step']:.0f} the training loss fell {best['train']:.3f} -> "
        f"{checks[-1]['train']:.3f} while the validation loss rose {best['val']:.3f} -> "
        f"{checks[-1]['val']:.3f}; the best model is kept. More text, --dropout or --patience help"
    )


def verdict(checks: list[dict[str, float]], best: float, step: int) -> str:
    """Say in words why the best model is that of ``step``, whose validation loss was ``best``."""
    after = [c for c in checks if c["step"] > step]
    why = f"validation loss {best:.4f}, the lowest of {len(checks)} checks"
    if not after:
        earlier = checks[-2]["val"] - best if len(checks) > 1 else 0.0
        return f"{why}; it was the last one{', and the loss was still falling' * (earlier > 0)}"
    last, then = after[-1], next((c for c in checks if c["step"] == step), None)
    why += f"; it was {last['val']:.4f} at step {last['step']:,.0f}"
    if then is not None and last["train"] < then["train"]:
        why += (
            f", while the training loss fell {then['train']:.4f} -> {last['train']:.4f}: from "
            "there on it learnt its text by heart"
        )
    return why
