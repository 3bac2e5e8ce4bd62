"""``mmrec grow``."""

import dataclasses
import itertools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrec.cli.options import (
    ALL_SETTINGS,
    SEED_BOUNDS,
    ModelOption,
    required_model,
    settings_options,
)
from mmrec.cli.session import say
from mmrec.errors import InputError

if TYPE_CHECKING:
    from mmrec.checkpoint.checkpoint import LoadedModel
    from mmrec.data.tokenizer import Tokenizer

SIZES = ("width", "depth", "heads", "ngram_buckets", "ffn_multiplier", "layer_types")


@settings_options(SIZES)
def grow(
    where: Annotated[
        Path | None, typer.Argument(metavar="RUN|CHECKPOINT", help="The model to grow.")
    ] = None,
    model: ModelOption = None,
    to: Annotated[str | None, typer.Option(metavar="PRESET", help="Preset to grow to.")] = None,
    vocab: Annotated[
        int | None, typer.Option(help="Vocabulary size of bpe; new tokens join old ones.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text for --vocab, by default the run's; or whose characters a char model gets."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="preserve|stack|random",
            help="Keep the function; copy layers into new ones; or keep nothing, to compare.",
        ),
    ] = "preserve",
    seed: Annotated[int, typer.Option(help="Seed of the new parameters.", **SEED_BOUNDS)] = 0,
    out: Annotated[Path | None, typer.Option(help="The grown checkpoint.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file --out.")] = False,
    **sizes: Any,
) -> None:
    """Make a larger model that computes the same: mmrec grow runs/tiny-stdlib --to mini."""
    from mmrec.checkpoint.checkpoint import load_model
    from mmrec.checkpoint.header import read_metadata
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.checkpoint.outputs import check_output
    from mmrec.config import ModelConfig, preset
    from mmrec.data.sources import iter_documents, source_files
    from mmrec.data.tokenizer import extend_characters
    from mmrec.evaluation.provenance import files_of_run
    from mmrec.finetune.grow import GrowthPlan, added_token_pieces, grow_checkpoint

    if to is None and vocab is None and data is None and not sizes:
        flags = ", ".join(ALL_SETTINGS[name].flag for name in SIZES)
        raise InputError(f"say what to grow: --to PRESET, --vocab, --data, or {flags}")
    path = find_checkpoint(required_model(where, model, "grow runs/tiny-stdlib --to mini"))
    _, info, old = read_metadata(path)
    tokenizer_kind = str(info.get("train", {}).get("data", {}).get("tokenizer", "bpe"))
    if data is not None and vocab is None and tokenizer_kind != "char":
        raise InputError(
            "--data is the text that --vocab takes new tokens from; give both (a char model gets "
            f"the characters of --data; this one is {tokenizer_kind})"
        )
    base = dataclasses.asdict(preset(to, tokenizer_kind) if to else old)
    new = ModelConfig.from_dict(base | sizes | {"vocab_size": old.vocab_size})
    GrowthPlan(old, new, method)  # a mistake is found before the weights are read
    if new == old and vocab is None and data is None:
        raise InputError(f"nothing to grow: {path} has this shape already")
    target = out or path.with_name(f"grown-{to or f'{new.width}x{new.depth}'}.h5")
    inputs = itertools.chain(files_of_run(path), source_files(data or ""))
    check_output(target, "checkpoint", inputs=inputs, force=force)
    source = load_model(path)
    tokenizer = source.tokenizer
    pieces: list[list[int]] = []
    if vocab is not None:
        tokenizer, pieces = _extend_vocabulary(source, vocab, data)
    elif data is not None:
        tokenizer = extend_characters(tokenizer, (d.text for d in iter_documents(data)))
        pieces = added_token_pieces(source, tokenizer)
        if not pieces and new == old:
            raise InputError(f"nothing to grow: {path} knows every character of {data} already")
    new = dataclasses.replace(new, vocab_size=tokenizer.vocab_size)
    grown = grow_checkpoint(
        source,
        new,
        target,
        preset=to or str(info.get("preset", "model")),
        method=method,
        seed=seed,
        tokenizer=tokenizer,
        pieces=pieces,
        force=force,
    )
    for title, shape, m in (("from", old, source.model), ("to", new, grown)):
        count = sum(p.numel() for p in m.parameters())
        typer.echo(
            f"{title:<5}width {shape.width}, {shape.depth} layers ({shape.resolved_layer_types}), "
            f"{shape.heads} heads, vocabulary {shape.vocab_size:,}, {count / 1e6:.2f} M parameters"
        )
    train_command = shlex.join(["mmrec", "train", "--initialize-from", str(target)])
    say(f"wrote {target}; train it with: {train_command}")


def _extend_vocabulary(
    source: "LoadedModel", vocab: int, data: str | None
) -> tuple["Tokenizer", list[list[int]]]:
    """The model's tokenizer with new tokens of a text, and the old tokens that each one joins."""
    from mmrec.data.prepare import read_options, training_texts
    from mmrec.data.tokenizer import extend_tokenizer
    from mmrec.evaluation.provenance import check_provenance

    if data is not None:
        texts = training_texts(data)
    else:
        settings = check_provenance(source, option="--data")
        texts = training_texts(settings.source, read_options(settings))
    return extend_tokenizer(source.tokenizer, texts, vocab)
