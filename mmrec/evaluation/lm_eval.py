"""The model for EleutherAI's lm-evaluation-harness (``pip install 'mmrec[harness]'``).

The harness is handed text and asks for log-likelihoods and for text. A recurrent state has no
longest context, so nothing is cut; and what several answers share is read once.
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
from mmrec.evaluation.evaluate import Continuation, continuation
from mmrec.inference.generate import Sampling, generate

MAX_TOKENS = 256  # of a generation, where the task does not say


@register_model("mmrec")
class HarnessModel(LM):
    """A checkpoint as the harness sees it."""

    def __init__(self, model: str | LoadedModel = "", **ignored: Any) -> None:
        """``model``: run folder, checkpoint, or empty for the newest run. Raises InputError."""
        super().__init__()
        if isinstance(model, str):
            model = load_model(find_checkpoint(Path(model) if model else None))
        self._loaded = model
        self._known: tuple[list[int], Continuation] | None = None

    def _after(self, context: list[int]) -> Continuation:
        """The model when it has read the end token and a context."""
        if self._known is None or self._known[0] != context:
            start = [self._loaded.tokenizer.eot, *context]
            self._known = context, continuation(self._loaded.model, start)
        return self._known[1]

    def _split(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what follows it, made together.

        Spaces between them belong to what follows, as in the harness's own models.
        """
        bare = context.rstrip()
        text, context = context[len(bare) :] + text, bare
        ids = self._loaded.tokenizer.encode(context + text).tolist()
        count = len(self._loaded.tokenizer.encode(context))
        return ids[:count], ids[count:]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation of its context, and whether it is what
        taking the likeliest token would give."""
        made = []
        for request in tqdm(requests, "loglikelihood", disable=disable_tqdm or None):
            context, ids = self._split(*request.args)
            nats, likeliest = self._after(context).score(ids)
            made.append((-float(nats.sum()), bool(likeliest.all())))
        return made

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability in nats of each whole text."""
        made = []
        for request in tqdm(requests, "rolling", disable=disable_tqdm or None):
            ids = self._loaded.tokenizer.encode(request.args[0]).tolist()
            made.append(-float(self._after([]).score(ids)[0].sum()))
        return made

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first stop text of the task."""
        made = []
        for request in tqdm(requests, "generating", disable=disable_tqdm or None):
            context, options = request.args
            stops = options.get("until") or []
            warm = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
            how = Sampling(temperature=warm, top_p=options.get("top_p", 1.0))
            pieces = generate(
                self._loaded.model,
                self._loaded.tokenizer,
                context,
                how=how,
                seed=0,
                max_tokens=int(options.get("max_gen_toks", MAX_TOKENS)),
                stop=[s for s in ([stops] if isinstance(stops, str) else stops) if s],
            )
            made.append("".join(pieces))
        return made


def run_tasks(loaded: LoadedModel, names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """Run tasks of the harness, or of YAML files in a folder; returns what the harness returns.

    Raises InputError if there is no such task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from mmrec.errors import InputError, did_you_mean

    manager = TaskManager(include_path=str(folder) if folder else None)
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(
                f"the harness has no task {name!r}{did_you_mean(name, list(manager.all_tasks))}"
            )
    torch.manual_seed(0)
    made = simple_evaluate(HarnessModel(loaded), tasks=list(names), task_manager=manager)
    assert made is not None
    return made
