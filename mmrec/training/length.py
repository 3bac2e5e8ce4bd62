"""The length of a run that is resumed: a longer one, or one that is added to what was trained."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrec.config import LENGTHS, TRAIN_SETTINGS, LengthConfig, seconds_until
from mmrec.errors import InputError

if TYPE_CHECKING:
    from mmrec.training.metrics import Progress


def parse_amount(text: str, kind: type) -> int | float | str:
    """Read an amount of steps, epochs or minutes as it is typed: ``60``, or ``+60`` to add it.

    Args:
        text: what was typed.
        kind: int or float.

    Returns:
        The number, or the text itself if it begins with a plus sign.

    Raises:
        ValueError: it is no number of this kind.
    """
    try:
        number: int | float = kind(text)
    except ValueError:
        words = "a whole number" if kind is int else "a number"
        raise ValueError(f"must be {words}, or + and {words} with --resume") from None
    return text if text.startswith("+") else number


def given_lengths(settings: dict[str, Any]) -> dict[str, Any]:
    """The length among given settings; None stands for one that is not given.

    Raises:
        InputError: a length is not usable, or two are given.
    """
    given = {name: settings[name] for name in LENGTHS if settings.get(name) is not None}
    LengthConfig(**{name: _amount(name, value)[0] for name, value in given.items()})
    check_not_past(given.get("until"))
    return given


def check_not_past(until: str | None) -> None:
    """Check that a moment lies ahead.

    Raises:
        InputError: it has passed.
    """
    if until is not None and seconds_until(LengthConfig(until=until).until or "") <= 0:
        raise InputError(f"until must lie ahead; {until} has passed")


def _amount(name: str, value: Any) -> tuple[Any, bool]:
    """The number of a length, and whether it is added to what was trained."""
    if name == "until" or not str(value).startswith("+"):
        return value, False
    kind = TRAIN_SETTINGS[name].type
    try:
        parse_amount(value, kind)
    except ValueError as error:
        raise InputError(f"{name} {error}; got {value!r}") from None
    return kind(value), True


def resumed_length(
    given: dict[str, Any],
    before: LengthConfig,
    progress: "Progress",
    *,
    batches_per_step: int,
    batches_per_epoch: float,
    folder: Path,
) -> LengthConfig:
    """The new length of a run.

    Args:
        given: what ``given_lengths`` returned. ``+60`` counts from what the run has trained.
        before: the length that the run has now.
        progress: where it stands.
        batches_per_step: batches of a step.
        batches_per_epoch: batches in one pass over the training text.
        folder: the run folder, for the message.

    Raises:
        InputError: the run has trained longer than that.
    """
    if not given:
        return before
    batches = progress.batches(batches_per_step)
    trained: dict[str, int | float] = {
        "steps": progress.step,
        "epochs": progress.epochs_after(batches, batches_per_epoch),
        "minutes": progress.seconds / 60,
    }
    [(name, value)] = given.items()
    amount, is_added = _amount(name, value)
    if is_added:
        amount += trained[name]
    length = LengthConfig(**{name: amount})
    if name != "until" and asdict(length) != asdict(before):
        too_short = amount < trained[name]
        if name == "epochs":  # whole batches count
            too_short = progress.batches_of(amount, batches_per_epoch) < batches
        if too_short:
            raise InputError(
                f"{name} must not be less than the {trained[name]:.15g} that {folder} has trained; "
                f"got {amount:.15g}"
            )
    return length
