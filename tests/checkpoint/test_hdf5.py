"""HDF5 storage: all or nothing, and one clear line for every file that is not ours or not whole."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from mmrec.checkpoint.hdf5 import (
    atomic_write,
    open_file,
    read_array,
    read_json,
    write_array,
    write_json,
)
from mmrec.errors import InputError, StorageError
from mmrec.runtime.atomic import append, sweep


def write(path: Path, kind: str = "corpus", schema: int = 1, seed: int = 0) -> np.ndarray:
    data = np.random.default_rng(seed).integers(0, 1 << 30, 50_000)
    with atomic_write(path, kind, schema) as file:
        write_array(file, "data", data, pack=seed > 0)
        write_json(file, "note", {"text": "é" * 40_000})
    return data


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    data = write(path)
    with open_file(path, "corpus", 1) as file:
        assert np.array_equal(read_array(file, "data", np.int64), data)
        assert read_json(file, "note") == {"text": "é" * 40_000}
    assert [p.name for p in path.parent.iterdir()] == ["a.h5"]
    with h5py.File(path) as plain:  # an ordinary HDF5 file to everyone
        assert plain.attrs["kind"] == b"corpus"
    start, rest = path.read_bytes()[:512].rstrip(b"\0"), path.read_bytes()[512:]
    assert start.decode() == (
        f"mmrec sealed {len(rest)} bytes, sha256 {hashlib.sha256(rest).hexdigest()}\n"
    )


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    data = write(path)
    with pytest.raises(ZeroDivisionError), atomic_write(path, "corpus", 1) as file:
        file["data"] = data[:10]
        1 / 0  # noqa: B018
    with open_file(path, "corpus", 1) as file:
        assert np.array_equal(file["data"][:], data)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from mmrec.errors import StorageError
from mmrec.checkpoint.hdf5 import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    with atomic_write(Path(sys.argv[1]), "corpus", 1) as file:
        file["data"] = np.random.default_rng(1).random(100_000)
        file.create_dataset("more", data=np.arange(100_000), chunks=True, compression="gzip")
except StorageError as error:
    print("StorageError:", error)
"""


@pytest.mark.parametrize("limit", [0, 100, 4096, 300_000, 850_000])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, limit: int) -> None:
    """The system's own refusal to write past a size, met at any point of the file."""
    path = tmp_path / "a.h5"
    data = write(path)
    command = [sys.executable, "-c", FULL_DISK, str(path), str(limit)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"StorageError: could not write {path}: File too large; ")
    assert run.stdout.count("\n") == 1
    with open_file(path, "corpus", 1) as file:
        assert np.array_equal(file["data"][:], data)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="could not write .*: (File|Not).*; nothing"):
        write(tmp_path / "file" / "a.h5")


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    write(tmp_path / "good.h5", "corpus")
    write(tmp_path / "newer.h5", "corpus", schema=9)
    (tmp_path / "empty.h5").touch()
    (tmp_path / "text.h5").write_text("hello")
    h5py.File(tmp_path / "other.h5", "w").close()
    write(tmp_path / "third.h5", "zoo")
    whole = (tmp_path / "good.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    for name, kind, message in [
        ("absent.h5", "corpus", "no corpus at .*absent.h5: no such file"),
        (".", "corpus", "must be a file; it is a folder"),
        ("empty.h5", "corpus", "is empty; expected a corpus"),
        ("text.h5", "corpus", "is not an HDF5 file; expected a corpus"),
        ("cut.h5", "corpus", "is damaged or truncated: it was [0-9,]+ bytes long and is [0-9,]+"),
        ("good.h5", "checkpoint", "must be a checkpoint; it is a corpus"),
        ("third.h5", "corpus", "must be a corpus; it is not one of mmrec's files"),
        ("other.h5", "corpus", "has no seal: .* an earlier mmrec or by another program; make it"),
        ("newer.h5", "corpus", r"newer mmrec \(schema 9; this one reads up to 1\): upgrade"),
    ]:
        with (
            pytest.raises(InputError, match=message) as caught,
            open_file(tmp_path / name, kind, 1),
        ):
            pass
        assert "\n" not in str(caught.value)


def test_what_is_missing_inside_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with (
        pytest.raises(InputError, match="a.h5 is not valid: absent is missing"),
        open_file(tmp_path / "a.h5", "corpus", 1) as file,
    ):
        read_array(file, "absent", np.int64)


def test_temporaries_of_the_dead_are_swept(tmp_path: Path) -> None:
    """Of a real process, killed while its temporary was there; the living keep theirs."""
    code = (
        "import os, sys, pathlib, mmrec.runtime.atomic as f\n"
        "with f.atomic_file(pathlib.Path(sys.argv[1])) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "a.h5"
    killed = subprocess.run([sys.executable, "-c", code, str(target)], check=False, timeout=60)
    assert killed.returncode == -9
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    mine = tmp_path / f".a.h5.{os.getpid()}.tmp"
    for path in (mine, tmp_path / ".notes.tmp", tmp_path / "a.1.tmp"):
        path.touch()
    sweep(tmp_path)
    assert not left[0].exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_small_disk_that_is_full(tmp_path: Path) -> None:
    """A real file system of 128 KiB: it fills up in the middle, and takes the file once larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(size, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        (disk / "a.h5").write_bytes(b"before")
        with pytest.raises(StorageError, match="No space left on device; the file .* is intact"):
            write(disk / "a.h5")
        assert [p.name for p in disk.iterdir()] == ["a.h5"]
        assert (disk / "a.h5").read_bytes() == b"before"
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        write(disk / "a.h5")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="Read-only file system; the file .* is intact"):
            write(disk / "a.h5")
        with open_file(disk / "a.h5", "corpus", 1) as file:
            assert read_json(file, "note")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_append_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with path.open("ab", buffering=0) as file:
        append(file, path, b"one\n")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, old[1]))
            with pytest.raises(StorageError, match="metrics.jsonl: File too large; it is as it"):
                append(file, path, b"two, too long\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, handler)
        append(file, path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"
