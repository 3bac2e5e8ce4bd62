"""The checkpoints of run folders: which there are, which to use, which to go on from."""

import contextlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmrec.checkpoint.checkpoint import KIND, SCHEMA, read_info
from mmrec.checkpoint.hdf5 import open_file, read_json
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import DamagedError, InputError

RUNS = Path("runs")


def run_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer of a run, from its furthest checkpoint that can be read.

    Raises InputError if there is none.
    """
    for path in reversed(run_checkpoints(run)):
        with contextlib.suppress(InputError), open_file(path, KIND, SCHEMA, SCHEMA) as file:
            return Tokenizer.from_json(json.dumps(read_json(file, "tokenizer")))
    raise InputError(f"{run} holds no whole checkpoint, so its tokenizer is lost: start it again")


def resume(
    run: Path, load: Callable[[Path], dict[str, Any]], say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """Load the furthest whole checkpoint of a run; return its path and what ``load`` returned.

    A damaged one is named and set aside as ``NAME.h5.damaged``, so that it is neither counted as
    kept nor in the way, and the one before it is tried.

    Raises InputError if none is whole, or the furthest is whole but not for this version.
    """
    saved, lost = run_checkpoints(run), []
    if not saved:
        raise InputError(f"{run} holds no checkpoint to resume from (last.h5 or step-N.h5)")
    for path in reversed(saved):
        try:
            info = load(path)
        except DamagedError as error:
            say(f"{error}; going back to the checkpoint before it")
            lost.append(path)
            continue
        for bad in lost:
            with contextlib.suppress(OSError):
                bad.replace(bad.with_name(f"{bad.name}.damaged"))
        return path, info
    raise InputError(f"no checkpoint of {run} is whole: {', '.join(p.name for p in saved)}")


def step_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """The step-N checkpoints of a run folder by their number, which their names say."""
    named = ((re.fullmatch(r"step-(\d{1,18})\.h5", p.name), p) for p in run.glob("step-*.h5"))
    return sorted((int(match[1]), path) for match, path in named if match)


def run_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder to resume from, the furthest one last.

    last.h5 is placed by its step, or taken for the furthest if that cannot be read.
    """
    found: list[tuple[float, Path]] = [*step_checkpoints(run)]
    last = run / "last.h5"
    if last.exists():
        try:
            found.append((read_info(last)[0], last))
        except InputError:
            found.append((math.inf, last))
    return [path for _, path in sorted(found, key=lambda pair: pair[0])]


def trim(run: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest step-N checkpoints."""
    for _, path in step_checkpoints(run)[: -keep or None]:
        path.unlink()


def newest_run(runs: Path = RUNS) -> Path:
    """The run folder whose checkpoints changed last. Raises InputError if there is none."""
    files = [p for p in runs.glob("*/*.h5") if not p.name.startswith(".")]
    if not files:
        raise InputError(f"no trained model under {runs}/: train one first with 'mmrec train tiny'")
    return max(files, key=lambda p: p.stat().st_mtime_ns).parent


def find_checkpoint(where: Path | None) -> Path:
    """The checkpoint to use: a file itself; of a run folder, or the newest run, best before last.

    Raises InputError if there is none.
    """
    run = newest_run() if where is None else where
    if not run.is_dir():
        return run  # a file, or a missing one, which opening will name
    for name in ("best.h5", "last.h5"):
        if (run / name).exists():
            return run / name
    steps = run_checkpoints(run)
    if steps:
        return steps[-1]
    raise InputError(f"no checkpoint in {run}: expected best.h5, last.h5 or step-N.h5")
