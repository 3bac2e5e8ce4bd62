"""Files written completely or not at all, and what is left of processes that died."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmrec.errors import StorageError
from mmrec.runtime.atomic import (
    append_all_or_nothing,
    atomic_path,
    atomic_write_text,
    process_is_alive,
    remove_stale_temporaries,
    write_with_retry,
)

KILLED_WRITER = """
import os, pathlib, sys
from mmrec.runtime.atomic import atomic_path
with atomic_path(pathlib.Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print(os.getpid(), flush=True)
    sys.stdin.readline()
"""


def test_a_file_is_replaced_or_untouched(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "é\n")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    with pytest.raises(StorageError), atomic_path(path):
        pass  # the block wrote nothing
    assert path.read_text("utf-8") == "é\n"
    with pytest.raises(StorageError):
        atomic_write_text(tmp_path / "absent" / "a.txt", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_temporaries_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """A real process is killed while its temporary exists. Those of the living stay."""
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "a.h5")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as writer:  # type: ignore[call-overload]
        assert int(writer.stdout.readline()) == writer.pid
        assert process_is_alive(writer.pid)
        [temporary] = tmp_path.iterdir()
        remove_stale_temporaries(tmp_path)
        assert temporary.exists()
        writer.kill()
    assert not process_is_alive(writer.pid)
    mine = (".notes.tmp", "a.1.mmrec.tmp", ".backup.999999999.tmp")  # files of the user
    for name in (f".a.h5.{os.getpid()}.mmrec.tmp", *mine):
        (tmp_path / name).touch()
    remove_stale_temporaries(tmp_path)
    assert not temporary.exists()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="process 1 is that of POSIX")
def test_processes_of_others_are_alive() -> None:
    assert process_is_alive(1)
    assert process_is_alive(os.getpid())


def test_an_append_is_complete_or_not_there(tmp_path: Path) -> None:
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    path = tmp_path / "metrics.jsonl"
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with path.open("ab", buffering=0) as file:
        append_all_or_nothing(file, path, b"one\n")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, old[1]))
            with pytest.raises(StorageError, match="metrics.jsonl"):
                append_all_or_nothing(file, path, b"two, too long\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, handler)
        append_all_or_nothing(file, path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"


def test_a_write_is_repeated_as_long_as_retry_says() -> None:
    errors: list[StorageError] = []
    attempts = 0

    def write() -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise StorageError(str(attempts))

    def retry(error: StorageError) -> bool:
        errors.append(error)
        return len(errors) < 2

    with pytest.raises(StorageError, match="1"):
        write_with_retry(write)
    attempts = 0
    write_with_retry(write, lambda error: True)
    assert attempts == 3
    attempts = 0
    with pytest.raises(StorageError, match="2"):
        write_with_retry(write, retry)
    assert [str(e) for e in errors] == ["1", "2"]
