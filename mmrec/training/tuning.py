"""Searching settings: many short runs, the better of them again and longer, the best last.

This is successive halving with whole runs. A trial trains a model for a given time with a learning
rate that reaches its end in that time, so a short trial is a short run and not the beginning of a
long one. Trials of equal length form a rung. The first rung draws settings (Optuna's TPE, after the
settings as they are); each further rung trains the best of the rung below again, from new weights,
three times as long. Rungs share the time of the search equally.

Trials run in this process, one after the other, on all threads. They are judged by their last loss
on the fixed validation subset.

Source: Jamieson and Talwalkar 2016 (arXiv:1502.07943), successive halving; Bergstra et al. 2011,
"Algorithms for Hyper-Parameter Optimization", TPE.
"""

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import shlex
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrec.config import (
    AUTO,
    MAX_COUNT,
    MODEL_SETTINGS,
    TRAIN_SETTINGS,
    ModelConfig,
    read_config_file,
)
from mmrec.data.corpus import EVALUATION_STREAMS, Corpus, Split
from mmrec.data.dataloader import evenly_spaced_sample
from mmrec.data.prepare import prepare, read_options
from mmrec.data.sources import is_single_pass
from mmrec.errors import InputError, RunLockedError, StorageError, TrainingDivergedError
from mmrec.runtime.locking import FolderLock
from mmrec.runtime.names import user_path
from mmrec.training.callbacks import Callback
from mmrec.training.metrics import format_duration
from mmrec.training.run_dir import remove_run_files
from mmrec.training.setup import RunPlan, default_run_dir, plan_run
from mmrec.training.trainer import Trainer

if TYPE_CHECKING:
    import optuna

Space = dict[str, tuple[float, float] | list[Any]]
"""What is searched, by name: a range, on a logarithmic scale, or a list of choices."""

SEARCHED: Space = {
    "lr": (2e-3, 4e-2),
    "matrix_lr": (5e-3, 6e-2),
    "weight_decay": (3e-2, 3.0),
    "dropout": [0.0, 0.05, 0.1, 0.2, 0.3],
    "batch_size": [4, 8, 16, 32],
}
"""The settings that are searched besides the width."""
WIDTHS = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Widths that are searched, as multiples of the preset's."""
LOG_FILE = "trials.log"
"""The finished trials: Optuna's journal, which its tools read."""
TRIAL_FOLDER = "trial"
"""Folder of the log of the running trial, for ``mmrec status``."""
REDUCTION = 3
"""How many times longer the trials of a rung are than those of the rung below."""
MAX_RUNGS = 4
TOP_TRIALS = 3
"""Trials that the last rung has time for: the settings as they are, and the two best."""
SHORTEST_SECONDS = 10.0
"""No rung is added whose trials would be shorter; shorter runs say little about longer ones."""
FEW_STEPS = 100
"""A trial of fewer steps is said to be too short to judge by."""
WARM_UP_SECONDS = 0.1
STARTUP_TRIALS = 8
"""Trials of random settings before TPE chooses."""


# ---- what is searched


def space_of(model: ModelConfig, fixed: Iterable[str] = ()) -> Space:
    """The settings to search around the shape of a model.

    Args:
        model: the shape.
        fixed: names of settings that the user has chosen, which stay as they are.

    Raises:
        InputError: all of them are fixed.
    """
    sizes = [round(model.width * share) for share in WIDTHS]
    divisors = (model.heads, model.recurrent_blocks)
    widths = [w for w in sizes if not any(w % divisor for divisor in divisors)]
    space: Space = SEARCHED | {"width": widths}
    fixed = set(fixed)
    left = {name: values for name, values in space.items() if name not in fixed}
    if not left:
        raise InputError(
            f"nothing is left to search: {', '.join(space)} are all given; leave some of them out"
        )
    return left


def suggest(trial: "optuna.trial.BaseTrial", space: Space) -> dict[str, Any]:
    """Choose the settings of a trial. Numbers of a range are rounded to two digits."""
    chosen: dict[str, Any] = {}
    for name, values in space.items():
        if isinstance(values, tuple):
            chosen[name] = float(f"{trial.suggest_float(name, *values, log=True):.2g}")
        else:
            chosen[name] = trial.suggest_categorical(name, values)
    return chosen


# ---- how long


@dataclass(frozen=True)
class Rung:
    """Trials of one length."""

    seconds: float
    """Training time of each."""
    deadline: float
    """Seconds of the search after which no further trial of the rung begins."""


def plan_rungs(minutes: float, final_minutes: float | None = None) -> list[Rung]:
    """Share the time of a search among rungs, the shortest trials first.

    The longest trials are as long as the training that the search is for, or, where the time does
    not allow it, as long as three of them fit into the share of their rung.

    Args:
        minutes: of the search.
        final_minutes: of the training that it is for; None: as long as the longest trials.
    """
    budget = 60 * minutes

    def longest(count: int) -> float:
        seconds = budget / (TOP_TRIALS * count)
        return seconds if final_minutes is None else min(seconds, 60 * final_minutes)

    def shortest(count: int) -> float:
        return longest(count) / REDUCTION ** (count - 1)

    count = next((n for n in range(MAX_RUNGS, 1, -1) if shortest(n) >= SHORTEST_SECONDS), 1)
    return [Rung(shortest(count) * REDUCTION**n, budget * (n + 1) / count) for n in range(count)]


# ---- the log


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    rung: int
    number: int
    """Number of its settings: 0 for the settings as they are, then in the order of the draws."""
    settings: dict[str, Any]
    loss: float | None
    """Nats per token on the validation subset; None if the trial gave none."""
    seconds: float
    """Of the search that it took, in all."""
    bits_per_byte: float | None = None
    steps: int = 0
    parameters: int = 0
    reason: str = ""
    """Why there is no loss."""


class TrialLog:
    """The finished trials of a search, on disk. A trial is one line, so a kill loses no other.

    Optuna's journal holds a study per rung. The lock of the folder keeps other writers out, so the
    journal needs none of its own, which a killed process would leave behind.
    """

    def __init__(self, path: Path, space: Space, search: dict[str, Any], rungs: int) -> None:
        """Open the log, or begin one.

        Args:
            path: the file.
            space: what is searched.
            search: everything that the search depends on, as JSON.
            rungs: their number.

        Raises:
            InputError: the file holds something else, or a search that depends on other things.
            StorageError: it cannot be written.
        """
        storage = open_journal(path)
        self._space, self._studies = space, []
        try:
            for rung in range(rungs):
                study = open_study(storage, f"rung {rung + 1}")
                if rung == 0:
                    self._check_search(path, study, search)
                self._studies.append(study)
        except OSError as error:
            raise StorageError(f"could not write {path}: {error.strerror or error}") from None
        self._path = path

    @staticmethod
    def _check_search(path: Path, study: "optuna.Study", search: dict[str, Any]) -> None:
        before = study.user_attrs.get("search")
        if before is None:
            study.set_user_attr("search", search)
            return
        for name in {**search, **before}:
            if before.get(name) == search.get(name):
                continue
            if name == "text":
                raise InputError(
                    f"{path} is of a search on another text, or the text of {search['data']} has "
                    "changed: choose another --out, or begin anew with --force"
                )
            was, now = (_shown(values.get(name)) for values in (before, search))
            raise InputError(
                f"{path} is of a search with {name} {was}; got {now}: continue it with the "
                "command that began it, choose another --out, or begin anew with --force"
            )

    def trials(self, rung: int) -> list[Trial]:
        """The finished trials of a rung, in their order."""
        return [Trial(**trial.user_attrs) for trial in self._studies[rung].trials]

    def draw(self) -> dict[str, Any]:
        """Draw settings for a trial of the first rung."""
        finished = self._studies[0].trials
        study = open_study(None, "draw")  # in memory: a trial that is killed leaves nothing
        study.add_trials(finished)
        return suggest(study.ask(), self._space)

    def add(self, trial: Trial) -> None:
        """Write a trial.

        Raises:
            StorageError: it could not be written.
        """
        import optuna

        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.FloatDistribution(*values, log=True)
            if isinstance(values, tuple)
            else optuna.distributions.CategoricalDistribution(values)
            for name, values in self._space.items()
        }
        states = optuna.trial.TrialState
        try:
            self._studies[trial.rung].add_trial(
                optuna.trial.create_trial(
                    state=states.PRUNED if trial.loss is None else states.COMPLETE,
                    value=trial.loss,
                    params={name: trial.settings[name] for name in distributions},
                    distributions=distributions,
                    user_attrs=dataclasses.asdict(trial),
                )
            )
        except OSError as error:
            raise StorageError(
                f"could not write {self._path}: {error.strerror or error}; the trials before are "
                "intact"
            ) from None


def check_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
        InputError: it is not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise InputError("a search needs a package: pip install 'mmrec[tune]'")


def open_journal(path: Path) -> "optuna.storages.JournalStorage":
    """Open a file of trials that only this process writes, or begin one.

    A line that was cut by a kill is removed. The next one would be added to it.

    Raises:
        InputError: optuna is missing, or the file is no journal.
        StorageError: it cannot be written.
    """
    check_optuna()
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class NoLock(JournalFileOpenLock):
        def acquire(self) -> bool:
            return True

        def release(self) -> None: ...

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        first = json.loads(whole.split(b"\n", 1)[0]) if whole else {"op_code": 0}
        if not whole and data and not data.startswith(b'{"op_code":0'):
            raise ValueError
        if not isinstance(first, dict) or first.get("op_code") != 0:
            raise ValueError
        if whole != data:
            os.truncate(path, len(whole))
        return optuna.storages.JournalStorage(JournalFileBackend(str(path), NoLock(str(path))))
    except OSError as error:
        raise StorageError(f"could not write {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is no log of trials: choose another folder") from None


def open_study(storage: "optuna.storages.BaseStorage | None", name: str) -> "optuna.Study":
    """Open a study of Optuna, or begin it: TPE for several settings at once, losses to minimise.

    The sampler has no fixed seed: one would draw the same settings again each time that a search is
    continued.

    Args:
        storage: where it is; None is in memory.
        name: of the study.
    """
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=STARTUP_TRIALS)
    if storage is not None and name in (study.study_name for study in storage.get_all_studies()):
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    return optuna.create_study(storage=storage, study_name=name, sampler=sampler)


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


# ---- one trial


class TrialTrainer(Trainer):
    """A run that saves no checkpoint; its log tells ``mmrec status`` where it stands."""

    def save(self, name: str, *, resumable: bool) -> None:
        """Check the weights, as before a checkpoint."""
        self._check_weights()

    def save_resumable(self, name: str) -> None:
        """Save nothing."""


def judged_by_subset(corpus: Corpus, eval_tokens: int) -> Corpus:
    """A corpus whose validation split is the fixed validation subset of a run.

    Args:
        corpus: the corpus.
        eval_tokens: as in ``EvaluationConfig``.
    """
    val, token_bytes = corpus.val, corpus.tokenizer.token_bytes

    def sample(values: np.ndarray) -> np.ndarray:
        return evenly_spaced_sample(values, eval_tokens, EVALUATION_STREAMS)

    tokens = np.array(sample(val.tokens))
    sizes = [len(token_bytes(i)) for i in range(corpus.tokenizer.vocab_size)]
    answers = None if val.answers is None else np.array(sample(val.answers))
    n_bytes = max(1, sum(sizes[t] for t in tokens.tolist()))
    subset = Split(tokens, np.array([0, len(tokens)]), np.array([n_bytes]), answers)
    return dataclasses.replace(corpus, val=subset)


class _Watch(Callback):
    """Shows how far the search is."""

    def __init__(self, show: Callable[[], None]) -> None:
        self._show = show

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._show()


# ---- the search


class Search:
    """A search in its folder.

    Attributes:
        plan: the run whose settings are searched, with its length.
        rungs: the lengths of the trials.
        log: the finished trials.
        signal_number: the signal that stopped the search, or 0.
    """

    def __init__(
        self,
        plan: RunPlan,
        minutes: float,
        final_minutes: float | None,
        given: dict[str, Any],
        *,
        config_path: Path | None = None,
        out: Path | None = None,
        force: bool = False,
        echo: Callable[[str], None] = print,
        show_progress: bool = True,
    ) -> None:
        """Prepare the text, lock the folder and open its log.

        Args:
            plan: preset and settings of the runs, as ``plan_run`` returns them.
            minutes: of the search.
            final_minutes: of the training that it is for; None: as long as the longest trials.
            given: settings by flat name that the user chose, besides those of ``config_path``.
            config_path: the configuration file of the plan.
            out: folder of the search; None is ``runs/tune-PRESET-CORPUS``.
            force: begin anew in a folder that holds a search.
            echo: called with each line of text for the user.
            show_progress: whether to show a bar.

        Raises:
            InputError: a setting or the data is not usable, nothing is left to search, or the
                folder holds another search.
            RunLockedError: another process searches in the folder.
        """
        self.plan, self.rungs = plan, plan_rungs(minutes, final_minutes)
        self.final_minutes = final_minutes or self.rungs[-1].seconds / 60
        self._given, self._config_path, self._echo = given, config_path, echo
        self._show_progress = show_progress
        file = read_config_file(config_path) if config_path else None
        fixed = {**given, **file.train, **file.model} if file else given
        self._space = space_of(plan.model, fixed)
        self.signal_number = 0
        data = plan.train.data
        for source in filter(None, (data.source, data.val_file)):
            if is_single_pass(source):
                raise InputError(
                    f"a search and the training after it read the text several times; got {source}:"
                    f" first write a corpus, mmrec data prepare {source} --out text.h5, and take "
                    "--data text.h5"
                )
        options = read_options(data)
        corpus = Corpus.open(prepare(data.source, data.tokenizer, data.vocab, None, echo, options))
        self._corpus = judged_by_subset(corpus, plan.train.evaluation.eval_tokens)
        name = default_run_dir(plan.preset, data.source).name
        self.folder = out or Path("runs") / f"tune-{name}"
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--out must be a folder; {self.folder} is a file")
        settings = {k: v for k, v in plan.train.flat().items() if k not in ("minutes", "out")}
        search = {
            "preset": plan.preset,
            "minutes": minutes,
            "for": self.final_minutes,
            **{k: v for k, v in settings.items() if k not in self._space and v is not None},
            **{
                k: v
                for k, v in dataclasses.asdict(plan.model).items()
                if k not in self._space and k != "vocab_size"
            },
            "searched settings": {k: list(v) for k, v in self._space.items()},
            "text": corpus.identity,
        }
        search = json.loads(json.dumps(search))  # as the log will hold it
        # a text that is too short for a batch is refused before there is a folder
        self._build(self._settings_as_they_are(), self.rungs[0].seconds)
        self._lock = FolderLock(self.folder)
        try:
            if force:
                (self.folder / LOG_FILE).unlink(missing_ok=True)
            self.log = TrialLog(self.folder / LOG_FILE, self._space, search, len(self.rungs))
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    @property
    def budget(self) -> float:
        """Seconds of the search."""
        return self.rungs[-1].deadline

    @property
    def seconds(self) -> float:
        """Seconds that the finished trials took."""
        return sum(t.seconds for rung in range(len(self.rungs)) for t in self.log.trials(rung))

    def run(self) -> None:
        """Run trials until the time is used, or a signal comes.

        Raises:
            InputError, TrainingDivergedError: the settings as they are cannot be trained with.
            StorageError: a file could not be written.
        """
        if self._next() is None:
            return
        # the first trial must not pay for compiling kernels
        trial = self._run_trial(0, 0, self._settings_as_they_are(), seconds=WARM_UP_SECONDS)
        while trial is not None and (following := self._next()) is not None:
            rung, number, settings = following
            trial = self._run_trial(rung, number, settings, seconds=self.rungs[rung].seconds)
            if trial is None:
                return
            self.log.add(trial)
            self._describe(trial)

    def _next(self) -> tuple[int, int, dict[str, Any]] | None:
        """Rung, number and settings of the next trial; None if the search is over."""
        used = 0.0
        for index, rung in enumerate(self.rungs):
            finished = self.log.trials(index)
            used += sum(t.seconds for t in finished)
            expected = rung.seconds
            if finished:
                expected = max(expected, statistics.mean(t.seconds for t in finished))
            has_time = used + expected / 2 <= rung.deadline
            if index == 0:
                if not finished:
                    return 0, 0, self._settings_as_they_are()
                if has_time or len(finished) < 2:  # a winner needs a rival
                    return 0, len(finished), self.log.draw()
                continue
            done = {t.number for t in finished}
            waiting = [t for t in self._promoted(index) if t.number not in done]
            if waiting and (has_time or len(finished) < 2):
                return index, waiting[0].number, waiting[0].settings
        return None

    def _settings_as_they_are(self) -> dict[str, Any]:
        now = self.plan.train.flat() | dataclasses.asdict(self.plan.model)
        return {name: now[name] for name in self._space}

    def _promoted(self, rung: int) -> list[Trial]:
        """The trials of the rung below in the order in which this rung takes them.

        The settings as they are come first, so that the result can be compared with them.
        """
        below = [t for t in self.log.trials(rung - 1) if t.loss is not None]
        return sorted(below, key=lambda t: (t.number != 0, t.loss))

    def _run_trial(
        self, rung: int, number: int, settings: dict[str, Any], *, seconds: float
    ) -> Trial | None:
        """Train for some seconds and score; None if a signal came."""
        begin, before, reason = time.perf_counter(), self.seconds, ""
        trial = Trial(rung, number, settings, None, 0.0)
        with self._bar(trial, before) as show:
            watch, trainer = _Watch(lambda: show(time.perf_counter() - begin)), None
            try:
                trainer = self._build(settings, seconds, [watch])
                summary = trainer.fit()
                if summary["ended"] == "signal":
                    self.signal_number = trainer.stop_signal.signal_number
                    return None
                assert trainer.scores is not None
                count = sum(p.numel() for p in trainer.model.parameters())
                trial = dataclasses.replace(
                    trial,
                    loss=trainer.scores.loss,
                    bits_per_byte=trainer.scores.bits_per_byte,
                    steps=summary["steps"],
                    parameters=count,
                )
            except (StorageError, RunLockedError):
                raise
            except (InputError, TrainingDivergedError, MemoryError, RuntimeError) as error:
                if number == 0:  # as mmrec train would fail
                    raise
                reason = str(error) or type(error).__name__
            finally:
                self._remove_trial_folder()
                trainer = None
                gc.collect()  # the next trial needs the memory
        return dataclasses.replace(trial, seconds=time.perf_counter() - begin, reason=reason)

    def _build(
        self, settings: dict[str, Any], seconds: float, callbacks: Sequence[Callback] = ()
    ) -> TrialTrainer:
        model = {k: v for k, v in settings.items() if k in MODEL_SETTINGS}
        config = self.plan.train.replace(
            **{k: v for k, v in settings.items() if k in TRAIN_SETTINGS},
            steps=None,
            epochs=None,
            until=None,
            minutes=seconds / 60,
            eval_every=MAX_COUNT,
            save_every=MAX_COUNT,
            sample_tokens=0,
            patience=0,
            on_nan="stop",
            out="",
            log="",
            html=False,
        )
        return TrialTrainer(
            self.folder / TRIAL_FOLDER,
            self._corpus,
            dataclasses.replace(self.plan.model, **model),
            config,
            self.plan.preset,
            echo=lambda line: None,
            callbacks=callbacks,
            show_progress=False,
            draw_curve=False,
        )

    def _remove_trial_folder(self) -> None:
        folder = self.folder / TRIAL_FOLDER
        if folder.is_dir():
            remove_run_files(folder)
            with contextlib.suppress(OSError):  # a file of the user is in it
                folder.rmdir()

    @contextlib.contextmanager
    def _bar(self, trial: Trial, before: float) -> Iterator[Callable[[float], None]]:
        """A bar over the time of the search; yields what shows the seconds of this trial."""
        from tqdm import tqdm

        title = f"rung {trial.rung + 1} of {len(self.rungs)}, trial {trial.number}"
        bar = tqdm(
            total=round(self.budget),
            initial=min(round(self.budget), round(before)),
            desc=title,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix}",
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not (self._show_progress and os.isatty(2)),
        )

        def show(seconds: float) -> None:
            done = min(self.budget, before + seconds)
            bar.set_postfix_str(f"{format_duration(self.budget - done)} left", refresh=False)
            bar.update(round(done) - bar.n)

        with bar:
            yield show

    # ---- what is printed

    def describe_plan(self) -> str:
        """The plan in a line."""
        counts = [
            max(1, round((rung.deadline - begin) / rung.seconds))
            for rung, begin in zip(
                self.rungs, [0.0, *(r.deadline for r in self.rungs)], strict=False
            )
        ]
        parts = [
            f"{'the best ' * (i > 0)}{count} for {format_duration(rung.seconds)}"
            for i, (rung, count) in enumerate(zip(self.rungs, counts, strict=True))
        ]
        before = self.seconds
        continued = f", {format_duration(before)} of it used before" if before else ""
        return (
            f"search  {', '.join(self._space)}, for {format_duration(self.budget)}{continued}: "
            f"about {', then '.join(parts)}; log {self.folder / LOG_FILE}"
        )

    def _describe(self, trial: Trial) -> None:
        left = format_duration(self.budget - self.seconds)
        place = f"trial   {trial.number} for {format_duration(self.rungs[trial.rung].seconds)}"
        chosen = ", ".join(f"{k} {v:g}" for k, v in trial.settings.items())
        if trial.loss is None:
            self._echo(f"{place}: left out, {trial.reason}; {chosen}; {left} left")
            return
        losses = [t.loss for t in self.log.trials(trial.rung) if t.loss is not None]
        is_best = trial.loss <= min(losses)
        note = ", the best of this length" if is_best and len(losses) > 1 else ""
        self._echo(f"{place}: loss {trial.loss:.4f}{note}; {chosen}; {left} left")
        if trial.number == 0 and trial.rung == 0 and trial.steps < FEW_STEPS:
            self._echo(
                f"note    these trials have only {trial.steps:,} steps, too few to tell settings "
                "apart: give more --minutes, or a smaller --preset"
            )

    def best(self) -> list[Trial]:
        """Trials with a loss: the longest first, and of equal length the better first."""
        everything = [t for rung in range(len(self.rungs)) for t in self.log.trials(rung)]
        usable = [t for t in everything if t.loss is not None]
        return sorted(usable, key=lambda t: (-t.rung, t.loss))

    def table(self, rows: int = 10) -> list[str]:
        """A table of the best trials, as lines."""
        names = list(self._space)
        widths = [max(len(name), 6) for name in names]
        header = f"{'trial':>8} {'time':>7} {'loss':>8} {'bits/byte':>10} {'steps':>8} {'size':>8}"
        titles = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
        lines = [f"{header} {titles}"]
        for t in self.best()[:rows]:
            values = " ".join(
                f"{t.settings[name]:>{width}g}" for name, width in zip(names, widths, strict=True)
            )
            label = "as it is" if t.number == 0 else str(t.number)
            time_text = format_duration(self.rungs[t.rung].seconds)
            lines.append(
                f"{label:>8} {time_text:>7} {t.loss:8.4f} {t.bits_per_byte:10.4f} {t.steps:8,} "
                f"{t.parameters / 1e6:6.2f} M {values}"
            )
        return lines

    def conclusion(self) -> list[str]:
        """What was found, in lines: how much better it is, and what to know of it."""
        found, seconds = self.best()[0], self.rungs[self.best()[0].rung].seconds
        assert found.loss is not None
        rivals = [t for t in self.best() if t.rung == found.rung]
        base = next((t.loss for t in rivals if t.number == 0), None)
        length = format_duration(seconds)
        lines = []
        if found.number == 0:
            lines.append(
                f"no trial of {length} was better than the settings as they are, loss "
                f"{found.loss:.4f}"
            )
        elif base is not None:
            lines.append(
                f"trial {found.number} is best: loss {found.loss:.4f} after {length}, "
                f"{1 - found.loss / base:.1%} below the settings as they are ({base:.4f})"
            )
        if self.final_minutes * 60 > seconds * 1.05:
            lines.append(
                f"note    the longest trials were {length}, and you will train for "
                f"{format_duration(60 * self.final_minutes)}: a longer run may want a lower rate, "
                "more dropout and a larger width; more --minutes allow longer trials"
            )
        return lines

    def train_command(self) -> str:
        """The command that trains with what was found."""
        words = ["mmrec", "train", self.plan.preset]
        if self._config_path is not None:
            words += ["--config", str(self._config_path)]
        settings = self._given | self.best()[0].settings
        for name, value in settings.items():
            words += (TRAIN_SETTINGS.get(name) or MODEL_SETTINGS[name]).as_arguments(value)
        return shlex.join([*words, "--minutes", f"{self.final_minutes:.4g}"])


def open_search(
    preset: str | None,
    minutes: float,
    final_minutes: float | None,
    given: dict[str, Any],
    *,
    config_path: Path | None = None,
    out: str | None = None,
    **options: Any,
) -> Search:
    """Plan a search, and open its folder.

    Args:
        preset: name of a preset; None takes that of the file, or ``tiny``.
        minutes: of the search.
        final_minutes: of the training that it is for; None: as long as the longest trials.
        given: settings by flat name that stay as they are.
        config_path: a TOML file with further ones, or None.
        out: folder of the search.
        options: further arguments of ``Search``.

    Raises:
        InputError: see ``Search``; or the file names a model to begin from.
    """
    check_optuna()
    for name, value in (("minutes", minutes), ("for", final_minutes)):
        dataclasses.replace(TRAIN_SETTINGS["minutes"], flat_name=name).check(value)
    if preset == AUTO:
        raise InputError(f"a search begins with a preset, not with {AUTO}: name one, such as tiny")
    plan = plan_run(preset, config_path, given, default_preset="tiny")
    if plan.source is not None:
        raise InputError(
            "mmrec tune trains new models, so initialize_from cannot be given; got "
            f"{plan.train.finetune.initialize_from}"
        )
    folder = None if out is None else user_path(out)
    return Search(
        plan, minutes, final_minutes, given, config_path=config_path, out=folder, **options
    )
