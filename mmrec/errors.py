"""Every exception that a user of mmrec can meet.

The text of each error is one line. It states the rule, what was expected and what came.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in what the user gave: an argument, a setting, a file or a text."""


class StorageError(InputError):
    """A file could not be written. What stood at its path before is untouched."""


class DamagedError(InputError):
    """A file does not hold what was once written: it was cut, changed, or not made by mmrec."""


class RunLockedError(InputError):
    """Another process writes in the run folder."""


class RequestError(InputError):
    """A request that a server refuses.

    Attributes:
        status: status code of HTTP.
        param: the parameter at fault, or None.
        code: a word for programs, or None.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        """Create the error; see the attributes."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class TrainingDivergedError(Exception):
    """A loss or a gradient became NaN or infinite. The weights were not updated with it."""


class WeightsDivergedError(TrainingDivergedError):
    """The weights themselves are no longer finite, so that skipping a step cannot help."""


class ProcessLostError(Exception):
    """Another process of a distributed run ended without saying why."""


class InterruptedTrainingError(Exception):
    """A signal asked for the end of work that can be repeated later."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the most similar known word, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {matches[0]!r}?" if matches else ""
