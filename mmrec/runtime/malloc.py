"""What the C library does with freed memory, where it can be told (glibc)."""

import contextlib
import ctypes


def _call(name: str, *numbers: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        getattr(ctypes.CDLL(None), name)(*numbers)


def keep_freed() -> None:
    """Keep freed blocks of up to 32 MiB in the process.

    Training frees and asks for the same tens of megabytes at each step. By default they go back to
    the system and their pages are faulted in again: 12,000 faults a step of tiny, a tenth of its
    time. One heap serves all threads, so that one's holes are another's blocks.
    """
    _call("mallopt", -1, 1 << 30)  # M_TRIM_THRESHOLD: the top of the heap stays
    _call("mallopt", -3, 1 << 25)  # M_MMAP_THRESHOLD
    _call("mallopt", -8, 1)  # M_ARENA_MAX


def leave_no_holes() -> None:
    """Give freed blocks of 1 MiB and more back at once.

    A heap has holes, since an aligned block does not fit where an equal one was. They took as much
    again as what lived, where layers are run again in backward; without them a step takes longer,
    by a tenth there.
    """
    _call("mallopt", -3, 1 << 20)


def give_back() -> None:
    """Return freed memory to the system.

    Small blocks that outlive large ones cut up the heap: in a process that trains run after run it
    grew by 366 MB an hour, of which none was in use.
    """
    _call("malloc_trim", 0)
