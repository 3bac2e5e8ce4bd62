"""Every option of every command refuses an empty value, and a second value where it takes one."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from mmrec.cli.main import app
from mmrec.cli.options import MAY_BE_EMPTY
from mmrec.errors import InputError

COMMAND = typer.main.get_command(app)


def parameters(command: Any = COMMAND, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """The words of each command, and each of its parameters that takes a value."""
    for name, member in getattr(command, "commands", {}).items():
        yield from parameters(member, (*path, name))
    if not hasattr(command, "commands"):
        yield from ((path, p) for p in command.params if not getattr(p, "is_flag", False))


ALL = list(parameters())
IDS = [f"{' '.join(path)} {parameter.name}" for path, parameter in ALL]


def parse(*words: str) -> None:
    COMMAND.main([*words], "mmrec", standalone_mode=False)


@pytest.mark.parametrize(("path", "parameter"), ALL, ids=IDS)
def test_an_empty_value_is_refused(path: tuple[str, ...], parameter: Any) -> None:
    if parameter.name in MAY_BE_EMPTY:
        return
    is_option = parameter.param_type_name == "option"
    for words in ([parameter.opts[0], ""], [f"{parameter.opts[0]}="]) if is_option else ([""],):
        with pytest.raises(InputError, match="must not be empty; got ''"):
            parse(*path, *words)


@pytest.mark.parametrize(("path", "parameter"), ALL, ids=IDS)
def test_a_second_value_is_refused(path: tuple[str, ...], parameter: Any) -> None:
    if parameter.param_type_name != "option" or parameter.multiple:
        return
    flag = parameter.opts[0]
    with pytest.raises(InputError, match=f"{flag} must be given once; got it 2 times"):
        parse(*path, flag, "1", f"{flag}=1")


def test_flags_may_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    parse("info", "tiny", "--json", "--json")
    assert capsys.readouterr().out.startswith("{")
