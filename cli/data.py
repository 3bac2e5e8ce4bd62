"""``mmrec data``: prepare a corpus, or show what one holds."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrec.cli.options import App, settings_options
from mmrec.cli.streams import print_json
from mmrec.config import PRESETS, DataConfig
from mmrec.errors import InputError

if TYPE_CHECKING:
    from mmrec.data.corpus import Corpus

app = App(help="Tokenise text into a corpus file, or look into one.")

SETTINGS = (
    "tokenizer",
    "vocab",
    "text_field",
    "skip_bad",
    "max_bytes",
    "val_fraction",
    "val_file",
)
DEFAULT_VOCAB = PRESETS["tiny"].vocab_size
SOURCE_HELP = "stdlib, shakespeare, a file, a folder, a glob, - for standard input, or hf:NAME."


def _prepare(source: str, settings: dict[str, Any], **options: Any) -> Path:
    from mmrec.data.prepare import check_given_settings, prepare, read_options

    config = DataConfig(source=source, **settings)
    check_given_settings(settings, config)
    vocab = config.vocab or DEFAULT_VOCAB
    return prepare(source, config.tokenizer, vocab, options=read_options(config), **options)


@app.command()
@settings_options(SETTINGS)
def prepare(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)] = "stdlib",
    out: Annotated[
        Path | None, typer.Option(help="The corpus file, .h5 or .hdf5; default: one in the cache.")
    ] = None,
    compress: Annotated[bool, typer.Option("--compress", help="Make a smaller file.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a file --out that is no corpus.")
    ] = False,
    **settings: Any,
) -> None:
    """Read text, split it, train a tokenizer, and write one HDF5 file."""
    if force and out is None:
        raise InputError("--force overwrites --out; give both")
    echo = functools.partial(typer.echo, err=True)
    typer.echo(_prepare(source, settings, out=out, progress=echo, compress=compress, force=force))


@app.command()
@settings_options(SETTINGS)
def inspect(
    source: Annotated[str, typer.Argument(help="A corpus file, or any source of text.")] = "stdlib",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **settings: Any,
) -> None:
    """Show what a corpus holds."""
    from mmrec.data.corpus import Corpus

    corpus = Corpus.open(_prepare(source, settings))
    splits: dict[str, Any] = {
        name: {"documents": len(s.doc_bytes), "bytes": s.n_bytes, "tokens": s.n_tokens}
        for name, s in (("train", corpus.train), ("validation", corpus.val))
    }
    total = sum(split["bytes"] for split in splits.values())
    for split in splits.values():
        split["share"] = split["bytes"] / total if total else 0.0
    if as_json:
        info = {k: v for k, v in corpus.info.items() if k != "cache_key"}
        tokenizer = {"kind": corpus.tokenizer.kind, "vocabulary": corpus.tokenizer.vocab_size}
        extra = {"tokenizer": tokenizer, "file_bytes": corpus.path.stat().st_size}
        print_json(info | splits | extra)
    else:
        _print(corpus, splits)


def _print(corpus: "Corpus", splits: dict[str, Any]) -> None:
    info = corpus.info
    typer.echo(f"{corpus.path}  ({corpus.path.stat().st_size / 1e6:.1f} MB)")
    typer.echo(f"source {_printable(info['source'])}")
    typer.echo(
        f"left out: {info['duplicates']:,} exact duplicates, {info['skipped']:,} broken records; "
        f"moved between splits as near-duplicates: {info['near_duplicates']:,}; cut, with text in "
        f"both splits: {info.get('cut_documents', 0):,}"
    )
    typer.echo(f"tokenizer {corpus.tokenizer.kind}, {corpus.tokenizer.vocab_size:,} tokens")
    if corpus.train.answers is not None and corpus.val.answers is not None:
        count = int(corpus.train.answers.sum() + corpus.val.answers.sum())
        typer.echo(f"conversations: {count:,} tokens of answers are learnt; bytes are of answers")
    typer.echo()
    heading = f"{'documents':>12}{'bytes':>14}{'share':>8}{'tokens':>14}{'bytes/token':>13}"
    typer.echo(f"{'':12}{heading}")
    for name, split in splits.items():
        rate = split["bytes"] / max(1, split["tokens"])
        counts = f"{split['documents']:>12,}{split['bytes']:>14,}{split['share']:>8.1%}"
        typer.echo(f"{name:12}{counts}{split['tokens']:>14,}{rate:>13.2f}")
    for (weight, begin, end), part in zip(corpus.mixture_streams, info["mixture"], strict=True):
        if len(info["mixture"]) > 1:
            name = _printable(part["source"])
            typer.echo(f"{weight:>12g} of the windows from {end - begin:,} tokens of {name}")
    first_tokens = [corpus.tokenizer.decode([t]) for t in corpus.train.tokens[:40]]
    typer.echo("\nfirst tokens: " + "|".join(repr(t)[1:-1] for t in first_tokens))
    for title, shown in (("longest", info["longest"]), ("random", info["random"])):
        typer.echo(f"\n{title} documents")
        for document in shown:
            name, start = (_printable(document[key]) for key in ("name", "text"))
            typer.echo(f"{document['bytes']:>14,}  {name}\n{'':14}  {start[:72]}")


def _printable(text: str) -> str:
    """One line of text, without characters that move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
