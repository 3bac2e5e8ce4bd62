"""The files that a benchmark writes: it asks before it works, and overwrites only its own."""

import argparse
from pathlib import Path

from mmrec.checkpoint.outputs import check_output
from mmrec.errors import InputError


def add_force(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark the option ``--force``."""
    parser.add_argument("--force", action="store_true", help="overwrite files of others")


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
