"""Callbacks: the user's own code, called during a run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from mmrec.evaluation.evaluate import Evaluation
    from mmrec.training.trainer import Trainer


class Callback:
    """Override the methods that you need, and pass an instance to ``mmrec.train(callbacks=[…])``.

    Every method receives the trainer. ``trainer.request_stop()`` ends the run after the current
    step, with a checkpoint. ``trainer.log_metrics(**values)`` adds a line of kind ``callback`` to
    ``metrics.jsonl``. Callbacks run in the training process, and only in runs of a single process.
    An exception in a callback ends the run as any other error does.

    A callback must not draw from torch's global generator if runs are to be resumed bit for bit.
    """

    def on_start(self, trainer: "Trainer") -> None:
        """Called once, before the first step. The run folder and its log exist.

        Args:
            trainer: the run; ``trainer.progress.step`` is above 0 if the run was resumed, and
                ``trainer.config`` and ``trainer.model.config`` are its settings. What this callback
                was told of later steps, before the run was killed, comes again.
        """

    def on_step(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """Called after each optimizer step.

        Args:
            trainer: the run; ``trainer.progress.step`` counts the steps taken.
            metrics: ``step``, ``loss`` (nats per token), ``lr``, ``grad_norm``,
                ``tokens_per_second``.
        """

    def on_validation(self, trainer: "Trainer", scores: "Evaluation") -> None:
        """Called after each validation on the fixed subset.

        Args:
            trainer: the run. With ``ema_decay`` its model holds the average of the weights.
            scores: loss in nats per token, perplexity, bits per byte, accuracy.
        """

    def on_sample(self, trainer: "Trainer", sample: dict[str, Any]) -> None:
        """Called after each text that the model has written, which follows a validation.

        Args:
            trainer: the run.
            sample: a line of ``samples.jsonl``: ``step``, ``tokens``, ``seconds``, ``prompt``,
                ``text``, ``seed``.
        """

    def on_rollback(self, trainer: "Trainer") -> None:
        """Called after the run went back to a checkpoint, as ``on_nan="rollback"`` says.

        Args:
            trainer: the run; the steps after ``trainer.progress.step`` are taken again, with other
                data.
        """

    def on_checkpoint(self, trainer: "Trainer", path: "Path") -> None:
        """Called after each checkpoint has been written.

        Args:
            trainer: the run.
            path: the file: ``best.h5``, ``last.h5`` or ``step-N.h5``. The metrics that this method
                logs are not part of it: a resume from it drops them.
        """

    def on_end(self, trainer: "Trainer", summary: dict[str, Any]) -> None:
        """Called once, when the run has ended and all its files are written.

        Args:
            trainer: the run. Its log is closed: ``log_metrics`` raises an error here.
            summary: the contents of ``summary.json``.
        """
