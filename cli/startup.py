"""What a process must be told before torch and Numba are loaded, for speed."""

import contextlib
import os
import time
from pathlib import Path

from mmrec.runtime.malloc import keep_freed_memory

# Commands that keep all cores at work; others take torch as it comes.
HEAVY = ("train", "finetune", "chain", "eval", "bench train")


def prepare_process(command: list[str]) -> None:
    """Set how idle threads wait and how freed memory is kept, for this command line's command."""
    share_cores()
    heavy = " ".join(command).startswith(HEAVY)
    said = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if heavy and not said and others_work():
        # torch's OpenMP pool, which Numba's kernels run on too, spins while it is idle, and while
        # it spins nobody else has the core. A step is many short pieces of work, so on a quiet
        # machine that is best (tiny by character: 29,000 tokens/s; asleep at once: 15,000), beside
        # a busy process it is worst (6,500; asleep: 14,000). The pool reads this as it is loaded.
        os.environ["OMP_WAIT_POLICY"] = "passive"
    keep_freed_memory()


def share_cores() -> None:
    """Let a process that torchrun started use its share of the cores.

    torchrun allows it a single thread, unless the user has set the number.
    """
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count == 1:
        return
    said = b""
    with contextlib.suppress(OSError):  # what torchrun itself was given
        said = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    if b"\0OMP_NUM_THREADS=" not in b"\0" + said:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ["OMP_NUM_THREADS"] = str(max(1, (cores or 1) // count))


def others_work(seconds: float = 0.1) -> bool:
    """Whether other processes keep a good part of a core busy, as Linux counts it."""

    def read() -> tuple[int, int]:
        times = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return times[3] + times[4], sum(times)  # idle and waiting for a disk; all

    try:
        idle, everything = read()
        time.sleep(seconds)
        idle_then, everything_then = read()
    except (OSError, ValueError, IndexError):
        return False
    idle_share = (idle_then - idle) / max(1, everything_then - everything)
    return (1 - idle_share) * (os.cpu_count() or 1) > 0.4
