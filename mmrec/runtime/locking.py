"""The lock of a run folder, so that two processes never write in it at once."""

import contextlib
import errno
import os
import platform
import sys
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from mmrec.errors import InputError, RunLockedError
from mmrec.runtime.atomic import remove_stale_temporaries

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What a file system without locks answers."""
LOCK_FILE, OWNER_FILE = ".mmrec.lock", ".mmrec.lock.owner"
PATIENCE = 0.1
"""Seconds that a lock is waited for: its owner may be about to release it."""


class FolderLock:
    """The exclusive right to write in a folder, until it is released or the process ends.

    The operating system releases the lock of a process that dies. Readers need no lock. On a file
    system without locks there is no protection, and everything else works.
    """

    def __init__(self, folder: Path) -> None:
        """Create the folder if it is missing, lock it, and remove what dead writers left in it.

        Args:
            folder: The folder.

        Raises:
            RunLockedError: Another process holds the lock. The message names it.
            InputError: The folder cannot be created or written.
        """
        self.folder = folder
        self._path, self._owner_path = folder / LOCK_FILE, folder / OWNER_FILE
        # several objects, and several threads, must exclude each other: nothing may be shared
        self._lock = FileLock(self._path, timeout=PATIENCE, thread_local=False)
        self._held = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._held = True
            # the lock file itself is empty: Windows lets nobody read a locked file
            self._owner_path.write_text(f"process {os.getpid()} on {platform.node()}\n", "utf-8")
        except OSError as error:
            self.release()
            reason = error.strerror or error
            raise InputError(f"cannot write in the run folder {folder}: {reason}") from None
        remove_stale_temporaries(folder)

    def _acquire(self) -> None:
        try:
            with warnings.catch_warnings():  # that of a file system without locks
                warnings.simplefilter("ignore")
                self._lock.acquire(poll_interval=PATIENCE / 4)
        except Timeout:
            raise RunLockedError(
                f"{self.folder} is being written by {_owner(self.folder)}: wait for it, stop it, "
                "or choose another --out"
            ) from None
        except NotImplementedError:
            pass
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def release(self) -> None:
        """Release the lock and remove its files. Further calls do nothing."""
        if not self._held:
            return
        self._held = False
        self._remove(self._owner_path)
        if sys.platform != "win32":  # while the lock is held, no other process can have a new file
            self._remove(self._path)
        self._lock.release()
        if sys.platform == "win32":  # which removes no open file
            self._remove(self._path)

    @staticmethod
    def _remove(path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def lock_owner(folder: Path) -> str | None:
    """Who holds the lock of a folder, for a reader, who needs none.

    Args:
        folder: The folder. Nothing is written in it.

    Returns:
        Such as ``process 7 on host``; None if nobody holds it, or the system does not say.
    """
    path = folder / LOCK_FILE
    if not path.exists():
        return None
    try:
        import fcntl
    except ImportError:  # Windows
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return _owner(folder)
        lock.release()
        return None
    with contextlib.suppress(OSError), path.open("rb") as file:
        try:  # a writer who comes meanwhile waits longer than this takes
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _owner(folder)
    return None


def _owner(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / OWNER_FILE).read_text("utf-8").strip() or "another process"
    return "another process"
