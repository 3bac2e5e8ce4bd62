"""Ask the user for help when a file cannot be written."""

import sys

from mmrec.errors import StorageError


def ask_to_free_space(error: StorageError) -> bool:
    """Ask the person at the terminal to free space, and wait for the answer.

    Args:
        error: Why the file could not be written.

    Returns:
        Whether to write again. False without a terminal, or if the person gives up.
    """
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(
        f"\nerror: {error}\nThe training state is still in memory. Free some space and "
        "press Enter to try again, or q and Enter to give up: ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    answer = sys.stdin.readline()
    return bool(answer) and answer.strip().lower() != "q"
