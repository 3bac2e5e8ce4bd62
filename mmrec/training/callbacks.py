"""Callbacks: code of the user that sees a run as it goes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from mmrec.evaluation.evaluate import Evaluation
    from mmrec.training.trainer import Trainer


class Callback:
    """Override the methods that you need, and pass an instance to ``mmrec.train(callbacks=[…])``.

    Every method receives the trainer. ``trainer.request_stop()`` ends the run after the current
    step, with a checkpoint. ``trainer.log_metrics(**values)`` adds a line of kind ``callback`` to
    ``metrics.jsonl``. Callbacks run in the training process. An exception in one ends the run as
    any other error does.

    A callback must not draw from torch's global generator if runs are to be resumed bit for bit.
    """

    def on_step(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """Called after each optimizer step.

        Args:
            trainer: the run; ``trainer.progress.step`` counts the steps taken.
            metrics: ``step``, ``loss`` (nats per token), ``lr``, ``grad_norm``,
                ``tokens_per_second``.
        """

    def on_validation(self, trainer: "Trainer", scores: "Evaluation") -> None:
        """Called after each validation on the fixed subset."""

    def on_checkpoint(self, trainer: "Trainer", path: "Path") -> None:
        """Called after each checkpoint was written."""

    def on_end(self, trainer: "Trainer", summary: dict[str, Any]) -> None:
        """Called once, after the run's last checkpoint; summary is that of ``summary.json``."""
