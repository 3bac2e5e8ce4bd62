"""Progress bars on standard error. They appear once a stage has taken two seconds."""

import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

DELAY_SECONDS = 2.0

_hidden = ContextVar("_hidden", default=False)


@contextlib.contextmanager
def hide_progress_bars(hidden: bool = True) -> Iterator[None]:
    """Show none of the bars that ``progress_bar`` makes in the block.

    Args:
        hidden: False changes nothing.
    """
    token = _hidden.set(hidden or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


def progress_bar(total: int | None, stage: str, unit: str = "B") -> Any:
    """Return a tqdm bar that vanishes in the end.

    Args:
        total: units to do; None if that is not known.
        stage: what the bar is called.
        unit: what is counted, by default bytes.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=stage,
        unit=unit,
        unit_scale=True,
        leave=False,
        delay=DELAY_SECONDS,
        mininterval=0.5 if os.isatty(2) else 30.0,
        dynamic_ncols=True,
        disable=_hidden.get(),
    )


@contextlib.contextmanager
def ticking_bar(stage: str) -> Iterator[Any]:
    """Show a bar whose clock goes on during a library call that reports no progress of its own.

    Args:
        stage: what the bar is called.

    Yields:
        A tqdm bar that counts bytes.
    """
    ended = threading.Event()
    with progress_bar(None, stage) as bar:
        bar.dynamic_miniters, bar.miniters = False, 0  # an update of 0 draws the clock

        def tick() -> None:
            while not ended.wait(bar.mininterval):
                bar.update(0)

        thread = threading.Thread(target=tick, name="mmrec-progress", daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            ended.set()
            thread.join()
