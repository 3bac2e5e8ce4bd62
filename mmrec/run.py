"""The run folder: configuration, metrics, loss curve, checkpoints, and the table of epochs."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from mmrec.config import InputError
from mmrec.files import StorageError, append, atomic_file, keep_trying, write_text

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


def open_run(out: str, default: Path, *, force: bool) -> Path:
    """Choose and make the folder of a new run.

    A named folder that holds a run is refused, or with ``force`` cleared of the files that a run
    makes; without a name the default is used, numbered if it is taken.
    """
    folder = Path(out) if out else default
    number = 2
    while not out and not force and _holds_run(folder):
        folder = default.with_name(f"{default.name}-{number}")
        number += 1
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the run folder {folder} must be a folder; it is a file")
    if _holds_run(folder):
        if not force:
            raise InputError(
                f"{folder} already holds a run: choose another --out, continue it with --resume, "
                "or overwrite it with --force"
            )
        for path in [*(folder / name for name in FILES), *folder.glob("step-*.h5")]:
            path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the run folder {folder}: {error.strerror}") from None
    return folder


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILES) or any(folder.glob("step-*.h5"))


class Log:
    """Metrics of a run: a JSON line each, kept in memory too for the curve."""

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        """``resumed_at``: keep the lines up to that step and go on after them."""
        self.folder = folder
        self.lines: list[dict[str, Any]] = []
        self._drawn = 0.0
        path = folder / "metrics.jsonl"
        if resumed_at is not None and path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # the last line of a run that was killed while writing it
                if line["step"] <= resumed_at:
                    self.lines.append(line)
        write_text(path, "".join(json.dumps(x) + "\n" for x in self.lines))
        self._file = path.open("ab", buffering=0)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line, and redraw the curve if the last drawing is old."""
        line, path = {"kind": kind, "step": step, **values}, self.folder / "metrics.jsonl"
        self.lines.append(line)
        data = f"{json.dumps(line)}\n".encode()
        keep_trying(lambda: append(self._file, path, data))
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            keep_trying(self.draw)  # it tells of a folder that vanished, too

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
