"""The folder for compiled kernels. Nothing here imports Numba."""

import os
from pathlib import Path

import platformdirs


def _find_cache_folder() -> Path | None:
    """The folder for compiled kernels, or None if no folder can be written."""
    try:
        root = os.environ.get("NUMBA_CACHE_DIR") or platformdirs.user_cache_path("mmrec/kernels")
        folder = Path(root).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return None
    return folder if os.access(folder, os.W_OK) else None


CACHE_FOLDER = _find_cache_folder()
