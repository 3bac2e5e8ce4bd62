"""The checkpoints of run folders: which exist, which to use, and which to resume from."""

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmrec.checkpoint.header import open_checkpoint, read_metadata, read_tokenizer
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import DamagedError, InputError
from mmrec.pretrained import find_pretrained, is_plain_name, pretrained_models, unknown_name

RUNS = Path("runs")
"""Where run folders are created by default."""
CHAIN_FILE = "chain.json"
"""File of the folder of a chain, whose runs are the folders in it."""
_CHECKPOINT = re.compile(r"best\.h5|last\.h5|step-\d{1,18}\.h5")


def load_latest(
    run: Path, load: Callable[[Path], dict[str, Any]], log: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """Load the latest complete checkpoint of a run.

    A damaged checkpoint is reported and renamed to ``NAME.h5.damaged``, so that it neither counts
    as one of those to keep nor gets in the way. Then the one before it is tried.

    Args:
        run: The run folder.
        load: Reads a checkpoint and returns its metadata.
        log: Receives a line for each damaged checkpoint.

    Returns:
        The path of the checkpoint, and what ``load`` returned.

    Raises:
        InputError: No checkpoint is complete, or the latest one is complete but cannot be used, for
            instance because another version wrote it.
    """
    checkpoints, damaged = list_checkpoints(run), []
    if not checkpoints:
        raise InputError(f"{run} holds no checkpoint to resume from (last.h5 or step-N.h5)")
    for path in reversed(checkpoints):
        try:
            metadata = load(path)
        except DamagedError as error:
            log(f"{error}; going back to the checkpoint before it")
            damaged.append(path)
            continue
        for bad in damaged:
            with contextlib.suppress(OSError):
                bad.replace(bad.with_name(f"{bad.name}.damaged"))
        return path, metadata
    raise InputError(f"no checkpoint of {run} is whole: {', '.join(p.name for p in checkpoints)}")


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder that can be resumed from, the latest one last.

    last.h5 stands at the position of its step. If the step cannot be read, it counts as the latest.
    """
    found: list[tuple[float, Path]] = [*step_checkpoints(run)]
    last = run / "last.h5"
    if last.exists():
        try:
            found.append((read_metadata(last).step, last))
        except InputError:
            found.append((math.inf, last))
    return [path for _, path in sorted(found, key=lambda pair: pair[0])]


def step_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return the step-N.h5 checkpoints of a run folder with the N of their names, in order."""
    names = ((re.fullmatch(r"step-(\d{1,18})\.h5", p.name), p) for p in run.glob("step-*.h5"))
    return sorted((int(match[1]), path) for match, path in names if match)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all step-N.h5 checkpoints of a run folder except the ``keep`` latest ones."""
    for _, path in step_checkpoints(run)[: -keep or None]:
        path.unlink()


def newest_run(runs: Path = RUNS) -> Path:
    """Return the run folder whose checkpoints changed last; the stages of chains count, too.

    Raises:
        InputError: There is none.
    """
    folders = ("*", "*/*", "*/*/*")  # runs, and the stages of chains
    files = [p for f in folders for p in runs.glob(f"{f}/*.h5") if _CHECKPOINT.fullmatch(p.name)]
    if not files:
        pretrained = next(iter(pretrained_models()), None)
        hint = f", or use a pretrained one: mmrec generate {pretrained}" if pretrained else ""
        raise InputError(
            f"no trained model under {runs}/: train one first with 'mmrec train tiny'{hint}"
        )
    return max(files, key=lambda p: p.stat().st_mtime_ns).parent


def latest_stage(folder: Path) -> Path:
    """Return the last stage with a checkpoint, of the folder of a chain; of another, the folder."""
    if not (folder / CHAIN_FILE).is_file():
        return folder
    numbers = ((re.fullmatch(r"(\d{1,9})-.+", p.name), p) for p in folder.iterdir())
    stages = sorted((int(match[1]), path) for match, path in numbers if match)
    trained = [p for _, p in stages if any(_CHECKPOINT.fullmatch(f.name) for f in p.glob("*.h5"))]
    return trained[-1] if trained else folder


def find_checkpoint(where: Path | None, runs: Path = RUNS) -> Path:
    """Return the checkpoint to use.

    Args:
        where: A checkpoint, which is returned; a run folder; the folder of a chain, for its last
            stage; the name of a pretrained model, unless a file or folder has that name; or None
            for the newest run.
        runs: Where run folders are, for None.

    Returns:
        Of a run folder best.h5, else last.h5, else the latest step-N.h5.

    Raises:
        InputError: There is none.
    """
    run = newest_run(runs) if where is None else where
    if pretrained := find_pretrained(run):
        return pretrained.checked_path()
    if not run.is_dir():
        if is_plain_name(str(run)) and not run.exists():
            raise InputError(unknown_name(str(run)))
        return run  # a file; if it is missing, opening it says so
    run = latest_stage(run)
    for name in ("best.h5", "last.h5"):
        if (run / name).exists():
            return run / name
    steps = step_checkpoints(run)
    if steps:
        return steps[-1][1]
    others = sorted(p.name for p in run.glob("*.h5"))
    hint = f"; it holds {others[0]}, which must be named in full" if others else ""
    raise InputError(f"no checkpoint in {run}: expected best.h5, last.h5 or step-N.h5{hint}")


def run_tokenizer(run: Path) -> Tokenizer:
    """Return the tokenizer of a run, from its latest readable checkpoint.

    Raises:
        InputError: There is none.
    """
    for path in reversed(list_checkpoints(run)):
        with contextlib.suppress(InputError), open_checkpoint(path) as file:
            return read_tokenizer(file)
    raise InputError(f"{run} holds no whole checkpoint, so its tokenizer is lost: start it again")
