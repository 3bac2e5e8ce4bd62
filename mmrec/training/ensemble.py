"""A small text and much time: several models, then one that learns their mean.

``mmrec distill`` trains the members of an ensemble, one per core at a time, each in a process of
its own. Then a student trains on all cores, with the members as its teachers (see
``mmrec.training.distillation``). Members and student are ordinary runs in one folder: ``1-member``,
``2-member`` … and last ``5-student``. So each of them continues bit for bit where it was stopped.

Source: Kim et al. 2025, "Pre-training under infinite compute" (arXiv:2509.14786, sections 4 and 5).
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from mmrec.checkpoint.manager import CHAIN_FILE
from mmrec.checkpoint.outputs import check_output
from mmrec.config import (
    AUTO,
    LENGTHS,
    MODEL_SETTINGS,
    TRAIN_SETTINGS,
    read_config_file,
)
from mmrec.data.sources import is_single_pass
from mmrec.errors import InputError
from mmrec.evaluation.compare import read_run
from mmrec.runtime.atomic import atomic_write_text
from mmrec.runtime.interrupts import StopSignal
from mmrec.runtime.locking import FolderLock
from mmrec.runtime.names import user_path
from mmrec.runtime.numeric import cdiv
from mmrec.training.metrics import format_duration
from mmrec.training.run_dir import check_run_dir, is_run_config, remove_run_files
from mmrec.training.setup import (
    RunPlan,
    begin_run,
    default_run_dir,
    plan_run,
    prepare_corpus,
    resume_run,
)
from mmrec.training.status import SECONDS_BETWEEN_LINES, STATUS_FILE, read_json
from mmrec.training.trackers import make_trackers
from mmrec.training.trainer import Trainer

MAX_MEMBERS = 64
MEMBER_DROPOUT = 0.1
"""Of members, unless the user sets it. The student has none."""
OF_STUDENT = ("teacher_weight", "log", "html", "sample_tokens", "sample_prompt")
"""Settings that the members do not take."""
_RUN_FOLDER = re.compile(r"\d{1,3}-(member|student)")
SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_TO_SAVE = 120.0
"""How long a member that was told to stop may take."""


class Ensemble:
    """Members and student in their folder, which is locked until the block ends.

    Attributes:
        folder: the folder of all runs.
        members, student: their run folders.
        signal_number: the signal that stopped the members, or 0.
    """

    def __init__(
        self,
        preset: str | None,
        given: dict[str, Any],
        *,
        minutes: float,
        members: int = 4,
        member_share: float = 0.55,
        config_path: Path | None = None,
        out: str | None = None,
        force: bool = False,
        echo: Callable[[str], None] = print,
        show_progress: bool = True,
    ) -> None:
        """Plan the runs, prepare the text and lock the folder.

        Args:
            preset: name of a preset; None takes that of the file, or ``tiny``.
            given: settings by flat name, of all runs.
            minutes: of all training together.
            members: number of members, at least 2.
            member_share: share of the minutes for the members.
            config_path: a TOML file with further settings.
            out: folder of all runs; None is ``runs/distill-PRESET-CORPUS``.
            force: begin anew in a folder that holds an ensemble.
            echo: called with each line of text for the user.
            show_progress: whether to show a bar.

        Raises:
            InputError: a setting or the data is not usable, or the folder holds another ensemble.
            RunLockedError: another process writes in the folder.
        """
        file = read_config_file(config_path) if config_path else None
        _check(minutes, members, member_share, preset or (file.preset if file else ""))
        self._echo, self._show_progress = echo, show_progress
        self._given, self._config_path = given, config_path
        self._has_dropout = "dropout" in given or (file is not None and "dropout" in file.model)
        self._plan = plan = plan_run(
            preset, config_path, given | {"minutes": minutes}, default_preset="tiny"
        )
        plan.train.replace(teachers="the members")  # what a student cannot have is found at once
        data = plan.train.data
        for source in filter(None, (data.source, data.val_file)):
            if is_single_pass(source):
                raise InputError(
                    f"each member reads the text; got {source}: first write a corpus, mmrec data "
                    f"prepare {source} --out text.h5, and take --data text.h5"
                )
        cores = torch.get_num_threads()
        self._at_once, self._threads = min(cores, members), max(1, cores // members)
        self.rounds = cdiv(members, self._at_once)
        self.member_minutes = minutes * member_share / self.rounds
        self.student_minutes = minutes * (1 - member_share)
        name = default_run_dir(plan.preset, data.source).name
        self.folder = user_path(out) if out else Path("runs") / f"distill-{name}"
        self.members = [self.folder / f"{i}-member" for i in range(1, members + 1)]
        self.student = self.folder / f"{members + 1}-student"
        self.signal_number = 0
        settings = {k: v for k, v in plan.train.flat().items() if k not in ("out", *LENGTHS)}
        state: dict[str, Any] = {
            "preset": plan.preset,
            "minutes": minutes,
            "members": members,
            "member_share": member_share,
            **settings,
            **{k: getattr(plan.model, k) for k in MODEL_SETTINGS if k != "vocab_size"},
        }
        self._check_folder(plan, state, force=force)
        # a mistake is found before there is a folder, and not when the members have been trained
        make_trackers(plan.train.output.trackers)
        corpus, config = prepare_corpus(plan, echo)
        if corpus.train.answers is not None:
            raise InputError(f"teachers teach a text; got conversations, {data.source}")
        Trainer(self.student, corpus, plan.model, config, plan.preset, echo=_silent)
        self._lock = FolderLock(self.folder)
        try:
            if force:
                # those of an ensemble of another size, too: the last run stands for the folder
                for run in self.folder.iterdir():
                    if run.is_dir() and _RUN_FOLDER.fullmatch(run.name):
                        with FolderLock(run):
                            remove_run_files(run)
            text = json.dumps({"distill": state}, indent=1) + "\n"
            atomic_write_text(self.folder / CHAIN_FILE, text)
        except BaseException:
            self._lock.release()
            raise

    def _check_folder(self, plan: RunPlan, state: dict[str, Any], *, force: bool) -> None:
        """Check that the folder is new, or holds this ensemble.

        Raises:
            InputError: it does not.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--out must be a folder; {self.folder} is a file")
        before = read_json(self.folder / CHAIN_FILE).get("distill")
        runs = [run for run in (*self.members, self.student) if run.exists()]
        if force or not (runs or before):
            inputs = list(plan.input_files)
            if self.folder.is_dir():
                check_output(
                    self.folder / CHAIN_FILE, "ensemble", option="--out", inputs=inputs, force=force
                )
            for run in runs:
                check_run_dir(run, inputs, force=True)
            return
        advice = "choose another --out, or begin anew with --force"
        if not isinstance(before, dict):
            raise InputError(f"{runs[0]} exists, and no mmrec distill made it: {advice}")
        for name, value in json.loads(json.dumps(state)).items():
            if before.get(name, value) != value:
                raise InputError(
                    f"{self.folder} holds an ensemble with other settings ({name} was "
                    f"{before[name]!r}, now {value!r}): {advice}"
                )

    def __enter__(self) -> "Ensemble":
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def describe(self) -> str:
        """The plan in a line."""
        at_once = f", {self._at_once} at a time" if self.rounds > 1 else ""
        each = format_duration(60 * self.member_minutes)
        return (
            f"distill {len(self.members)} members for {each} each{at_once}, then a student that "
            f"learns their mean for {format_duration(60 * self.student_minutes)}; in {self.folder}"
        )

    # ---- members

    def train_members(self) -> None:
        """Train the members that are not finished, side by side, until the end or a signal.

        Raises:
            InputError: a member failed. The others have been stopped, and saved.
        """
        waiting = [run for run in self.members if not is_finished(run)]
        running: dict[Path, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        with StopSignal() as stop, self._bar() as show:
            try:
                while waiting or running:
                    while waiting and len(running) < self._at_once:
                        run = waiting.pop(0)
                        file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
                        running[run] = (self._start(run, file), file)
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    if stop.is_set():
                        self.signal_number = stop.signal_number
                        return
                    show()
                    for run, (process, errors) in list(running.items()):
                        if process.poll() is None:
                            continue
                        del running[run]
                        with errors:
                            if process.returncode:
                                raise InputError(f"{run}: {_last_line(errors)}")
                        self._echo(describe_run(run))
            finally:
                _stop(running)

    def _start(self, run: Path, errors: IO[bytes]) -> "subprocess.Popen[bytes]":
        """Start the process of a member, which Ctrl-C does not reach."""
        if is_run_config(run / "config.toml"):
            words = ["--resume", str(run)]
        else:
            words = [self._plan.preset]
            if self._config_path is not None:
                words += ["--config", str(self._config_path)]
            for name, value in self._member_settings(run).items():
                words += (TRAIN_SETTINGS.get(name) or MODEL_SETTINGS[name]).as_arguments(value)
            words += ["--force"]  # files of a member that was killed before it began
        return subprocess.Popen(
            [sys.executable, "-m", "mmrec", "train", *words],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"OMP_NUM_THREADS": str(self._threads)},
            start_new_session=True,
        )

    def _member_settings(self, run: Path) -> dict[str, Any]:
        own = {k: v for k, v in self._given.items() if k not in OF_STUDENT}
        seed = 1000 * self._plan.train.optimizer.seed + self.members.index(run) + 1
        bounded = seed % (1 << 31)  # a seed of the user may be as large as there are
        return {
            **({} if self._has_dropout else {"dropout": MEMBER_DROPOUT}),
            **own,
            "seed": bounded,
            "out": str(run),
            "minutes": self.member_minutes,
            "sample_tokens": 0,
        }

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Callable[[], None]]:
        """A bar over the training time of all members; without a terminal a line a minute."""
        from tqdm import tqdm

        total = 60 * self.member_minutes * len(self.members)
        bar = tqdm(
            total=round(total),
            desc="members",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix}",
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not (self._show_progress and os.isatty(2)),
        )
        last = time.monotonic()

        def show() -> None:
            nonlocal last
            done = min(total, sum(map(self._trained_seconds, self.members)))
            left = format_duration((total - done) / self._at_once)
            bar.set_postfix_str(f"{left} left", refresh=False)
            bar.update(round(done) - bar.n)
            if not os.isatty(1) and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self._echo(f"members {done / total:.0%} trained, {left} left")

        with bar:
            yield show

    def _trained_seconds(self, run: Path) -> float:
        if is_finished(run):
            return 60 * self.member_minutes
        return float(read_json(run / STATUS_FILE).get("seconds", 0.0))

    # ---- student

    def begin_student(self, **options: Any) -> tuple[FolderLock, Trainer, bool]:
        """Begin the student, or continue it.

        Args:
            options: further arguments of ``Trainer``.

        Returns:
            The lock of its folder, its trainer, and whether it is a resume.
        """
        if is_run_config(self.student / "config.toml"):
            return *resume_run({"out": str(self.student)}, **options), True
        given = self._given | {
            "teachers": ",".join(map(str, self.members)),
            "minutes": self.student_minutes,
            "dropout": 0.0,
            "out": str(self.student),
        }
        plan = plan_run(self._plan.preset, self._config_path, given)
        return *begin_run(plan, force=True, **options), False


def is_finished(run: Path) -> bool:
    """Whether a run has ended, and not by a signal."""
    return read_json(run / "summary.json").get("ended") in ("done", "early")


def describe_run(run: Path) -> str:
    """A line on a run that is finished."""
    curve = read_run(run)
    return (
        f"{run.name:<7} {curve.tokens:,} tokens in {format_duration(curve.seconds)}, "
        f"{curve.split_bits_per_byte:.4f} bits per byte of the validation split"
    )


def _check(minutes: float, members: int, member_share: float, preset: str) -> None:
    TRAIN_SETTINGS["minutes"].check(minutes)
    if not 2 <= members <= MAX_MEMBERS:
        raise InputError(f"members must be a whole number from 2 to {MAX_MEMBERS}; got {members}")
    if not 0 < member_share < 1:
        raise InputError(f"member_share must lie in (0, 1); got {member_share:g}")
    if preset == AUTO:
        raise InputError(f"the members need a preset; got {AUTO}: name one, such as tiny")


def _silent(line: str) -> None:
    """Print nothing."""


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "it ended without a message"


def _stop(running: dict[Path, tuple["subprocess.Popen[bytes]", IO[bytes]]]) -> None:
    """Let members save and end."""
    for process, _ in running.values():
        with contextlib.suppress(OSError):
            process.send_signal(signal.SIGTERM)
    for process, errors in running.values():
        try:
            process.wait(SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        errors.close()
