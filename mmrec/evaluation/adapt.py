"""Dynamic evaluation: a model reads a text in order and learns from what it has just read.

The text is read in segments. Each segment is scored first, and then the weights take one small step
of gradient descent on it. So every token is predicted by a model that has seen only what precedes
it, and the scores are as honest as plain ones; they answer another question. The recurrent state is
carried on. The weights are never set back, also not at a document's end.

The step is RMSProp with Adam's bias correction: the gradient over the root of its running mean
square.

Sources: Mikolov et al. 2010, "Recurrent neural network based language model", section 2; Krause et
al. 2018 (arXiv:1709.07432).
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from mmrec.config import AdaptationConfig
from mmrec.data.corpus import Split
from mmrec.data.dataloader import evaluation_streams
from mmrec.errors import InputError
from mmrec.evaluation.evaluate import DynamicEvaluation, ScoreSums
from mmrec.model import LayerState, Model, State

SEGMENT_TOKENS = 64
"""Tokens that are scored, and then learnt from, at once (docs/development/decisions)."""
BETA2 = 0.999
"""Decay of the running mean of squared gradients."""


def check_length(n_tokens: int) -> None:
    """Raise InputError if a text has no token that a model could predict better by adapting."""
    if n_tokens <= SEGMENT_TOKENS:
        raise InputError(
            f"a text to adapt to must be longer than a segment of {SEGMENT_TOKENS} tokens; got "
            f"{n_tokens}"
        )


def evaluate_dynamically(
    model: Model,
    split: Split,
    eot: int,
    config: AdaptationConfig = AdaptationConfig(),
    *,
    reset_at_documents: bool = False,
    progress: Callable[[int], object] | None = None,
) -> DynamicEvaluation:
    """Score a text segment by segment, and update the weights after each.

    Args:
        model: its weights are changed. It is left in evaluation mode.
        split: tokens and bytes of the text; every document ends with ``eot``.
        eot: id of the end token, which is also the context of the first token.
        config: the learning rate.
        reset_at_documents: start every document from the empty state; the weights go on.
        progress: called with the number of tokens just scored; an exception that it raises ends
            the evaluation.

    Raises:
        InputError: the text is not longer than a segment, or a loss is not finite.
    """
    check_length(split.n_tokens)
    begin, updates = time.perf_counter(), 0
    model.eval().requires_grad_()  # without dropout, as in the literature
    # without momentum, which goes on in the direction of segments that are past
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.adapt_lr, betas=(0.0, BETA2), weight_decay=0.0, fused=True
    )
    state: State | None = None
    sums = ScoreSums()
    positions = torch.arange(split.n_tokens).split(SEGMENT_TOKENS)
    segments = evaluation_streams(np.asarray(split.tokens), eot, 1, SEGMENT_TOKENS)
    for (x, y, _), position in zip(segments, positions, strict=True):
        document_starts = x == eot if reset_at_documents else None
        hidden, state = model.hidden_states(x, state, document_starts=document_starts)
        losses = sums.add(model.lm_head(hidden[0]), y[0], position)
        loss = losses.sum() / SEGMENT_TOKENS  # the last segment may be short; so is its step
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss must stay finite; after {updates} updates it is {loss.item()}: "
                f"adapt_lr must be lower than {config.adapt_lr:g}"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updates += 1
        state = _detach(state)
        if progress is not None:
            progress(len(position))
    return DynamicEvaluation(
        *sums.means(split.n_bytes),
        updates=updates,
        learning_rate=config.adapt_lr,
        segment_tokens=SEGMENT_TOKENS,
        seconds=time.perf_counter() - begin,
    )


def _detach(state: State) -> State:
    """A state through which no gradient flows back into the segment that it ends."""
    layers = [
        LayerState(*(None if x is None else x.detach() for x in layer))  # type: ignore[arg-type]
        for layer in state.layers
    ]
    return state._replace(layers=layers)
