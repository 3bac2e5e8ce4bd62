"""The record of a corpus's documents, by which a longer text is known again."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mmrec.checkpoint.hdf5 import (
    atomic_h5_file,
    open_h5_file,
    read_array,
    read_json,
    write_array,
    write_json,
)
from mmrec.errors import InputError

KIND, SCHEMA = "documents of a run", 1
DOCUMENTS_FILE = "documents.hdf5"
"""Its file in a run folder."""
ARRAYS = ("keys", "lengths", "cuts", "continues")


@dataclass(frozen=True)
class DocumentRecord:
    """The documents of a corpus, by which a longer text is known again.

    Attributes:
        keys: (documents,) uint64, the first eight bytes of the SHA-256 of each text.
        lengths: (documents,) int64, characters.
        cuts: (documents,) int64, where validation text begins, see ``SplitPlan``.
        continues: (documents,) int64, the document whose text goes on in this one, in one document
            of the source; -1 if there is none.
        val_documents: the first so many documents are validation text that was given.
        identity: what identifies the corpus, see ``Corpus.identity``.
        earlier: the identities of the texts to which this one was added, the oldest first.
    """

    keys: np.ndarray
    lengths: np.ndarray
    cuts: np.ndarray
    continues: np.ndarray
    val_documents: int
    identity: dict[str, Any] = field(default_factory=dict)
    earlier: list[dict[str, Any]] = field(default_factory=list)

    def write_arrays(self, file: h5py.File, group: str) -> None:
        """Store the arrays in a group of a file."""
        for name in ARRAYS:  # HDF5 files of mmrec hold no uint64
            write_array(file, f"{group}/{name}", getattr(self, name).view(np.int64))

    @classmethod
    def read_arrays(cls, file: h5py.File, group: str, **others: Any) -> "DocumentRecord":
        """Read what ``write_arrays`` stored.

        Args:
            file: open for reading.
            group: the group.
            others: the other attributes.
        """
        arrays = {name: read_array(file, f"{group}/{name}", np.int64) for name in ARRAYS}
        if len({len(array) for array in arrays.values()}) > 1:
            raise ValueError(f"the arrays of {group} differ in length")
        return cls(**(arrays | {"keys": arrays["keys"].view(np.uint64)} | others))

    def save(self, path: Path) -> None:
        """Write the record into a file of its own, unless it holds the same.

        Raises:
            StorageError: it could not be written.
        """
        info = {n: getattr(self, n) for n in ("val_documents", "identity", "earlier")}
        with contextlib.suppress(InputError), open_h5_file(path, KIND, SCHEMA, SCHEMA) as file:
            if read_json(file, "info") == info:
                return
        with atomic_h5_file(path, KIND, SCHEMA) as file:
            self.write_arrays(file, "documents")
            write_json(file, "info", info)

    @classmethod
    def load(cls, path: Path) -> "DocumentRecord":
        """Read what ``save`` wrote.

        Raises:
            InputError: the file is missing or damaged.
        """
        with open_h5_file(path, KIND, SCHEMA, SCHEMA) as file:
            return cls.read_arrays(file, "documents", **read_json(file, "info"))
