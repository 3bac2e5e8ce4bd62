"""How the C library treats freed memory.

Every function here does nothing where the library has no such call: on Windows, macOS and musl.
"""

import contextlib
import ctypes

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8


def _call_libc(name: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no such call, or no glibc
        getattr(ctypes.CDLL(None), name)(*arguments)


def keep_freed_memory() -> None:
    """Keep freed blocks of up to 32 MiB in the process, and use one heap for all threads.

    Training frees and requests the same tens of megabytes at each step. By default glibc returns
    them to the system, and each page must be faulted in again: 12,000 page faults per step of the
    preset tiny, a tenth of its time. With one heap, one thread can reuse what another one freed.
    """
    _call_libc("mallopt", M_TRIM_THRESHOLD, 1 << 30)
    _call_libc("mallopt", M_MMAP_THRESHOLD, 1 << 25)
    _call_libc("mallopt", M_ARENA_MAX, 1)


def return_large_blocks() -> None:
    """Return freed blocks of 1 MiB and more to the system at once.

    glibc cannot reuse a freed aligned block for an equal request, so the heap fragments. With
    activation checkpointing the fragments took as much memory as the live blocks. Without them a
    step takes up to a tenth longer.
    """
    _call_libc("mallopt", M_MMAP_THRESHOLD, 1 << 20)


def trim() -> None:
    """Return unused memory to the system.

    Small blocks that outlive large ones fragment the heap. A process that trained one run after
    another grew by 366 MB per hour, none of which was in use.
    """
    _call_libc("malloc_trim", 0)
