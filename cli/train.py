"""``mmrec train``."""

import contextlib
import dataclasses
import functools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrec.cli.ranks import check_launch, command, follow, lead, together
from mmrec.config import (
    ModelConfig,
    TrainConfig,
    from_dict,
    load_toml,
    preset,
    train_settings,
)
from mmrec.errors import InputError
from mmrec.runtime.interrupts import exit_on_signal, tolerate_closed_output

if TYPE_CHECKING:
    from mmrec.checkpoint.checkpoint import LoadedModel
    from mmrec.runtime.distributed import ProcessGroup
    from mmrec.runtime.locking import FolderLock
    from mmrec.training.trainer import Trainer

Opt = typer.Option
LENGTHS = {"steps", "epochs", "minutes"}
say = functools.partial(print, flush=True)


def train(
    name: Annotated[str | None, typer.Argument(metavar="PRESET", help="tiny, mini, … 7b.")] = None,
    config: Annotated[Path | None, Opt(help="TOML file with [model] and [train] tables.")] = None,
    data: Annotated[
        str | None, Opt(help="stdlib, shakespeare, file, folder, glob, - or hf:NAME.")
    ] = None,
    text_field: Annotated[str | None, Opt(help="Field or column that holds the text.")] = None,
    skip_bad: Annotated[bool | None, Opt("--skip-bad", help="Pass over broken records.")] = None,
    max_bytes: Annotated[int | None, Opt(help="Read no more text than this.")] = None,
    val_share: Annotated[float | None, Opt(help="Share of the text for validation.")] = None,
    val_file: Annotated[str | None, Opt(help="Source of the validation text.")] = None,
    tokenizer: Annotated[str | None, Opt(help="bpe, char or byte.")] = None,
    vocab: Annotated[int | None, Opt(help="Vocabulary of bpe.")] = None,
    grow_from: Annotated[str | None, Opt(help="Run to grow to PRESET and train on.")] = None,
    epochs: Annotated[float | None, Opt(help="Length in passes over the text.")] = None,
    steps: Annotated[int | None, Opt(help="Length in optimizer steps.")] = None,
    minutes: Annotated[float | None, Opt(help="Length in minutes of training.")] = None,
    batch: Annotated[int | None, Opt(help="Windows in a batch.")] = None,
    seq_len: Annotated[int | None, Opt(help="Tokens in a window.")] = None,
    state: Annotated[str | None, Opt(help="Memories start at window, document or carry.")] = None,
    accumulate: Annotated[int | None, Opt(help="Batches in a step.")] = None,
    recompute: Annotated[bool | None, Opt("--recompute", help="Less memory, more time.")] = None,
    lr: Annotated[float | None, Opt(help="Peak rate of embeddings, norms, biases.")] = None,
    muon_lr: Annotated[float | None, Opt(help="Peak rate of weight matrices.")] = None,
    min_lr: Annotated[float | None, Opt(help="Rate left at the end, share of the peak.")] = None,
    warmup: Annotated[float | None, Opt(help="Warmup, share of the run.")] = None,
    schedule: Annotated[str | None, Opt(help="cosine, linear or constant.")] = None,
    weight_decay: Annotated[float | None, Opt(help="Weight decay of matrices.")] = None,
    table_decay: Annotated[float | None, Opt(help="Weight decay of pairs and triples.")] = None,
    clip: Annotated[float | None, Opt(help="Largest gradient norm.")] = None,
    dropout: Annotated[float | None, Opt(help="Dropout of each branch.")] = None,
    layers: Annotated[str | None, Opt(help="Memories by layer: s, l, b(oth), n(o weight).")] = None,
    precision: Annotated[str | None, Opt(help="auto, float32 or bfloat16 products.")] = None,
    seed: Annotated[int | None, Opt(help="Seed of weights, order and dropout.")] = None,
    eval_every: Annotated[int | None, Opt(help="Steps between validations.")] = None,
    save_every: Annotated[int | None, Opt(help="Steps between step-N checkpoints.")] = None,
    keep: Annotated[int | None, Opt(help="Number of step-N checkpoints kept.")] = None,
    patience: Annotated[int | None, Opt(help="Stop after so many validations; 0: never.")] = None,
    on_nan: Annotated[str | None, Opt(help="stop, skip or rollback.")] = None,
    out: Annotated[str | None, Opt(help="Run folder.")] = None,
    parallel: Annotated[str | None, Opt(help="ddp or fsdp, under torchrun.")] = None,
    force: Annotated[bool, Opt("--force", help="Overwrite the run in --out.")] = False,
    resume: Annotated[bool, Opt("--resume", help="Continue --out, or the newest run.")] = False,
) -> None:
    """Train a model: mmrec train tiny. Settings: preset, then --config, then flags."""
    given = {k: v for k, v in locals().items() if v is not None}
    for key in ("name", "config", "parallel", "force", "resume"):
        given.pop(key, None)
    if resume:
        wrong = ["PRESET"] * (name is not None) + ["--config"] * (config is not None)
        wrong += ["--force"] * force
        wrong += [f"--{k.replace('_', '-')}" for k in given if k not in LENGTHS | {"out", "on_nan"}]
        if wrong:
            raise InputError(f"--resume keeps the settings of its run; {wrong[0]} cannot be given")
    check_launch(parallel)
    with tolerate_closed_output(), contextlib.ExitStack() as held:
        with exit_on_signal("stopped before training began: there was nothing to save"):
            process_group = held.enter_context(together(parallel))
            lock = None
            if process_group and process_group.rank:
                trainer, resume = follow(process_group)
            elif resume:
                lock, trainer = resume_run(given, held, process_group)
            else:
                lock, trainer = _begin(name, config, given, force, held, process_group)
            if lock and process_group:
                lead(trainer, resume=resume)
        finish(trainer, lock, resume, parallel)


def _begin(
    name: str | None,
    config: Path | None,
    given: dict[str, Any],
    force: bool,
    held: contextlib.ExitStack,
    process_group: "ProcessGroup | None",
) -> tuple["FolderLock", "Trainer"]:
    """A new run: its folder, locked, and its trainer."""
    tables = load_toml(config) if config else {}
    settings = dict(tables.get("train", {}))
    if LENGTHS & set(given):
        settings = {k: v for k, v in settings.items() if k not in LENGTHS}
    own = {k: given.pop(k) for k in ("dropout", "layers") if k in given}
    chosen = from_dict(TrainConfig, settings | given)
    title = name or str(tables.get("preset", ""))
    if not (title or chosen.grow_from):
        raise InputError("name a preset: mmrec train tiny, or one in a --config file")
    source = _source(chosen.grow_from, settings | given) if chosen.grow_from else None
    if title:
        from mmrec.data.prepare import tokenizer_kind

        kind = source.tokenizer.kind if source else tokenizer_kind(chosen)
        shape = preset(title, kind)
        chosen = from_dict(TrainConfig, train_settings(title, kind) | settings | given)
    elif source:
        shape, title = source.model.config, str(source.info.get("preset", "model"))
    values = dataclasses.asdict(shape) | tables.get("model", {}) | own
    model: ModelConfig = from_dict(ModelConfig, values)
    if source is None:
        chosen = dataclasses.replace(chosen, vocab=chosen.vocab or model.vocab_size)
    return begin(title, model, chosen, source, force, held, process_group)


def begin(
    title: str,
    model: ModelConfig,
    chosen: TrainConfig,
    source: "LoadedModel | None",
    force: bool,
    held: contextlib.ExitStack,
    process_group: "ProcessGroup | None" = None,
    how: str = "preserve",
) -> tuple["FolderLock", "Trainer"]:
    """A new run, from the source's weights, grown as ``how`` says, and with its tokenizer if there
    is one."""
    from mmrec.data.corpus import Corpus
    from mmrec.data.prepare import open_corpus, prepare, reading
    from mmrec.data.sources import mixture, read_once
    from mmrec.finetune.grow import Growth
    from mmrec.runtime.distributed import SINGLE_PROCESS
    from mmrec.training.run_dir import open_run
    from mmrec.training.trainer import Trainer

    if source is None:
        read = reading(chosen)
        corpus = Corpus.open(prepare(chosen.data, chosen.tokenizer, chosen.vocab, None, say, read))
    else:
        known = source.tokenizer
        chosen = dataclasses.replace(chosen, tokenizer=known.kind, vocab=known.vocab_size)
        # a mistake is said before any text is read
        Growth(source.model.config, dataclasses.replace(model, vocab_size=known.vocab_size), how)
        corpus = open_corpus(chosen.data, known, say, reading(chosen))
    stem = Path(chosen.data).stem if Path(chosen.data).exists() else chosen.data
    stem = re.sub(r"[^\w.]+", "-", stem).strip("-.") or "data"
    default = Path("runs") / f"{title}-{stem}"
    # what is read once leaves tokens, not text, for a resume to find
    if any(read_once(part) for _, part in mixture(chosen.data)):
        chosen = dataclasses.replace(chosen, data=str(corpus.path.resolve()))
    trainer = Trainer(default, corpus, model, chosen, title, say, process_group or SINGLE_PROCESS)
    if source is not None:
        trainer.start_from(source, how)
        moments = ", with its moments" if trainer.progress.aged else ""
        say(f"start   {source.path}, step {source.step:,}{moments}")
    lock = held.enter_context(open_run(chosen.out, default, force=force))
    trainer.folder = lock.folder
    return lock, trainer


def _source(where: str, settings: dict[str, Any]) -> "LoadedModel":
    """The checkpoint to grow from; InputError if another tokenizer is asked for than its own."""
    from mmrec.checkpoint.checkpoint import load_model
    from mmrec.checkpoint.manager import find_checkpoint

    source = load_model(find_checkpoint(Path(where)))
    known = source.tokenizer
    kind, size = settings.get("tokenizer", known.kind), settings.get("vocab", 0)
    if kind != known.kind or size not in (0, known.vocab_size):
        raise InputError(
            f"a grown model keeps the tokenizer of its source, {known.kind} of "
            f"{known.vocab_size:,}: leave out --tokenizer and --vocab; got {kind} of {size:,}"
        )
    return source


def resume_run(
    given: dict[str, Any], held: contextlib.ExitStack, process_group: "ProcessGroup | None" = None
) -> tuple["FolderLock", "Trainer"]:
    """An earlier run: its folder, locked, and a trainer as its own config.toml describes it."""
    from mmrec.checkpoint.manager import newest_run, run_tokenizer
    from mmrec.data.corpus import Corpus
    from mmrec.data.prepare import prepare, reading
    from mmrec.runtime.distributed import SINGLE_PROCESS
    from mmrec.runtime.locking import FolderLock
    from mmrec.training.trainer import Trainer

    folder = Path(given.pop("out")) if "out" in given else newest_run()
    if not (folder / "config.toml").exists():
        raise InputError(f"no run at {folder} to resume: expected a folder with a config.toml")
    lock = held.enter_context(FolderLock(folder))
    tables = load_toml(folder / "config.toml")
    settings = dict(tables["train"])
    if LENGTHS & set(given):
        settings = {k: v for k, v in settings.items() if k not in LENGTHS}
    settings |= given
    chosen, model = from_dict(TrainConfig, settings), from_dict(ModelConfig, tables["model"])
    title = str(tables["preset"])
    kept = run_tokenizer(folder) if chosen.grow_from else chosen.tokenizer
    how = reading(chosen)
    corpus = Corpus.open(prepare(chosen.data, kept, chosen.vocab, None, say, how))
    return lock, Trainer(folder, corpus, model, chosen, title, say, process_group or SINGLE_PROCESS)


def finish(
    trainer: "Trainer",
    lock: "FolderLock | None",
    resume: bool,
    parallel: str | None = None,
    again: str | None = None,
) -> None:
    """Train to the end and say how it went; exit code 1 if it diverged, 128 + n after a signal.

    ``again`` is the command that goes on after a signal, if it is not train's.
    """
    from mmrec.checkpoint.manager import list_checkpoints
    from mmrec.errors import TrainingDivergedError
    from mmrec.training.trainer import train

    folder = trainer.folder
    resuming = command(f"train --resume --out {folder}", parallel)
    try:
        made = train(trainer, resume=resume, lock=lock)
    except TrainingDivergedError as error:
        good = list_checkpoints(folder)
        kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        say(
            f"error: {error}, which never reached the weights; {kept}; start again with a lower "
            f"--lr and --muon-lr, or go on with {resuming} --on-nan skip (or rollback)",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    if made["ended"] == "signal":
        say(
            f"stopped at step {made['steps']:,} and saved; continue with: {again or resuming}",
            file=sys.stderr,
        )
        raise typer.Exit(128 + trainer.stop.number)
    if made["ended"] == "early":
        say(f"stopped early: no better validation loss in {trainer.config.patience} checks")
    say(
        f"trained {made['tokens']:,} tokens in {made['seconds']:.0f} s "
        f"({made['tokens_per_second']:,} tokens/s)"
    )
    say(f"best model {folder / 'best.h5'}, of step {made['best_step']:,}: {made['best_because']}")
    say(f'curve {folder / "loss.png"}; next: mmrec generate --model {folder} --prompt "..."')
