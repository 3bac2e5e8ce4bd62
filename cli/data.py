"""``mmrec data``: prepare a corpus, look into one."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mmrec.config import InputError

app = typer.Typer(help="Tokenise text into a corpus file, or look into one.")

Source = Annotated[str, typer.Argument(help="stdlib, shakespeare, a file, a folder or a glob.")]
Kind = Annotated[str, typer.Option("--tokenizer", help="bpe, char or byte.")]
Vocab = Annotated[int, typer.Option(help="Vocabulary of bpe.")]


@app.command()
def prepare(
    source: Source = "stdlib",
    tokenizer: Kind = "bpe",
    vocab: Vocab = 5000,
    out: Annotated[Path | None, typer.Option(help="Where to write; default: the cache.")] = None,
) -> None:
    """Read text, split it, train a tokenizer, and write one HDF5 file."""
    from mmrec.data.corpus import prepare

    if out is not None and out.is_dir():
        raise InputError(f"--out must be a file to write; {out} is a folder")
    typer.echo(prepare(source, tokenizer, vocab, out, lambda line: typer.echo(line, err=True)))


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A corpus file, or any source of text.")] = "stdlib",
    tokenizer: Kind = "bpe",
    vocab: Vocab = 5000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a corpus holds."""
    from mmrec.data.corpus import Corpus, prepare

    corpus = Corpus.open(prepare(source, tokenizer, vocab))
    sides: dict[str, Any] = {
        name: {"documents": len(s.doc_bytes), "bytes": s.n_bytes, "tokens": s.n_tokens}
        for name, s in (("train", corpus.train), ("validation", corpus.val))
    }
    if as_json:
        info = {k: v for k, v in corpus.info.items() if k != "wanted"}
        made = {"kind": corpus.tokenizer.kind, "vocabulary": corpus.tokenizer.vocab_size}
        size = corpus.path.stat().st_size
        typer.echo(json.dumps(info | sides | {"tokenizer": made, "file_bytes": size}, indent=1))
        return
    typer.echo(f"{corpus.path}  ({corpus.path.stat().st_size / 1e6:.1f} MB)")
    typer.echo(
        f"source {corpus.info['source']}, exact duplicates left out: {corpus.info['duplicates']}"
    )
    typer.echo(f"tokenizer {corpus.tokenizer.kind}, {corpus.tokenizer.vocab_size:,} tokens\n")
    typer.echo(f"{'':12}{'documents':>12}{'bytes':>14}{'tokens':>14}{'bytes/token':>13}")
    for name, s in sides.items():
        rate = s["bytes"] / max(1, s["tokens"])
        counts = f"{s['documents']:>12,}{s['bytes']:>14,}{s['tokens']:>14,}"
        typer.echo(f"{name:12}{counts}{rate:>13.2f}")
    pieces = [corpus.tokenizer.decode([t]) for t in corpus.train.tokens[:40]]
    typer.echo("\nfirst tokens: " + "|".join(repr(p)[1:-1] for p in pieces))
