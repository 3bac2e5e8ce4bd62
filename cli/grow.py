"""``mmrec grow``."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmrec.cli.eval import may_read

if TYPE_CHECKING:
    from mmrec.checkpoint.checkpoint import LoadedModel
    from mmrec.data.tokenizer import Tokenizer

Opt = typer.Option


def grow(
    where: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="What is grown.")],
    to: Annotated[str | None, Opt(help="Preset to grow to.")] = None,
    width: Annotated[int | None, Opt(help="Width.")] = None,
    depth: Annotated[int | None, Opt(help="Number of layers.")] = None,
    heads: Annotated[int | None, Opt(help="Heads of the long-term memory.")] = None,
    ngrams: Annotated[int | None, Opt(help="Rows of the table of pairs and triples.")] = None,
    ffn: Annotated[float | None, Opt(help="Feed-forward size, a multiple of the width.")] = None,
    layers: Annotated[str | None, Opt(help="Memories by layer, as for train.")] = None,
    vocab: Annotated[int | None, Opt(help="Tokens of bpe; new ones join old ones.")] = None,
    data: Annotated[str | None, Opt(help="Text for --vocab; by default the run's.")] = None,
    how: Annotated[str, Opt(help="preserve, stack or random.")] = "preserve",
    seed: Annotated[int, Opt(min=0, max=(1 << 63) - 1, help="Of what is new.")] = 0,
    out: Annotated[Path | None, Opt(help="The grown checkpoint.")] = None,
    force: Annotated[bool, Opt("--force", help="Overwrite --out.")] = False,
) -> None:
    """Make a model larger that computes what it did: mmrec grow runs/tiny-stdlib --to mini."""
    given = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "ngrams": ngrams,
        "ffn": ffn,
        "layers": layers,
    }
    given = {k: v for k, v in given.items() if v is not None}

    from mmrec.checkpoint.checkpoint import load_model, read_metadata
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.config import ModelConfig, from_dict, preset
    from mmrec.errors import InputError
    from mmrec.finetune.grow import Growth

    if to is None and vocab is None and not given:
        raise InputError(
            "say what to grow: --to PRESET, or --width, --depth, --heads, --ngrams, "
            "--ffn, --layers, --vocab"
        )
    if data is not None and vocab is None:
        raise InputError("--data is the text that --vocab takes new tokens from; give both")
    path = find_checkpoint(where)
    _, info, old = read_metadata(path)
    kind = str(info.get("train", {}).get("tokenizer", "bpe"))
    base = dataclasses.asdict(preset(to, kind) if to else old)
    new = from_dict(ModelConfig, base | given | {"vocab_size": old.vocab_size})
    Growth(old, new, how)  # a mistake is said before the weights are read
    if new == old and vocab is None:
        raise InputError(f"nothing to grow: {path} has this shape already")
    name = to or str(info.get("preset", "model"))
    target = out or path.with_name(f"grown-{to or f'{new.width}x{new.depth}'}.h5")
    if target.is_dir():
        raise InputError(f"--out must be a file to write; {target} is a folder")
    if target.exists() and not force:
        raise InputError(f"{target} is there already: choose another --out, or add --force")

    from mmrec.finetune.start import grow_checkpoint

    loaded = load_model(path)
    tokenizer = loaded.tokenizer
    pieces: list[list[int]] = []
    if vocab is not None:
        tokenizer, pieces = _extend(loaded, vocab, data)
        new = dataclasses.replace(new, vocab_size=tokenizer.vocab_size)
    model = grow_checkpoint(
        loaded, new, target, name=name, how=how, seed=seed, tokenizer=tokenizer, pieces=pieces
    )
    for title, shape, m in (("from", old, loaded.model), ("to", new, model)):
        count = sum(p.numel() for p in m.parameters())
        typer.echo(
            f"{title:<5}width {shape.width}, {shape.depth} layers ({shape.kinds}), "
            f"{shape.heads} heads, vocabulary {shape.vocab_size:,}, "
            f"{count / 1e6:.2f} M parameters"
        )
    typer.echo(f"wrote {target}; train it on: mmrec train --grow-from {target}")


def _extend(
    loaded: "LoadedModel", vocab: int, data: str | None
) -> tuple["Tokenizer", list[list[int]]]:
    """The model's tokenizer with tokens of a text added, and what each of them joins."""
    from mmrec.config import TrainConfig, from_dict
    from mmrec.data.prepare import reading, training_texts
    from mmrec.data.tokenizer import extend_tokenizer
    from mmrec.errors import InputError

    settings = from_dict(TrainConfig, loaded.info.get("train", {}))
    if data is None and not may_read(settings, loaded.path):
        raise InputError(
            f"{loaded.path} says it was trained on {settings.data!r}; what a file names is "
            "not read unless the config.toml beside it names it too: give --data"
        )
    texts = training_texts(data) if data else training_texts(settings.data, reading(settings))
    return extend_tokenizer(loaded.tokenizer, texts, vocab)
