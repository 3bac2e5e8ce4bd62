"""Evaluate a loaded model on its validation split or on any other text."""

import copy
import dataclasses
from collections.abc import Callable

import numpy as np

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.config import AdaptationConfig
from mmrec.data.conversations import conversations_to_score, holds_conversations
from mmrec.data.corpus import Corpus, Split, is_prepared
from mmrec.data.readers import ReadOptions
from mmrec.data.sources import iter_documents
from mmrec.data.tokenize import encode_documents
from mmrec.errors import InputError
from mmrec.evaluation.adapt import check_length, evaluate_dynamically
from mmrec.evaluation.cached import evaluate_with_cache
from mmrec.evaluation.evaluate import Evaluation, TokenScores, evaluate_split
from mmrec.evaluation.provenance import training_config, training_corpus
from mmrec.evaluation.report import Report, make_report
from mmrec.model import Model
from mmrec.runtime.names import user_path

COPY_SEARCH_TOKENS = 20_000_000  # tokens of the training text that are searched for copies


def open_split(
    loaded: LoadedModel, data: str | None = None, *, text_field: str = "", skip_bad: bool = False
) -> tuple[Split, str]:
    """Tokenise the text to evaluate a model on.

    Args:
        loaded: the checkpoint.
        data: None for the validation split of the text that the model was trained on; a prepared
            corpus file for the validation split of that; any other source for all of its text.
        text_field: field or column of ``data`` that holds the text; empty is ``text``.
        skip_bad: skip broken records and files that are not UTF-8.

    Returns:
        The split, and its description, such as "validation split of stdlib".

    Raises:
        InputError: the text cannot be read, may not be read (see ``provenance``), is empty, or was
            prepared with another tokenizer.
    """
    options = ReadOptions(text_field, skip_bad)
    if (text_field or skip_bad) and (data is None or is_prepared(data)):
        flag = "--text-field" if text_field else "--skip-bad"
        raise InputError(f"{flag} is for a text in --data; got {data or 'no --data'}")
    if data is None:
        corpus = training_corpus(loaded)
        answers = " (its answers)" * (corpus.val.answers is not None)
        return corpus.val, f"validation split of {training_config(loaded).data.source}{answers}"
    if is_prepared(data):
        corpus = Corpus.open(user_path(data))
        if not loaded.tokenizer.extends(corpus.tokenizer):
            raise InputError(
                f"{data} must have the tokenizer of {loaded.path}; it has another: "
                "give its text instead"
            )
        return corpus.val, f"validation split of {data}"
    if loaded.tokenizer.chat_template and not text_field and holds_conversations(data):
        split = conversations_to_score(data, loaded.tokenizer, options)
        skipped = options.skipped_records
        return split, f"the answers of {data}" + f" (lines skipped: {skipped:,})" * bool(skipped)
    split = encode_documents(loaded.tokenizer, iter_documents(data, options))
    if not split.n_tokens:
        raise options.no_text(data)
    options.check_text_field(data)
    skipped = options.skipped_records
    return split, f"all of {data}" + f" (records or files skipped: {skipped:,})" * bool(skipped)


def evaluate_source(
    loaded: LoadedModel,
    data: str | None = None,
    *,
    text_field: str = "",
    skip_bad: bool = False,
    adaptation: AdaptationConfig | None = None,
    neural_cache: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Evaluation, Report, str]:
    """Score a loaded model on a text.

    Args:
        loaded: the checkpoint.
        data: the text; see ``open_split``.
        text_field: field or column of ``data`` that holds the text; empty is ``text``.
        skip_bad: skip broken records and files that are not UTF-8.
        adaptation: how to score the text by dynamic evaluation, too; None leaves that out.
        neural_cache: tokens of a neural cache with which the text is scored, too; 0 leaves that
            out.
        progress: called with the number of tokens just scored and the number of all tokens to
            score.

    Returns:
        The scores, the scores of the plain model broken down, and the description of the text.

    Raises:
        InputError: see ``open_split`` and ``adapt.evaluate_dynamically``.
    """
    split, description = open_split(loaded, data, text_field=text_field, skip_bad=skip_bad)
    tokenizer, scores = loaded.tokenizer, TokenScores.empty(split.n_tokens)
    evaluation, _ = _score(loaded, split, adaptation, scores, progress, neural_cache)
    token_bytes = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    tokens = np.asarray(split.tokens)
    report = make_report(tokens, tokenizer.eot, np.array(token_bytes), scores, split.answers)
    return evaluation, report, description


def adapt_to_source(
    loaded: LoadedModel,
    data: str,
    adaptation: AdaptationConfig = AdaptationConfig(),
    *,
    text_field: str = "",
    skip_bad: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[LoadedModel, Evaluation]:
    """Let a copy of a model learn from a text while it reads it once.

    Args:
        loaded: the checkpoint, which stays as it is.
        data: the text; see ``open_split``.
        adaptation: how the model learns.
        text_field: field or column of ``data`` that holds the text; empty is ``text``.
        skip_bad: skip broken records and files that are not UTF-8.
        progress: called with the number of tokens just scored and the number of all tokens to
            score.

    Returns:
        The model with the weights after the text; and the scores of the text, those of the model
        before and, as ``dynamic``, those while it learnt.

    Raises:
        InputError: see ``open_split`` and ``adapt.evaluate_dynamically``.
    """
    split, _ = open_split(loaded, data, text_field=text_field, skip_bad=skip_bad)
    evaluation, model = _score(loaded, split, adaptation, None, progress)
    return dataclasses.replace(loaded, model=model), evaluation


def _score(
    loaded: LoadedModel,
    split: Split,
    adaptation: AdaptationConfig | None,
    token_scores: TokenScores | None,
    progress: Callable[[int, int], object] | None,
    neural_cache: int = 0,
) -> tuple[Evaluation, Model]:
    """The scores, and the model after dynamic evaluation: a copy, if there was any."""
    is_chat = split.answers is not None
    if adaptation is not None:
        if is_chat:
            raise InputError("a model adapts to a text; got conversations")
        check_length(split.n_tokens)
    if neural_cache and is_chat:
        raise InputError("a neural cache is for a text; got conversations")
    total = split.n_tokens * (1 + (adaptation is not None) + bool(neural_cache))
    show = None if progress is None else lambda count: progress(count, total)
    reset = is_chat or training_config(loaded).data.state != "window"
    evaluation = evaluate_split(
        loaded.model,
        split,
        loaded.tokenizer,
        reset_at_documents=reset,
        token_scores=token_scores,
        progress=show,
    )
    eot = loaded.tokenizer.eot
    if neural_cache:
        cached = evaluate_with_cache(
            loaded.model, split, eot, neural_cache, reset_at_documents=reset, progress=show
        )
        evaluation = dataclasses.replace(evaluation, cached=cached)
    if adaptation is None:
        return evaluation, loaded.model
    model = copy.deepcopy(loaded.model)
    dynamic = evaluate_dynamically(
        model, split, eot, adaptation, reset_at_documents=reset, progress=show
    )
    return dataclasses.replace(evaluation, dynamic=dynamic), model


def training_text(loaded: LoadedModel) -> bytes:
    """Return the training text of a checkpoint in which copies are looked for.

    Returns:
        UTF-8 bytes of the first 20 million tokens of its training split.

    Raises:
        InputError: the text may not or cannot be read; see ``provenance.training_corpus``.
    """
    tokens = training_corpus(loaded).train.tokens[:COPY_SEARCH_TOKENS]
    return b"".join(loaded.tokenizer.token_bytes(t) for t in tokens.tolist())
