"""The folder of a run: which files it holds, who may write in it, how a new one is chosen."""

import json
from collections.abc import Iterable
from pathlib import Path

from mmrec.checkpoint.hdf5 import is_sealed
from mmrec.checkpoint.manager import step_checkpoints
from mmrec.checkpoint.outputs import check_not_read, is_same_file
from mmrec.data.document_record import DOCUMENTS_FILE
from mmrec.errors import InputError, RunLockedError
from mmrec.runtime.locking import FolderLock
from mmrec.runtime.names import user_path
from mmrec.training.status import REPORT_FILE, STATUS_FILE

FILES = (
    *("config.toml", "metrics.jsonl", "samples.jsonl", "loss.png", STATUS_FILE, "summary.json"),
    REPORT_FILE,
    *("best.h5", "last.h5", DOCUMENTS_FILE),
)
"""The files of a run besides its ``step-N.h5`` checkpoints and its events for TensorBoard."""
EVENTS_SUFFIX = ".mmrec-events"
"""How the names of our event files for TensorBoard end."""
CONFIG_MARK = "# The settings of a run, written by mmrec.\n"
"""First line of the ``config.toml`` of a run; a user's own file has another."""


def check_run_dir(folder: Path, inputs: Iterable[Path] = (), *, force: bool = False) -> None:
    """Check that a new run may write in a folder. Nothing is created.

    Args:
        folder: the folder.
        inputs: the files that the run reads, which it must not replace.
        force: overwrite an earlier run, and other files with the names of a run's.

    Raises:
        InputError: the folder is a file, holds a run or a file that the run would replace, or one
            that it reads.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the run folder {folder} must be a folder; it is a file")
    files = run_files(folder)
    if not files:
        return
    inputs = list(inputs)
    for path in files:
        if holds_run(folder) and any(is_same_file(path, source) for source in inputs):
            raise InputError(
                f"{folder} already holds a run, and {path} of it is read: choose another --out"
            )
        check_not_read(path, inputs)
        if path.is_dir():
            raise InputError(
                f"the run writes a file {path}, which is a folder: choose another --out"
            )
    if force:
        return
    if holds_run(folder):
        raise InputError(
            f"{folder} already holds a run: choose another --out, continue it with "
            "--resume, or overwrite it with --force"
        )
    raise InputError(
        f"{files[0]} is there already, and no run wrote it: choose another --out, or overwrite it "
        "with --force"
    )


def open_run_dir(
    out: str, default: Path, *, force: bool, inputs: Iterable[Path] = ()
) -> FolderLock:
    """Choose, create and lock the folder of a new run.

    Args:
        out: the folder that the user named; empty takes ``default``, or ``default-2``,
            ``default-3`` … if it already holds a run.
        default: the folder without a name given.
        force: remove the files of an earlier run from the folder.
        inputs: the files that the run reads.

    Returns:
        The lock; its ``folder`` is the run folder.

    Raises:
        RunLockedError: another process writes in the folder, with ``force`` or without.
        InputError: see ``check_run_dir``; or the folder cannot be written.
    """
    folder, number, inputs = user_path(out) if out else default, 1, list(inputs)
    is_fixed = bool(out) or force
    while True:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"the run folder {folder} must be a folder; it is a file")
        try:
            lock = FolderLock(folder)
        except RunLockedError:
            if is_fixed:
                raise
        else:
            try:
                check_run_dir(folder, inputs, force=force)
                remove_run_files(folder)
            except InputError:
                lock.release()
                if is_fixed:
                    raise
            except BaseException:
                lock.release()
                raise
            else:
                return lock
        number += 1
        folder = default.with_name(f"{default.name}-{number}")


def run_files(folder: Path) -> list[Path]:
    """Return the files in a folder that have the names of a run's."""
    named = [path for name in FILES if (path := folder / name).exists() or path.is_symlink()]
    events = folder.glob(f"*{EVENTS_SUFFIX}")
    return [*named, *(path for _, path in step_checkpoints(folder)), *events]


def remove_run_files(folder: Path) -> None:
    """Remove the files that a run makes; leave all others."""
    for path in run_files(folder):
        path.unlink(missing_ok=True)


def holds_run(folder: Path) -> bool:
    """Whether a run wrote in a folder. A user may have a ``config.toml`` there without one."""
    return (
        is_run_config(folder / "config.toml")
        or any(is_sealed(path) for path in run_files(folder) if path.suffix in (".h5", ".hdf5"))
        or _is_run_log(folder / "metrics.jsonl")
    )


def is_run_config(path: Path) -> bool:
    """Whether a run wrote this ``config.toml``."""
    try:
        with path.open("rb") as file:
            return file.read(len(CONFIG_MARK)) == CONFIG_MARK.encode()
    except OSError:
        return False


def _is_run_log(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            line = json.loads(file.readline(10_000))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(line, dict) and {"kind", "step"} <= line.keys()
