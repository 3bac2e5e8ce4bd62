"""A chain of growth: runs that each begin as the grown end of the one before, and their report."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmrec.checkpoint.checkpoint import read_info
from mmrec.config import (
    ModelConfig,
    TrainConfig,
    from_dict,
    preset,
    train_settings,
)
from mmrec.data.prepare import tokenizer_kind
from mmrec.errors import InputError, did_you_mean
from mmrec.evaluation.compare import Curve, read_run
from mmrec.finetune.grow import Growth
from mmrec.profiling.cost import flops_per_token, parameters
from mmrec.runtime.atomic import atomic_file, write_text

LENGTHS = ("steps", "epochs", "minutes")
ONCE = ("data", "tokenizer", "vocab")  # of the text and its tokens: the same in all stages
OUT = "runs/chain"
KEPT = "chain.json"
"""The recipe that the stages of a folder were made by, and what each scored as it began."""
COLUMNS = (
    f"{'stage':<12} {'parameters':>11} {'tokens':>9} {'time':>8} {'FLOPs':>9} {'start':>8} "
    f"{'end':>8} {'whole split':>12}  ended"
)


@dataclass(frozen=True)
class Stage:
    """One run of a chain."""

    folder: Path
    preset: str
    how: str
    """See ``Growth``; the first stage grows from nothing."""
    model: ModelConfig
    train: TrainConfig
    """``grow_from`` is the folder of the stage before."""

    @property
    def ended(self) -> str:
        """Why it ended, as its summary says; empty if it has none."""
        try:
            made = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        return str(made.get("ended", ""))

    @property
    def finished(self) -> bool:
        """Whether the next stage can grow from it."""
        return self.ended in ("done", "early")

    @property
    def end(self) -> Path:
        """What the next stage grows from: its end, moments included; if it stopped early, its best,
        since by then the end was worse."""
        return self.folder / ("best.h5" if self.ended == "early" else "last.h5")


def read_recipe(path: Path) -> list[Stage]:
    """The stages of a recipe, all resolved. Each must be able to grow to the next.

    One tokenizer serves them all. Its vocabulary, unless the recipe says ``vocab``, is that of the
    last stage: it is what the chain is for, and a vocabulary once chosen stays. Only the last
    stage's rates fall, unless the recipe says ``schedule``: what a model gains as they fall is lost
    when the next stage begins at the full ones (docs/decisions.md).

    Raises InputError, before anything is read but the recipe, at the first fault.
    """
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not TOML: {error}") from None
    tables = recipe.pop("stage", [])
    if not (isinstance(tables, list) and tables and all(isinstance(t, dict) for t in tables)):
        raise InputError(f"recipe {path} must hold one [[stage]] or more; it holds none")
    settings = [f.name for f in fields(TrainConfig) if f.name not in ("grow_from", "out")]
    shared = [name for name in settings if name not in LENGTHS]
    _check_keys(recipe, [*shared, "out"], f"recipe {path}")
    out = recipe.pop("out", OUT)
    if not (isinstance(out, str) and out):
        raise InputError(f"out must be the folder of the chain; got {out!r}")
    own = [*(name for name in settings if name not in ONCE), "preset", "how", "model"]
    kind = tokenizer_kind(from_dict(TrainConfig, {k: recipe[k] for k in ONCE if k in recipe}))
    stages: list[Stage] = []
    for number, table in enumerate(tables, 1):
        steady = {"schedule": "constant"} if number < len(tables) else {}
        try:
            _check_keys(table, own, "a stage")
            stages.append(_stage(number, table, steady | recipe, Path(out), kind, stages))
        except InputError as error:
            raise InputError(f"stage {number}: {error}") from None
    vocab = recipe.get("vocab") or stages[-1].model.vocab_size
    return [
        replace(s, model=replace(s.model, vocab_size=vocab), train=replace(s.train, vocab=vocab))
        for s in stages
    ]


def _check_keys(table: dict[str, Any], known: list[str], what: str) -> None:
    for key in table:
        if key in (*LENGTHS, *ONCE) and key not in known:
            place = "above all stages" if key in ONCE else "in each [[stage]]"
            raise InputError(f"{key} must stand {place}, not in {what}")
        if key not in known:
            raise InputError(f"unknown setting {key!r} in {what}{did_you_mean(key, known)}")


def _stage(
    number: int,
    table: dict[str, Any],
    shared: dict[str, Any],
    out: Path,
    kind: str,
    before: list[Stage],
) -> Stage:
    given = [name for name in LENGTHS if name in table]
    if len(given) != 1:
        came = " and ".join(given) or "none"
        raise InputError(f"its length must be one of {', '.join(LENGTHS)}; got {came}")
    name, how, sizes = table.get("preset"), table.get("how", "preserve"), table.get("model", {})
    if not isinstance(name, str):
        raise InputError(f"preset must name its size, such as 'tiny'; got {name!r}")
    if not isinstance(sizes, dict):
        raise InputError(f"model must be a table of sizes; got {sizes!r}")
    model: ModelConfig = from_dict(ModelConfig, asdict(preset(name, kind)) | sizes)
    folder = out / f"{number}-{name}"
    own = {k: v for k, v in table.items() if k not in ("preset", "how", "model")}
    where = {"out": str(folder)} | ({"grow_from": str(before[-1].folder)} if before else {})
    train: TrainConfig = from_dict(TrainConfig, train_settings(name, kind) | shared | own | where)
    source = before[-1].model if before else model
    Growth(replace(source, vocab_size=1), replace(model, vocab_size=1), how)
    return Stage(folder, name, how, model, train)


def plain(stages: list[Stage]) -> list[dict[str, Any]]:
    """The stages as JSON values."""
    made: list[dict[str, Any]] = json.loads(json.dumps([asdict(s) for s in stages], default=str))
    return made


def read_kept(folder: Path) -> dict[str, Any]:
    """What the folder of a chain says of it; nothing if it holds none."""
    try:
        made = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(made, dict) and isinstance(made.get("stages"), list)
    return made if good and isinstance(made.get("starts"), list) else {}


def check_unchanged(folder: Path, kept: dict[str, Any], stages: list[Stage]) -> None:
    """Raise InputError if a folder holds stages of another recipe."""
    over = "go back to it, choose another out, or start over with --force"
    if not kept:
        held = next((s.folder for s in stages if s.folder.exists()), None)
        if held:
            raise InputError(f"{held} is there already, of no chain that is known: {over}")
        return
    was, now = kept["stages"], plain(stages)
    if len(was) != len(now):
        raise InputError(
            f"{folder} holds a chain of another recipe, of {len(was)} stages, now "
            f"{len(now)}: {over}"
        )
    for number, (old, new) in enumerate(zip(was, now, strict=True), 1):
        for (key, a), (_, b) in zip(_flat(old), _flat(new), strict=False):
            if a != b:
                raise InputError(
                    f"{folder} holds a chain of another recipe (stage {number}: {key} "
                    f"was {a!r}, now {b!r}): {over}"
                )


def _flat(stage: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in stage.items():
        yield from value.items() if isinstance(value, dict) else [(key, value)]


def keep(folder: Path, stages: list[Stage], starts: list[float | None]) -> None:
    """Write what ``read_kept`` reads. Raises StorageError."""
    text = json.dumps({"stages": plain(stages), "starts": starts}, indent=1) + "\n"
    write_text(folder / KEPT, text)


def report(folder: Path, stages: list[Stage], starts: list[float | None]) -> list[dict[str, Any]]:
    """Write report.json and chain.png of finished stages; return a row for each.

    ``start`` and ``end`` are bits per byte on the fixed validation subset, ``whole`` on the whole
    split at the end; FLOPs are those of training, as ``mmrec info`` counts them.
    """
    rows, curves = [], [read_run(stage.folder) for stage in stages]
    for stage, curve, start in zip(stages, curves, starts, strict=True):
        tokens = curve.steps * curve.tokens_per_step
        _, _, model = read_info(stage.folder / "last.h5")  # with the vocabulary that it came to
        rows.append(
            {
                "stage": stage.folder.name,
                "parameters": parameters(model)["total"],
                "steps": curve.steps,
                "tokens": tokens,
                "seconds": curve.seconds,
                "flops": tokens * flops_per_token(model)["training"],
                "start": start,
                "end": curve.checks[-1][1],
                "whole": curve.whole,
                "ended": curve.ended,
            }
        )
    write_text(folder / "report.json", json.dumps(rows, indent=1) + "\n")
    draw(curves, starts, folder / "chain.png")
    return rows


def row(made: dict[str, Any]) -> str:
    """One line of the table under COLUMNS; a dash for what was not measured."""
    start = "-" if made["start"] is None else f"{made['start']:.4f}"
    return (
        f"{made['stage']:<12} {made['parameters'] / 1e6:>9.2f} M {made['tokens'] / 1e6:>7.2f} M "
        f"{made['seconds']:>6,.0f} s {made['flops']:>9.2e} {start:>8} {made['end']:>8.4f} "
        f"{made['whole']:>12.4f}  {made['ended']}"
    )


def draw(curves: list[Curve], starts: list[float | None], path: Path) -> None:
    """Write a PNG of the validation curves of all stages, one after the other in time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    axes, begin = figure.add_subplot(), 0.0
    for curve, start in zip(curves, starts, strict=True):
        rate = curve.seconds / max(1, curve.steps)  # as in compare.draw_curves
        points = [(0, start)] if start is not None else []
        steps, values = zip(*points, *curve.checks, strict=True)
        seconds = [begin + step * rate for step in steps]
        axes.plot(seconds, values, "o-", markersize=3, label=Path(curve.run).name)
        begin += curve.seconds
    axes.set(xlabel="seconds of training", ylabel="bits per byte, validation subset")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
