"""Command-line options that are derived from the settings' declarations in ``mmrec.config``."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mmrec.config import (
    LENGTHS,
    MODEL_SETTINGS,
    PRESETS,
    TRAIN_SECTIONS,
    TRAIN_SETTINGS,
    WEIGHT_DTYPES,
    ModelConfig,
    Section,
    Setting,
)
from mmrec.errors import InputError
from mmrec.pretrained import find_pretrained

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
MODEL_HELP = "A run, a checkpoint or a name of 'mmrec models'; by default the newest run."
"""Help for the model of commands that generate or read text."""
ModelOption = Annotated[
    Path | None,
    typer.Option("--model", metavar="RUN|CHECKPOINT", help="The same as the argument."),
]
"""The ``--model`` of commands that take a model as an argument, too."""
ModelsOption = Annotated[
    list[Path] | None,
    typer.Option("--model", metavar="RUN|CHECKPOINT", help="The same as the argument; repeatable."),
]
"""The ``--model`` of commands that take several models."""
WeightsOption = Annotated[
    str,
    typer.Option(
        metavar="|".join(WEIGHT_DTYPES), help="How the weights are held: fewer bytes, less exact."
    ),
]
"""The ``--weights`` of commands that generate or read text."""
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads; by default chosen by the size of the model.")
]
"""The ``--threads`` of the same commands."""
VocabSize = Annotated[int | None, typer.Option(min=2, max=1 << 32, help="Vocabulary size.")]
"""The ``--vocab`` of commands that need no tokenizer."""
MAY_BE_EMPTY = ("prompt", "stop")
"""Options whose value is a text of the user; all others name something."""


class Command(TyperCommand):
    """A command that refuses what others let pass: an empty value, or a second one.

    An empty value is mostly a shell variable that is not set. Of two values the first would be
    lost.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check the values as they were typed, and parse them."""
        if not ctx.resilient_parsing:  # the shell completes a command that is not finished
            given, _, order = self.make_parser(ctx).parse_args(list(args))
            for parameter in order:
                self._check(parameter, given.get(parameter.name), order.count(parameter))
        return super().parse_args(ctx, args)

    @staticmethod
    def _check(parameter: Any, value: Any, count: int) -> None:
        is_option = parameter.param_type_name == "option"
        name = parameter.opts[0] if is_option else parameter.metavar or parameter.name.upper()
        values = value if isinstance(value, list | tuple) else [value]
        if "" in values and parameter.name not in MAY_BE_EMPTY:
            raise InputError(
                f"{name} must not be empty; got '' (a shell variable that is not set?)"
            )
        if is_option and count > 1 and not (parameter.multiple or parameter.is_flag):
            hint = "; a mixture is written 3:code/,1:book.txt" * (name == "--data")
            raise InputError(f"{name} must be given once; got it {count} times{hint}")


class App(typer.Typer):
    """A Typer app whose commands are ``Command``s."""

    def command(self, *arguments: Any, **options: Any) -> Any:
        """Register a command; see ``typer.Typer.command``."""
        return super().command(*arguments, **{"cls": Command} | options)


def several_models(argument: list[Path] | None, option: list[Path] | None) -> list[Path]:
    """Return the models that a command takes as arguments or as ``--model``.

    Raises:
        InputError: both are given.
    """
    if argument and option:
        raise InputError(
            "give the model once, as an argument or as --model; got "
            f"{argument[0]} and --model {option[0]}"
        )
    return argument or option or []


def one_model(argument: Path | None, option: Path | None) -> Path | None:
    """Return the model of a command that takes one, or None; see ``several_models``."""
    models = several_models(
        None if argument is None else [argument], None if option is None else [option]
    )
    return models[0] if models else None


def required_model(argument: Path | None, option: Path | None, command: str) -> Path:
    """Return the model of a command that cannot do without; see ``one_model``.

    Raises:
        InputError: neither or both are given.
    """
    model = one_model(argument, option)
    if model is None:
        raise InputError(f"name a model, a run folder or a checkpoint: mmrec {command}")
    return model


def misplaced_path_hint(word: str) -> str:
    """Say where a name belongs that stands where a command or a preset is expected.

    Args:
        word: what the user gave.

    Returns:
        A clause to add to the message; empty if the word is neither a preset, a model nor a file.
    """
    if word in PRESETS:
        return f"; to train this preset: mmrec train {word}"
    if find_pretrained(word):
        return (
            f"; to use this pretrained model: mmrec generate {word}; to fine-tune it: "
            f"mmrec finetune {word} --data FILE"
        )
    path = Path(word)
    if path.suffix == ".h5" and path.is_file():
        return f"; to use this checkpoint: mmrec generate {word}"
    if path.is_dir() and any(path.glob("*.h5")):
        return (
            f"; to use this run: mmrec generate {word}; to continue it: mmrec train --resume {word}"
        )
    return f"; to train on this text: mmrec train tiny --data {word}" if path.exists() else ""


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
    metavar = s.metavar or ("|".join(s.choices) if s.choices else None)
    parser = None
    if s.flat_name in LENGTHS and s.type is not str:
        from mmrec.training.length import parse_amount

        metavar = "N|+N"
        parser = functools.wraps(parse_amount)(functools.partial(parse_amount, kind=s.type))
    option = typer.Option(
        s.flag,
        help=s.help,
        rich_help_panel=PANELS.get(s.section, s.section.capitalize()),
        metavar=metavar,
        show_default=_shown_default(s),
        parser=parser,
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
