"""``mmrec eval``."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmrec.checkpoint.checkpoint import LoadedModel

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


def _write_on(
    models: list["LoadedModel"],
    prompts: Path,
    temperatures: str,
    max_tokens: int,
    report: Path | None,
    as_json: bool,
) -> None:
    from tqdm import tqdm

    from mmrec.config import SamplingConfig
    from mmrec.errors import InputError
    from mmrec.evaluation.samples import read_prompts, to_html, to_markdown, write_samples
    from mmrec.runtime.atomic import atomic_write_text

    if report is not None and report.suffix not in (".md", ".html"):
        raise InputError(f"--report must end in .md or .html; got {report}")
    try:
        warm = [float(x) for x in temperatures.split(",")]
    except ValueError:
        raise InputError(
            f"--temperatures must be numbers joined by commas; got {temperatures!r}"
        ) from None
    for x in warm:
        SamplingConfig(temperature=x)
    texts = read_prompts(prompts)
    training = [_training_text(loaded) for loaded in models]
    count = len(models) * len(texts) * len(warm)
    with tqdm(total=count, unit="text", leave=False, disable=None) as bar:
        made = write_samples(models, texts, warm, training, max_tokens, bar.update)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(s) for s in made], ensure_ascii=False, indent=1))
    elif report is None:
        typer.echo(to_markdown(made), nl=False)
    if report is not None:
        atomic_write_text(report, to_html(made) if report.suffix == ".html" else to_markdown(made))
        typer.echo(f"{count} texts: {report}", err=as_json)


def _training_text(loaded: "LoadedModel") -> bytes:
    """What copies are looked for in; nothing, said aloud, where it cannot be read."""
    from mmrec.errors import InputError
    from mmrec.evaluation.source import training_text

    try:
        return training_text(loaded)
    except InputError as error:
        typer.echo(f"note: copies of the training text are not looked for: {error}", err=True)
        return b""


def _run_tasks(loaded: "LoadedModel", tasks: str, folder: Path | None, as_json: bool) -> None:
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
    loaded: "LoadedModel",
    data: str | None,
    text_field: str,
    skip_bad: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    from tqdm import tqdm

    from mmrec.evaluation.report import draw_report
    from mmrec.evaluation.source import evaluate_source

    with tqdm(unit="tok", unit_scale=True, leave=False, disable=None) as bar:

        def show(count: int, total: int) -> None:
            bar.total = total
            bar.update(count)

        made, report, what = evaluate_source(
            loaded, data, text_field=text_field, skip_bad=skip_bad, progress=show
        )
    if plot is not None:
        draw_report(report, plot, f"{loaded.path}, step {loaded.step:,}")
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
