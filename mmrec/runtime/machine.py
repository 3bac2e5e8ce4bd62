"""What machine this is. Nothing here imports torch."""

import os
import platform
from pathlib import Path
from typing import Any

from mmrec.runtime.cores import available_cores


def processor_name() -> str:
    """Return the name of the processor, as Linux or Python tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def memory_bytes() -> int | None:
    """Return the size of the memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def describe() -> dict[str, Any]:
    """Return processor, cores, memory, system and Python, as JSON values."""
    return {
        "processor": processor_name(),
        "cores": available_cores(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
