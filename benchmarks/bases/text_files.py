"""The texts of the pretrained models as JSON lines, written completely or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

from mmrec.data.sources import iter_documents

SPLITS = ("train", "held-out")


class OutputFiles:
    """``train.jsonl`` and ``held-out.jsonl`` of a folder, replaced when the block ends well."""

    def __init__(self, out: Path) -> None:
        """Begin both files beside their places; the folder is made if it is not there."""
        out.mkdir(parents=True, exist_ok=True)
        self._paths = {split: out / f"{split}.jsonl" for split in SPLITS}
        self._files: dict[str, TextIO] = {}
        self.counts = {split: [0, 0] for split in SPLITS}
        """Documents and bytes of text of each file."""

    def __enter__(self) -> "OutputFiles":
        for split, path in self._paths.items():
            self._files[split] = path.with_suffix(".part").open("w", encoding="utf-8", newline="\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for split, file in self._files.items():
            file.close()
            if kind is None:
                Path(file.name).replace(self._paths[split])

    def write(self, split: str, name: str, text: str) -> int:
        """Write a document of a split; return its bytes in UTF-8."""
        self._files[split].write(json.dumps({"text": text, "name": name}, ensure_ascii=False))
        self._files[split].write("\n")
        size = len(text.encode())
        self.counts[split][0] += 1
        self.counts[split][1] += size
        return size


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a text file or of a file of JSON lines, each as a whole."""
    parts: list[str] = []
    for piece in iter_documents(str(path)):  # a long document comes in pieces
        parts.append(piece.text)
        if not piece.more:
            yield "".join(parts)
            parts = []
