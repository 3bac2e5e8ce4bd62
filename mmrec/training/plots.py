"""Pictures of training: the loss curve of a run, and the curves of staged training."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrec.runtime.names import shorten
from mmrec.runtime.pictures import LABEL_CHARS, legend_label, picture, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mmrec.evaluation.compare import Curve


TRAINING_COLOUR, VALIDATION_COLOUR, BEST_COLOUR = "#1f77b4", "#ff7f0e", "#d62728"
Losses = Sequence[tuple[int, float]]
"""Steps, and their losses in nats per token."""


def draw_loss_curve(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss against steps as a PNG.

    Args:
        lines: those of metrics.jsonl.
        path: the file.
        title: the name of the run.

    Raises:
        StorageError: the picture could not be drawn or written.
    """
    train = [(x["step"], x["loss"]) for x in lines if x["kind"] == "train"]
    val = [(x["step"], x["loss"]) for x in lines if x["kind"] == "val"]
    with picture(path, 7.2) as figure:
        axes = _plot_losses(figure, train, val)
        axes.set_title(shorten(title, LABEL_CHARS))
        if train or val:
            axes.legend()


def loss_curve_svg(train: Losses, val: Losses) -> str:
    """Draw training and validation loss against steps as an ``<svg>`` element.

    It has no legend, whose letters could not be made larger without leaving its frame. The colours
    are ``TRAINING_COLOUR``, ``VALIDATION_COLOUR`` and ``BEST_COLOUR``.

    Raises:
        StorageError: the picture could not be drawn.
    """
    return svg(lambda figure: _plot_losses(figure, train, val), 7.2, 4.2)


def _plot_losses(figure: "Figure", train: Losses, val: Losses) -> "Axes":
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        smooth, mean = [], losses[0]
        for loss in losses:
            mean += 0.1 * (loss - mean)
            smooth.append(mean)
        axes.plot(steps, losses, color=TRAINING_COLOUR, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=TRAINING_COLOUR, label="training")
    if val:
        steps, losses = zip(*val, strict=True)
        axes.plot(steps, losses, "o-", color=VALIDATION_COLOUR, markersize=4, label="validation")
        step, loss = min(val, key=lambda pair: pair[1])
        axes.plot([step], [loss], "*", color=BEST_COLOUR, markersize=12, label=f"best {loss:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    return axes


def draw_stages(curves: list["Curve"], start_scores: list[float | None], path: Path) -> None:
    """Draw the validation curves of staged training, one after the other in time, as a PNG.

    Args:
        curves: one per stage.
        start_scores: bits per byte of each stage before its first step; None if not measured.
        path: the file.

    Raises:
        StorageError: the picture could not be drawn or written.
    """
    with picture(path, 7.2) as figure:
        axes, begin = figure.add_subplot(), 0.0
        for curve, start_score in zip(curves, start_scores, strict=True):
            seconds_per_step = curve.seconds / max(1, curve.steps)  # as in compare.draw_curves
            points = [(0, start_score)] if start_score is not None else []
            steps, values = zip(*points, *curve.validations, strict=True)
            seconds = [begin + step * seconds_per_step for step in steps]
            label = legend_label(Path(curve.run).name)
            axes.plot(seconds, values, "o-", markersize=3, label=label)
            begin += curve.seconds
        axes.set(xlabel="seconds of training", ylabel="bits per byte, validation subset")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend()
