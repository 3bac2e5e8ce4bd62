"""Distillation: a model learns what other models predict, not only what the text says.

Models that were trained on the same text from other seeds make different mistakes, so the mean of
their predictions is better than each of them. A student that learns that mean keeps most of the
gain in a single model. Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a
Neural Network" (arXiv:1503.02531, section 2), with temperature 1; several teachers as in Kim et al.
2025, "Pre-training under infinite compute" (arXiv:2509.14786).
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.checkpoint.checkpoint import load_model
from mmrec.checkpoint.manager import find_checkpoint
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.model import Model, State
from mmrec.runtime.names import user_path
from mmrec.runtime.numeric import cdiv
from mmrec.training.replicas import Replicas

MAX_TABLE_BYTES = 1 << 30
"""Most memory of the teachers' predictions for a whole text. Those of a larger text or vocabulary
are computed for each batch anew."""
TABLE_STREAMS, TABLE_WINDOW = 64, 256
"""Parallel streams in which teachers read a whole text, and tokens of each at a time."""


def teacher_names(setting: str) -> list[str]:
    """The runs and checkpoints of the setting ``teachers``; none if it is empty.

    Raises:
        InputError: a name is missing.
    """
    if not setting:
        return []
    names = [name.strip() for name in setting.split(",")]
    if not all(names):
        raise InputError(f"teachers must be runs or checkpoints joined by commas; got {setting!r}")
    return names


class Teachers:
    """Models whose mean prediction another model learns."""

    def __init__(self, models: Sequence[Model]) -> None:
        """Take models with one vocabulary; they are not changed."""
        self.models = [model.eval().requires_grad_(False) for model in models]

    @classmethod
    def load(cls, setting: str, tokenizer: Tokenizer, precision: str) -> "Teachers":
        """Load teachers.

        Args:
            setting: runs or checkpoints, joined by commas.
            tokenizer: the student's.
            precision: that of the teachers' matrix products, ``float32`` or ``bfloat16``.

        Raises:
            InputError: a teacher is not there, or has another tokenizer than the student.
        """
        models = []
        for name in teacher_names(setting):
            loaded = load_model(find_checkpoint(user_path(name)))
            if loaded.tokenizer.to_json() != tokenizer.to_json():
                raise InputError(
                    f"a teacher must have the tokenizer of the run, {tokenizer.kind} of "
                    f"{tokenizer.vocab_size:,}; {name} has {loaded.tokenizer.kind} of "
                    f"{loaded.tokenizer.vocab_size:,}, learnt from another text"
                )
            loaded.model.set_precision(precision)
            models.append(loaded.model)
        return cls(models)

    def fingerprint(self) -> str:
        """A SHA-256 of all weights, by which a resumed run knows its teachers."""
        digest = hashlib.sha256()
        for model in self.models:
            for name, p in model.named_parameters():
                digest.update(name.encode())
                digest.update(p.detach().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def probabilities(self, tokens: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """The mean of the probabilities that the teachers give to each next token.

        Args:
            tokens: (B, T) int64.
            document_starts: (B, T) bool, as for ``Model.hidden_states``.

        Returns:
            (B, T, V) float32.
        """
        total: Tensor | None = None
        for model in self.models:
            hidden, _ = model.hidden_states(tokens, document_starts=document_starts)
            probabilities = model.lm_head(hidden).softmax(-1)
            total = probabilities if total is None else total.add_(probabilities)
        assert total is not None
        return total.div_(len(self.models))

    def table_bytes(self, tokens: int) -> int:
        """Bytes of the table of a text of so many tokens."""
        return 2 * tokens * self.models[0].config.vocab_size

    @torch.no_grad()
    def predict_text(
        self,
        tokens: np.ndarray,
        end_of_text: int | None,
        replicas: Replicas,
        on_window: Callable[[int], object] = lambda count: None,
    ) -> np.ndarray:
        """The mean of the probabilities that the teachers give to each next token of a text.

        A student reads its text many times; so its teachers read it once. They read it in 64
        streams, each of which begins without context and then has all of it.

        Args:
            tokens: (n,) token ids.
            end_of_text: a token at which the recurrent state is reset; None never resets it.
            replicas: threads that share the streams.
            on_window: called with the number of tokens that have been read since its last call.

        Returns:
            (n, V) float16. Row i is the prediction after tokens[i].
        """
        n = len(tokens)
        table = np.zeros((n, self.models[0].config.vocab_size), np.float16)
        length = cdiv(n, TABLE_STREAMS)
        begins = np.arange(0, n, length)

        def read(own_begins: np.ndarray) -> None:
            states: list[State | None] = [None] * len(self.models)
            for offset in range(0, length, TABLE_WINDOW):
                places = own_begins[:, None] + np.arange(offset, min(offset + TABLE_WINDOW, length))
                window = torch.from_numpy(tokens[np.minimum(places, n - 1)].astype(np.int64))
                starts = None if end_of_text is None else window == end_of_text
                total = torch.zeros(*window.shape, table.shape[1])
                for i, model in enumerate(self.models):
                    hidden, states[i] = model.hidden_states(
                        window, states[i], document_starts=starts
                    )
                    total += model.lm_head(hidden).softmax(-1)
                is_inside = places < n
                table[places[is_inside]] = (total / len(self.models)).numpy()[is_inside]
                on_window(int(is_inside.sum()))

        parts = np.array_split(begins, replicas.count)
        replicas.run([partial(read, part) for part in parts if len(part)])
        return table


def distillation_loss(
    student: Model,
    tokens: Tensor,
    targets: Tensor,
    state: State | None = None,
    *,
    weight: float,
    teachers: Teachers | None = None,
    soft_targets: Tensor | None = None,
    document_starts: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, State]:
    """The loss of a student. Most arguments are those of ``Model.loss``.

    Args:
        student: the model that learns.
        tokens, targets, state, document_starts, generator: see ``Model.loss``.
        weight: w, from 0 to 1.
        teachers: whose mean prediction it learns; None where ``soft_targets`` are given.
        soft_targets: (B, T, V) float32, what the teachers predict; None asks them.

    Returns:
        w times the cross-entropy with the teachers' mean prediction, plus 1 - w times that with the
        targets, as a mean over tokens; and the new state.
    """
    mean = soft_targets
    if mean is None:
        assert teachers is not None
        mean = teachers.probabilities(tokens, document_starts)
    hidden, state = student.hidden_states(
        tokens, state, document_starts=document_starts, generator=generator
    )
    log_probabilities = student.lm_head(hidden).log_softmax(-1).flatten(0, 1)
    loss = -weight * (mean.flatten(0, 1) * log_probabilities).sum(-1).mean()
    if weight < 1:
        loss = loss + (1 - weight) * F.nll_loss(log_probabilities, targets.flatten())
    return loss, state
