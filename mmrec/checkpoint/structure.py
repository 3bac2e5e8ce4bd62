"""What an HDF5 file of ours may hold. Everything is looked at before anything is read.

HDF5 can name other files (external and soft links, virtual datasets, external storage), run
filters that load code, refer to objects, and claim any size. None of that is ever written by
mmrec, so all of it is refused: a file holds groups and plain arrays of numbers, each stored whole
inside it, and reading it all takes at most MAX_RATIO times its own size.
"""

import itertools
import math
import zlib
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t, h5z

MAX_OBJECTS = 20_000  # a 7b checkpoint has about a thousand
MAX_DEPTH = 4
MAX_NAME = 256
MAX_RATIO, SPARE = 32, 1 << 20
"""All arrays together may take this many times the size of the file, and a megabyte more."""
DTYPES = tuple(map(np.dtype, ("<u1", "<u2", "<u4", "<i8", "<f4")))
FILTERS = [h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE]
TEXT = 64  # bytes of the longest text attribute


def check_structure(file: h5py.File, size: int) -> None:
    """Refuse a file that holds anything but groups and plain arrays that fit its ``size`` in bytes.

    Raises ValueError, saying what was found.
    """
    seen: set[Any] = set()
    claimed = 0

    def visit(group: h5g.GroupID, where: str, depth: int) -> None:
        nonlocal claimed
        if depth > MAX_DEPTH:
            raise ValueError(f"groups are nested deeper than {MAX_DEPTH}")
        for name in _names(group, MAX_OBJECTS - len(seen)):
            label = f"{where}{name.decode('utf-8', 'backslashreplace')}"
            if group.links.get_info(name).type != h5l.TYPE_HARD:
                raise ValueError(f"{label!r} is a link to elsewhere")
            found = h5o.open(group, name)
            address = h5o.get_info(found).addr
            if address in seen:
                raise ValueError(f"{label!r} is a second name of another object")
            seen.add(address)
            if isinstance(found, h5g.GroupID):
                visit(found, f"{label}/", depth + 1)
            elif isinstance(found, h5d.DatasetID):
                claimed += _check_array(found, repr(label), size)
                if claimed > MAX_RATIO * size + SPARE:
                    raise ValueError(
                        f"its arrays claim {claimed:,} bytes; a file of {size:,} may hold at most "
                        f"{MAX_RATIO} times its size"
                    )
            else:
                raise ValueError(f"{label!r} is neither a group nor an array")

    root = h5g.open(file.id, b"/")
    seen.add(h5o.get_info(root).addr)
    visit(root, "", 1)


def _names(group: h5g.GroupID, limit: int) -> list[bytes]:
    names: list[bytes] = []

    def take(name: bytes) -> bool | None:
        names.append(name)
        return True if len(names) > limit or len(name) > MAX_NAME else None

    group.links.iterate(take)
    if len(names) > limit or len(names[-1:] or b"") > MAX_NAME:
        raise ValueError(f"it holds more than {MAX_OBJECTS:,} objects, or a name too long")
    return names


def _check_array(array: h5d.DatasetID, label: str, size: int) -> int:
    """Check one dataset; return the bytes that reading it takes."""
    kind, space, how = array.get_type(), array.get_space(), array.get_create_plist()
    if not isinstance(kind, h5t.TypeIntegerID | h5t.TypeFloatID) or kind.dtype not in DTYPES:
        raise ValueError(f"{label} is not of a type that mmrec stores")
    if space.get_simple_extent_type() != h5s.SIMPLE or space.get_simple_extent_ndims() > 4:
        raise ValueError(f"{label} is not an array of up to 4 axes")
    shape = space.get_simple_extent_dims()
    if shape != space.get_simple_extent_dims(True):
        raise ValueError(f"{label} can grow")
    layout, item = how.get_layout(), kind.get_size()
    if layout not in (h5d.CONTIGUOUS, h5d.CHUNKED) or how.get_external_count():
        raise ValueError(f"{label} is not stored as plain bytes inside the file")
    used = [how.get_filter(i)[0] for i in range(how.get_nfilters())]
    if used != (FILTERS if layout == h5d.CHUNKED else []):
        raise ValueError(f"{label} is packed in another way than by shuffle and gzip")
    total = math.prod(shape) * item
    if total > MAX_RATIO * size + SPARE:
        raise ValueError(f"{label} claims {total:,} bytes in a file of {size:,}")
    if layout == h5d.CHUNKED:
        _check_chunks(array, label, shape, how.get_chunk(), item)
    elif total and array.get_storage_size() != total:
        raise ValueError(f"{label} is not stored in full")
    return total


def _check_chunks(
    array: h5d.DatasetID, label: str, shape: tuple[int, ...], chunk: tuple[int, ...], item: int
) -> None:
    """Every chunk must be there, and packed into no more than it holds."""
    whole, sizes = math.prod(chunk) * item, []
    if any(c > n for c, n in zip(chunk, shape, strict=True)):
        raise ValueError(f"{label} has chunks of {chunk}, larger than itself")
    array.chunk_iter(lambda info: sizes.append(info.size))
    if max(sizes, default=0) > whole + 1024:
        raise ValueError(f"{label} has a chunk that is larger packed than unpacked")
    if len(sizes) != math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True)):
        raise ValueError(f"{label} is not stored in full")


def read_whole(array: h5py.Dataset) -> np.ndarray:
    """Read an array whose structure was checked.

    Chunks are unpacked here, because HDF5 unpacks one to any size, and one that unpacks to less
    than its size is filled up with whatever lay in memory. Raises ValueError at such a chunk.
    """
    if array.chunks is None:
        return np.asarray(array[()])
    made = np.empty(array.shape, array.dtype)
    chunk, item = array.chunks, array.dtype.itemsize
    whole = math.prod(chunk) * item
    starts = (range(0, n, c) for n, c in zip(array.shape, chunk, strict=True))
    for start in itertools.product(*starts):
        mask, data = array.id.read_direct_chunk(start)
        if not mask & 2:  # HDF5 leaves gzip out where it would not help
            try:
                data = zlib.decompressobj().decompress(data, whole)
            except zlib.error as error:
                raise ValueError(f"{array.name[1:]!r} does not unpack: {error}") from None
        if len(data) != whole or mask & ~2:
            raise ValueError(f"{array.name[1:]!r} has a chunk that unpacks to another size")
        shuffled = np.frombuffer(data, np.uint8).reshape(item, -1)
        piece = np.ascontiguousarray(shuffled.T).view(array.dtype).reshape(chunk)
        where = tuple(slice(s, s + c) for s, c in zip(start, chunk, strict=True))
        into = made[where]
        into[...] = piece[tuple(slice(n) for n in into.shape)]
    return made


def attribute(owner: h5py.HLObject, name: str, kind: type) -> Any:
    """A whole number or a short text stored with a file or an array.

    Raises KeyError if there is none, ValueError if it is of another type or long.
    """
    if not h5a.exists(owner.id, name.encode()):
        raise KeyError(f"the attribute {name} is missing")
    found = h5a.open(owner.id, name.encode())
    stored, scalar = found.get_type(), found.get_space().get_simple_extent_type() == h5s.SCALAR
    if kind is int:
        good = isinstance(stored, h5t.TypeIntegerID) and stored.get_size() <= 8
    else:
        good = isinstance(stored, h5t.TypeStringID) and not stored.is_variable_str()
        good = good and stored.get_size() <= TEXT
    if not (good and scalar):
        raise ValueError(f"the attribute {name} must be one {kind.__name__}")
    value = np.zeros((), stored.dtype)
    found.read(value)
    return int(value) if kind is int else value.item().decode("ascii", "replace")
