"""Files that nobody should trust: hundreds of mutated ones, and each trick by its name."""

import importlib
import random
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mmrec.checkpoint.hdf5 import (
    atomic_write,
    open_file,
    read_array,
    seal,
    write_array,
)
from mmrec.errors import DamagedError, InputError
from tests.conftest import ROOT


def test_hundreds_of_mutated_files(tmp_path: Path) -> None:
    """The first 300 files of benchmarks/fuzz.py with another seed, in processes with limits."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "fuzz.py"),
        "--files",
        "300",
        "--seed",
        "7",
        "--keep",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]


def test_the_fuzz_would_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it calls wrong content is found where there is some."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fuzz, mutations = (importlib.import_module(name) for name in ("fuzz", "mutations"))
    source = fuzz.originals(tmp_path, "the cat sat on the mat; " * 200)[0]
    want, seen = fuzz.read(*source), Counter[str]()
    assert fuzz.judge(*source, False, want) == ("identical content", "")
    changed = tmp_path / "changed.h5"
    for number in range(40):
        data = bytearray(source[1].read_bytes())
        mutations.flip_bits(data, random.Random(number))
        changed.write_bytes(data)
        assert fuzz.judge("corpus", changed, False, want)[0] == "one clear error"
        mutations.reseal(changed)  # most are still found by the checksums within
        seen[fuzz.judge("corpus", changed, False, want)[0]] += 1
    assert seen["one clear error"] > 30
    assert not seen["wrong content"]
    changed.write_bytes(source[1].read_bytes())
    with h5py.File(changed, "a") as file:  # forged throughout, but judged as if it were not
        tokens = file["train/tokens"][()]
        tokens[0] = tokens[0] + 1
        del file["train/tokens"]
        write_array(file, "train/tokens", tokens)
    seal(changed)
    assert fuzz.judge("corpus", changed, False, want)[0] == "wrong content"


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


def promised(file: h5py.File, path: Path) -> None:
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
    made = file.create_dataset(
        "data", (16384,), "u1", chunks=(16384,), compression="gzip", shuffle=True
    )
    made.attrs["crc32"] = np.uint32(0)
    made.id.write_direct_chunk((0,), data, mask)


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
        (promised, "'data' claims 4,503,599,627,370,496 bytes in a file of"),
        (absent, "'data' is not stored in full"),
        (bomb, "'data' claims 67,108,864 bytes in a file of"),
        (other_filter, "'data' is packed in another way than by shuffle and gzip"),
        (growing, "'data' can grow"),
        (short_chunk, "'data' has a chunk that unpacks to another size"),
        (endless_chunk, "data is not what was stored: its checksum differs"),
        (raw_chunk, "'data' has a chunk that unpacks to another size"),
        (broken_chunk, "'data' does not unpack"),
        (many, "more than 20,000 objects"),
        (deep, "groups are nested deeper than 4"),
        (long_text, "the attribute kind must be one str"),
        (variable_text, "the attribute kind must be one str"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_each_trick_is_refused(tmp_path: Path, trick: Any, message: str) -> None:
    """In a file with the right seal, before anything is read or allocated."""
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["data"] = np.arange(4, dtype="f4")
    path = tmp_path / "a.h5"
    with atomic_write(path, "corpus", 1) as file:
        if trick in (soft, cycle):
            write_array(file, "data", np.arange(4, dtype="f4"))
        trick(file, other)
    with pytest.raises(InputError) as caught, open_file(path, "corpus", 1) as file:
        read_array(file, "data", np.uint8)
    assert str(caught.value).startswith(f"corpus {path} is not valid: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_bit_counts(tmp_path: Path) -> None:
    """One bit changed in any byte of the seal, or in any of the first structures, is noticed."""
    path = tmp_path / "a.h5"
    with atomic_write(path, "corpus", 1) as file:
        write_array(file, "data", np.arange(100_000).reshape(400, 250), pack=True)
    whole = path.read_bytes()
    with open_file(path, "corpus", 1) as file:
        data = read_array(file, "data", np.int64, (400, 250))
    assert np.array_equal(data, np.arange(100_000).reshape(400, 250))
    rng = random.Random(0)
    for at in [*range(0, 700, 3), *(rng.randrange(len(whole)) for _ in range(100))]:
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DamagedError), open_file(path, "corpus", 1):
            pass
    seal(path)
    path.write_bytes(whole + b"\0")
    with (
        pytest.raises(DamagedError, match="it was .* bytes long and is"),
        open_file(path, "corpus", 1),
    ):
        pass
