"""Command-line options that are derived from the settings' declarations in ``mmrec.config``."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from mmrec.config import (
    MODEL_SETTINGS,
    PRESETS,
    TRAIN_SECTIONS,
    TRAIN_SETTINGS,
    ModelConfig,
    Section,
    Setting,
)

SECTIONS: list[type[Section]] = [ModelConfig, *TRAIN_SECTIONS.values()]
PANELS = {cls.section: cls.title for cls in SECTIONS}
"""Heading of each section's options in ``--help``."""
ALL_SETTINGS: dict[str, Setting] = TRAIN_SETTINGS | {
    name: s for name, s in MODEL_SETTINGS.items() if name != "vocab_size"
}
"""Every setting that can be given on the command line, by flat name."""
PRESET_HELP = f"{', '.join(PRESETS)}."
_SEED = TRAIN_SETTINGS["seed"]
SEED_BOUNDS: dict[str, Any] = {"min": _SEED.minimum, "max": _SEED.maximum}
"""The range of every ``--seed``."""
VocabSize = Annotated[int | None, typer.Option(min=2, max=1 << 32, help="Vocabulary size.")]
"""The ``--vocab`` of commands that need no tokenizer."""


def literal(text: str) -> str:
    """Escape square brackets, which Typer's help would read as markup and leave out."""
    return text.replace("[", r"\[")


def settings_options(
    names: Iterable[str] = ALL_SETTINGS,
    *,
    required: Iterable[str] = (),
    declared: Mapping[str, Setting] = ALL_SETTINGS,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of some settings.

    The command takes them as keyword arguments (``**settings``) by flat name. Settings that the
    user did not give are left out.

    Args:
        names: flat names.
        required: those that the user must give.
        declared: the declarations by flat name.
    """
    chosen = [declared[name] for name in names]
    must = set(required)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        derived = [_parameter(s, is_required=s.flat_name in must) for s in chosen]

        @functools.wraps(command)
        def wrapper(**arguments: Any) -> None:
            given = {s.flat_name: arguments.pop(s.flat_name) for s in chosen}
            command(**arguments, **{k: v for k, v in given.items() if v is not None})

        shown = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*own, *derived]]
        wrapper.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in shown}
        return wrapper

    return decorate


def _parameter(s: Setting, *, is_required: bool) -> inspect.Parameter:
    option = typer.Option(
        s.flag,
        help=literal(s.help),
        rich_help_panel=PANELS.get(s.section, s.section.capitalize()),
        metavar=s.metavar or ("|".join(s.choices) if s.choices else None),
        show_default=_shown_default(s),
    )
    kind: Any = s.type if is_required else s.type | None
    return inspect.Parameter(
        s.flat_name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else None,
        annotation=Annotated[kind, option],
    )


def _shown_default(s: Setting) -> str | bool:
    """The default that ``--help`` shows; none for the model, whose defaults the preset sets."""
    if s.section == ModelConfig.section or s.default in (None, "", False):
        return False
    return str(s.default)
