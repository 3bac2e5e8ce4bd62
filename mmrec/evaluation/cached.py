"""Score a text by a model with a neural cache; see ``mmrec.inference.neural_cache``.

As in dynamic evaluation the text is read in order, every token is predicted from what precedes it,
and the scores answer another question than those of the model alone.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from mmrec.data.corpus import Split
from mmrec.data.dataloader import evaluation_streams
from mmrec.errors import InputError
from mmrec.evaluation.evaluate import CachedEvaluation, ScoreSums
from mmrec.inference.neural_cache import NeuralCache, unit_keys
from mmrec.model import Model, State

CHUNK = 256
"""Tokens per forward pass. It changes speed and memory only."""


@torch.inference_mode()
def evaluate_with_cache(
    model: Model,
    split: Split,
    eot: int,
    neural_cache: int,
    *,
    reset_at_documents: bool = False,
    progress: Callable[[int], object] | None = None,
) -> CachedEvaluation:
    """Score a text from its beginning to its end in one stream.

    Args:
        model: left in evaluation mode.
        split: tokens and bytes of the text; every document ends with ``eot``.
        eot: id of the end token, which is also the context of the first token.
        neural_cache: newest tokens of the text that are kept, at least 1.
        reset_at_documents: start every document from the empty state; the cache goes on.
        progress: called with the number of tokens just scored; an exception that it raises ends
            the evaluation.

    Raises:
        InputError: the text is empty.
    """
    if not split.n_tokens:
        raise InputError("nothing to evaluate: the text is empty")
    begin = time.perf_counter()
    model.eval()
    cache = NeuralCache(neural_cache, model.config.width)
    state: State | None = None
    sums = ScoreSums()
    positions = torch.arange(split.n_tokens).split(CHUNK)
    chunks = evaluation_streams(np.asarray(split.tokens), eot, 1, CHUNK)
    for (x, y, mask), position in zip(chunks, positions, strict=True):
        document_starts = x == eot if reset_at_documents else None
        hidden, state = model.hidden_states(x, state, document_starts=document_starts)
        rows, targets = hidden[mask], y[mask]
        logits = model.lm_head(rows).float().numpy()
        mixed = cache.mix(logits, unit_keys(rows.float().numpy()), targets.numpy())
        sums.add(torch.from_numpy(mixed), targets, position)
        if progress is not None:
            progress(len(targets))
    return CachedEvaluation(
        *sums.means(split.n_bytes),
        neural_cache=neural_cache,
        seconds=time.perf_counter() - begin,
    )
