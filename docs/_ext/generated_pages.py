"""A Sphinx extension that fills the pages derived from the program itself.

A page holds a marker such as ``<!-- generated: cli -->``. When the page is read, Markdown made from
the Typer app or from the settings' declarations takes the marker's place, so neither page can
disagree with the program.
"""

import inspect
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mmrec.cli.main import app as cli_app
from mmrec.config import MAX_COUNT, PRESETS, TRAIN_SECTIONS, ModelConfig, Section, Setting
from mmrec.model import parameter_counts


def escape(text: str) -> str:
    """Escape what Markdown would read as markup and the bar that ends a cell; mark up options."""
    escaped = re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![\w-])--[a-z][a-z-]*\w", r"`\g<0>`", escaped)


def code(text: str) -> str:
    """A code span that may stand in a table cell."""
    return f"`{text}`".replace("|", r"\|")


def table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


# The command line.


def cli_page() -> str:
    """Every command of the Typer app with its arguments, options, defaults and help."""
    root = typer.main.get_command(cli_app)
    lines = [escape(root.help or ""), ""]
    for command in _commands(root, "mmrec"):
        lines += command
    return "\n".join(lines)


def _commands(group: Any, path: str) -> Iterator[list[str]]:
    for name, command in group.commands.items():
        full_name = f"{path} {name}"
        if hasattr(command, "commands"):
            yield [f"## {full_name}", "", _help(command), ""]
            yield from _commands(command, full_name)
        else:
            yield [*_command(command, full_name)]


def _help(command: Any) -> str:
    """A command's docstring, with an example at the end of a paragraph as code."""
    paragraphs = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        text, example = " ".join(paragraph.split()), ""
        if match := re.fullmatch(r"(.*: )(mmrec .*)\.", text):
            text, example = match[1], f"{code(match[2])}."
        paragraphs.append(f"{escape(text)} {example}".rstrip())
    return "\n\n".join(paragraphs)


def _command(command: Any, full_name: str) -> Iterator[str]:
    yield f"{'#' * (1 + len(full_name.split()[:-1]))} {full_name}"
    yield ""
    yield _help(command)
    yield ""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join([full_name, *map(_argument_name, arguments), "[OPTIONS]"])
    yield f"```text\n{usage}\n```"
    yield ""
    if arguments:
        rows = [[code(_argument_name(p)), _description(p)] for p in arguments]
        yield from table(["Argument", "Meaning"], rows)
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    for title, members in panels.items():
        rows = [[_option_name(p), _default(p), _description(p)] for p in members]
        yield from table([escape(title), "Default", "Meaning"], rows)


def _argument_name(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    repeats = "..." if parameter.nargs == -1 and not name.endswith("...") else ""
    is_optional = not parameter.required and not name.startswith("[")
    return f"[{name}]{repeats}" if is_optional else f"{name}{repeats}"


def _option_name(parameter: Any) -> str:
    flags = [*parameter.opts, *parameter.secondary_opts]
    names = " ".join(code(flag) for flag in flags)
    if getattr(parameter, "is_flag", False):
        return names
    return f"{names} {escape(parameter.metavar or _type_name(parameter))}"


def _type_name(parameter: Any) -> str:
    """INT, FLOAT, PATH …, in the attribute that the installed version of Typer keeps it in."""
    descriptor = getattr(parameter, "type_descriptor", None)
    if descriptor is None:
        return str(parameter.type.name).split()[0].upper()
    members = typing.get_args(descriptor.annotation)
    kind = members[0] if members else descriptor.annotation
    return {"STR": "TEXT"}.get(kind.__name__.upper(), kind.__name__.upper())


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    shown, default = getattr(parameter, "show_default", None), parameter.default
    if isinstance(shown, str):
        return code(shown)
    if default is None or default is False or default == "" or callable(default) or shown is False:
        return ""
    return code(str(default))


def _description(parameter: Any) -> str:
    return escape(getattr(parameter, "help", None) or "")


# The settings.


def configuration_page() -> str:
    """Every section's settings, from their declarations, and the presets."""
    lines: list[str] = []
    for section in (ModelConfig, *TRAIN_SECTIONS.values()):
        lines += _section(section)
    return "\n".join(lines)


def _section(section: type[Section]) -> Iterator[str]:
    yield f"## \\[{section.section}\\]: {section.title.split(' (')[0]}"
    yield ""
    yield escape((section.__doc__ or "").split("\n\n")[0])
    yield ""
    rows = []
    for s in section.settings().values():
        # the size of the vocabulary follows from the tokenizer, so no option sets it
        is_derived = section is ModelConfig and s.name == "vocab_size"
        flag = "" if is_derived else code(s.flag)
        rows.append([code(s.name), flag, _type(s), _setting_default(s), _meaning(s)])
    yield from table(["Key", "Option", "Type", "Default", "Meaning"], rows)


def _type(s: Setting) -> str:
    return f"{s.type.__name__}, may be left out" if s.optional else s.type.__name__


def _setting_default(s: Setting) -> str:
    if s.default is None:
        return ""
    return code(str(s.default).lower() if s.type is bool else repr(s.default).replace("'", '"'))


def _meaning(s: Setting) -> str:
    return f"{escape(s.help)} {_rule(s)}"


def _rule(s: Setting) -> str:
    if s.choices:
        return f"One of {', '.join(map(code, s.choices))}."
    if s.minimum is None:
        return ""
    if s.maximum in (None, MAX_COUNT):  # the largest count is beyond any use
        return f"{'Above' if s.exclusive_minimum else 'At least'} {s.minimum:g}."
    return f"The value {escape(s.rule)}."


def presets_table() -> str:
    """One row per preset."""
    header = ["Preset", "Parameters", "Width", "Layers", "Types", "Heads", "Vocabulary"]
    header += ["FFN multiplier", "N-gram buckets", "Max timescale"]
    rows = []
    for name, c in PRESETS.items():
        total = parameter_counts(c)["total"]
        size = f"{total / 1e9:.2f} G" if total >= 1e9 else f"{total / 1e6:.2f} M"
        values = (c.width, c.depth, c.layer_types, c.heads, c.vocab_size, c.ffn_multiplier)
        values += (c.ngram_buckets, c.max_timescale)
        rows.append(
            [code(name), size, *(f"{v:,}" if isinstance(v, int) else str(v) for v in values)]
        )
    return "\n".join(table(header, rows))


# The versions that were tried.

VERSIONS = Path(__file__).parents[2] / "benchmarks" / "results" / "versions.json"


def versions_table() -> str:
    """One row per dependency, one column per set of versions, from what was measured."""
    sets = json.loads(VERSIONS.read_text(encoding="utf-8"))["rows"]
    names = dict.fromkeys(name for row in sets for name in row["versions"])
    titles = [", ".join([row["set"], *row["pins"]]) for row in sets]
    rows = [["Python", *(row["python"] for row in sets)]]
    rows += [[name, *(row["versions"].get(name, "") for row in sets)] for name in names]
    rows.append(["tests passed", *(str(row["tests"]["passed"]) for row in sets)])
    return "\n".join(table(["Package", *titles], rows))


PAGES = {
    "cli": cli_page,
    "configuration": configuration_page,
    "presets": presets_table,
    "versions": versions_table,
}
MARKER = re.compile(r"<!-- generated: (\w+) -->")


def fill_markers(app: Any, docname: str, source: list[str]) -> None:
    """Replace the markers of a page: Sphinx's ``source-read`` event."""
    source[0] = MARKER.sub(lambda match: PAGES[match[1]](), source[0])


HIDDEN_COLON = "\ue000"  # of the private use area of Unicode
RETURNED_VALUE = re.compile(r"( +)(\w+): (.*)")


def prepare_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Rewrite a docstring so that napoleon and reStructuredText read it as it is meant.

    * Napoleon takes what stands before a colon in the first line of an attribute for its type, so
      the colons are hidden from it; ``restore_colons`` puts them back.
    * Several named values under ``Returns:`` become a list.
    * Outside of literals, ``|k|`` would be a substitution and a trailing underscore a reference.
    """
    if what in ("attribute", "property"):
        lines[:] = [line.replace(": ", f"{HIDDEN_COLON} ") for line in lines]
    if "Returns:" in lines:
        start = lines.index("Returns:") + 1
        end = next((i for i in range(start, len(lines)) if lines[i][:1].strip()), len(lines))
        lines[start:end] = _list_returned_values(lines[start:end])
    for i, line in enumerate(lines):
        pieces = line.split("``")
        for j in range(0, len(pieces), 2):
            pieces[j] = pieces[j].replace("|", "\\|")
            pieces[j] = re.sub(r"(?<=\w)_(?=[\s.,;:)]|$)", "\\\\_", pieces[j])
        lines[i] = "``".join(pieces)


def restore_colons(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Undo what ``prepare_docstring`` hid from napoleon."""
    lines[:] = [line.replace(HIDDEN_COLON, ":") for line in lines]


def _list_returned_values(lines: list[str]) -> list[str]:
    matches = [RETURNED_VALUE.fullmatch(line) for line in lines]
    indents = [match[1] for match in matches if match]
    named = [match if match and match[1] == min(indents) else None for match in matches]
    if sum(match is not None for match in named) < 2:
        return lines
    items = [f"{m[1]}* **{m[2]}** -- {m[3]}" if m else x for m, x in zip(named, lines, strict=True)]
    return [f"{min(indents)}A tuple with", "", *items]


def setup(app: Any) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("source-read", fill_markers)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", restore_colons, priority=600)
    return {"version": "1", "parallel_read_safe": True}
