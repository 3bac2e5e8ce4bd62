"""``mmrec eval``."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    where: Annotated[Path | None, typer.Argument(metavar="[RUN|CHECKPOINT]")] = None,
    data: Annotated[str | None, typer.Option(help="Other text to score, all of it.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw loss by position and calibration as a PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on its whole validation split, or on all of --data."""
    import numpy as np
    from tqdm import tqdm

    from mmrec.checkpoint import find_checkpoint, load_model
    from mmrec.config import InputError, TrainConfig, from_dict
    from mmrec.data.corpora import load_documents
    from mmrec.data.corpus import Corpus, encode_documents, prepare
    from mmrec.evaluate import TokenScores, evaluate
    from mmrec.report import draw, make_report

    if plot is not None and plot.is_dir():
        raise InputError(f"--plot must be a file to write the picture in; {plot} is a folder")
    loaded = load_model(find_checkpoint(where))
    settings = dataclasses.asdict(from_dict(TrainConfig, loaded.info.get("train", {})))
    if data is None:
        if not may_read(settings["data"], loaded.path):
            raise InputError(
                f"{loaded.path} says it was trained on {settings['data']!r}; what a file names is "
                "not read unless the config.toml beside it names it too: give --data"
            )
        what = f"validation split of {settings['data']}"
        made_before = loaded.tokenizer if settings["grow_from"] else settings["tokenizer"]
        corpus = Corpus.open(prepare(settings["data"], made_before, settings["vocab"]))
        if corpus.info["fingerprint"] != loaded.info.get("fingerprint"):
            raise InputError(f"the text of {settings['data']} changed since training; name --data")
        split = corpus.val
    else:
        what, split = f"all of {data}", encode_documents(loaded.tokenizer, load_documents(data))
    detail = TokenScores.empty(split.n_tokens)
    with tqdm(total=split.n_tokens, unit="tok", unit_scale=True, leave=False, disable=None) as bar:
        made = evaluate(loaded.model, split.tokens, loaded.tokenizer.eot, split.n_bytes,
                        detail=detail, progress=bar.update)  # fmt: skip
    tokenizer = loaded.tokenizer
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    report = make_report(np.asarray(split.tokens), tokenizer.eot, sizes, detail)
    if plot is not None:
        draw(report, plot, f"{loaded.path}, step {loaded.step:,}")
    if as_json:
        extra = {"checkpoint": str(loaded.path), "step": loaded.step, "data": what}
        typer.echo(
            json.dumps(extra | dataclasses.asdict(made) | dataclasses.asdict(report), indent=1)
        )
        return
    typer.echo(f"{loaded.path}, step {loaded.step:,}, on the {what}\n")
    typer.echo(f"  loss            {made.loss:.4f} nats/token")
    typer.echo(f"  perplexity      {made.perplexity:.2f}")
    typer.echo(f"  bits per byte   {made.bits_per_byte:.4f}{_interval(report.interval)}")
    typer.echo(f"  accuracy        {made.accuracy:.2%} of next tokens")
    typer.echo(f"  calibration     {report.calibration_error:.3f} between probability and accuracy")
    rate = made.tokens / made.seconds
    typer.echo(
        f"  scored          {made.tokens:,} tokens, {made.bytes:,} bytes, {report.documents:,} "
        f"documents, {rate:,.0f} tokens/s"
    )
    if plot is not None:
        typer.echo(f"  picture         {plot}")


def _interval(interval: tuple[float, float] | None) -> str:
    return f" (95 % by documents: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""


def may_read(source: str, checkpoint: Path) -> bool:
    """Whether the text that a checkpoint names is a built-in corpus or that of its run's config."""
    from mmrec.config import load_toml
    from mmrec.data.corpora import NAMES

    config = checkpoint.with_name("config.toml")
    return source in NAMES or (
        config.is_file() and load_toml(config).get("train", {}).get("data") == source
    )
