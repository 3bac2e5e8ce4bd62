"""Staged training: runs of growing size. Each begins from the model of the one before, grown.

A recipe is a TOML file: settings that all stages share, and one ``[[stage]]`` table per run.
Progressive growth is that of Gong et al. 2019, "Efficient Training of BERT by Progressively
Stacking"; how a model is grown is in ``mmrec.finetune.grow``.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmrec.checkpoint.checkpoint import load_model
from mmrec.checkpoint.header import read_metadata
from mmrec.checkpoint.manager import CHAIN_FILE
from mmrec.checkpoint.outputs import check_output
from mmrec.config import (
    LENGTHS,
    MODEL_SETTINGS,
    SOURCES,
    TRAIN_SETTINGS,
    ModelConfig,
    TrainConfig,
    preset,
    preset_train_settings,
    read_toml,
)
from mmrec.data.prepare import corpus_tokenizer_kind
from mmrec.data.sources import source_files
from mmrec.errors import InputError, StorageError, did_you_mean
from mmrec.evaluation.compare import read_run
from mmrec.evaluation.evaluate import evaluate
from mmrec.finetune.grow import GrowthPlan
from mmrec.model import flops_per_token, parameter_counts
from mmrec.runtime.atomic import atomic_write_text
from mmrec.runtime.locking import FolderLock
from mmrec.runtime.names import user_path
from mmrec.training.plots import draw_stages
from mmrec.training.run_dir import check_run_dir, remove_run_files
from mmrec.training.setup import RunPlan, begin_run, resume_run
from mmrec.training.trainer import Trainer

STAGE_LENGTHS = tuple(name for name in LENGTHS if name != "until")
"""The lengths that a stage may have. A moment in time would end whichever stage runs then."""
SHARED_ONLY = ("data", "tokenizer", "vocab")
"""Settings of the text and its tokens, which are the same in all stages."""
DEFAULT_FOLDER = "runs/chain"
"""Folder of all stages if the recipe names none."""
PLACES = {"folder", "out", "initialize_from", *(TRAIN_SETTINGS[name].name for name in SOURCES)}
"""Fields of a stage that say where files are. Files may move; their contents are compared."""
STATE_FILE = CHAIN_FILE
"""File that holds the resolved recipe of a folder, and the score of each stage at its start."""
HEADER = (
    f"{'stage':<12} {'parameters':>11} {'tokens':>9} {'time':>8} {'FLOPs':>9} {'start':>8} "
    f"{'end':>8} {'whole split':>12}  ended"
)


@dataclass(frozen=True)
class Stage:
    """One run of a staged training."""

    folder: Path
    preset: str
    method: str
    """How the model of the stage before is grown; see ``GrowthPlan``. The first stage has none."""
    model: ModelConfig
    train: TrainConfig
    """``initialize_from`` is the folder of the stage before."""

    @property
    def ended(self) -> str:
        """Why the run ended, as its summary says; empty if it has none."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        return str(summary.get("ended", ""))

    @property
    def is_finished(self) -> bool:
        """Whether the next stage can begin from it."""
        return self.ended in ("done", "early")

    @property
    def result(self) -> Path:
        """The checkpoint that the next stage begins from.

        It is the last one, with its moments. If the run stopped early it is the best one, since
        the last one is worse by then.
        """
        return self.folder / ("best.h5" if self.ended == "early" else "last.h5")


def read_recipe(path: Path) -> list[Stage]:
    """Read the stages of a recipe, with all settings resolved.

    All stages share one tokenizer. Unless the recipe sets ``vocab``, its vocabulary is that of the
    last stage's preset. Unless the recipe sets ``schedule``, only the last stage lowers its
    learning rate: what a model gains from a falling rate is lost when the next stage begins at the
    full rate (docs/development/decisions).

    Args:
        path: the TOML file.

    Raises:
        InputError: the recipe has a mistake, such as a stage that cannot be grown to the next one.
            No text has been read by then.
    """
    recipe = read_toml(path, "recipe")
    tables = recipe.pop("stage", [])
    if not (isinstance(tables, list) and tables and all(isinstance(t, dict) for t in tables)):
        raise InputError(f"recipe {path} must hold one [[stage]] or more; it holds none")
    settings = [
        n for n in TRAIN_SETTINGS if n not in ("initialize_from", "from_scratch", "out", "until")
    ]
    shared_names = [name for name in settings if name not in STAGE_LENGTHS]
    _check_names(recipe, [*shared_names, "out"], f"recipe {path}")
    out = recipe.pop("out", DEFAULT_FOLDER)
    if not (isinstance(out, str) and out):
        raise InputError(f"out must be the folder of all stages; got {out!r}")
    stage_names = [name for name in settings if name not in SHARED_ONLY]
    stage_names += ["preset", "method", "model"]
    text = TrainConfig.from_flat({k: recipe[k] for k in SHARED_ONLY if k in recipe}).data
    tokenizer = corpus_tokenizer_kind(text.source, text.tokenizer)
    stages: list[Stage] = []
    for number, table in enumerate(tables, 1):
        constant_rate = {"schedule": "constant"} if number < len(tables) else {}
        try:
            _check_names(table, stage_names, "a stage")
            stages.append(
                _stage(number, table, constant_rate | recipe, user_path(out), tokenizer, stages)
            )
        except InputError as error:
            raise InputError(f"stage {number}: {error}") from None
    vocab = recipe.get("vocab") or stages[-1].model.vocab_size
    return [
        replace(s, model=replace(s.model, vocab_size=vocab), train=s.train.replace(vocab=vocab))
        for s in stages
    ]


def _check_names(table: dict[str, Any], known: list[str], where: str) -> None:
    for name in table:
        if name in (*STAGE_LENGTHS, *SHARED_ONLY) and name not in known:
            place = "above all stages" if name in SHARED_ONLY else "in each [[stage]]"
            raise InputError(f"{name} must stand {place}, not in {where}")
        if name not in known:
            raise InputError(f"unknown setting {name!r} in {where}{did_you_mean(name, known)}")


def _stage(
    number: int,
    table: dict[str, Any],
    shared: dict[str, Any],
    out: Path,
    tokenizer: str,
    earlier: list[Stage],
) -> Stage:
    lengths = [name for name in STAGE_LENGTHS if name in table]
    if len(lengths) != 1:
        got = " and ".join(lengths) or "none"
        raise InputError(f"its length must be one of {', '.join(STAGE_LENGTHS)}; got {got}")
    name, method = table.get("preset"), table.get("method", "preserve")
    sizes = table.get("model", {})
    if not isinstance(name, str):
        raise InputError(f"preset must name its size, such as 'tiny'; got {name!r}")
    if not isinstance(sizes, dict):
        raise InputError(f"model must be a table of {', '.join(MODEL_SETTINGS)}; got {sizes!r}")
    model = ModelConfig.from_dict(asdict(preset(name, tokenizer)) | sizes)
    folder = out / f"{number}-{name}"
    own = {k: v for k, v in table.items() if k not in ("preset", "method", "model")}
    places = {"out": str(folder)}
    if earlier:
        places["initialize_from"] = str(earlier[-1].folder)
    train = TrainConfig.from_flat(preset_train_settings(name, tokenizer) | shared | own | places)
    source = earlier[-1].model if earlier else model
    GrowthPlan(replace(source, vocab_size=1), replace(model, vocab_size=1), method)
    return Stage(folder, name, method, model, train)


# ---- the state file of a folder of stages


def _as_json(stages: list[Stage]) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = json.loads(json.dumps([asdict(s) for s in stages], default=str))
    return values


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state file of a folder.

    Returns:
        A dictionary with ``stages`` and ``start_scores``; empty if there is no intact file.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_valid = isinstance(state, dict) and isinstance(state.get("stages"), list)
    return state if is_valid and isinstance(state.get("start_scores"), list) else {}


def write_state(folder: Path, stages: list[Stage], start_scores: list[float | None]) -> None:
    """Write the state file that ``read_state`` reads.

    Raises:
        StorageError: the file could not be written.
    """
    state = {"stages": _as_json(stages), "start_scores": start_scores}
    atomic_write_text(folder / STATE_FILE, json.dumps(state, indent=1) + "\n")


def check_unchanged(folder: Path, state: dict[str, Any], stages: list[Stage]) -> None:
    """Check that a folder holds the stages of this recipe, or none.

    Args:
        folder: the folder of all stages.
        state: what ``read_state`` returned for it.
        stages: those of the recipe.

    Raises:
        InputError: the folder holds the stages of another recipe.
    """
    advice = "go back to it, choose another out, or start over with --force"
    if not state:
        existing = next((s.folder for s in stages if s.folder.exists()), None)
        if existing:
            raise InputError(f"{existing} exists, but {folder} holds no recipe for it: {advice}")
        return
    before, now = state["stages"], _as_json(stages)
    if len(before) != len(now):
        raise InputError(
            f"{folder} holds stages of another recipe, {len(before)} of them, now {len(now)}: "
            f"{advice}"
        )
    for number, (old_stage, new_stage) in enumerate(zip(before, now, strict=True), 1):
        known = dict(_flat(old_stage))  # a setting may be newer than the folder
        for path, new in _flat(new_stage):
            if path[-1] not in PLACES and known.get(path, new) != new:
                raise InputError(
                    f"{folder} holds stages of another recipe (stage {number}: {path[-1]} was "
                    f"{known[path]!r}, now {new!r}): {advice}"
                )


def _flat(
    values: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in values.items():
        inner = (*path, name)
        yield from _flat(value, inner) if isinstance(value, dict) else [(inner, value)]


# ---- training the stages


def open_stages(
    recipe: Path, *, force: bool = False
) -> tuple[FolderLock, list[Stage], list[float | None]]:
    """Read a recipe and lock its folder.

    Args:
        recipe: the TOML file.
        force: remove the files of earlier stages.

    Returns:
        The lock of the folder; the stages; and for each stage its bits per byte before the first
        step, None if not measured yet.

    Raises:
        InputError: the recipe has a mistake, or the folder holds the stages of another recipe.
        RunLockedError: another process writes in the folder.
    """
    stages = read_recipe(recipe)
    folder = stages[0].folder.parent
    _check_folder(recipe, stages, force=force)
    state = {} if force else read_state(folder)
    if not force:
        check_unchanged(folder, state, stages)
    lock = FolderLock(folder)
    try:
        if force:
            old_stages = [Path(s["folder"]) for s in read_state(folder).get("stages", [])]
            old_stages = [path for path in old_stages if path.parent == folder]
            for path in {*(s.folder for s in stages), *old_stages}:
                if path.is_dir():
                    with FolderLock(path):
                        remove_run_files(path)
        start_scores = state.get("start_scores") or [None] * len(stages)
        write_state(folder, stages, start_scores)
    except BaseException:
        lock.release()
        raise
    return lock, stages, start_scores


def _check_folder(recipe: Path, stages: list[Stage], *, force: bool) -> None:
    """Check that the files of a chain may be written in its folder."""
    folder, train = stages[0].folder.parent, stages[0].train
    inputs = [recipe]
    for text in (train.data.source, *(s.train.data.val_file for s in stages)):
        inputs += source_files(text)
    if folder.is_dir():
        for name, kind in (
            (STATE_FILE, "recipe"),
            ("report.json", "stages"),
            ("chain.png", "picture"),
        ):
            check_output(folder / name, kind, option="out", inputs=inputs, force=force)
    if force:
        for stage in stages:
            check_run_dir(stage.folder, inputs, force=True)


def begin_stage(
    stages: list[Stage],
    index: int,
    start_scores: list[float | None],
    *,
    echo: Callable[[str], None] = print,
    **options: Any,
) -> tuple[FolderLock, Trainer, bool]:
    """Begin a stage, or continue an interrupted one.

    Args:
        stages: all stages.
        index: which one, from 0.
        start_scores: one entry per stage, changed in place. If the stage begins from a grown model,
            its entry is set to the bits per byte on the validation subset before the first step.
        echo: called with each line of text for the user.
        options: further arguments of ``Trainer``.

    Returns:
        The lock of the stage's folder, its trainer, and whether it is a resume.

    Raises:
        InputError: the text changed since the stage before was trained on it.
    """
    stage = stages[index]
    if (stage.folder / "config.toml").exists():
        settings = stage.train.flat()
        places = [n for n in SOURCES if n != "replay_data" or settings["replay_fraction"]]
        given = {"out": str(stage.folder)} | {n: settings[n] for n in places if settings[n]}
        lock, trainer = resume_run(given, echo=echo, **options)
        return lock, trainer, True
    if not index:
        plan = RunPlan(stage.preset, stage.model, stage.train)
        return *begin_run(plan, force=True, echo=echo, **options), False
    source = load_model(stages[index - 1].result)
    train = stage.train.replace(initialize_from=str(source.path))
    plan = RunPlan(stage.preset, stage.model, train, source, method=stage.method)
    lock, trainer = begin_run(plan, force=True, echo=echo, **options)
    try:
        if trainer.corpus.info["fingerprint"] != source.metadata.get("fingerprint"):
            raise InputError(
                f"the text of {train.data.source} changed since stage {index} was trained on it: "
                "put it back, or start over with --force"
            )
        start_scores[index] = evaluate(
            trainer.model,
            trainer.subset,
            trainer.corpus.tokenizer.eot,
            trainer.subset_bytes,
            reset_at_documents=trainer.resets_at_documents,
        ).bits_per_byte
        write_state(stage.folder.parent, stages, start_scores)
    except BaseException:
        lock.release()
        raise
    return lock, trainer, False


def write_report(
    folder: Path,
    stages: list[Stage],
    start_scores: list[float | None],
    warn: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Write ``report.json`` and ``chain.png`` of finished stages.

    A file that cannot be written is one warning: the stages are trained, whatever happens to it.

    Args:
        folder: the folder of all stages.
        stages: all stages, each of them finished.
        start_scores: bits per byte before the first step of each stage; None if not measured.
        warn: called with a line of text for each file that cannot be written.

    Returns:
        One row per stage. ``start`` and ``end`` are bits per byte on the fixed validation subset,
        ``whole_split`` those on the whole validation split at the end. ``flops`` counts training as
        ``mmrec info`` does.
    """
    rows, curves = [], [read_run(stage.folder) for stage in stages]
    for stage, curve, start in zip(stages, curves, start_scores, strict=True):
        tokens = curve.tokens
        model = read_metadata(stage.folder / "last.h5")[2]  # with the tokenizer's vocabulary
        rows.append(
            {
                "stage": stage.folder.name,
                "parameters": parameter_counts(model)["total"],
                "steps": curve.steps,
                "tokens": tokens,
                "seconds": curve.seconds,
                "flops": tokens * flops_per_token(model)["training"],
                "start": start,
                "end": curve.validations[-1][1],
                "whole_split": curve.split_bits_per_byte,
                "ended": curve.ended,
            }
        )
    text = json.dumps(rows, indent=1) + "\n"
    for write in (
        lambda: atomic_write_text(folder / "report.json", text),
        lambda: draw_stages(curves, start_scores, folder / "chain.png"),
    ):
        try:
            write()
        except StorageError as error:
            warn(f"warning: {error}")
    return rows


def report_row(row: dict[str, Any]) -> str:
    """Format one line of the table under ``HEADER``; a dash stands for a missing score."""
    start = "-" if row["start"] is None else f"{row['start']:.4f}"
    return (
        f"{row['stage']:<12} {row['parameters'] / 1e6:>9.2f} M {row['tokens'] / 1e6:>7.2f} M "
        f"{row['seconds']:>6,.0f} s {row['flops']:>9.2e} {start:>8} {row['end']:>8.4f} "
        f"{row['whole_split']:>12.4f}  {row['ended']}"
    )
