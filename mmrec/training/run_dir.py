"""The folder of a run: which files it holds, who may write in it, how a new one is chosen."""

from pathlib import Path

from mmrec.errors import InputError, RunLockedError
from mmrec.runtime.locking import FolderLock
from mmrec.runtime.names import user_path

FILES = ("config.toml", "metrics.jsonl", "loss.png", "summary.json", "best.h5", "last.h5")
"""The files of a run besides its ``step-N.h5`` checkpoints."""


def open_run_dir(out: str, default: Path, *, force: bool) -> FolderLock:
    """Choose, create and lock the folder of a new run.

    Args:
        out: the folder that the user named; empty takes ``default``, or ``default-2``,
            ``default-3`` … if it already holds a run.
        default: the folder without a name given.
        force: remove the files of an earlier run from the folder.

    Returns:
        The lock; its ``folder`` is the run folder.

    Raises:
        RunLockedError: another process writes in the folder, with ``force`` or without.
        InputError: the folder already holds a run, is a file, or cannot be written.
    """
    folder, number = user_path(out) if out else default, 1
    while True:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"the run folder {folder} must be a folder; it is a file")
        try:
            lock = FolderLock(folder)
        except RunLockedError:
            if out or force:
                raise
        else:
            if force or not holds_run(folder):
                break
            lock.release()
            if out:
                raise InputError(
                    f"{folder} already holds a run: choose another --out, continue it with "
                    "--resume, or overwrite it with --force"
                )
        number += 1
        folder = default.with_name(f"{default.name}-{number}")
    try:
        remove_run_files(folder)
    except BaseException:
        lock.release()
        raise
    return lock


def remove_run_files(folder: Path) -> None:
    """Remove the files that a run makes; leave all others."""
    for path in [*(folder / name for name in FILES), *folder.glob("step-*.h5")]:
        path.unlink(missing_ok=True)


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a file of a run."""
    return any((folder / name).exists() for name in FILES) or any(folder.glob("step-*.h5"))
