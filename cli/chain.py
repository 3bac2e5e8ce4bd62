"""``mmrec chain``."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmrec.cli.train import begin, finish, resume_run, say
from mmrec.errors import InputError
from mmrec.runtime.interrupts import exit_on_signal, tolerate_closed_output

if TYPE_CHECKING:
    from mmrec.training.staged import Stage
    from mmrec.training.trainer import Trainer

Opt = typer.Option


def chain(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file with [[stage]]s.")],
    force: Annotated[bool, Opt("--force", help="Start over; overwrite the stages.")] = False,
) -> None:
    """Train a chain of growing models: mmrec chain recipe.toml. The same command goes on."""
    from mmrec.runtime.locking import FolderLock
    from mmrec.training.run_dir import clear
    from mmrec.training.staged import (
        COLUMNS,
        check_unchanged,
        keep,
        read_kept,
        read_recipe,
        report,
        row,
    )

    stages = read_recipe(recipe)
    folder = stages[0].folder.parent
    kept = {} if force else read_kept(folder)
    if not force:
        check_unchanged(folder, kept, stages)
    with tolerate_closed_output(), FolderLock(folder):
        if force:
            old = [Path(s["folder"]) for s in read_kept(folder).get("stages", [])]
            for path in {*(s.folder for s in stages), *(p for p in old if p.parent == folder)}:
                if path.is_dir():
                    with FolderLock(path):
                        clear(path)
        starts = kept.get("starts") or [None] * len(stages)
        keep(folder, stages, starts)
        for number, stage in enumerate(stages):
            if stage.finished:
                say(f"stage   {stage.folder}: finished before")
                continue
            say(f"stage   {stage.folder}: {number + 1} of {len(stages)}")
            _train(stages, number, starts, f"mmrec chain {recipe}")
        made = report(folder, stages, starts)
    say(COLUMNS)
    for line in map(row, made):
        say(line)
    total = {k: sum(r[k] for r in made) for k in ("tokens", "seconds", "flops")}
    say(
        f"in all {total['tokens'] / 1e6:.2f} M tokens, {total['seconds']:,.0f} s, "
        f"{total['flops']:.2e} FLOPs; report {folder / 'report.json'}, curve "
        f"{folder / 'chain.png'}"
    )


def _train(stages: list["Stage"], number: int, starts: list[float | None], again: str) -> None:
    """Begin a stage, or go on with it, and train it to its end; note in ``starts`` what a grown one
    scores before it is trained."""
    from mmrec.checkpoint.checkpoint import load_model
    from mmrec.training.staged import keep

    stage, before = stages[number], stages[number - 1] if number else None
    resume = (stage.folder / "config.toml").exists()
    with contextlib.ExitStack() as held:
        with exit_on_signal(f"stopped before the stage began; continue with: {again}"):
            if resume:
                lock, trainer = resume_run({"out": str(stage.folder)}, held)
            else:
                source = load_model(before.end) if before else None
                chosen = stage.train
                if source:
                    chosen = dataclasses.replace(chosen, grow_from=str(source.path))
                lock, trainer = begin(
                    stage.preset, stage.model, chosen, source, True, held, how=stage.how
                )
                if source:
                    if trainer.corpus.info["fingerprint"] != source.info.get("fingerprint"):
                        raise InputError(
                            f"the text of {chosen.data} changed since stage {number} "
                            "learnt from it: put it back, or start over with --force"
                        )
                    starts[number] = _score(trainer)
                    keep(stage.folder.parent, stages, starts)
        finish(trainer, lock, resume, again=again)


def _score(trainer: "Trainer") -> float:
    """Bits per byte on the fixed validation subset."""
    from mmrec.evaluation.evaluate import evaluate

    return evaluate(
        trainer.model,
        trainer.subset,
        trainer.corpus.tokenizer.eot,
        trainer.subset_bytes,
        resets=trainer.resets,
    ).bits_per_byte
