"""``mmrec models``."""

import dataclasses
from typing import Annotated

import typer

from mmrec.cli.streams import print_json
from mmrec.errors import InputError, did_you_mean
from mmrec.pretrained import (
    IN_MODELS_PACKAGE,
    MODELS_PACKAGE,
    PretrainedModel,
    how_to_install,
    pretrained_models,
)


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print the card of this model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the pretrained models that are installed, or print the card of one.

    Every command that takes a model takes such a name: mmrec generate english.
    """
    known = pretrained_models()
    if name is None:
        if as_json:
            print_json([_facts(model) for model in known.values()])
        else:
            _print_table(list(known.values()))
        return
    if name not in known:
        if name in IN_MODELS_PACKAGE:
            raise InputError(how_to_install(name))
        raise InputError(
            f"no pretrained model is named {name!r}{did_you_mean(name, known)}; there are "
            f"{', '.join(known) or 'none'}"
        )
    if as_json:
        print_json(_facts(known[name]))
    else:
        typer.echo(known[name].card.rstrip())


def _facts(model: PretrainedModel) -> dict[str, object]:
    facts = dataclasses.asdict(model)
    return {**facts.pop("facts"), **facts, "path": str(model.path)}


def _print_table(known: list[PretrainedModel]) -> None:
    if not known:
        typer.echo("no pretrained models are part of this installation")
        return
    width = max(len(model.name) for model in known)
    typer.echo(f"{'name':<{width}}  preset  parameters  {'tokens':<12}  {'file':>7}  has read")
    for model in known:
        tokens = model.tokenizer + f" {model.vocab_size:,}" * (model.tokenizer == "bpe")
        size = f"{model.path.stat().st_size / 1e6:.1f} MB" if model.path.exists() else "missing"
        typer.echo(
            f"{model.name:<{width}}  {model.preset:<6}  {model.parameters / 1e6:>8.2f} M  "
            f"{tokens:<12}  {size:>7}  {model.summary}"
        )
    if missing := [name for name in IN_MODELS_PACKAGE if name not in {m.name for m in known}]:
        typer.echo(f"not installed: {', '.join(missing)} (package {MODELS_PACKAGE})")
    first = known[0].name
    typer.echo(
        f"\nmmrec generate {first}; mmrec finetune {first} --data FILE; mmrec models {first}"
    )
