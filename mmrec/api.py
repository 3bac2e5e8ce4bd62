"""The Python API besides ``mmrec.train``: load a model, let it write, score it on a text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmrec.checkpoint.checkpoint import LoadedModel, load_model
from mmrec.checkpoint.manager import find_checkpoint
from mmrec.evaluation.evaluate import Evaluation
from mmrec.evaluation.source import evaluate_source
from mmrec.training.setup import Run

ModelSource = LoadedModel | Run | str | Path | None
"""A loaded model, a finished run, a checkpoint or run folder; None is the newest run."""


def load(source: ModelSource = None) -> LoadedModel:
    """Load a model.

    Args:
        source: a checkpoint file; a run, or its folder, whose best model is taken; None takes the
            newest run under ``runs/``.

    Returns:
        The model in evaluation mode, with its tokenizer. ``model.generate(...)`` lets it write.

    Raises:
        InputError: there is no such checkpoint, or it is damaged or of another version.
    """
    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, Run):
        source = source.folder
    return load_model(find_checkpoint(None if source is None else Path(source)))


def generate(
    source: ModelSource,
    prompt: str = "",
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    seed: int | None = None,
    stream: bool = False,
    **sampling: Any,
) -> str | Iterator[str]:
    """Continue a prompt: ``load(source).generate(prompt, …)``, see ``LoadedModel.generate``."""
    return load(source).generate(
        prompt, max_tokens=max_tokens, stop=stop, seed=seed, stream=stream, **sampling
    )


def evaluate(
    source: ModelSource = None,
    data: str | Path | None = None,
    *,
    text_field: str = "",
    skip_bad: bool = False,
) -> Evaluation:
    """Score a model on a text, every token once, as ``mmrec eval`` does.

    Args:
        source: see ``load``.
        data: any source of text, which is scored in full; a prepared corpus file, whose validation
            split is scored; None scores the validation split of the text the model was trained on.
        text_field: field or column of a record that holds the text; empty is ``text``.
        skip_bad: skip broken records and files that are not UTF-8.

    Returns:
        Loss in nats per token, perplexity, bits per byte, accuracy, tokens and bytes.

    Raises:
        InputError: the model or the text cannot be read.
    """
    text = None if data is None else str(data)
    scores, _, _ = evaluate_source(load(source), text, text_field=text_field, skip_bad=skip_bad)
    return scores
