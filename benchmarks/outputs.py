"""The files that a benchmark writes: it asks before it works, and overwrites only its own."""

import argparse
import json
from pathlib import Path
from typing import Any

from mmrec.checkpoint.outputs import check_output
from mmrec.errors import InputError


def add_force(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark the option ``--force``."""
    parser.add_argument("--force", action="store_true", help="overwrite files of others")


def add_add(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark that runs in several sittings the option ``--add``."""
    parser.add_argument("--add", action="store_true", help="keep the earlier runs of the results")


def write_runs(path: Path, run: dict[str, Any], *, add: bool) -> None:
    """Write the results of a benchmark that runs in several sittings, a list of runs.

    Args:
        path: the JSON file.
        run: what the run found.
        add: keep the runs that are there, and put this one behind them.
    """
    earlier = json.loads(path.read_text("utf-8"))["runs"] if add and path.exists() else []
    path.write_text(json.dumps({"runs": [*earlier, run]}, indent=1) + "\n", "utf-8")


def check_results(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    path: Path,
    picture: Path | None = None,
    option: str = "--out",
) -> None:
    """End with an error of the parser if the results must not be written.

    Args:
        parser: the parser of the benchmark.
        args: what it parsed, with ``force``.
        path: the JSON file.
        picture: the picture that belongs to it; where the results are there, it is theirs.
        option: what error messages call the files.
    """
    try:
        is_there = path.exists()
        check_output(path, "benchmark result", option=option, force=args.force)
        if picture is not None:
            check_output(picture, "picture", option=option, force=args.force or is_there)
    except InputError as error:
        parser.error(str(error))
