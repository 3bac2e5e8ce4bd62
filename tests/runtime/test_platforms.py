"""Runtime and checkpoints on a platform that lacks what only POSIX or Linux has."""

import subprocess
import sys
from pathlib import Path

HIDDEN = """
import ctypes, mmap, os, signal, sys
import filelock, h5py, numba, numpy, platformdirs, torch  # libraries may need what they like
for name in ("fcntl", "resource", "pwd", "grp", "pty", "termios"):
    sys.modules[name] = None
for module, names in (
    (signal, ("SIGHUP", "SIGKILL", "SIGXFSZ", "SIGUSR1", "pthread_kill")),
    (mmap, ("MADV_HUGEPAGE",)),
    (os, ("sched_getaffinity", "getuid", "geteuid", "fork", "killpg")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
ctypes.CDLL = None
real_open = os.open
def open_files_only(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, *arguments, **options)
os.open = open_files_only

from pathlib import Path
from mmrec.checkpoint import hdf5, manager
from mmrec.cli import startup
from mmrec.errors import InputError
from mmrec.runtime import atomic, distributed, hardware, interrupts, locking, malloc, numeric

folder = Path(sys.argv[1])
startup.prepare_process(["train"])
malloc.keep_freed_memory()
malloc.return_large_blocks()
malloc.trim()
with locking.FolderLock(folder / "run"), interrupts.StopSignal() as stop:
    assert not stop.is_set()
    with hdf5.atomic_h5_file(folder / "run" / "a.h5", "corpus", 1) as file:
        hdf5.write_json(file, "note", {"a": 1})
    with hdf5.open_h5_file(folder / "run" / "a.h5", "corpus", 1) as file:
        assert hdf5.read_json(file, "note") == {"a": 1}
assert manager.list_checkpoints(folder / "run") == []
with interrupts.exit_on_signal(""), interrupts.tolerate_closed_output():
    print("done")
"""


def test_nothing_needs_a_posix_system(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", HIDDEN, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (process.stdout, process.stderr) == ("done\n", "")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["a.h5"]
