"""The adapter for EleutherAI's lm-evaluation-harness (``pip install 'mmrec[harness]'``).

The harness asks for log-likelihoods of texts and for generated text. The context of a recurrent
model has no largest length, so nothing is cut; a context that several answers share is read once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from mmrec.checkpoint.checkpoint import LoadedModel, load_model
from mmrec.checkpoint.manager import find_checkpoint
from mmrec.config import SamplingConfig
from mmrec.errors import InputError, did_you_mean
from mmrec.evaluation.evaluate import ScoredContext, read_context
from mmrec.inference.engine import Request, complete

MAX_TOKENS = 256  # of a generated text, where the task sets no limit


@register_model("mmrec")
class LmEvalModel(LM):
    """A checkpoint as a model of the harness."""

    def __init__(self, model: str | LoadedModel = "", **ignored: Any) -> None:
        """Load the checkpoint.

        Args:
            model: run folder or checkpoint; empty for the newest run.
            ignored: settings of the harness that do not concern mmrec, such as the batch size.

        Raises:
            InputError: the checkpoint cannot be read.
        """
        super().__init__()
        if isinstance(model, str):
            model = load_model(find_checkpoint(Path(model) if model else None))
        self._loaded = model
        self._last: tuple[list[int], ScoredContext] | None = None

    def _read(self, context: list[int]) -> ScoredContext:
        """The model after the end token and a context; the last one is kept."""
        if self._last is None or self._last[0] != context:
            ids = [self._loaded.tokenizer.eot, *context]
            self._last = context, read_context(self._loaded.model, ids)
        return self._last[1]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of its continuation, encoded as one text.

        Spaces at the end of the context count to the continuation, as in the harness's own models.
        """
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        ids = self._loaded.tokenizer.encode(context + continuation).tolist()
        count = len(self._loaded.tokenizer.encode(context))
        return ids[:count], ids[count:]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the log-probability of the continuation in nats,
        and whether greedy decoding would generate it."""
        results = []
        for request in tqdm(requests, "loglikelihood", disable=disable_tqdm or None):
            context, ids = self._encode_pair(*request.args)
            nats, correct = self._read(context).score(ids)
            results.append((-float(nats.sum()), bool(correct.all())))
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each text in nats."""
        results = []
        for request in tqdm(requests, "rolling", disable=disable_tqdm or None):
            ids = self._loaded.tokenizer.encode(request.args[0]).tolist()
            results.append(-float(self._read([]).score(ids)[0].sum()))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated after each context, up to the first stop text of the task."""
        prepared = [self._generation(*request.args) for request in requests]
        completions = complete(self._loaded.decoder, prepared)
        progress = tqdm(
            completions, "generating", total=len(prepared), disable=disable_tqdm or None
        )
        return [completion.text for completion in progress]

    def _generation(self, context: str, options: dict[str, Any]) -> Request:
        """The request for a text after a context, with the options that the task sets."""
        stop = options.get("until") or []
        temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
        return Request(
            context,
            SamplingConfig(temperature=temperature, top_p=options.get("top_p", 1.0)),
            seed=0,
            max_tokens=int(options.get("max_gen_toks", MAX_TOKENS)),
            stop=[text for text in ([stop] if isinstance(stop, str) else stop) if text],
            return_state=False,
        )


def run_tasks(loaded: LoadedModel, names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """Evaluate a model on tasks of the harness.

    Args:
        loaded: the checkpoint.
        names: names of tasks.
        folder: folder with more tasks as YAML files, or None.

    Returns:
        The result of the harness, with scores under "results".

    Raises:
        InputError: there is no task of that name.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None)
    for name in names:
        if name not in manager.all_tasks:
            suggestion = did_you_mean(name, list(manager.all_tasks))
            raise InputError(f"the harness has no task {name!r}{suggestion}")
    torch.manual_seed(0)
    result = simple_evaluate(LmEvalModel(loaded), tasks=list(names), task_manager=manager)
    assert result is not None
    return result
