"""Fine-tuning: continue training with another text, and measure what the model forgets."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrec.checkpoint.checkpoint import LoadedModel, load_model
from mmrec.checkpoint.manager import find_checkpoint
from mmrec.config import (
    FINETUNING_SETTINGS,
    LENGTHS,
    MODEL_SETTINGS,
    PRETRAINED_SETTINGS,
    ModelConfig,
    TrainConfig,
)
from mmrec.data.chat_template import read_template
from mmrec.data.conversations import chat_tokenizer, holds_conversations, read_conversations
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import check_given_settings, open_corpus
from mmrec.data.readers import ReadOptions
from mmrec.data.sources import check_read_once, source_files
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.evaluation.evaluate import evaluate_split
from mmrec.evaluation.provenance import training_corpus
from mmrec.model import Model
from mmrec.pretrained import note_if_read, pretrained_of
from mmrec.runtime.atomic import atomic_write_text
from mmrec.runtime.locking import FolderLock
from mmrec.runtime.names import user_path
from mmrec.training.pretrained import own_writing
from mmrec.training.run_dir import check_run_dir
from mmrec.training.setup import RunPlan, begin_run, check_effects
from mmrec.training.trainer import Trainer

DEFAULTS: dict[str, Any] = FINETUNING_SETTINGS | {"patience": 5, "eval_every": 50}
"""Settings in which fine-tuning differs from training, by flat name."""
LORA_LR = 1e-2
"""Default learning rate of LoRA factors."""
DEFAULT_EPOCHS = 4.0
"""Passes over the new text if no length is given."""
INHERITED = (
    "batch_size",
    "seq_len",
    "state",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "weight_decay",
    "ngram_weight_decay",
    "beta1",
    "beta2",
    "max_grad_norm",
    "ema_decay",
    "precision",
    "eval_tokens",
)
"""Settings that fine-tuning takes from the run of the model, unless the user gives them."""


@dataclass(frozen=True)
class Finetuning:
    """A fine-tuning run that is ready to train, with its scores before training."""

    trainer: Trainer
    lock: FolderLock
    corpora: dict[str, Corpus]
    """``new``, the text to train on, and ``earlier``, the text that the model was trained on, if it
    can be read."""
    names: dict[str, str]
    """What each corpus is called: the source of its text, or who wrote it."""
    before: dict[str, float]
    """Bits per byte on the validation split of each corpus before training."""

    def score_best(self) -> dict[str, dict[str, float]]:
        """Score the best model, and add the scores to the run's ``summary.json``.

        Returns:
            For each corpus its bits per byte ``before`` and ``after`` training.
        """
        best = load_model(self.trainer.run_dir / "best.h5")
        scores = {
            name: {
                "before": self.before[name],
                "after": _bits_per_byte(best.model, corpus, self.trainer),
            }
            for name, corpus in self.corpora.items()
        }
        path = self.trainer.run_dir / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8"))
        atomic_write_text(path, json.dumps(summary | {"bits_per_byte": scores}, indent=1) + "\n")
        return scores


def begin_finetuning(
    where: str | Path,
    given: dict[str, Any],
    *,
    is_chat: bool = False,
    chat_template: Path | None = None,
    old_data: str | None = None,
    force: bool = False,
    echo: Callable[[str], None] = print,
    **options: Any,
) -> Finetuning:
    """Load a model, prepare the new text, and score the model before training.

    Args:
        where: run folder or checkpoint of the model, or the name of a pretrained one.
        given: settings by flat name; ``data`` is the new text.
        is_chat: whether ``data`` is a file of conversations, of which the answers are learnt; see
            ``mmrec.data.conversations``.
        chat_template: file with the template of the chats; None takes the model's, else
            ``DEFAULT_TEMPLATE``.
        old_data: the earlier text, on which forgetting is measured and from which
            ``replay_fraction`` draws. None takes the one that the checkpoint names, if the
            ``config.toml`` beside the checkpoint names it too; of a pretrained model, what it
            writes itself.
        force: overwrite the run in the folder ``out``.
        echo: called with each line of text for the user.
        options: further arguments of ``Trainer``.

    Returns:
        The run, whose folder is locked until ``Trainer.fit`` ends or ``lock.release`` is called.

    Raises:
        InputError: the model, a text or a setting is not usable.
    """
    path = find_checkpoint(Path(where))
    template_files = () if chat_template is None else (chat_template,)
    inputs = (path, *source_files(old_data or ""), *template_files)
    if given.get("out"):  # before any long work
        check_run_dir(Path(given["out"]), inputs, force=force)
    if is_chat:
        _check_conversations(given)
        given = given | {"state": "document"}  # a conversation sees no other
    source = load_model(path)
    tokenizer = _chat_tokenizer(source, chat_template) if is_chat else None
    settings, model = _resolve(source, given, echo)
    check_read_once([settings["data"], old_data or ""])
    if note := note_if_read(path, settings["data"]):
        echo(f"note    {note}")
    wants_replay = bool(given.get("replay_fraction"))
    earlier = _earlier_corpus(source, old_data, echo, required=wants_replay)
    if wants_replay and earlier is not None:
        settings["replay_data"] = str(earlier.path.resolve())
    train = TrainConfig.from_flat(settings)
    preset = str(source.metadata.get("preset", "model"))
    plan = RunPlan(preset, model, train, source, inputs=inputs, tokenizer=tokenizer)
    lock, trainer = begin_run(plan, force=force, echo=echo, **options)
    corpora = {"new": trainer.corpus} | ({"earlier": earlier} if earlier is not None else {})
    try:
        echo("scoring the validation text before training")
        before = {n: _bits_per_byte(trainer.model, c, trainer) for n, c in corpora.items()}
    except BaseException:
        lock.release()
        raise
    names = {name: str(corpus.info["source"]) for name, corpus in corpora.items()}
    if old_data is None and (pretrained := pretrained_of(source.path)):
        names["earlier"] = f"that {pretrained.name} writes itself"
    return Finetuning(trainer, lock, corpora, names, before)


def _check_conversations(given: dict[str, Any]) -> None:
    """Check that ``data`` is a file of conversations, and that settings suit them.

    Raises:
        InputError: they do not.
    """
    path = user_path(given["data"])
    if not path.is_file():
        raise InputError(f"--chat must be a file of JSON lines; there is none at {path}")
    if given.get("text_field"):
        raise InputError(
            "--text-field has no effect with --chat: messages, or prompt and completion, are read; "
            f"got {given['text_field']!r}"
        )
    if given.get("state", "document") != "document":
        raise InputError(
            "--state must be document with --chat, as a conversation sees no other; got "
            f"{given['state']}"
        )
    for name in (given["data"], given.get("val_file", "")):
        if name and not holds_conversations(name):
            # the first line that is none says what is wrong
            next(read_conversations(user_path(name), ReadOptions()), None)
            raise InputError(
                f"{name} must hold a conversation per line, as a JSON object with the field "
                "'messages', or 'prompt' and 'completion'"
            )


def _chat_tokenizer(source: LoadedModel, chat_template: Path | None) -> Tokenizer:
    """The model's tokenizer with a chat template."""
    if chat_template is None:
        return chat_tokenizer(source.tokenizer, None, "the chat template of the model")
    name = f"--chat-template {chat_template}"
    return chat_tokenizer(source.tokenizer, read_template(chat_template), name)


def _resolve(
    source: LoadedModel, given: dict[str, Any], echo: Callable[[str], None]
) -> tuple[dict[str, Any], ModelConfig]:
    """Merge the settings of the source with the given ones.

    Returns:
        Settings of training by flat name, without ``replay_data``, and the shape of the model.

    Raises:
        InputError: a setting is not usable.
    """
    inherited = TrainConfig.from_dict(source.metadata.get("train", {})).flat()
    settings = {name: inherited[name] for name in INHERITED} | DEFAULTS
    if pretrained_of(source.path):
        settings |= PRETRAINED_SETTINGS | {"precision": "auto"}  # not that of its machine
    model_changes = {n: v for n, v in given.items() if n in MODEL_SETTINGS}
    given = {n: v for n, v in given.items() if n not in MODEL_SETTINGS}
    settings |= given
    lora_rank = given.get("lora_rank", 0)
    if lora_rank and "lr" not in given:
        settings["lr"] = LORA_LR
    if "lora_alpha" in given and not lora_rank:
        alpha = given["lora_alpha"]
        raise InputError(f"--lora-alpha needs --lora-rank, the rank; got {alpha} alone")
    if lora_rank and "matrix_lr" in given:
        rate = given["matrix_lr"]
        raise InputError(f"--matrix-lr has no effect with --lora-rank: set --lr; got {rate}")
    if given.get("replay_fraction") and settings["state"] == "carry":
        settings["state"] = "document"
        echo("note    with --replay-fraction the state is reset at each window, too")
    if not any(name in given for name in LENGTHS):
        settings["epochs"] = DEFAULT_EPOCHS
    settings["initialize_from"] = str(source.path)
    # check the settings before any text is read; the earlier text has no path yet
    config = TrainConfig.from_flat(settings | {"replay_data": "not known yet"})
    check_given_settings(given, config.data)
    check_effects(given, config)
    model = dataclasses.replace(source.model.config, **model_changes)
    return settings, model


def _earlier_corpus(
    source: LoadedModel,
    old_data: str | None,
    echo: Callable[[str], None],
    *,
    required: bool,
) -> Corpus | None:
    """The text that the source was trained on; None, with a note, if it cannot be read.

    What a pretrained model writes itself stands for the text that it was trained on.
    """
    model = pretrained_of(source.path)
    if model is not None and old_data is None:
        old_data = str(own_writing(source, model, echo))
    try:
        if old_data is not None:
            return open_corpus(old_data, source.tokenizer, echo)
        return training_corpus(source, option="--old-data", echo=echo)
    except InputError as error:
        if old_data is not None or required:
            raise
        echo(f"note    forgetting of the earlier text is not measured: {error}")
        return None


def _bits_per_byte(model: Model, corpus: Corpus, trainer: Trainer) -> float:
    scores = evaluate_split(
        model, corpus.val, corpus.tokenizer, reset_at_documents=trainer.resets_at_documents
    )
    return scores.bits_per_byte
