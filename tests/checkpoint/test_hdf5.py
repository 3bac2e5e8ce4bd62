"""HDF5 files: written completely or not at all, and one clear error for every bad file."""

import hashlib
import importlib
import random
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from mmrec.checkpoint.hdf5 import (
    atomic_h5_file,
    open_h5_file,
    read_array,
    read_json,
    seal,
    write_array,
    write_json,
)
from mmrec.errors import DamagedError, InputError, StorageError
from tests.conftest import ROOT


def write(path: Path, kind: str = "corpus", schema: int = 1, seed: int = 0) -> np.ndarray:
    """Write a small file; return its array."""
    data = np.random.default_rng(seed).integers(0, 1 << 30, 50_000)
    with atomic_h5_file(path, kind, schema) as file:
        write_array(file, "data", data, compress=seed > 0)
        write_json(file, "note", {"text": "é" * 40_000})
    return data


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    data = write(path)
    with open_h5_file(path, "corpus", 1) as file:
        assert np.array_equal(read_array(file, "data", np.int64), data)
        assert read_json(file, "note") == {"text": "é" * 40_000}
    assert [p.name for p in path.parent.iterdir()] == ["a.h5"]
    with h5py.File(path) as plain:  # an ordinary HDF5 file to everyone
        assert plain.attrs["kind"] == b"corpus"
    start, rest = path.read_bytes()[:512].rstrip(b"\0"), path.read_bytes()[512:]
    assert start.decode() == (
        f"mmrec sealed {len(rest)} bytes, sha256 {hashlib.sha256(rest).hexdigest()}\n"
    )


@pytest.mark.parametrize("rows", [0, 1, 1000, 7000, 200_000])
def test_an_array_of_zeros_and_some_rows_can_be_read(tmp_path: Path, rows: int) -> None:
    """A table of n-grams that has met few of them yet; compressed, it would look like an attack."""
    data = np.zeros((200_000, 16), np.float32)
    data[:rows] = np.random.default_rng(0).standard_normal((rows, 16), np.float32)
    path = tmp_path / "a.h5"
    with atomic_h5_file(path, "corpus", 1) as file:
        write_array(file, "data", data, compress=True)
    with open_h5_file(path, "corpus", 1) as file:
        assert np.array_equal(read_array(file, "data", np.float32, data.shape), data)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    data = write(path)
    with pytest.raises(ZeroDivisionError), atomic_h5_file(path, "corpus", 1) as file:
        file["data"] = data[:10]
        1 / 0  # noqa: B018
    with open_h5_file(path, "corpus", 1) as file:
        assert np.array_equal(file["data"][:], data)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from mmrec.errors import StorageError
from mmrec.checkpoint.hdf5 import atomic_h5_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        with atomic_h5_file(Path(sys.argv[1]), "corpus", 1) as file:
            file["data"] = np.random.default_rng(1).random(100_000)
            file.create_dataset("more", data=np.arange(100_000), chunks=True, compression="gzip")
    except StorageError as error:
        print("StorageError:", error)
"""


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """A process with a limit on the size of files fails at five different points of the file."""
    pytest.importorskip("resource")
    path = tmp_path / "a.h5"
    data = write(path)
    limits = ["0", "100", "4096", "300000", "850000"]
    command = [sys.executable, "-c", FULL_DISK, str(path), *limits]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    lines = process.stdout.splitlines()
    assert len(lines) == len(limits)
    assert all(line.startswith(f"StorageError: could not write {path}: ") for line in lines)
    with open_h5_file(path, "corpus", 1) as file:
        assert np.array_equal(file["data"][:], data)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file/a.h5: Not a directory"):
        write(tmp_path / "file" / "a.h5")


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    write(tmp_path / "good.h5", "corpus")
    write(tmp_path / "old.h5", "checkpoint")
    write(tmp_path / "newer.h5", "corpus", schema=9)
    (tmp_path / "empty.h5").touch()
    (tmp_path / "text.h5").write_text("hello")
    h5py.File(tmp_path / "other.h5", "w").close()
    write(tmp_path / "third.h5", "zoo")
    whole = (tmp_path / "good.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "seal.h5").write_bytes(b"mmrec sealed" + whole[12:500])
    for name, kind, error, message in [
        ("absent.h5", "corpus", InputError, "absent.h5: no such file"),
        (".", "corpus", InputError, "it is a folder"),
        ("empty.h5", "corpus", DamagedError, "is empty"),
        ("text.h5", "corpus", DamagedError, "is not an HDF5 file"),
        ("cut.h5", "corpus", DamagedError, "bytes long"),
        ("seal.h5", "corpus", DamagedError, "seal.h5"),
        ("good.h5", "checkpoint", InputError, "must be a checkpoint; it is a corpus"),
        ("third.h5", "corpus", InputError, "must be a corpus; it is not one of mmrec's files"),
        ("other.h5", "corpus", InputError, "has no seal"),
        ("newer.h5", "corpus", InputError, r"schema 9; this one reads up to 3"),
        ("good.h5", "corpus", InputError, r"schema 1; this one reads from 2 on.*prepare"),
        ("old.h5", "checkpoint", InputError, r"schema 1; this one reads from 2 on.*train"),
    ]:
        with (
            pytest.raises(InputError, match=message) as caught,
            open_h5_file(tmp_path / name, kind, 3, oldest=2),
        ):
            pass
        assert caught.type is error
        assert "\n" not in str(caught.value)


def test_what_is_missing_inside_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with (
        pytest.raises(InputError, match="a.h5 is not valid: absent is missing"),
        open_h5_file(tmp_path / "a.h5", "corpus", 1) as file,
    ):
        read_array(file, "absent", np.int64)


def test_a_small_disk_that_is_full(tmp_path: Path) -> None:
    """A real file system of 128 KiB: it is full in the middle of the file, then made larger."""
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
        with open_h5_file(disk / "a.h5", "corpus", 1) as file:
            assert read_json(file, "note")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- files that nobody should trust


def test_a_hundred_mutated_files(tmp_path: Path) -> None:
    """100 files of benchmarks/fuzz.py with another seed, in processes with limits."""
    pytest.importorskip("resource")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "fuzz.py"),
        "--files",
        "100",
        "--seed",
        "7",
        "--keep",
        str(tmp_path),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-2000:]


def test_the_fuzz_would_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed content that no check finds is reported as wrong content."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fuzz, mutations = (importlib.import_module(name) for name in ("fuzz", "mutations"))
    source = fuzz.originals(tmp_path, "the cat sat on the mat; " * 200)[0]
    expected, outcomes = fuzz.read(*source), Counter[str]()
    assert fuzz.judge(*source, False, expected) == ("identical content", "")
    changed = tmp_path / "changed.h5"
    for number in range(40):
        data = bytearray(source[1].read_bytes())
        mutations.flip_bits(data, random.Random(number))
        changed.write_bytes(data)
        assert fuzz.judge("corpus", changed, False, expected)[0] == "one clear error"
        mutations.reseal(changed)  # most are still found by the checksums within
        outcomes[fuzz.judge("corpus", changed, False, expected)[0]] += 1
    assert outcomes["one clear error"] > 30
    assert not outcomes["wrong content"]
    changed.write_bytes(source[1].read_bytes())
    with h5py.File(changed, "a") as file:  # forged consistently, but judged as not sealed again
        tokens = file["train/tokens"][()]
        tokens[0] = tokens[0] + 1
        del file["train/tokens"]
        write_array(file, "train/tokens", tokens)
    seal(changed)
    assert fuzz.judge("corpus", changed, False, expected)[0] == "wrong content"


def external(file: h5py.File, path: Path) -> None:
    file["data"] = h5py.ExternalLink(str(path), "/data")


def soft(file: h5py.File, path: Path) -> None:
    file["more"] = h5py.SoftLink("/data")


def cycle(file: h5py.File, path: Path) -> None:
    file["more"] = file["/"]


def virtual(file: h5py.File, path: Path) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(str(path), "data", (4,))
    file.create_virtual_dataset("data", layout)


def outside(file: h5py.File, path: Path) -> None:
    file.create_dataset("data", (8,), "u1", external=[(str(path), 0, 8)])


def text(file: h5py.File, path: Path) -> None:
    file.create_dataset("data", data=["a"], dtype=h5py.string_dtype())


def reference(file: h5py.File, path: Path) -> None:
    file.create_dataset("data", data=np.array([file.ref], h5py.ref_dtype), dtype=h5py.ref_dtype)


def declared_only(file: h5py.File, path: Path) -> None:
    file.create_dataset(
        "data", (1 << 50,), "f4", chunks=(1 << 20,), compression="gzip", shuffle=True
    )


def absent(file: h5py.File, path: Path) -> None:
    file.create_dataset("data", (1000,), "f4")


def bomb(file: h5py.File, path: Path) -> None:
    file.create_dataset("data", data=np.zeros(1 << 24, "f4"), compression="gzip", shuffle=True)


def other_filter(file: h5py.File, path: Path) -> None:
    file.create_dataset("data", data=np.zeros(1000, "f4"), compression="lzf")


def growing(file: h5py.File, path: Path) -> None:
    file.create_dataset("data", data=np.zeros(10, "f4"), chunks=(10,), maxshape=(None,))


def chunk(file: h5py.File, data: bytes, mask: int = 0) -> None:
    dataset = file.create_dataset(
        "data", (16384,), "u1", chunks=(16384,), compression="gzip", shuffle=True
    )
    dataset.attrs["crc32"] = np.uint32(0)
    dataset.id.write_direct_chunk((0,), data, mask)


def short_chunk(file: h5py.File, path: Path) -> None:
    chunk(file, zlib.compress(b"a"))


def endless_chunk(file: h5py.File, path: Path) -> None:
    chunk(file, zlib.compress(bytes(16384 + 10**7)))


def raw_chunk(file: h5py.File, path: Path) -> None:
    chunk(file, b"a" * 100, 2)


def broken_chunk(file: h5py.File, path: Path) -> None:
    chunk(file, b"not zlib")


def many(file: h5py.File, path: Path) -> None:
    for i in range(20_001):
        file.create_group(str(i))


def deep(file: h5py.File, path: Path) -> None:
    file.create_group("a/" * 2000)


def long_text(file: h5py.File, path: Path) -> None:
    file.attrs["kind"] = np.bytes_("x" * 1000)


def variable_text(file: h5py.File, path: Path) -> None:
    file.attrs["kind"] = "corpus"


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        (external, "'data' is a link to elsewhere"),
        (soft, "'more' is a link to elsewhere"),
        (cycle, "'more' is a second name of another object"),
        (virtual, "'data' is not stored as plain bytes inside the file"),
        (outside, "'data' is not stored as plain bytes inside the file"),
        (text, "'data' is not of a type that mmrec stores"),
        (reference, "'data' is not of a type that mmrec stores"),
        (declared_only, "'data' claims 4,503,599,627,370,496 bytes in a file of"),
        (absent, "'data' is not stored in full"),
        (bomb, "'data' claims 67,108,864 bytes in a file of"),
        (other_filter, "'data' is compressed in another way than by shuffle and gzip"),
        (growing, "'data' can grow"),
        (short_chunk, "'data' has a chunk that decompresses to another size"),
        (endless_chunk, "data is not what was stored: its checksum differs"),
        (raw_chunk, "'data' has a chunk that decompresses to another size"),
        (broken_chunk, "'data' does not decompress"),
        (many, "more than 20,000 objects"),
        (deep, "groups are nested deeper than 4"),
        (long_text, "the attribute kind must be one str"),
        (variable_text, "the attribute kind must be one str"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_each_trick_is_refused(
    tmp_path: Path, trick: Callable[[h5py.File, Path], None], message: str
) -> None:
    """In a file with a valid seal, before any array is read or allocated."""
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["data"] = np.arange(4, dtype="f4")
    path = tmp_path / "a.h5"
    with atomic_h5_file(path, "corpus", 1) as file:
        if trick in (soft, cycle):
            write_array(file, "data", np.arange(4, dtype="f4"))
        trick(file, other)
    with pytest.raises(InputError) as caught, open_h5_file(path, "corpus", 1) as file:
        read_array(file, "data", np.uint8)
    assert str(caught.value).startswith(f"corpus {path} is not valid: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_bit_counts(tmp_path: Path) -> None:
    """One changed bit is noticed, in the seal, in the first structures, or anywhere else."""
    path = tmp_path / "a.h5"
    with atomic_h5_file(path, "corpus", 1) as file:
        write_array(file, "data", np.arange(100_000).reshape(400, 250), compress=True)
    whole = path.read_bytes()
    with open_h5_file(path, "corpus", 1) as file:
        data = read_array(file, "data", np.int64, (400, 250))
    assert np.array_equal(data, np.arange(100_000).reshape(400, 250))
    rng = random.Random(0)
    for at in [*range(0, 700, 3), *(rng.randrange(len(whole)) for _ in range(100))]:
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DamagedError), open_h5_file(path, "corpus", 1):
            pass
    seal(path)
    path.write_bytes(whole + b"\0")
    with (
        pytest.raises(DamagedError, match="it was .* bytes long and is"),
        open_h5_file(path, "corpus", 1),
    ):
        pass
