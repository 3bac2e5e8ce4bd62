"""``mmrec eval``."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmrec.checkpoint.checkpoint import Loaded
    from mmrec.config import TrainConfig
    from mmrec.data.corpus import Corpus

COPIED_TOKENS = 20_000_000  # of the training text, in which copies are looked for


Opt = typer.Option


def evaluate(
    where: Annotated[list[Path] | None, typer.Argument(metavar="[RUN|CHECKPOINT]...")] = None,
    data: Annotated[str | None, Opt(help="Other text to score, all of it.")] = None,
    text_field: Annotated[str, Opt(help="Field of --data that holds the text.")] = "",
    skip_bad: Annotated[bool, Opt("--skip-bad", help="Pass over broken records.")] = False,
    plot: Annotated[
        Path | None, Opt(help="Draw loss by position and calibration as a PNG.")
    ] = None,
    prompts: Annotated[Path | None, Opt(help="Write on from the prompts of a file.")] = None,
    temperatures: Annotated[str, Opt(help="Of --prompts, joined by commas.")] = "0,0.8,1",
    max_tokens: Annotated[int, Opt(help="Most tokens after a prompt.", min=1)] = 120,
    report: Annotated[Path | None, Opt(help="Write what came of --prompts: .md or .html.")] = None,
    tasks: Annotated[str, Opt(help="Tasks of lm-evaluation-harness, joined by commas.")] = "",
    include_path: Annotated[Path | None, Opt(help="Folder with more tasks, as YAML.")] = None,
    as_json: Annotated[bool, Opt("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on its whole validation split, on all of --data, by --prompts or --tasks."""
    from mmrec.checkpoint.checkpoint import load_model
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.errors import InputError

    for option, path in (("--plot", plot), ("--report", report)):
        if path is not None and path.is_dir():
            raise InputError(f"{option} must be a file to write; {path} is a folder")
    if len(where or ()) > 1 and not prompts:
        raise InputError(
            f"one model at a time is scored; got {len(where or ())}: --prompts takes "
            "several, and mmrec compare"
        )
    paths: list[Path | None] = [*where] if where else [None]
    models = [load_model(find_checkpoint(path)) for path in paths]
    if prompts:
        _write_on(models, prompts, temperatures, max_tokens, report, as_json)
    elif tasks:
        _run_tasks(models[0], tasks, include_path, as_json)
    else:
        _score(models[0], data, text_field, skip_bad, plot, as_json)


def _corpus(loaded: "Loaded") -> "Corpus":
    """The corpus that a model was trained on. Raises InputError if its text may not be read."""
    from mmrec.data.corpus import Corpus
    from mmrec.data.prepare import prepare, reading
    from mmrec.errors import InputError

    settings = _settings(loaded)
    if not may_read(settings, loaded.path):
        raise InputError(
            f"{loaded.path} says it was trained on {settings.data!r}; what a file names is "
            "not read unless the config.toml beside it names it too: give --data"
        )
    how = reading(settings)
    kept = loaded.tokenizer if settings.grow_from else settings.tokenizer
    corpus = Corpus.open(prepare(settings.data, kept, settings.vocab, how=how))
    if corpus.info["fingerprint"] != loaded.info.get("fingerprint"):
        raise InputError(
            f"the text of {settings.data}, or how mmrec reads it, changed since "
            "training; name --data"
        )
    return corpus


def _settings(loaded: "Loaded") -> "TrainConfig":
    from mmrec.config import TrainConfig, from_dict

    made: TrainConfig = from_dict(TrainConfig, loaded.info.get("train", {}))
    return made


def _write_on(
    models: list["Loaded"],
    prompts: Path,
    temperatures: str,
    max_tokens: int,
    report: Path | None,
    as_json: bool,
) -> None:
    from tqdm import tqdm

    from mmrec.errors import InputError
    from mmrec.evaluation.samples import as_html, as_markdown, read_prompts, write_samples
    from mmrec.inference.generate import Sampling
    from mmrec.runtime.atomic import write_text

    if report is not None and report.suffix not in (".md", ".html"):
        raise InputError(f"--report must end in .md or .html; got {report}")
    try:
        warm = [float(x) for x in temperatures.split(",")]
    except ValueError:
        raise InputError(
            f"--temperatures must be numbers joined by commas; got {temperatures!r}"
        ) from None
    for x in warm:
        Sampling(temperature=x)
    texts = read_prompts(prompts)
    training = [_training_text(loaded) for loaded in models]
    count = len(models) * len(texts) * len(warm)
    with tqdm(total=count, unit="text", leave=False, disable=None) as bar:
        made = write_samples(models, texts, warm, training, max_tokens, bar.update)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(s) for s in made], ensure_ascii=False, indent=1))
    elif report is None:
        typer.echo(as_markdown(made), nl=False)
    if report is not None:
        write_text(report, as_html(made) if report.suffix == ".html" else as_markdown(made))
        typer.echo(f"{count} texts: {report}", err=as_json)


def _training_text(loaded: "Loaded") -> bytes:
    """What copies are looked for in; nothing, said aloud, where it cannot be read."""
    from mmrec.errors import InputError

    try:
        train = _corpus(loaded).train.tokens[:COPIED_TOKENS]
    except InputError as error:
        typer.echo(f"note: copies of the training text are not looked for: {error}", err=True)
        return b""
    return b"".join(loaded.tokenizer.token_bytes(t) for t in train.tolist())


def _run_tasks(loaded: "Loaded", tasks: str, folder: Path | None, as_json: bool) -> None:
    from mmrec.errors import InputError

    if folder is not None and not folder.is_dir():
        raise InputError(f"--include-path must be a folder of tasks; {folder} is none")
    try:
        from lm_eval.utils import make_table

        from mmrec.evaluation.lm_eval import run_tasks
    except ImportError:
        raise InputError("--tasks needs a package: pip install 'mmrec[harness]'") from None
    made = run_tasks(loaded, [t for t in tasks.split(",") if t], folder)
    if as_json:
        typer.echo(json.dumps(made["results"], indent=1, default=str))
    else:
        typer.echo(make_table(made))


def _score(
    loaded: "Loaded",
    data: str | None,
    text_field: str,
    skip_bad: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    import numpy as np
    from tqdm import tqdm

    from mmrec.data.corpus import Corpus, is_prepared
    from mmrec.data.readers import ReadOptions
    from mmrec.data.sources import iter_documents
    from mmrec.data.tokenize import encode_documents
    from mmrec.errors import InputError
    from mmrec.evaluation.evaluate import TokenScores, evaluate
    from mmrec.evaluation.report import draw, make_report

    settings = _settings(loaded)
    if data is None:
        what, split = f"validation split of {settings.data}", _corpus(loaded).val
    elif is_prepared(data):
        corpus = Corpus.open(Path(data))
        if corpus.tokenizer.to_json() != loaded.tokenizer.to_json():
            raise InputError(
                f"{data} must have the tokenizer of {loaded.path}; it has another: "
                "give its text instead"
            )
        what, split = f"validation split of {data}", corpus.val
    else:
        texts = iter_documents(data, ReadOptions(text_field, skip_bad))
        what, split = f"all of {data}", encode_documents(loaded.tokenizer, texts)
        if not split.n_tokens:
            raise InputError(f"{data} is empty: expected text; got only white space or nothing")
    detail = TokenScores.empty(split.n_tokens)
    with tqdm(total=split.n_tokens, unit="tok", unit_scale=True, leave=False, disable=None) as bar:
        made = evaluate(
            loaded.model,
            split.tokens,
            loaded.tokenizer.eot,
            split.n_bytes,
            resets=settings.state != "window",
            detail=detail,
            progress=bar.update,
        )
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


def may_read(settings: "TrainConfig", checkpoint: Path) -> bool:
    """Whether the text that a checkpoint names is a built-in corpus or that of its run's config."""
    from mmrec.config import load_toml
    from mmrec.data.sources import CORPUS_NAMES

    if settings.data in CORPUS_NAMES and not settings.val_file:
        return True
    config = checkpoint.with_name("config.toml")
    said = load_toml(config).get("train", {}) if config.is_file() else {}
    return (said.get("data"), said.get("val_file", "")) == (settings.data, settings.val_file)
