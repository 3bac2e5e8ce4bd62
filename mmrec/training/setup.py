"""Setting up a run: from settings to a trainer, and ``mmrec.train`` itself.

The command line and the Python API call the same functions:

* ``plan_run`` merges preset, configuration file and given settings, and checks them;
* ``begin_run`` prepares the corpus, builds the trainer and opens the run folder;
* ``resume_run`` does the same for an earlier run;
* ``train`` puts them together.
"""

import contextlib
import dataclasses
import json
import platform
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrec.checkpoint.checkpoint import LoadedModel, load_model, read_progress
from mmrec.checkpoint.header import read_metadata
from mmrec.checkpoint.manager import (
    find_checkpoint,
    latest_stage,
    list_checkpoints,
    newest_run,
    run_tokenizer,
)
from mmrec.config import (
    AUTO,
    LENGTHS,
    MODEL_SETTINGS,
    RESUMABLE_SETTINGS,
    SOURCES,
    TRAIN_SETTINGS,
    ModelConfig,
    TrainConfig,
    preset_train_settings,
    read_config_file,
)
from mmrec.config import preset as preset_config
from mmrec.data.added_text import KnownText
from mmrec.data.corpus import Corpus
from mmrec.data.document_record import DOCUMENTS_FILE, DocumentRecord
from mmrec.data.prepare import (
    check_given_settings,
    corpus_tokenizer_kind,
    open_corpus,
    prepare,
    read_options,
)
from mmrec.data.sources import (
    CORPUS_NAMES,
    DOCUMENTS,
    absolute_path,
    absolute_source,
    is_single_pass,
    parse_mixture,
    source_files,
)
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError, did_you_mean
from mmrec.finetune.grow import GrowthPlan, added_token_pieces, initialize_from
from mmrec.pretrained import find_pretrained
from mmrec.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mmrec.runtime.locking import FolderLock
from mmrec.runtime.names import MAX_STEM_CHARS, path_exists, user_path
from mmrec.runtime.progress import hide_progress_bars
from mmrec.training.auto import choose_for
from mmrec.training.callbacks import Callback
from mmrec.training.distillation import teacher_names
from mmrec.training.length import check_not_past, given_lengths, resumed_length
from mmrec.training.metrics import Progress, from_plain
from mmrec.training.run_dir import check_run_dir, holds_run, open_run_dir
from mmrec.training.trackers import make_trackers
from mmrec.training.trainer import Trainer, check_same_text

Source = str | Path | Iterable[str]
"""Where text comes from: a name or path as for ``--data``, or the documents themselves."""


@dataclass(frozen=True)
class RunPlan:
    """A new run, with every setting resolved."""

    preset: str
    """Name of the preset, which the run folder is named after."""
    model: ModelConfig
    train: TrainConfig
    source: LoadedModel | None = None
    """The model that training begins from."""
    documents: Iterable[str] | None = None
    """The documents to train on; None reads them from ``train.data.source``."""
    method: str = "preserve"
    """How the source is grown to the shape of ``model``; see ``GrowthPlan``."""
    tokenizer: Tokenizer | None = None
    """One that extends the source's, with a chat template; None takes the source's."""
    note: str = ""
    """A line for the user: what ``auto`` chose, and why."""
    inputs: tuple[Path, ...] = ()
    """Files that are read besides the texts and the source, such as the configuration file."""

    @property
    def input_files(self) -> Iterator[Path]:
        """The files that the run reads, none of which it may replace."""
        yield from self.inputs
        if self.source is not None:
            yield self.source.path
        settings = self.train.flat()
        for name in SOURCES:
            yield from source_files(settings[name])
        if settings["teachers"]:
            yield from map(find_checkpoint, map(user_path, teacher_names(settings["teachers"])))


@dataclass(frozen=True)
class Run:
    """A run that has ended: what ``mmrec.train`` returns."""

    folder: Path
    """The run folder."""
    summary: dict[str, Any]
    """The contents of ``summary.json``: why it ended, steps, tokens, seconds, best step …"""

    @property
    def best(self) -> Path:
        """The checkpoint with the lowest validation loss."""
        return self.folder / "best.h5"

    @property
    def last(self) -> Path:
        """The checkpoint of the last step, which a resume continues from."""
        return self.folder / "last.h5"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def train(
    data: Source | None = None,
    preset: str | None = None,
    *,
    config: str | Path | None = None,
    resume: bool | str | Path = False,
    force: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train a model, as ``mmrec train`` does.

    >>> run = mmrec.train("book.txt", preset="tiny", minutes=5)  # doctest: +SKIP

    Args:
        data: text to train on: a name or path as for ``--data``, or a list or iterator of
            documents (strings). None takes that of ``config``, by default ``stdlib``.
        preset: ``tiny``, ``mini``, … ``7b``; or ``auto``, which chooses the preset and settings
            that are not given by the size of the text and the time. None takes that of ``config``,
            or the shape of the model ``initialize_from``; without either, ``tiny``.
        config: a TOML configuration file.
        resume: continue a run: its folder, or True for the folder ``out``, or for the newest run if
            ``out`` is not given. Only the length, ``patience``, ``on_nan``, ``log``, ``html`` and
            ``out`` may be given with it; and ``data``, ``val_file`` and ``replay_data``, for the
            same text in another place. ``data`` may also be the run's text with more added to it. A
            length such as ``minutes="+60"`` is added to what the run has trained.
        force: overwrite the run in the folder ``out``.
        callbacks: see ``mmrec.Callback``.
        progress: whether to print messages and a progress bar.
        settings: any setting of the command line by its name, such as ``seq_len=128`` or
            ``dropout=0.1``; see the configuration page of the documentation. Settings that are
            paths may be ``pathlib.Path`` objects.

    Returns:
        The run. ``summary["ended"]`` says why it ended: ``"done"``; ``"early"``, by ``patience``;
        ``"stopped"``, by a callback; or ``"signal"``, by SIGINT or SIGTERM. It can be resumed.

    Raises:
        InputError: a setting, the data or the folder is not usable.
        TrainingDivergedError: a loss or gradient is not finite, and ``on_nan`` does not let the run
            continue.
        StorageError: a file could not be written.
    """
    echo: Callable[[str], None] = print if progress else _silent
    options: dict[str, Any] = {"callbacks": callbacks, "show_progress": progress}
    _check_types(preset=preset, config=config, resume=resume, callbacks=callbacks)
    given = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    documents = None
    if isinstance(data, str | Path):
        given["data"] = str(data)
    elif data is not None:
        given["data"], documents = DOCUMENTS, data
    with hide_progress_bars(not progress):
        if resume:
            if preset is not None or config is not None or force:
                raise InputError(
                    "resume keeps the settings of its run; preset, config and force cannot be given"
                )
            if not isinstance(resume, bool):
                if "out" in given:
                    raise InputError(
                        f"give the folder once: as resume or as out; got {given['out']!r}"
                    )
                given["out"] = str(resume)
            lock, trainer = resume_run(
                given,
                documents=documents,
                takes_additions="data" in given,
                echo=echo,
                **options,
            )
        else:
            plan = plan_run(preset, config, given, default_preset="tiny", documents=documents)
            lock, trainer = begin_run(plan, force=force, echo=echo, **options)
        with lock:
            summary = trainer.fit(resume=bool(resume), lock=lock)
        return Run(trainer.run_dir, summary)


def _silent(line: str) -> None:
    """Print nothing."""


def _check_types(
    *, preset: object, config: object, resume: object, callbacks: Sequence[object]
) -> None:
    """Check the types of arguments that would otherwise fail late or with a traceback.

    Raises:
        InputError: an argument is of another type than ``train`` takes.
    """
    if not isinstance(preset, str | None):
        raise InputError(f"preset must be a name or None; got {preset!r}")
    if not isinstance(config, str | Path | None):
        raise InputError(f"config must be the path of a TOML file or None; got {config!r}")
    if not isinstance(resume, bool | str | Path):
        raise InputError(f"resume must be True, False or a run folder; got {resume!r}")
    if not isinstance(callbacks, Sequence):
        raise InputError(f"callbacks must be a list; got {callbacks!r}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise InputError(f"callbacks must be instances of mmrec.Callback; got {callback!r}")


def plan_run(
    preset: str | None,
    config_path: str | Path | None,
    given: dict[str, Any],
    *,
    default_preset: str = "",
    documents: Iterable[str] | None = None,
    processes: int = 1,
) -> RunPlan:
    """Merge settings: the preset's, then the configuration file's, then the given ones.

    Args:
        preset: name of a preset, or ``auto``; None takes that of the file.
        config_path: a TOML file, or None.
        given: settings by flat name, of training and of the model.
        default_preset: the preset if neither an argument nor the file names one, and no model is
            named that training begins from.
        documents: the documents to train on, if they do not come from ``data``.
        processes: processes that train together, by which ``auto`` assumes a speed.

    Raises:
        InputError: a setting is unknown or not usable, or no preset is named.
    """
    file = read_config_file(Path(config_path)) if config_path is not None else None
    settings = dict(file.train) if file else {}
    model_settings = dict(file.model) if file else {}
    for name, value in given.items():
        if name in TRAIN_SETTINGS:
            settings[name] = value
        elif name in MODEL_SETTINGS and name != "vocab_size":
            model_settings[name] = value
        else:
            hint = did_you_mean(name, [*TRAIN_SETTINGS, *MODEL_SETTINGS])
            raise InputError(f"unknown setting {name!r}{hint}")
    if file and any(given.get(name) is not None for name in LENGTHS):
        settings = {k: v for k, v in settings.items() if k not in LENGTHS or k in given}
    config = TrainConfig.from_flat(settings)
    name = preset or (file.preset if file else "")
    initial = config.finetune.initialize_from
    if not (name or initial):
        name = default_preset
    if not (name or initial):
        raise InputError("name a preset: mmrec train tiny, or one in a --config file")
    note = ""
    if name == AUTO:
        if initial:
            raise InputError(f"auto chooses a new model; name a preset to begin from {initial}")
        documents = None if documents is None else list(documents)
        choice = choose_for(
            config.data,
            settings | model_settings,
            documents=documents,
            precision=config.optimizer.precision,
            processes=processes,
        )
        name, note = choice.preset, choice.note
        initial = choice.settings.get("initialize_from", "")
        settings = {k: v for k, v in choice.settings.items() if k in TRAIN_SETTINGS}
        model_settings = {k: v for k, v in choice.settings.items() if k in MODEL_SETTINGS}
        config = TrainConfig.from_flat(settings)
    elif config.finetune.from_scratch:
        raise InputError(f"--from-scratch has no effect without auto; got the preset {name}")
    source = load_initial_model(initial, settings) if initial else None
    if name:
        kind = config.data.tokenizer
        if source:
            kind = source.tokenizer.kind
        elif config.data.source != DOCUMENTS:
            kind = corpus_tokenizer_kind(config.data.source, config.data.tokenizer)
        shape = preset_config(name, kind)
        config = TrainConfig.from_flat(preset_train_settings(name, kind) | settings)
    else:
        assert source is not None
        shape, name = source.model.config, str(source.metadata.get("preset", "model"))
    model = ModelConfig.from_dict(dataclasses.asdict(shape) | model_settings)
    own = given if source is None else {k: v for k, v in given.items() if k != "vocab"}
    check_given_settings(own, config.data)
    check_effects(given, config)
    if source is None:
        config = config.replace(vocab=config.data.vocab or model.vocab_size)
    inputs = () if config_path is None else (Path(config_path),)
    return RunPlan(name, model, config, source, documents, note=note, inputs=inputs)


def check_effects(given: dict[str, Any], config: TrainConfig) -> None:
    """Check that given settings have an effect that depends on another setting.

    Raises:
        InputError: one has none.
    """
    schedule = config.optimizer.schedule
    if "decay_fraction" in given and schedule != "wsd":
        raise InputError(f"--decay-fraction has no effect: the schedule is {schedule}, not wsd")
    if "teacher_weight" in given and not config.distillation.teachers:
        raise InputError(f"teacher_weight needs teachers; got {given['teacher_weight']:g} alone")
    if "sample_prompt" in given and not config.evaluation.sample_tokens:
        raise InputError(
            f"sample_prompt has no effect with sample_tokens 0; got {given['sample_prompt']!r}"
        )


def load_initial_model(where: str, settings: dict[str, Any]) -> LoadedModel:
    """Load the model that training begins from.

    Args:
        where: run folder or checkpoint.
        settings: by flat name.

    Raises:
        InputError: there is no such model, or another tokenizer is asked for than its own.
    """
    source = load_model(find_checkpoint(user_path(where)))
    tokenizer = source.tokenizer
    kind, size = settings.get("tokenizer", tokenizer.kind), settings.get("vocab", 0)
    if kind != tokenizer.kind or size not in (0, tokenizer.vocab_size):
        raise InputError(
            f"a grown model keeps the tokenizer of its source, {tokenizer.kind} of "
            f"{tokenizer.vocab_size:,}: leave out --tokenizer and --vocab; got {kind} of {size:,}"
        )
    return source


def begin_run(
    plan: RunPlan,
    *,
    force: bool = False,
    echo: Callable[[str], None] = print,
    process_group: ProcessGroup = SINGLE_PROCESS,
    **options: Any,
) -> tuple[FolderLock, Trainer]:
    """Prepare the corpus, build the trainer, and open and lock the run folder.

    Args:
        plan: the run.
        force: overwrite the run in the folder.
        echo: called with each line of text for the user.
        process_group: the processes that train together.
        options: further arguments of ``Trainer``.

    Returns:
        The lock of the run folder, and the trainer.

    Raises:
        InputError: the data or the folder is not usable, or the source cannot be grown.
    """
    config, model, source = plan.train, plan.model, plan.source
    if plan.note:
        echo(plan.note)
    check_not_past(config.length.until)
    trackers = make_trackers(config.output.trackers)
    default, out = default_run_dir(plan.preset, config.data.source), config.output.out
    if out or force:  # before any long work
        check_run_dir(user_path(out) if out else default, plan.input_files, force=force)
    corpus, config = prepare_corpus(plan, echo)
    config = _in_every_folder(config, corpus, echo, is_given=plan.documents is not None)
    trainer = Trainer(
        default,
        corpus,
        model,
        config,
        plan.preset,
        echo=echo,
        process_group=process_group,
        **options,
    )
    if source is not None:
        initialize_trainer(trainer, source, plan.method)
        moments = ", with its moments" if trainer.progress.optimizer_step_offset else ""
        echo(f"start   {source.path}, step {source.step:,}{moments}")
        new_ids = range(source.tokenizer.vocab_size, corpus.tokenizer.vocab_size)
        special = [name for name, i in corpus.tokenizer.special_tokens.items() if i in new_ids]
        if special:
            echo(f"note    special tokens new to the model: {', '.join(special)}")
        if count := len(new_ids) - len(special):
            echo(
                f"note    characters new to the model, which get embeddings of their own: {count:,}"
            )
    lock = open_run_dir(out, default, force=force, inputs=plan.input_files)
    trainer.run_dir = lock.folder
    trainer.callbacks += trackers
    return lock, trainer


def _in_every_folder(
    config: TrainConfig, corpus: Corpus, echo: Callable[[str], None], *, is_given: bool
) -> TrainConfig:
    """Settings whose paths mean the same wherever the run is continued.

    A text that can be read only once is not there for a resume, but its tokens are: their corpus
    file takes its place.

    Args:
        config: the settings.
        corpus: the corpus of ``config.data``.
        echo: called with each line of text for the user.
        is_given: whether the documents came from the caller.
    """
    finetune, data, val_file = config.finetune, config.data.source, config.data.val_file
    names = [] if is_given else [name for _, name in parse_mixture(data)]
    if is_given or any(is_single_pass(name) for name in [*names, val_file]):
        data, val_file = str(corpus.path.resolve()), ""
    replay = finetune.replay_data
    if is_single_pass(replay):
        replay = str(open_corpus(replay, corpus.tokenizer, echo).path.resolve())
    initial, out = finetune.initialize_from, config.output.out
    teachers = config.distillation.teachers
    return config.replace(
        data=absolute_source(data),
        val_file=absolute_source(val_file),
        replay_data=absolute_source(replay),
        initialize_from=_absolute_model(initial) if initial else "",
        teachers=",".join(map(_absolute_model, teacher_names(teachers))),
        out=str(absolute_path(user_path(out))) if out else "",
    )


def _absolute_model(name: str) -> str:
    """The path that a model's name means in every folder; that of a pretrained one, too."""
    pretrained = find_pretrained(name)
    return str(pretrained.path if pretrained else absolute_path(user_path(name)))


def prepare_corpus(plan: RunPlan, echo: Callable[[str], None]) -> tuple[Corpus, TrainConfig]:
    """The corpus of a plan, and its settings with the kind and size of the source's tokenizer."""
    config, source = plan.train, plan.source
    text: Source = config.data.source if plan.documents is None else plan.documents
    options = read_options(config.data)
    if source is None:
        path = prepare(text, config.data.tokenizer, config.data.vocab, None, echo, options)
        return Corpus.open(path), config
    shape = dataclasses.replace(plan.model, vocab_size=source.tokenizer.vocab_size)
    GrowthPlan(source.model.config, shape, plan.method)  # a mistake is found before text is read
    tokenizer = plan.tokenizer or source.tokenizer
    corpus = open_corpus(text, tokenizer, echo, options, add_characters=True)
    return corpus, config.replace(tokenizer=tokenizer.kind, vocab=corpus.tokenizer.vocab_size)


def default_run_dir(preset: str, source: str) -> Path:
    """The run folder if the user names none: ``runs/PRESET-CORPUS``."""
    path = user_path(source)
    stem = path.stem if path_exists(path) else source
    stem = re.sub(r"[^\w.]+", "-", stem[:MAX_STEM_CHARS]).strip("-.") or "data"
    return Path("runs") / f"{preset}-{stem}"


def initialize_trainer(trainer: Trainer, source: LoadedModel, method: str = "preserve") -> None:
    """Give a new trainer the weights of a checkpoint, grown to its shape, and its moments.

    Raises:
        InputError: the source cannot be grown to the trainer's shape.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.config.optimizer.seed)
        pieces = added_token_pieces(source, trainer.corpus.tokenizer)
        offset = initialize_from(
            trainer.model, source, trainer.optimizer, method=method, pieces=pieces
        )
    if trainer.config.finetune.lora_rank:  # the factors that are trained have no moments yet
        trainer.optimizer.state.clear()
        offset = 0
    trainer.progress.optimizer_step_offset = offset
    if pieces:
        trainer.progress.first_new_token = source.tokenizer.vocab_size
        trainer.train_new_tokens()


def resume_run(
    given: dict[str, Any],
    *,
    documents: Iterable[str] | None = None,
    takes_additions: bool = False,
    echo: Callable[[str], None] = print,
    process_group: ProcessGroup = SINGLE_PROCESS,
    **options: Any,
) -> tuple[FolderLock, Trainer]:
    """Lock the folder of an earlier run, and build a trainer from its ``config.toml``.

    A text to which more was added since becomes a corpus in which the tokens of the earlier text
    stay as they were, each in its split; from then on that corpus is the run's text.

    Args:
        given: ``out``, the folder (by default the newest run's), and settings that a resume may
            change: those of ``RESUMABLE_SETTINGS``.
        documents: the documents of the run, if they do not come from ``data``.
        takes_additions: take up text that was added to the run's; else it is refused.
        echo, process_group, options: as for ``begin_run``.

    Returns:
        The lock of the run folder, and the trainer.

    Raises:
        InputError: there is no such run, or a setting is given that a resume cannot change. That a
            text is the same is checked when the trainer loads its checkpoint.
        RunLockedError: another process writes in the folder.
    """
    for name in given:
        if name not in RESUMABLE_SETTINGS:
            raise InputError(f"a resume keeps the settings of its run; {name} cannot be given")
    lengths = given_lengths(given)
    changes = {k: v for k, v in given.items() if k != "out" and k not in LENGTHS}
    folder = latest_stage(user_path(given["out"])) if "out" in given else newest_run()
    path = folder / "config.toml"
    if not path.exists():
        raise InputError(f"no run at {folder} to resume: expected a folder with a config.toml")
    if not holds_run(folder):
        raise InputError(
            f"no run at {folder} to resume: no run wrote its config.toml; begin one with it: "
            f"{shlex.join(['mmrec', 'train', '--config', str(path), '--out', 'FOLDER'])}"
        )
    lock = FolderLock(folder)
    try:
        preset, model, config, metadata = _saved_settings(folder, changes)
        trackers = make_trackers(config.output.trackers)
        progress = _saved_progress(folder)
        patience = config.evaluation.patience
        if lengths and 0 < patience <= progress.evals_since_best:
            raise InputError(
                f"{folder} ended early, after {patience} validations without a better loss: to "
                "train it longer, give --patience too, 0 for never"
            )
        if "replay_data" in given and not config.finetune.replay_fraction:
            raise InputError("--replay-data has no effect: the run was started without a replay")
        text: Source = config.data.source if documents is None else documents
        options_of_text = read_options(config.data)
        known = _known_text(folder, metadata, takes_additions=takes_additions)
        try:
            if config.finetune.initialize_from:
                tokenizer = run_tokenizer(folder)
                corpus = open_corpus(text, tokenizer, echo, options_of_text, known=known)
            else:
                kind, size = config.data.tokenizer, config.data.vocab
                path = prepare(text, kind, size, None, echo, options_of_text, known=known)
                corpus = Corpus.open(path)
        except InputError as error:
            is_there = next(source_files(config.data.source), None) is not None
            if is_there or "data" in given or config.data.source in CORPUS_NAMES:
                raise
            raise InputError(
                f"{error}; if the text was moved, say where it is with --data"
            ) from None
        check_same_text(metadata, corpus.identity, config, folder, corpus.earlier)
        is_own_text = documents is None and not corpus.earlier
        config = _in_every_folder(config, corpus, echo, is_given=not is_own_text)
        if config.output.out:
            config = config.replace(out=str(absolute_path(folder)))
        trainer = Trainer(
            folder, corpus, model, config, preset, echo=echo, process_group=process_group, **options
        )
        is_longer = metadata.get("fingerprint", corpus.info["fingerprint"]) in [
            earlier["fingerprint"] for earlier in corpus.earlier
        ]
        if is_longer:
            progress.begin_longer_text(trainer.batches_per_step, metadata["batches_per_epoch"])
        length = resumed_length(
            lengths,
            config.length,
            progress,
            batches_per_step=trainer.batches_per_step,
            batches_per_epoch=trainer.loader.batches_per_epoch,
            folder=folder,
        )
        trainer.config = dataclasses.replace(trainer.config, length=length)
        trainer.callbacks += trackers
        trainer.progress = progress
        if is_longer and not lengths and length.until is None and trainer.fraction_done() >= 1.0:
            raise InputError(
                f"{folder} has ended: to train it on the text that was added, give it a longer "
                "length, such as --epochs +1"
            )
    except BaseException:
        lock.release()
        raise
    return lock, trainer


def _known_text(
    folder: Path, metadata: dict[str, Any], *, takes_additions: bool
) -> KnownText | None:
    """The text of a run as its folder knows it; None of a run of mmrec 0.6 or earlier."""
    with contextlib.suppress(InputError):
        record = DocumentRecord.load(folder / DOCUMENTS_FILE)
        texts = [record.identity, *record.earlier]
        if metadata.get("fingerprint") in [text["fingerprint"] for text in texts]:
            return KnownText(record, run_tokenizer(folder), folder, takes_additions)
    return None


def _saved_settings(
    folder: Path, changes: dict[str, Any]
) -> tuple[str, ModelConfig, TrainConfig, dict[str, Any]]:
    """Preset, shape and settings of an earlier run, and the metadata of its newest checkpoint.

    The settings are those of its ``config.toml``, and for what that leaves out those of its newest
    checkpoint.

    Args:
        folder: the run folder.
        changes: settings that the resume changes.

    Raises:
        InputError: settings are missing, or the shape is not that of the checkpoint.
    """
    path = folder / "config.toml"
    file = read_config_file(path)
    preset, shape, settings = file.preset, dict(file.model), dict(file.train)
    header = None
    for checkpoint in reversed(list_checkpoints(folder)):
        with contextlib.suppress(InputError):
            header = read_metadata(checkpoint)
            break
    if header is not None:
        preset = preset or str(header.metadata.get("preset", "model"))
        saved = dataclasses.asdict(header.model_config)
        for name, value in shape.items():
            if value != saved[name]:
                raise InputError(
                    f"{path} must have the shape of the run's checkpoints, {name} {saved[name]}; "
                    f"it has {value}"
                )
        shape = saved
        before = TrainConfig.from_dict(header.metadata.get("train", {})).flat()
        lengths = LENGTHS if any(name in settings for name in LENGTHS) else ()
        settings = {k: v for k, v in before.items() if k not in lengths} | settings
    elif any(name in changes for name in SOURCES):
        name = next(name for name in SOURCES if name in changes)
        raise InputError(
            f"{folder} has no checkpoint yet that {TRAIN_SETTINGS[name].flag} could be compared "
            "with: start the run again"
        )
    else:
        expected = [*MODEL_SETTINGS, *(n for n, s in TRAIN_SETTINGS.items() if not s.optional)]
        missing = next((name for name in expected if name not in shape | settings), None)
        if missing:
            raise InputError(
                f"{path} must hold every setting of the run, which has no checkpoint; it lacks "
                f"{missing}: start the run again"
            )
    config = TrainConfig.from_flat(settings | changes)
    return preset, ModelConfig.from_dict(shape), config, header.metadata if header else {}


def _saved_progress(folder: Path) -> Progress:
    """Where a run stands, as its newest readable checkpoint says."""
    for checkpoint in reversed(list_checkpoints(folder)):
        with contextlib.suppress(InputError):
            return from_plain(Progress, read_progress(checkpoint))
    return Progress()


@dataclass(frozen=True)
class DistributedPlan:
    """What rank 0 sends to the other processes of a distributed run."""

    run_dir: Path
    preset: str
    model: ModelConfig
    train: TrainConfig
    corpus: Path
    fingerprint: str
    """SHA-256 of the text."""
    tokenizer: str
    """As JSON."""
    resume: bool


def broadcast_plan(trainer: Trainer, *, resume: bool) -> None:
    """Send the plan of rank 0 to the other processes, which call ``receive_plan``."""
    corpus = trainer.corpus
    trainer.process_group.broadcast_object(
        DistributedPlan(
            trainer.run_dir,
            trainer.preset,
            trainer.model.config,
            trainer.config,
            corpus.path.resolve(),
            corpus.info["fingerprint"],
            corpus.tokenizer.to_json(),
            resume,
        )
    )
    trainer.process_group.local_rank_zero_first(lambda: corpus)


def receive_plan(process_group: ProcessGroup) -> tuple[Trainer, bool]:
    """Build the trainer of a process that is not rank 0, from what ``broadcast_plan`` sends.

    Returns:
        The trainer, and whether it resumes a run.

    Raises:
        InputError: the text cannot be read here, or is another one than rank 0's.
    """
    plan: DistributedPlan = process_group.broadcast_object(None)  # type: ignore[assignment]
    config, tokenizer = plan.train, Tokenizer.from_json(plan.tokenizer)

    def open_here() -> Corpus:
        if plan.corpus.exists():  # the same machine as rank 0, or a disk that machines share
            return open_corpus(plan.corpus, tokenizer)
        return open_corpus(config.data.source, tokenizer, options=read_options(config.data))

    corpus = process_group.local_rank_zero_first(open_here)
    if corpus.info["fingerprint"] != plan.fingerprint:
        raise InputError(
            f"the text of {config.data.source} on {platform.node()} must be that of rank 0; it is "
            "another one"
        )
    trainer = Trainer(
        plan.run_dir, corpus, plan.model, config, plan.preset, process_group=process_group
    )
    return trainer, plan.resume
