"""Pictures in which names that users choose are drawn as they are."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
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
BLACK = "#010203"
"""What is drawn in this colour in a page has the colour of its text."""
BLACK_PARTS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
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
    with _figure(printable(path), width, height) as figure:
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata=METADATA)


def svg(draw: Callable[["Figure"], object], width: float, height: float) -> str:
    """Return a picture as an ``<svg>`` element for an HTML page.

    Lines and letters that matplotlib draws in black have the colour of the page's text.

    Args:
        draw: draws into the figure that it is given.
        width, height: size in inches.

    Raises:
        StorageError: the picture could not be drawn.
    """
    # letters stay letters, and the names of parts are the same each time
    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "mmrec"}
    settings |= dict.fromkeys(BLACK_PARTS, BLACK)
    with _figure("the picture", width, height, **settings) as figure:
        draw(figure)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    return text[text.index("<svg") :].replace(BLACK, "currentColor")


@contextlib.contextmanager
def _figure(name: str, width: float, height: float, **settings: Any) -> Iterator["Figure"]:
    """Provide a figure in which text is drawn as it is.

    Args:
        name: what an error calls the picture.
        width, height: size in inches.
        settings: further settings of matplotlib.

    Raises:
        StorageError: the picture could not be drawn or written, for whatever reason.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure

        plain: Any = {"text.usetex": False, "text.parse_math": False} | settings
        with matplotlib.rc_context(plain), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield Figure(figsize=(width, height), dpi=120, layout="constrained")
    except StorageError:
        raise
    except Exception as error:  # of matplotlib, of its fonts and settings, or of the block
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"could not draw {name}: {reason[:200]}") from error


def legend_label(path: str | Path) -> str:
    """The entry of a legend that names a path. One that began with ``_`` would be left out."""
    label = shorten(path, LABEL_CHARS)
    return f"./{label}" if label.startswith("_") else label
