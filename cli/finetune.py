"""``mmrec finetune``."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrec.cli.eval import may_read
from mmrec.cli.ranks import check_launch
from mmrec.cli.train import LENGTHS, begin, finish, say
from mmrec.config import TrainConfig, from_dict
from mmrec.errors import InputError
from mmrec.runtime.interrupts import exit_on_signal, tolerate_closed_output

if TYPE_CHECKING:
    from mmrec.checkpoint.checkpoint import LoadedModel
    from mmrec.data.corpus import Corpus
    from mmrec.model import Model

Opt = typer.Option
# Half of the rates that a model is trained with: see docs/decisions.md.
DEFAULTS: dict[str, Any] = {
    "lr": 5e-3,
    "muon_lr": 1e-2,
    "warmup": 0.1,
    "patience": 5,
    "eval_every": 50,
}
LORA_LR = 1e-2
PASSES = 4.0
# What a fine-tuning takes from the training that it goes on with.
KEPT = (
    "batch",
    "seq_len",
    "state",
    "accumulate",
    "recompute",
    "weight_decay",
    "table_decay",
    "beta1",
    "beta2",
    "clip",
    "precision",
    "eval_tokens",
)


def finetune(
    where: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="What is trained on.")],
    data: Annotated[str, Opt(help="The new text, as for train.")],
    old: Annotated[str | None, Opt(help="Text of the run; by default what it says.")] = None,
    text_field: Annotated[str | None, Opt(help="Field or column that holds the text.")] = None,
    skip_bad: Annotated[bool | None, Opt("--skip-bad", help="Pass over broken records.")] = None,
    max_bytes: Annotated[int | None, Opt(help="Read no more text than this.")] = None,
    val_share: Annotated[float | None, Opt(help="Share of the text for validation.")] = None,
    val_file: Annotated[str | None, Opt(help="Source of the validation text.")] = None,
    freeze: Annotated[str | None, Opt(help="embeddings, memory, layers:0-2 …")] = None,
    layer_decay: Annotated[float | None, Opt(help="Rates of a layer, share of the next.")] = None,
    lora: Annotated[int | None, Opt(help="Learn factors of this rank beside the weights.")] = None,
    lora_alpha: Annotated[float | None, Opt(help="What they count, over the rank.")] = None,
    replay: Annotated[float | None, Opt(help="Share of the old text in a batch.")] = None,
    epochs: Annotated[float | None, Opt(help="Length in passes over the new text.")] = None,
    steps: Annotated[int | None, Opt(help="Length in optimizer steps.")] = None,
    minutes: Annotated[float | None, Opt(help="Length in minutes of training.")] = None,
    batch: Annotated[int | None, Opt(help="Windows in a batch.")] = None,
    seq_len: Annotated[int | None, Opt(help="Tokens in a window.")] = None,
    recompute: Annotated[bool | None, Opt("--recompute", help="Less memory, more time.")] = None,
    lr: Annotated[float | None, Opt(help="Peak rate of embeddings, norms, biases.")] = None,
    muon_lr: Annotated[float | None, Opt(help="Peak rate of weight matrices.")] = None,
    warmup: Annotated[float | None, Opt(help="Warmup, share of the run.")] = None,
    dropout: Annotated[float | None, Opt(help="Dropout of each branch.")] = None,
    eval_every: Annotated[int | None, Opt(help="Steps between validations.")] = None,
    patience: Annotated[int | None, Opt(help="Stop after so many validations; 0: never.")] = None,
    seed: Annotated[int | None, Opt(help="Seed of order and dropout.")] = None,
    out: Annotated[str | None, Opt(help="Run folder.")] = None,
    force: Annotated[bool, Opt("--force", help="Overwrite the run in --out.")] = False,
) -> None:
    """Train a model on with another text: mmrec finetune runs/tiny-stdlib --data book.txt."""
    given = {k: v for k, v in locals().items() if v is not None}
    check_launch(None)
    for key in ("where", "old", "force", "dropout"):
        given.pop(key, None)

    from mmrec.checkpoint.checkpoint import load_model
    from mmrec.checkpoint.manager import find_checkpoint

    source = load_model(find_checkpoint(where))
    earlier = source.info.get("train", {})
    settings = {k: earlier[k] for k in KEPT if k in earlier} | DEFAULTS | given
    if lora and lr is None:
        settings["lr"] = LORA_LR
    if lora_alpha is not None and not lora:
        raise InputError(f"--lora-alpha needs --lora, the rank; got {lora_alpha} alone")
    if lora and muon_lr is not None:
        raise InputError(f"--muon-lr moves nothing with --lora: its rate is --lr; got {muon_lr}")
    if replay and settings.get("state") == "carry":
        settings["state"] = "document"
        say("note: with --replay memories start anew in each window, not only in each document")
    if not LENGTHS & given.keys():
        settings["epochs"] = PASSES
    with tolerate_closed_output(), contextlib.ExitStack() as held:
        with exit_on_signal("stopped before training began: there was nothing to save"):
            before = _old_corpus(source, old, needed=bool(replay))
            if replay and before is not None:
                settings["replay_data"] = str(before.path.resolve())
            chosen = from_dict(TrainConfig, settings | {"grow_from": str(source.path)})
            shape = source.model.config
            if dropout is not None:
                shape = dataclasses.replace(shape, dropout=dropout)
            title = str(source.info.get("preset", "model"))
            lock, trainer = begin(title, shape, chosen, source, force, held)
            texts = {"new": trainer.corpus} | ({"old": before} if before is not None else {})
            say("scoring the validation text before training")
            scores = {k: [_bits(trainer.model, text, trainer.resets)] for k, text in texts.items()}
        finish(trainer, lock, resume=False)
    best = load_model(trainer.folder / "best.h5").model
    for key, text in texts.items():
        scores[key].append(_bits(best, text, trainer.resets))
        what = text.info["source"]
        say(
            f"{key} text {what}: {scores[key][0]:.4f} bits per byte before, {scores[key][1]:.4f} "
            "after"
        )
    _note(
        trainer.folder / "summary.json",
        {k: dict(zip(("before", "after"), v, strict=True)) for k, v in scores.items()},
    )


def _old_corpus(source: "LoadedModel", named: str | None, *, needed: bool) -> "Corpus | None":
    """The text that the source was trained on; None, said aloud, if it is not there."""
    from mmrec.data.prepare import open_corpus, reading

    settings = from_dict(TrainConfig, source.info.get("train", {}))
    data = named or settings.data
    try:
        if not named and not may_read(settings, source.path):
            raise InputError(
                f"{source.path} says it was trained on {data!r}; what a file names is "
                "not read unless the config.toml beside it names it too: give --old"
            )
        how = None if named else reading(settings)
        corpus = open_corpus(data, source.tokenizer, say, how)
        if not named and corpus.info["fingerprint"] != source.info.get("fingerprint"):
            raise InputError(f"the text of {data} changed since training: give --old")
    except InputError as error:
        if named or needed:
            raise
        say(f"note: what is forgotten of the old text is not measured: {error}")
        return None
    return corpus


def _bits(model: "Model", corpus: "Corpus", resets: bool) -> float:
    from mmrec.evaluation.evaluate import evaluate

    val, eot = corpus.val, corpus.tokenizer.eot
    return evaluate(model, val.tokens, eot, val.n_bytes, resets=resets).bits_per_byte


def _note(path: Path, scores: dict[str, Any]) -> None:
    """Add the scores before and after to the run's summary."""
    from mmrec.runtime.atomic import atomic_write_text

    made = json.loads(path.read_text(encoding="utf-8"))
    atomic_write_text(path, json.dumps(made | {"bits_per_byte": scores}, indent=1) + "\n")
