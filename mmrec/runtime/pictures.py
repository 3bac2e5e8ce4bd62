"""Pictures in which names that users choose are drawn as they are."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrec.config import VERSION
from mmrec.errors import StorageError
from mmrec.runtime.atomic import atomic_path
from mmrec.runtime.names import printable, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METADATA = {"Software": f"mmrec {VERSION}"}
"""What every picture of mmrec says about itself."""
LABEL_CHARS = 48
"""Longest title, or entry of a legend, in characters."""


@contextlib.contextmanager
def picture(path: Path, width: float, height: float = 4.2) -> Iterator["Figure"]:
    """Provide a figure, and write it as a PNG when the block ends.

    Text is drawn as it is: ``$`` begins no formula, and nothing is sent through TeX. A character
    that no font has is drawn as a box, without a warning.

    Args:
        path: the file.
        width, height: size in inches.

    Raises:
        StorageError: the picture could not be drawn or written, for whatever reason.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure

        plain: Any = {"text.usetex": False, "text.parse_math": False}
        with matplotlib.rc_context(plain), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
            yield figure
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format="png", metadata=METADATA)
    except StorageError:
        raise
    except Exception as error:  # of matplotlib, of its fonts and settings, or of the block
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"could not draw {printable(path)}: {reason[:200]}") from error


def legend_label(path: str | Path) -> str:
    """The entry of a legend that names a path. One that began with ``_`` would be left out."""
    label = shorten(path, LABEL_CHARS)
    return f"./{label}" if label.startswith("_") else label
