"""Settings of the process that must be made before torch and Numba are loaded, for speed."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

from mmrec.runtime.cores import available_cores
from mmrec.runtime.malloc import keep_freed_memory

HEAVY_COMMANDS = ("train", "tune", "finetune", "chain", "eval", "bench train")
"""Commands that keep all cores busy. Others use torch's defaults."""
DECODER_COMMANDS = ("generate", "chat", "score", "serve")
"""Commands that run the compiled decoder alone, without torch; unless they adapt the model."""
UNUSED_BLAS = "scipy.linalg.cython_blas"
"""What Numba imports for matrix products of NumPy functions. The decoder uses none of them."""


def machine_is_busy(seconds: float = 0.1) -> bool:
    """Measure whether other processes keep a good part of a core busy. False where unknown.

    Args:
        seconds: How long to measure. Linux counts the time of all processes in ``/proc/stat``.
    """

    def idle_and_total() -> tuple[int, int]:
        first_line = Path("/proc/stat").read_text().split("\n")[0]
        times = [int(x) for x in first_line.split()[1:9]]
        return times[3] + times[4], sum(times)  # idle includes waiting for a disk

    try:
        idle, total = idle_and_total()
        time.sleep(seconds)
        idle_after, total_after = idle_and_total()
    except (OSError, ValueError, IndexError):
        return False
    idle_share = (idle_after - idle) / max(1, total_after - total)
    return (1 - idle_share) * (os.cpu_count() or 1) > 0.4


def prepare_process(
    command: list[str],
    environ: MutableMapping[str, str] = os.environ,
    is_busy: Callable[[], bool] = machine_is_busy,
) -> None:
    """Choose the number of threads, how idle threads wait, and how freed memory is kept.

    Args:
        command: The arguments of the command line, without the program.
        environ: Environment variables, changed in place. What the user has set stays.
        is_busy: Measures whether other processes use the cores.
    """
    share_cores(environ)
    adapts = any(word.split("=")[0] == "--adapt" for word in command)
    if command[:1] and command[0] in DECODER_COMMANDS and not adapts:
        # Without this, a third of the start and 20 MB would go to scipy. Numba then refuses to
        # compile np.dot and its like, which is why only whole processes of mmrec do it.
        sys.modules.setdefault(UNUSED_BLAS, None)  # type: ignore[arg-type]
    is_heavy = " ".join(command).startswith(HEAVY_COMMANDS) or adapts
    chosen_by_user = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environ.keys()
    if is_heavy and not chosen_by_user and is_busy():
        # Numba's kernels run on torch's OpenMP pool. Its idle threads spin, and meanwhile no other
        # process can use their cores. A training step consists of many short tasks, so spinning is
        # best on a quiet machine (tiny by character: 29,000 tokens/s; 15,000 if threads sleep at
        # once) and worst beside a busy process (6,500; 14,000 if they sleep). The pool reads this
        # variable when it is loaded.
        environ["OMP_WAIT_POLICY"] = "passive"
    keep_freed_memory()


def share_cores(
    environ: MutableMapping[str, str] = os.environ,
    parent: int | None = None,
    cores: int | None = None,
) -> None:
    """Let a process that torchrun started use its share of the cores.

    torchrun sets OMP_NUM_THREADS to 1 unless the user has set it. What torchrun itself was given
    tells the two apart.

    Args:
        environ: Environment variables, changed in place.
        parent: Number of torchrun's process; None for the parent of this process.
        cores: Cores to share; None for those that this process may use.
    """
    processes = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1:
        return
    parent_environ = b""
    with contextlib.suppress(OSError):  # only Linux has /proc
        parent_environ = Path(f"/proc/{parent or os.getppid()}/environ").read_bytes()
    if b"\0OMP_NUM_THREADS=" not in b"\0" + parent_environ:
        threads = (cores or available_cores()) // processes
        environ["OMP_NUM_THREADS"] = str(max(1, threads))
