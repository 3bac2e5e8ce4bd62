"""The lock of a run folder: one writer at a time, and nothing left of one that died."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmrec.errors import InputError, RunLockedError
from mmrec.runtime.locking import FolderLock

HOLDER = """
import sys
from pathlib import Path
from mmrec.runtime.locking import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print(flush=True)
sys.stdin.readline()
"""
COUNTER = """
import sys
from pathlib import Path
from mmrec.errors import RunLockedError
from mmrec.runtime.locking import FolderLock
folder, count = Path(sys.argv[1]), Path(sys.argv[2])
done = 0
while done < 100:
    try:
        lock = FolderLock(folder)
    except RunLockedError:
        continue
    count.write_text(str(int(count.read_text()) + 1))
    done += 1
    lock.release()
"""
WITHOUT_LOCKS = """
import os, sys
from pathlib import Path
import fcntl
def refuse(*arguments):
    raise OSError(int(sys.argv[2]), os.strerror(int(sys.argv[2])))
fcntl.flock = refuse
from mmrec.runtime.locking import FolderLock
folder = Path(sys.argv[1])
with FolderLock(folder):
    assert list(folder.iterdir())
assert not list(folder.iterdir())
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs the script."""
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with FolderLock(folder) as lock:
        assert lock.folder == folder
        for _ in range(2):
            with pytest.raises(RunLockedError, match=f"process {os.getpid()} on "):
                FolderLock(folder)
        with FolderLock(tmp_path / "other"):
            pass
    assert list(folder.iterdir()) == []
    lock.release()  # once more does nothing
    with FolderLock(folder):
        lock.release()
        with pytest.raises(RunLockedError):
            FolderLock(folder)


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    """While it lives its number is named. After a kill, what it was writing is removed."""
    with start(HOLDER, tmp_path) as holder:
        assert holder.stdout
        holder.stdout.readline()
        (tmp_path / f".last.h5.{holder.pid}.mmrec.tmp").touch()
        with pytest.raises(RunLockedError, match=f"process {holder.pid} on "):
            FolderLock(tmp_path)
        holder.kill()
    with FolderLock(tmp_path):
        assert not list(tmp_path.glob("*.tmp"))
        with pytest.raises(RunLockedError, match=f"process {os.getpid()} on "):
            FolderLock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_lock_and_release_exclude_each_other(tmp_path: Path) -> None:
    """Releasing removes the lock file, which must not let two processes in."""
    count = tmp_path / "count"
    count.write_text("0")
    processes = [start(COUNTER, tmp_path / "run", count) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert count.read_text() == "300"
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError) as caught:
            FolderLock(folder)
        assert caught.type is InputError
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path: Path, number: int) -> None:
    pytest.importorskip("fcntl")
    with start(WITHOUT_LOCKS, tmp_path / "run", number) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
