"""``mmrec score``."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrec.cli.options import (
    MODEL_HELP,
    ModelOption,
    ThreadsOption,
    WeightsOption,
    one_model,
    settings_options,
)
from mmrec.cli.session import say
from mmrec.cli.streams import print_json
from mmrec.config import TRAIN_SETTINGS, NeuralCacheConfig
from mmrec.errors import InputError
from mmrec.runtime.names import printable

if TYPE_CHECKING:
    from mmrec.data.tokenizer import Tokenizer
    from mmrec.inference.score import ScoredLine, Totals

READ_SETTINGS = ("text_field", "skip_bad")
NEURAL_CACHE = NeuralCacheConfig.settings()
PAGE_TOP = 5
"""Likeliest tokens that a page shows of each place."""


@settings_options([*READ_SETTINGS, *NEURAL_CACHE], declared=TRAIN_SETTINGS | NEURAL_CACHE)
def score(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="The text, as for --data of training; - reads standard input."
        ),
    ],
    where: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|CHECKPOINT]", help=MODEL_HELP),
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = "float32",
    threads: ThreadsOption = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="A row for each token instead of each line.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each line, then the totals.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write the text, coloured by surprise, as an HTML page.")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            help="Likeliest tokens to tell of each place, with --json or --html.",
            min=0,
            show_default=f"{PAGE_TOP} with --html, else 0",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a file --html that is no page of mmrec.")
    ] = False,
    **settings: Any,
) -> None:
    """Show what a model finds strange in a text: mmrec score book.txt --html book.html."""
    if as_json and html is not None:
        raise InputError("--json and --html are two forms of the same scores; give one of them")
    if tokens and (as_json or html is not None):
        raise InputError("--tokens is for the table; --json and --html tell every token anyway")
    if top is not None and not as_json and html is None:
        raise InputError("--top has no effect without --json or --html")
    if force and html is None:
        raise InputError("--force overwrites --html; give it")
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.checkpoint.outputs import check_output
    from mmrec.data.corpus import is_prepared
    from mmrec.data.readers import ReadOptions
    from mmrec.data.sources import iter_documents, source_files
    from mmrec.data.tokenize import encode_documents
    from mmrec.inference.neural_cache import load_with_cache
    from mmrec.inference.score import Page, Totals, line_bytes, line_json, score_lines
    from mmrec.runtime.atomic import atomic_write_text
    from mmrec.runtime.progress import hide_progress_bars, progress_bar

    path = find_checkpoint(one_model(where, model))
    if is_prepared(source):
        raise InputError(f"a text is scored; mmrec eval scores a prepared corpus; got {source}")
    if html is not None:
        inputs = [path, *source_files(source)]
        check_output(html, "score page", option="--html", inputs=inputs, force=force)
    cache = NeuralCacheConfig(settings.pop("neural_cache", 0))
    decoder = load_with_cache(path, cache.neural_cache, weights=weights, threads=threads)
    tokenizer = decoder.tokenizer
    top = (0 if html is None else PAGE_TOP) if top is None else top
    if top > tokenizer.vocab_size:
        raise InputError(f"--top must be <= {tokenizer.vocab_size}, the vocabulary; got {top}")
    options = ReadOptions(**settings)
    split = encode_documents(tokenizer, iter_documents(source, options))
    if not split.n_tokens:
        raise options.no_text(source)
    options.check_text_field(source)
    skipped = f" (records or files skipped: {options.skipped_records:,})"
    title = f"{path}, step {decoder.step:,}, on all of {source}"
    title += skipped * bool(options.skipped_records)
    totals, page = Totals(), Page(tokenizer)
    columns, table = (TOKEN_COLUMNS, _token_rows) if tokens else (LINE_COLUMNS, _line_rows)
    is_table = not as_json and html is None
    if not as_json:
        say(title)
    if is_table:
        print(f"\n{columns}")
    # a bar would stand between the rows of a table on the same terminal
    is_bar_hidden = html is None and sys.stdout.isatty()
    with (
        hide_progress_bars(is_bar_hidden),
        progress_bar(split.n_tokens, "scoring", "tok") as bar,
    ):
        for line in score_lines(decoder, split, top=top, progress=bar.update):
            totals.add(line, len(line_bytes(tokenizer, line)))
            if html is not None:
                page.add(line)
            elif as_json:
                print_json(line_json(tokenizer, line), indent=None)
            for row in table(tokenizer, line) if is_table else ():
                print(row)
    if as_json:
        about = {"checkpoint": str(path), "step": decoder.step, "data": source}
        print_json({"total": about | totals.as_json()}, indent=None)
        return
    _print_totals(totals)
    if html is not None:
        atomic_write_text(html, page.render(title, totals))
        say(f"  page            {html}")


LINE_COLUMNS = f"{'line':>8} {'bits':>9} {'bits/byte':>9}  text"
TOKEN_COLUMNS = f"{'line':>8} {'id':>9} {'bits':>9}  token"


def _line_rows(tokenizer: "Tokenizer", line: "ScoredLine") -> Iterator[str]:
    from mmrec.inference.score import line_bytes, to_bits

    data = line_bytes(tokenizer, line)
    bits = to_bits(line.logprob)
    rate = f"{bits / len(data):.3f}" if data else "-"
    text = printable(data.decode("utf-8", "replace").removesuffix("\n"))
    yield f"{_place(line):>8} {bits:>9.2f} {rate:>9}  {text}"


def _token_rows(tokenizer: "Tokenizer", line: "ScoredLine") -> Iterator[str]:
    from mmrec.inference.score import quoted, to_bits

    for token, logprob in zip(line.tokens.tolist(), line.scores.logprobs.tolist(), strict=True):
        yield f"{_place(line):>8} {token:>9} {to_bits(logprob):>9.2f}  {quoted(tokenizer, token)}"


def _place(line: "ScoredLine") -> str:
    """The line, with the number of its document before it from the second one on."""
    return f"{line.document}:{line.number}" if line.document > 1 else str(line.number)


def _print_totals(totals: "Totals") -> None:
    print()
    print(f"  loss            {totals.loss:.4f} nats per token")
    print(f"  perplexity      {totals.perplexity:.2f}")
    print(f"  bits per byte   {totals.bits_per_byte:.4f}")
    print(
        f"  scored          {totals.tokens:,} tokens, {totals.bytes:,} bytes, "
        f"{totals.documents:,} documents"
    )
