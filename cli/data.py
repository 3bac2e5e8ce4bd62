"""``mmrec data``: prepare a corpus, look into one."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrec.config import check_reading
from mmrec.errors import InputError

if TYPE_CHECKING:
    from mmrec.data.readers import Reading

app = typer.Typer(help="Tokenise text into a corpus file, or look into one.")

Source = Annotated[
    str, typer.Argument(help="stdlib, shakespeare, a file, folder or glob, -, or hf:NAME.")
]
Kind = Annotated[str, typer.Option("--tokenizer", help="bpe, char or byte.")]
Vocab = Annotated[int, typer.Option(help="Vocabulary of bpe.")]
Field = Annotated[str, typer.Option("--text-field", help="Field or column that holds the text.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Pass over broken records.")]
MaxBytes = Annotated[int, typer.Option(help="Read no more text than this.")]
ValShare = Annotated[float, typer.Option(help="Share of the text for validation.")]
ValFile = Annotated[str, typer.Option(help="Source of the validation text.")]


@app.command()
def prepare(
    source: Source = "stdlib",
    tokenizer: Kind = "bpe",
    vocab: Vocab = 5000,
    text_field: Field = "",
    skip_bad: SkipBad = False,
    max_bytes: MaxBytes = 0,
    val_share: ValShare = 0.1,
    val_file: ValFile = "",
    out: Annotated[Path | None, typer.Option(help="Where to write; default: the cache.")] = None,
    compress: Annotated[bool, typer.Option("--compress", help="Make a smaller file.")] = False,
) -> None:
    """Read text, split it, train a tokenizer, and write one HDF5 file."""
    from mmrec.data.prepare import prepare

    if out is not None and out.is_dir():
        raise InputError(f"--out must be a file to write; {out} is a folder")
    how = _reading(text_field, skip_bad, max_bytes, val_share, val_file)
    say = functools.partial(typer.echo, err=True)
    typer.echo(prepare(source, tokenizer, vocab, out, say, how, pack=compress))


def _reading(
    text_field: str, skip_bad: bool, max_bytes: int, val_share: float, val_file: str
) -> "Reading":
    from mmrec.data.readers import Reading

    check_reading(max_bytes, val_share)
    return Reading(text_field, skip_bad, max_bytes, val_share, val_file)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A corpus file, or any source of text.")] = "stdlib",
    tokenizer: Kind = "bpe",
    vocab: Vocab = 5000,
    text_field: Field = "",
    skip_bad: SkipBad = False,
    max_bytes: MaxBytes = 0,
    val_share: ValShare = 0.1,
    val_file: ValFile = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a corpus holds."""
    from mmrec.data.corpus import Corpus
    from mmrec.data.prepare import prepare

    how = _reading(text_field, skip_bad, max_bytes, val_share, val_file)
    corpus = Corpus.open(prepare(source, tokenizer, vocab, how=how))
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
    info = corpus.info
    typer.echo(f"source {_printable(info['source'])}")
    typer.echo(
        f"left out: {info['duplicates']:,} exact duplicates, {info['skipped']:,} broken "
        f"records; on the other side than by chance because they are like others: "
        f"{info['near_duplicates']:,}"
    )
    typer.echo(f"tokenizer {corpus.tokenizer.kind}, {corpus.tokenizer.vocab_size:,} tokens\n")
    typer.echo(f"{'':12}{'documents':>12}{'bytes':>14}{'tokens':>14}{'bytes/token':>13}")
    for name, s in sides.items():
        rate = s["bytes"] / max(1, s["tokens"])
        counts = f"{s['documents']:>12,}{s['bytes']:>14,}{s['tokens']:>14,}"
        typer.echo(f"{name:12}{counts}{rate:>13.2f}")
    for (weight, begin, end), part in zip(corpus.parts, info["mixture"], strict=True):
        if len(info["mixture"]) > 1:
            name = _printable(part["source"])
            typer.echo(f"{weight:>12g} of the windows from {end - begin:,} tokens of {name}")
    pieces = [corpus.tokenizer.decode([t]) for t in corpus.train.tokens[:40]]
    typer.echo("\nfirst tokens: " + "|".join(repr(p)[1:-1] for p in pieces))
    for title, shown in (("longest", info["longest"]), ("at random", info["random"])):
        typer.echo(f"\n{title} documents")
        for d in shown:
            name, start = (_printable(d[key]) for key in ("name", "text"))
            typer.echo(f"{d['bytes']:>14,}  {name}\n{'':14}  {start[:72]}")


def _printable(text: str) -> str:
    """On one line, with nothing that moves a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
