"""``mmrec eval``."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrec.cli.options import MODEL_HELP, ModelsOption, settings_options, several_models
from mmrec.cli.session import say
from mmrec.cli.streams import print_json, print_note
from mmrec.config import TRAIN_SETTINGS, AdaptationConfig, NeuralCacheConfig, TrainConfig
from mmrec.errors import InputError, StorageError

if TYPE_CHECKING:
    from mmrec.checkpoint.checkpoint import LoadedModel
    from mmrec.evaluation.evaluate import CachedEvaluation, DynamicEvaluation, Evaluation
    from mmrec.evaluation.report import Report

READ_SETTINGS = ("text_field", "skip_bad")
ADAPTATION = AdaptationConfig.settings()
NEURAL_CACHE = NeuralCacheConfig.settings()
TEMPERATURES, MAX_TOKENS = "0,0.8,1", 120
"""Defaults of the options of --prompts."""


@settings_options(
    [*READ_SETTINGS, *ADAPTATION, *NEURAL_CACHE],
    declared=TRAIN_SETTINGS | ADAPTATION | NEURAL_CACHE,
)
def evaluate(
    where: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN|CHECKPOINT]...", help=MODEL_HELP),
    ] = None,
    model: ModelsOption = None,
    data: Annotated[str | None, typer.Option(help="Another text to score in full.")] = None,
    adapt: Annotated[
        bool,
        typer.Option(
            "--adapt",
            help="Add a row for dynamic evaluation: a copy of the model learns from each part of "
            "the text after its score.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw loss by position in the document and calibration as a PNG."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts to continue: one per line, or records.")
    ] = None,
    temperatures: Annotated[
        str | None,
        typer.Option(
            help="Temperatures for --prompts, joined by commas.", show_default=TEMPERATURES
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens per prompt.", min=1, show_default=str(MAX_TOKENS)),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the continuations of --prompts: .md or .html.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, joined by commas.")
    ] = None,
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
    from mmrec.evaluation.provenance import files_of_run

    if prompts is not None and tasks is not None:
        raise InputError("--tasks has no effect with --prompts")
    adaptation = {k: v for k, v in settings.items() if k in ADAPTATION}
    reading = {k: v for k, v in settings.items() if k in READ_SETTINGS}
    cache = {k: v for k, v in settings.items() if k in NEURAL_CACHE}
    adapts = adapt or None
    needs: dict[str, dict[str, Any]] = {
        "--prompts": {"temperatures": temperatures, "max_tokens": max_tokens, "report": report},
        "--tasks": {"include_path": include_path},
        "--adapt": adaptation,
        "--data or --prompts": reading,
    }
    needed = (prompts, tasks, adapts, prompts if data is None else data)
    for (option, dependent), value in zip(needs.items(), needed, strict=True):
        if value is None:
            _refuse(dependent, f"has no effect without {option}")
    if prompts is not None or tasks is not None:
        task = "--tasks" if prompts is None else "--prompts"
        _refuse({"data": data, "adapt": adapts, "plot": plot} | cache, f"has no effect with {task}")
    config = AdaptationConfig(**adaptation) if adapt else None
    size = NeuralCacheConfig(**cache).neural_cache
    if force and plot is None and report is None:
        raise InputError("--force overwrites --plot or --report; give one of them")
    chosen = several_models(where, model)
    if len(chosen) > 1 and prompts is None:
        raise InputError(
            f"one model at a time is scored; got {len(chosen)}: --prompts and mmrec compare take "
            "several"
        )
    paths: list[Path | None] = [*chosen] or [None]
    checkpoints = [find_checkpoint(path) for path in paths]
    inputs = [*([prompts] if prompts else []), *source_files(data or "")]
    for path in checkpoints:
        inputs += files_of_run(path)
    for option, kind, output in (("--plot", "picture", plot), ("--report", "report", report)):
        if output is not None:
            check_output(output, kind, option=option, inputs=inputs, force=force)
    models = [load_model(path) for path in checkpoints]
    if prompts is not None:
        temperatures = TEMPERATURES if temperatures is None else temperatures
        _write_samples(
            models, prompts, reading, temperatures, max_tokens or MAX_TOKENS, report, as_json
        )
    elif tasks is not None:
        _run_tasks(models[0], tasks, include_path, as_json)
    else:
        _score(models[0], data, reading, config, size, plot, as_json, force)


def _refuse(options: dict[str, Any], reason: str) -> None:
    """Raise InputError if one of these options, by their names in Python, is given."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')} {reason}")


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
    from mmrec.data.sources import read_prompts
    from mmrec.evaluation.samples import to_html, to_markdown, write_samples
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
    texts = read_prompts(prompts, note=print_note, **settings)
    training = [_training_text(loaded) for loaded in models]
    count = len(models) * len(texts) * len(values)
    with tqdm(total=count, unit="text", leave=False, disable=None) as bar:
        samples = write_samples(models, texts, values, training, max_tokens, bar.update)
    if as_json:
        print_json([dataclasses.asdict(s) for s in samples])
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
    from mmrec.evaluation.source import training_text

    try:
        return training_text(loaded)
    except InputError as error:
        print_note(f"copies of the training text are not searched for: {error}")
        return b""


def _run_tasks(loaded: "LoadedModel", tasks: str, folder: Path | None, as_json: bool) -> None:

    names = [name for name in tasks.split(",") if name]
    if not names:
        raise InputError(f"--tasks must be names joined by commas; got {tasks!r}")
    if folder is not None and not folder.is_dir():
        raise InputError(f"--include-path must be a folder of tasks; {folder} is none")
    try:
        from lm_eval.utils import make_table

        from mmrec.evaluation.lm_eval import run_tasks
    except ImportError:
        raise InputError("--tasks needs a package: pip install 'mmrec[harness]'") from None
    results = run_tasks(loaded, names, folder)
    if as_json:
        print_json(results["results"], default=str)
    else:
        typer.echo(make_table(results))


def _score(
    loaded: "LoadedModel",
    data: str | None,
    settings: dict[str, Any],
    adaptation: AdaptationConfig | None,
    neural_cache: int,
    plot: Path | None,
    as_json: bool,
    force: bool,
) -> None:
    from tqdm import tqdm

    from mmrec.evaluation.provenance import training_config
    from mmrec.evaluation.report import draw_report
    from mmrec.evaluation.source import evaluate_source
    from mmrec.pretrained import note_if_read

    config = TrainConfig()
    with contextlib.suppress(InputError):  # settings of another version; they are not needed
        config = training_config(loaded)
    source = data or config.data.source
    if note := note_if_read(loaded.path, source, config.finetune.initialize_from):
        print_note(note)
    with tqdm(unit="tok", unit_scale=True, leave=False, disable=None) as bar:

        def show(count: int, total: int) -> None:
            bar.total = total
            bar.update(count)

        scores, report, description = evaluate_source(
            loaded,
            data,
            adaptation=adaptation,
            neural_cache=neural_cache,
            progress=show,
            **settings,
        )
    title = f"{loaded.path}, step {loaded.step:,}"
    if as_json:
        extra = {"checkpoint": str(loaded.path), "step": loaded.step, "data": description}
        facts = dataclasses.asdict(scores)
        if adaptation is None:
            del facts["dynamic"]
        if not neural_cache:
            del facts["cached"]
        print_json(extra | facts | dataclasses.asdict(report))
    else:
        article = "the " * description.startswith("validation")
        _print_scores(scores, report, f"{title}, on {article}{description}")
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
    if scores.dynamic is not None:
        _print_dynamic(scores.dynamic)
    if scores.cached is not None:
        _print_cached(scores.cached)


def _print_dynamic(scores: "DynamicEvaluation") -> None:
    typer.echo(
        f"  with --adapt    {scores.bits_per_byte:.4f} bits per byte: dynamic evaluation, "
        f"{scores.updates:,} updates at rate {scores.learning_rate:g}, {scores.seconds:.1f} s"
    )


def _print_cached(scores: "CachedEvaluation") -> None:
    typer.echo(
        f"  with a cache    {scores.bits_per_byte:.4f} bits per byte: the newest "
        f"{scores.neural_cache:,} tokens are looked up, {scores.seconds:.1f} s"
    )


def _interval(interval: tuple[float, float] | None) -> str:
    return f" (95 % by documents: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
