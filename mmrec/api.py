"""The Python API besides ``mmrec.train``: load a model, generate text, evaluate."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrec.checkpoint.checkpoint import LoadedModel, load_model
from mmrec.checkpoint.manager import find_checkpoint
from mmrec.config import DEFAULT_MAX_TOKENS, AdaptationConfig, NeuralCacheConfig
from mmrec.errors import InputError
from mmrec.evaluation.evaluate import Evaluation
from mmrec.evaluation.source import adapt_to_source, evaluate_source
from mmrec.runtime.progress import hide_progress_bars
from mmrec.training.setup import Run

ModelSource = LoadedModel | Run | str | Path | None
"""A loaded model, a run, the path of a checkpoint or run folder, or the name of a pretrained model.
None is the newest run."""


def load(source: ModelSource = None) -> LoadedModel:
    """Load a model.

    Args:
        source: a checkpoint file; a run or its folder, of which the best model is loaded; or the
            name of a pretrained model, such as ``english``, unless a file or folder has that name.
            None takes the newest run under ``runs/``. A loaded model is returned as it is.

    Returns:
        The model in evaluation mode, with its tokenizer. ``model.generate(...)`` generates text.

    Raises:
        InputError: the source is of another type, there is no such checkpoint, or the file is
            damaged or of another version.
    """
    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, Run):
        source = source.folder
    if not isinstance(source, str | Path | None):
        raise InputError(f"source must be a model, a run, a path or None; got {source!r}")
    return load_model(find_checkpoint(None if source is None else Path(source)))


def generate(
    source: ModelSource,
    prompt: str | Sequence[str] = "",
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    stop: Sequence[str] = (),
    seed: int | None = None,
    stream: bool = False,
    logit_bias: Mapping[int, float] | None = None,
    neural_cache: int = 0,
    **sampling: Any,
) -> str | list[str] | Iterator[str]:
    """Continue prompts with a model: short for ``load(source).generate(prompt, ...)``.

    Args:
        source: see ``load``.
        prompt: text to continue; may be empty. Of a list, all texts are generated together.
        max_tokens: largest number of tokens to generate per text.
        stop: texts that end the generation. They are not part of the output.
        seed: equal seeds give equal text on the same machine; None differs at every call. Text i
            of a list has the seed ``seed + i``.
        stream: return an iterator over pieces of text, which yields each piece as it is generated.
        logit_bias: what is added to the logits of tokens by their ids, -100 to 100.
        neural_cache: newest tokens of the text that are looked up besides the recurrent state; see
            ``mmrec.inference.neural_cache``. 0 looks up nothing.
        sampling: settings of ``mmrec.config.SamplingConfig``, such as ``temperature=0``.

    Returns:
        The text that follows the prompt, a list of texts for a list of prompts, or an iterator over
        the pieces of one text.

    Raises:
        InputError: the model cannot be loaded, a setting is unknown or out of range, or the prompt
            holds a character that the tokenizer does not know. With ``stream`` the call raises it,
            not the iterator.
    """
    return load(source).generate(
        prompt,
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        stream=stream,
        logit_bias=logit_bias,
        neural_cache=neural_cache,
        **sampling,
    )


def evaluate(
    source: ModelSource = None,
    data: str | Path | None = None,
    *,
    text_field: str = "",
    skip_bad: bool = False,
    adapt: bool = False,
    adapt_lr: float | None = None,
    neural_cache: int = 0,
) -> Evaluation:
    """Score a model on a text, as ``mmrec eval`` does, and print nothing.

    Every token is scored once. The model stays as it is, also with ``adapt``.

    Args:
        source: see ``load``.
        data: a name or path as for ``--data``, whose whole text is scored; a prepared corpus file,
            whose validation split is scored; or None for the validation split of the text that the
            model was trained on.
        text_field: field or column of a record that holds the text; empty is ``text``.
        skip_bad: skip broken records and files that are not UTF-8.
        adapt: score the text by dynamic evaluation, too: a copy of the model learns from each part
            of the text after its score. These scores are ``dynamic`` of the result.
        adapt_lr: learning rate of that; None is the default of ``mmrec eval --adapt``.
        neural_cache: score the text with a neural cache of so many tokens, too; see
            ``mmrec.inference.neural_cache``. These scores are ``cached`` of the result.

    Returns:
        Loss in nats per token, perplexity, bits per byte, accuracy, tokens and bytes.

    Raises:
        InputError: the model or the text cannot be read, the text is too short to adapt to, or an
            argument is of another type or out of its range.
    """
    if not isinstance(data, str | Path | None):
        raise InputError(f"data must be a name, a path or None; got {data!r}")
    if not isinstance(adapt, bool):
        raise InputError(f"adapt must be of type bool; got {adapt!r}")
    if adapt_lr is not None and not adapt:
        raise InputError(f"adapt_lr has no effect without adapt; got {adapt_lr!r}")
    reading = _check_reading(text_field, skip_bad)
    text = None if data is None else str(data)
    adaptation = _adaptation(adapt_lr) if adapt else None
    entries = NeuralCacheConfig(neural_cache).neural_cache
    loaded = load(source)
    with hide_progress_bars():
        return evaluate_source(
            loaded, text, adaptation=adaptation, neural_cache=entries, **reading
        )[0]


def adapt(
    source: ModelSource,
    data: str | Path,
    *,
    text_field: str = "",
    skip_bad: bool = False,
    adapt_lr: float | None = None,
) -> tuple[LoadedModel, Evaluation]:
    """Let a copy of a model learn from a text while it reads it once (dynamic evaluation).

    The model and its file stay as they are.

    >>> adapted, scores = mmrec.adapt("runs/tiny-book", "other.txt")  # doctest: +SKIP
    >>> scores.bits_per_byte, scores.dynamic.bits_per_byte  # doctest: +SKIP
    >>> session = mmrec.Session(adapted.decoder)  # doctest: +SKIP
    >>> session.read(Path("other.txt"))  # doctest: +SKIP
    >>> "".join(session.generate(seed=1))  # doctest: +SKIP

    Args:
        source: see ``load``.
        data: a name or path as for ``--data``.
        text_field: field or column of a record that holds the text; empty is ``text``.
        skip_bad: skip broken records and files that are not UTF-8.
        adapt_lr: learning rate; None is the default of ``mmrec generate --adapt``.

    Returns:
        The model with the weights after the text; and the scores of the text, those of the model
        before and, as ``dynamic``, those while it learnt.

    Raises:
        InputError: the model or the text cannot be read, the text is too short, or an argument is
            of another type or out of its range.
    """
    if not isinstance(data, str | Path):
        raise InputError(f"data must be a name or a path; got {data!r}")
    reading, adaptation = _check_reading(text_field, skip_bad), _adaptation(adapt_lr)
    loaded = load(source)
    with hide_progress_bars():
        return adapt_to_source(loaded, str(data), adaptation, **reading)


def _adaptation(adapt_lr: float | None) -> AdaptationConfig:
    return AdaptationConfig() if adapt_lr is None else AdaptationConfig(adapt_lr)


def _check_reading(text_field: str, skip_bad: bool) -> dict[str, Any]:
    """Return how a text is read, as keyword arguments."""
    if not isinstance(text_field, str):
        raise InputError(f"text_field must be of type str; got {text_field!r}")
    if not isinstance(skip_bad, bool):
        raise InputError(f"skip_bad must be of type bool; got {skip_bad!r}")
    return {"text_field": text_field, "skip_bad": skip_bad}
