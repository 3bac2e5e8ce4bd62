"""What training does with pretrained models: which of them suits a text, and what they have read.

A pretrained model comes without the text that it has read. Where fine-tuning needs that text, to
measure what is forgotten or to draw from it against forgetting, texts stand for it that the model
writes itself (Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal").
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmrec.checkpoint.checkpoint import LoadedModel, load_model
from mmrec.config import SamplingConfig
from mmrec.data.corpus import cache_folder
from mmrec.data.readers import Document
from mmrec.data.tokenize import encode_documents
from mmrec.errors import InputError
from mmrec.evaluation.evaluate import evaluate_split
from mmrec.inference.engine import Request, complete
from mmrec.pretrained import PretrainedModel, pretrained_models
from mmrec.runtime.atomic import atomic_write_text
from mmrec.runtime.progress import progress_bar

SAMPLE_READ = 1 << 20
"""Characters of a text from which its sample is taken."""
SAMPLE_PIECES, SAMPLE_CHARS = 8, 4096
"""Pieces of the sample, and characters of each."""
WRITING_TEXTS, WRITING_TOKENS = 256, 512
"""Texts that a model writes in place of the text that it has read, and most tokens of each."""
WRITING_SAMPLING = SamplingConfig(
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
)
"""From the model's own distribution: the texts are to have the frequencies of what it has read."""


@dataclass(frozen=True)
class Candidate:
    """A pretrained model, and how well it explains a sample of a text before any training."""

    model: PretrainedModel
    bits_per_byte: float


def sample_text(texts: Iterable[str]) -> list[str]:
    """Return pieces of a text, evenly spread over its first million characters."""
    parts: list[str] = []
    for text in texts:
        parts.append(text[:SAMPLE_READ])
        if sum(map(len, parts)) >= SAMPLE_READ:
            break
    joined = "\n".join(parts)[:SAMPLE_READ]
    stride = max(SAMPLE_CHARS, len(joined) // SAMPLE_PIECES)
    return [joined[i : i + SAMPLE_CHARS] for i in range(0, len(joined), stride)][:SAMPLE_PIECES]


def score_candidates(sample: Sequence[str], kinds: Sequence[str], source: str) -> list[Candidate]:
    """Score the pretrained models on a sample of a text, the best one first.

    Args:
        sample: pieces of the text.
        kinds: the kinds of tokenizer that may be had.
        source: the text, as in ``--data``.

    Returns:
        The models with such a tokenizer that know every character of the sample, and have not read
        the text.
    """
    candidates = []
    for model in pretrained_models().values():
        if model.tokenizer in kinds and source not in model.read_corpora:
            loaded = load_model(model.checked_path())
            documents = (Document("sample", piece) for piece in sample)
            try:
                split = encode_documents(loaded.tokenizer, documents)
            except InputError:  # a character that it does not know
                continue
            scores = evaluate_split(loaded.model, split, loaded.tokenizer, reset_at_documents=True)
            candidates.append(Candidate(model, scores.bits_per_byte))
    return sorted(candidates, key=lambda c: c.bits_per_byte)


def own_writing(
    loaded: LoadedModel, model: PretrainedModel, echo: Callable[[str], None] = print
) -> Path:
    """Texts that a pretrained model writes, as a file of JSON lines in the cache folder.

    They are written once per machine. Equal files of the model write equal texts on one machine.

    Args:
        loaded: the model.
        model: what the index says of it.
        echo: called with a line of text for the user.
    """
    path = cache_folder() / f"{model.name}-{model.sha256[:16]}-writing.jsonl"
    if not path.exists():
        echo(
            f"note    {model.name} comes without the text that it has read: {WRITING_TEXTS} texts "
            "that it writes itself stand for it"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, "".join(_write_texts(loaded)))
    return path


def _write_texts(loaded: LoadedModel) -> Iterator[str]:
    requests = (
        Request(sampling=WRITING_SAMPLING, max_tokens=WRITING_TOKENS, seed=seed, return_state=False)
        for seed in range(WRITING_TEXTS)
    )
    with progress_bar(WRITING_TEXTS, "writing", "text") as bar:
        for completion in complete(loaded.decoder, requests):
            bar.update(1)
            if completion.text.strip():
                yield json.dumps({"text": completion.text}, ensure_ascii=False) + "\n"
