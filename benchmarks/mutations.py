"""Mutations of files for fuzz.py: of bytes, as disks and programs cause them, or through HDF5."""

import json
import random
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

# ---- mutations of bytes


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_structure(data: bytearray, rng: random.Random) -> None:
    """Change bytes near HDF5's own structures, which begin with four capital letters."""
    marks = [b"OHDR", b"FRHP", b"FHDB", b"BTHD", b"FAHD", b"FADB", b"OCHK", b"\x89HDF", b"BTLF"]
    at = [found.start() for found in re.finditer(b"|".join(marks), data)] or [0]
    for _ in range(rng.choice((1, 1, 2, 4))):
        where = rng.choice(at) + rng.randrange(120)
        if where < len(data):
            data[where] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, data[where] ^ 1 << rng.randrange(8)))


def fix_checksums(data: bytearray, rng: random.Random) -> None:
    """Break a structure of HDF5, and correct its own checksum."""
    heads = [found.start() for found in re.finditer(b"OHDR", data)]
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice(heads)
        flags = data[at + 5]
        width = 1 << (flags & 3)
        body = at + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        size = int.from_bytes(data[body : body + width], "little")
        end = body + width + size
        if end + 4 > len(data) or size == 0:
            continue
        where = rng.randrange(body + width, end)
        data[where] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, data[where] ^ 1 << rng.randrange(8)))
        data[end : end + 4] = lookup3(bytes(data[at:end])).to_bytes(4, "little")


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def extend(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.choice((1, 512, 4096)))


def zero(data: bytearray, rng: random.Random) -> None:
    at, size = rng.randrange(len(data)), rng.choice((1, 16, 512, 4096))
    data[at : at + size] = bytes(min(size, len(data) - at))


def noise(data: bytearray, rng: random.Random) -> None:
    at, size = rng.randrange(len(data)), rng.choice((4, 16, 512, 4096))
    size = min(size, len(data) - at)
    data[at : at + size] = rng.randbytes(size)


def swap_blocks(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((8, 512, 4096))
    if len(data) > 2 * size:
        a, b = (rng.randrange(len(data) // size) * size for _ in range(2))
        one, two = data[a : a + size], data[b : b + size]
        if len(one) == len(two):
            data[a : a + size], data[b : b + size] = two, one


BYTES = (flip_bits, flip_structure, fix_checksums, truncate, extend, zero, noise, swap_blocks)


def lookup3(key: bytes) -> int:
    """Bob Jenkins's hash, the checksum of HDF5's structures."""
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(key)) & mask

    def rot(x: int, k: int) -> int:
        return (x << k | x >> (32 - k)) & mask

    words = [int.from_bytes(key[i : i + 4], "little") for i in range(0, len(key), 4)]
    while len(words) > 3:
        a, b, c = (a + words[0]) & mask, (b + words[1]) & mask, (c + words[2]) & mask
        del words[:3]
        a = (a - c & mask) ^ rot(c, 4)
        c = c + b & mask
        b = (b - a & mask) ^ rot(a, 6)
        a = a + c & mask
        c = (c - b & mask) ^ rot(b, 8)
        b = b + a & mask
        a = (a - c & mask) ^ rot(c, 16)
        c = c + b & mask
        b = (b - a & mask) ^ rot(a, 19)
        a = a + c & mask
        c = (c - b & mask) ^ rot(b, 4)
        b = b + a & mask
    if not words:
        return c
    words += [0] * (3 - len(words))
    a, b, c = (a + words[0]) & mask, (b + words[1]) & mask, (c + words[2]) & mask
    c = (c ^ b) - rot(b, 14) & mask
    a = (a ^ c) - rot(c, 11) & mask
    b = (b ^ a) - rot(a, 25) & mask
    c = (c ^ b) - rot(b, 16) & mask
    a = (a ^ c) - rot(c, 4) & mask
    b = (b ^ a) - rot(a, 14) & mask
    return (c ^ b) - rot(b, 24) & mask


# ---- mutations through HDF5


def arrays(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda n, x: names.append(n) if isinstance(x, h5py.Dataset) else None)
    return names


def change_json(file: h5py.File, rng: random.Random) -> None:
    """Store other values, types and sizes in one of the JSON values."""
    from mmrec.checkpoint.hdf5 import write_json

    name = rng.choice(
        [n for n in ("config", "tokenizer", "metadata", "lora", "progress") if n in file]
    )
    value: Any = json.loads(bytes(file[name][:]))
    odd: list[Any] = [
        None,
        -1,
        0,
        10**9,
        2**62,
        10**30,
        1e308,
        float("nan"),
        "",
        [],
        {},
        "x" * 5000,
        True,
        [[[]]],
        {"a": {"b": 1}},
        "\ud800",
        "../../etc/passwd",
    ]
    if name == "tokenizer" and rng.random() < 0.7:
        words = rng.choice((["a"], [], ["<|endoftext|>"], [1, 2], ["<|endoftext|>", "a", "a"]))
        merges = rng.choice(([["a", "b"]], [[]], [["a"]], "x", [[1, 2]]))
        inner = json.dumps({"tokens": words, "merges": merges})
        vocabulary = rng.choice((inner, "[" * 100_000, "aa", "{}", "\ud800"))
        value = {"kind": rng.choice(("bpe", "char", "byte", "zip")), "vocabulary": vocabulary}
    elif rng.random() < 0.1:
        value = rng.choice(odd)
    else:
        value[rng.choice([*value, "extra"])] = rng.choice(odd)
    del file[name]
    if isinstance(value, str) or "\ud800" in json.dumps(value, ensure_ascii=False):
        store(file, name, np.frombuffer(json.dumps(value).encode(), np.uint8))
    else:
        write_json(file, name, value)


def store(file: h5py.File, name: str, data: np.ndarray, **options: Any) -> None:
    """Store an array with its checksum."""
    dataset = file.create_dataset(name, data=data, **options)
    dataset.attrs["crc32"] = np.uint32(zlib.crc32(np.ascontiguousarray(data).data))


def change_array(file: h5py.File, rng: random.Random) -> None:
    """Change type, shape, layout or filter of an array, replace it by a group, or remove it."""
    name = rng.choice(arrays(file))
    data = file[name][()]
    del file[name]
    choice = rng.randrange(16)
    if choice == 0:
        return
    if choice == 1:
        file.create_group(name)
    elif choice == 2:
        store(file, name, data.astype(rng.choice(("f8", "f2", ">f4", "i1", "u8", "c8", "?"))))
    elif choice == 3:
        store(file, name, data.reshape(-1)[: data.size // 2])
    elif choice == 4:
        store(file, name, data[None])
    elif choice == 5:  # declared and not stored
        huge = rng.choice(((1 << 40,), (1 << 20, 1 << 20), (1 << 30, 4)))
        file.create_dataset(name, huge, data.dtype, chunks=tuple(min(n, 4096) for n in huge))
    elif choice == 6:
        file.create_dataset(name, data.shape, data.dtype)
    elif choice == 7:  # a small file that decompresses to a large array
        store(file, name, np.zeros(1 << 26, data.dtype), compression="gzip", shuffle=True)
    elif choice == 8 and data.size:
        shape = data.shape
        dataset = file.create_dataset(
            name, shape, data.dtype, chunks=shape, compression="gzip", shuffle=True
        )
        dataset.attrs["crc32"] = np.uint32(0)
        short = zlib.compress(bytes(rng.choice((0, 1, 100, 1 << 26))))
        dataset.id.write_direct_chunk((0,) * data.ndim, short, rng.choice((0, 1, 2, 3)))
    elif choice == 9:
        store(file, name, data.reshape(-1), chunks=(max(1, data.size),), maxshape=(None,))
    elif choice == 10 and data.size:
        filters = [{"compression": "lzf"}, {"fletcher32": True}, {"scaleoffset": 0}]
        store(file, name, data.reshape(-1).astype("i8"), chunks=True, **rng.choice(filters))
    elif choice == 11:
        file.create_dataset(name, data=["a", "b"], dtype=h5py.string_dtype())
    elif choice == 12:
        file.create_dataset(name, data=np.array([file.ref], h5py.ref_dtype), dtype=h5py.ref_dtype)
    elif choice == 13:
        file.create_dataset(name, data=np.zeros(3, [("a", "f4"), ("b", "i8")]))
    elif choice == 14:
        file[name] = np.dtype("f4")  # a named type
    else:
        file.create_dataset(name, data=h5py.Empty("f4"))


def change_links(file: h5py.File, rng: random.Random) -> None:
    """Add links to other files and to existing objects."""
    name = rng.choice([*arrays(file), "extra"])
    target = rng.choice(arrays(file))
    data = file[name][()] if name in file else np.zeros(4, "f4")
    if name in file and name != target:
        del file[name]
    elif name in file:
        name = "more"
    choice = rng.randrange(7)
    if choice == 0:
        file[name] = h5py.ExternalLink("/etc/hostname", "/x")
    elif choice == 1:
        file[name] = h5py.ExternalLink(file.filename, f"/{target}")
    elif choice == 2:
        file[name] = h5py.SoftLink(rng.choice((f"/{target}", "/", "/nowhere", f"/{name}")))
    elif choice == 3:
        file[name] = file[target]
    elif choice == 4:
        file[name] = file["/"]
    elif choice == 5:
        layout = h5py.VirtualLayout(data.shape or (1,), data.dtype)
        layout[...] = h5py.VirtualSource("other.h5", "x", data.shape or (1,))
        file.create_virtual_dataset(name, layout)
    else:
        size = max(1, data.nbytes)
        file.create_dataset(name, (size,), "u1", external=[("/etc/passwd", 0, size)])


def change_attributes(file: h5py.File, rng: random.Random) -> None:
    """Change the type, size or value of an attribute, or remove it."""
    owner = file if rng.random() < 0.7 else file[rng.choice(arrays(file))]
    name = rng.choice(("kind", "schema", "step", "mmrec_version", "crc32", "extra"))
    odd: list[Any] = [
        "text",
        b"bytes",
        -1,
        2**63 - 1,
        3.5,
        float("nan"),
        np.arange(5),
        h5py.Empty("f4"),
        "x" * 60_000,
        np.zeros(8000),
        file.ref,
        [b"a", b"b"],
    ]
    if rng.random() < 0.2:
        owner.attrs.pop(name, None)
    else:
        owner.attrs[name] = rng.choice(odd)


def change_values(file: h5py.File, rng: random.Random) -> None:
    """Store an absurd number with the right checksum."""
    name = rng.choice(arrays(file))
    data = file[name][()]
    if data.size:
        flat = data.reshape(-1)
        top = np.finfo(data.dtype).max if data.dtype.kind == "f" else np.iinfo(data.dtype).max
        flat[rng.randrange(data.size)] = rng.choice((0, top, data.flat[0]))
    options = {"compression": "gzip", "shuffle": True} if file[name].chunks else {}
    chunks = file[name].chunks
    del file[name]
    store(file, name, data, chunks=chunks, **options)


def nest(file: h5py.File, rng: random.Random) -> None:
    """Add deeply nested groups, or very many of them."""
    group = file
    if rng.random() < 0.7:
        for _ in range(rng.choice((3, 10, 300))):
            group = group.create_group("deep")
    else:
        for i in range(rng.choice((100, 25_000))):
            group.create_group(f"many{i}")


THROUGH_HDF5 = (change_json, change_array, change_links, change_attributes, change_values, nest)


def reseal(path: Path) -> None:
    from mmrec.checkpoint.hdf5 import SEAL_BYTES, seal

    if path.stat().st_size > SEAL_BYTES:
        seal(path)


def mutate(source: Path, target: Path, rng: random.Random) -> tuple[str, bool]:
    """Write a changed copy.

    Returns:
        The name of the mutation, and whether the file was sealed again.
    """
    shutil.copyfile(source, target)
    if rng.random() < 0.45:
        change = rng.choice(THROUGH_HDF5)
        with h5py.File(target, "a", libver=("v110", "v110")) as file:
            change(file, rng)
        reseal(target)
        return change.__name__, True
    data = bytearray(source.read_bytes())
    byte_change = rng.choice(BYTES)
    sealed = rng.random() < 0.5
    if sealed:  # mutate only what lies behind the seal
        old_seal, data = data[:512], data[512:]
        byte_change(data, rng)
        target.write_bytes(old_seal + data)
        reseal(target)
    else:
        byte_change(data, rng)
        target.write_bytes(data)
    return byte_change.__name__ + (" (sealed)" if sealed else ""), sealed
