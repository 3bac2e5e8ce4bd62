"""The weights of a checkpoint: as float32, or in a quarter of the bytes as int8 with row scales."""

import h5py
import numpy as np

from mmrec.checkpoint.hdf5 import read_array, write_array

COMPACT_COLUMNS = 16
"""Matrices with shorter rows stay float32: they are small, and a scale per row would not pay."""
INT8_MAX = 127


def is_compact(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is held as int8 in a compact checkpoint."""
    return len(shape) == 2 and shape[1] >= COMPACT_COLUMNS and shape[0] >= COMPACT_COLUMNS


def write_weight(file: h5py.File, name: str, values: np.ndarray, *, compact: bool = False) -> None:
    """Store the weight ``model/NAME``.

    Args:
        file: Open for writing.
        name: The parameter's name in ``mmrec.model.Model``.
        values: float32.
        compact: Store a matrix (rows, columns) as the int8 array ``model/NAME`` and the float32
            array ``scales/NAME`` (rows,). A value is the product of both, with an error of at most
            half a scale, which is the largest magnitude of its row over 127.
    """
    if compact and is_compact(values.shape):
        scales = (np.abs(values).max(axis=1) / INT8_MAX).astype(np.float32)
        steps = np.where(scales > 0, scales, 1)[:, None]
        write_array(file, f"scales/{name}", scales, compress=True)
        values = np.rint(values / steps).astype(np.int8)
    write_array(file, f"model/{name}", values, compress=True)


def read_weight(file: h5py.File, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read what ``write_weight`` stored, as float32.

    Args:
        file: Open for reading.
        name: The parameter's name.
        shape: What it must have.

    Raises:
        KeyError: There is no such weight.
        ValueError: The shape differs, or the bytes are not those that were stored.
    """
    if f"scales/{name}" not in file:
        return read_array(file, f"model/{name}", np.float32, shape)
    if not is_compact(shape):
        raise ValueError(f"scales/{name} belong to a weight of shape {shape}, which has none")
    scales = read_array(file, f"scales/{name}", np.float32, shape[:1])
    if not np.isfinite(scales).all():
        raise ValueError(f"scales/{name} must be finite")
    return read_array(file, f"model/{name}", np.int8, shape) * scales[:, None]
