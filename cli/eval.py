"""``mmrec eval``."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrec.cli.options import ALL_SETTINGS, settings_options
from mmrec.cli.session import say

if TYPE_CHECKING:
    from mmrec.checkpoint.checkpoint import LoadedModel
    from mmrec.evaluation.evaluate import Evaluation
    from mmrec.evaluation.report import Report

EVAL_SETTINGS = ("text_field", "skip_bad")
DEFAULT_TEMPERATURES = "0,0.8,1"
DEFAULT_MAX_TOKENS = 120


@settings_options(EVAL_SETTINGS)
def evaluate(
    where: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN|CHECKPOINT]...", help="By default the newest run."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Another text to score in full.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw loss by position in the document and calibration as a PNG."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts to continue: one per line, or records.")
    ] = None,
    temperatures: Annotated[
        str, typer.Option(help="Temperatures for --prompts, joined by commas.")
    ] = DEFAULT_TEMPERATURES,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens per prompt.", min=1)
    ] = DEFAULT_MAX_TOKENS,
    report: Annotated[
        Path | None, typer.Option(help="Write the continuations of --prompts: .md or .html.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness, joined by commas.")
    ] = "",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with more tasks, as YAML.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Overwrite a file --plot or --report that mmrec did not write."
        ),
    ] = False,
    **settings: Any,
) -> None:
    """Score a model on its validation split, on --data, by --prompts, or by --tasks."""
    from mmrec.checkpoint.checkpoint import load_model
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.checkpoint.outputs import check_output
    from mmrec.data.sources import source_files
    from mmrec.errors import InputError
    from mmrec.evaluation.provenance import files_of_run

    mode = "--prompts" if prompts else "--tasks" if tasks else ""
    for option, is_given, modes in (
        ("--data", data is not None, [""]),
        ("--plot", plot is not None, [""]),
        *((ALL_SETTINGS[name].flag, True, ["", "--prompts"]) for name in settings),
        ("--temperatures", temperatures != DEFAULT_TEMPERATURES, ["--prompts"]),
        ("--max-tokens", max_tokens != DEFAULT_MAX_TOKENS, ["--prompts"]),
        ("--report", report is not None, ["--prompts"]),
        ("--tasks", bool(tasks), ["--tasks"]),
        ("--include-path", include_path is not None, ["--tasks"]),
    ):
        if is_given and mode not in modes:
            reason = f"with {mode}" if mode else f"without {modes[0]}"
            raise InputError(f"{option} has no effect {reason}: leave it out")
    if force and plot is None and report is None:
        raise InputError("--force overwrites --plot or --report; give one of them")
    if len(where or ()) > 1 and not prompts:
        raise InputError(
            f"one model at a time is scored; got {len(where or ())}: --prompts takes "
            "several, and mmrec compare"
        )
    paths: list[Path | None] = [*where] if where else [None]
    checkpoints = [find_checkpoint(path) for path in paths]
    inputs = [*([prompts] if prompts else []), *source_files(data or "")]
    for path in checkpoints:
        inputs += files_of_run(path)
    for option, kind, output in (("--plot", "picture", plot), ("--report", "report", report)):
        if output is not None:
            check_output(output, kind, option=option, inputs=inputs, force=force)
    models = [load_model(path) for path in checkpoints]
    if prompts:
        _write_samples(models, prompts, settings, temperatures, max_tokens, report, as_json)
    elif tasks:
        _run_tasks(models[0], tasks, include_path, as_json)
    else:
        _score(models[0], data, settings, plot, as_json, force)


def _write_samples(
    models: list["LoadedModel"],
    prompts: Path,
    settings: dict[str, Any],
    temperatures: str,
    max_tokens: int,
    report: Path | None,
    as_json: bool,
) -> None:
    from tqdm import tqdm

    from mmrec.checkpoint.outputs import REPORT_MARK
    from mmrec.config import SamplingConfig
    from mmrec.errors import InputError, StorageError
    from mmrec.evaluation.samples import read_prompts, to_html, to_markdown, write_samples
    from mmrec.runtime.atomic import atomic_write_text

    if report is not None and report.suffix not in (".md", ".html"):
        raise InputError(f"--report must end in .md or .html; got {report}")
    try:
        values = [float(x) for x in temperatures.split(",")]
    except ValueError:
        raise InputError(
            f"--temperatures must be numbers joined by commas; got {temperatures!r}"
        ) from None
    for x in values:
        SamplingConfig(temperature=x)
    texts = read_prompts(prompts, **settings)
    training = [_training_text(loaded) for loaded in models]
    count = len(models) * len(texts) * len(values)
    with tqdm(total=count, unit="text", leave=False, disable=None) as bar:
        samples = write_samples(models, texts, values, training, max_tokens, bar.update)
    if as_json:
        typer.echo(
            json.dumps([dataclasses.asdict(s) for s in samples], ensure_ascii=False, indent=1)
        )
    elif report is None:
        typer.echo(to_markdown(samples), nl=False)
    if report is not None:
        page = to_html(samples) if report.suffix == ".html" else to_markdown(samples)
        try:
            atomic_write_text(report, REPORT_MARK + page)
        except StorageError:
            if not as_json:
                typer.echo(to_markdown(samples), nl=False)  # the texts are not lost
            raise
        typer.echo(f"{count} texts: {report}", err=as_json)


def _training_text(loaded: "LoadedModel") -> bytes:
    """The text in which copies are searched; empty, with a note, if it cannot be read."""
    from mmrec.errors import InputError
    from mmrec.evaluation.source import training_text

    try:
        return training_text(loaded)
    except InputError as error:
        typer.echo(f"note    copies of the training text are not searched for: {error}", err=True)
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
    results = run_tasks(loaded, [t for t in tasks.split(",") if t], folder)
    if as_json:
        typer.echo(json.dumps(results["results"], indent=1, default=str))
    else:
        typer.echo(make_table(results))


def _score(
    loaded: "LoadedModel",
    data: str | None,
    settings: dict[str, Any],
    plot: Path | None,
    as_json: bool,
    force: bool,
) -> None:
    from tqdm import tqdm

    from mmrec.evaluation.report import draw_report
    from mmrec.evaluation.source import evaluate_source

    with tqdm(unit="tok", unit_scale=True, leave=False, disable=None) as bar:

        def show(count: int, total: int) -> None:
            bar.total = total
            bar.update(count)

        scores, report, description = evaluate_source(loaded, data, progress=show, **settings)
    title = f"{loaded.path}, step {loaded.step:,}"
    if as_json:
        extra = {"checkpoint": str(loaded.path), "step": loaded.step, "data": description}
        typer.echo(
            json.dumps(extra | dataclasses.asdict(scores) | dataclasses.asdict(report), indent=1)
        )
    else:
        _print_scores(scores, report, f"{title}, on the {description}")
    if plot is not None:  # last: without a picture there are still the scores
        draw_report(report, plot, title, force=force)
        if not as_json:
            say(f"  picture         {plot}")


def _print_scores(scores: "Evaluation", report: "Report", heading: str) -> None:
    say(heading)
    typer.echo()
    typer.echo(f"  loss            {scores.loss:.4f} nats per token")
    typer.echo(f"  perplexity      {scores.perplexity:.2f}")
    typer.echo(f"  bits per byte   {scores.bits_per_byte:.4f}{_interval(report.interval)}")
    typer.echo(f"  accuracy        {scores.accuracy:.2%} of next tokens")
    typer.echo(f"  calibration     {report.calibration_error:.3f} between probability and accuracy")
    rate = scores.tokens / scores.seconds
    typer.echo(
        f"  scored          {scores.tokens:,} tokens, {scores.bytes:,} bytes, {report.documents:,} "
        f"documents, {rate:,.0f} tokens/s"
    )


def _interval(interval: tuple[float, float] | None) -> str:
    return f" (95 % by documents: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
