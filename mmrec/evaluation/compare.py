"""Compare runs: the scores of each, and its validation curve by steps, tokens and time."""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from mmrec.checkpoint.header import read_metadata
from mmrec.checkpoint.outputs import check_output
from mmrec.config import TrainConfig, read_config_file
from mmrec.errors import InputError
from mmrec.runtime.pictures import legend_label, picture

READ = ("metrics.jsonl", "config.toml", "summary.json", "best.h5")
"""The files of a run that are read."""


@dataclass(frozen=True)
class Curve:
    """A run and its validation curve."""

    run: str
    """The run folder."""
    fingerprint: str
    """Fingerprint of the training text; empty while the run has no best model."""
    tokens_per_step: int
    steps: int
    """Optimizer steps so far."""
    tokens: int
    """Tokens that it was trained on so far."""
    seconds: float
    """Training time; NaN while the run has no summary."""
    validations: list[tuple[int, float]]
    """Step, and bits per byte on the fixed validation subset."""
    split_bits_per_byte: float
    """Bits per byte on the whole validation split, last time; NaN if there was none."""
    ended: str
    """Why the run ended: done, early or signal; ``running`` without a summary."""

    @property
    def best(self) -> tuple[int, float]:
        """Step and bits per byte of the best validation."""
        return min(self.validations, key=lambda validation: validation[1])


def read_run(folder: Path) -> Curve:
    """Read the curve of a run folder.

    Raises:
        InputError: the folder is not a run folder, or the run was not validated yet.
    """
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise InputError(f"{folder} must be a run folder; it holds no metrics.jsonl")
    lines = []
    for text in log.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a run may be writing the last line
            lines.append(json.loads(text))
    try:
        steps = max((x["step"] for x in lines if x["kind"] == "train"), default=0)
        validations = [(x["step"], x["bits_per_byte"]) for x in lines if x["kind"] == "val"]
        split_scores = [x["bits_per_byte"] for x in lines if x["kind"] == "epoch"]
    except (KeyError, TypeError):
        raise InputError(f"{log} is not the log of a run") from None
    if not validations:
        raise InputError(f"{folder} was not validated yet: nothing to compare")
    config = TrainConfig.from_flat(read_config_file(folder / "config.toml").train)
    summary, fingerprint = {}, ""
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    with contextlib.suppress(InputError):
        fingerprint = read_metadata(folder / "best.h5").metadata.get("fingerprint", "")
    data, accumulation = config.data, config.optimizer.gradient_accumulation_steps
    tokens_per_step = data.batch_size * data.seq_len * accumulation
    return Curve(
        str(folder),
        fingerprint,
        tokens_per_step,
        steps,
        summary["tokens"] if summary.get("steps") == steps else steps * tokens_per_step,
        float(summary.get("seconds", math.nan)),
        validations,
        split_scores[-1] if split_scores else math.nan,
        str(summary.get("ended", "running")),
    )


def draw_curves(curves: list[Curve], path: Path, *, force: bool = False) -> None:
    """Write a PNG of all curves against steps, training tokens and seconds of training.

    The log of a run holds no times, so that equal runs have equal logs. The time of a validation is
    estimated as its fraction of the steps times the seconds of the run. A run without summary has
    no curve against seconds.

    Args:
        curves: those of the runs.
        path: the file.
        force: replace a file that is no picture of mmrec.

    Raises:
        InputError: the file must not be replaced; see ``check_output``.
        StorageError: the picture cannot be drawn or written.
    """
    check_output(path, "picture", option="path", force=force)
    with picture(path, 12.6) as figure:
        axes = figure.subplots(1, 3, sharey=True)
        for curve in curves:
            steps, values = zip(*curve.validations, strict=True)
            seconds_per_step = curve.seconds / max(1, curve.steps)
            scales = (1, curve.tokens_per_step / 1e6, seconds_per_step)
            label = legend_label(curve.run)
            for ax, scale in zip(axes, scales, strict=True):
                if math.isfinite(scale):
                    ax.plot([s * scale for s in steps], values, "o-", markersize=3, label=label)
        labels = ("step", "training tokens (millions)", "seconds of training")
        for ax, label in zip(axes, labels, strict=True):
            ax.set_xlabel(label)
            ax.grid(alpha=0.3)
        axes[0].set_ylabel("bits per byte, validation subset")
        axes[0].legend()
