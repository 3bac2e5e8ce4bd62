"""Several runs side by side: what each reached, and its validation curve by steps, tokens, time."""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from mmrec.checkpoint.checkpoint import read_metadata
from mmrec.config import TrainConfig, from_dict, load_toml
from mmrec.errors import InputError
from mmrec.runtime.atomic import atomic_path


@dataclass(frozen=True)
class Curve:
    """A run and its validation curve."""

    run: str
    """The run folder."""
    fingerprint: str
    """Of its tokens; empty if the run keeps no best model yet."""
    tokens_per_step: int
    steps: int
    seconds: float
    """Training time; NaN while the run has no summary."""
    checks: list[tuple[int, float]]
    """Step, and bits per byte on the fixed validation subset."""
    whole: float
    """Bits per byte of the last pass over the whole validation split; NaN if there was none."""
    ended: str
    """Why it ended: done, early or signal; ``running`` if nothing says so."""

    @property
    def best(self) -> tuple[int, float]:
        """Step and bits per byte of the best check."""
        return min(self.checks, key=lambda check: check[1])


def read_run(folder: Path) -> Curve:
    """Read what a run folder says. Raises InputError if it is none, or was not validated yet."""
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise InputError(f"{folder} must be a run folder; it holds no metrics.jsonl")
    lines = []
    for text in log.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the last line of a run that is being written
            lines.append(json.loads(text))
    try:
        steps = max((x["step"] for x in lines if x["kind"] == "train"), default=0)
        checks = [(x["step"], x["bits_per_byte"]) for x in lines if x["kind"] == "val"]
        whole = [x["bits_per_byte"] for x in lines if x["kind"] == "epoch"]
    except (KeyError, TypeError):
        raise InputError(f"{log} is not the log of a run") from None
    if not checks:
        raise InputError(f"{folder} was not validated yet: nothing to compare")
    config = from_dict(TrainConfig, load_toml(folder / "config.toml").get("train", {}))
    summary, fingerprint = {}, ""
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    with contextlib.suppress(InputError):
        fingerprint = read_metadata(folder / "best.h5").info.get("fingerprint", "")
    return Curve(
        str(folder),
        fingerprint,
        config.batch * config.seq_len * config.accumulate,
        steps,
        float(summary.get("seconds", math.nan)),
        checks,
        whole[-1] if whole else math.nan,
        str(summary.get("ended", "running")),
    )


def draw_curves(curves: list[Curve], path: Path) -> None:
    """Write a PNG of all curves against steps, tokens and seconds.

    A log keeps no clock, so that it is the same each time; a check's second is its share of the
    run's steps times the run's seconds. A run without summary is left out there.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for curve in curves:
        steps, values = zip(*curve.checks, strict=True)
        rate = curve.seconds / max(1, curve.steps)
        for ax, unit in zip(axes, (1, curve.tokens_per_step / 1e6, rate), strict=True):
            if math.isfinite(unit):
                ax.plot([s * unit for s in steps], values, "o-", markersize=3, label=curve.run)
    labels = ("step", "training tokens (millions)", "seconds of training")
    for ax, label in zip(axes, labels, strict=True):
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("bits per byte, validation subset")
    axes[0].legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
