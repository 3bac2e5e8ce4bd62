"""``mmrec generate``."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mmrec.cli.options import SEED_BOUNDS, ModelOption, one_model, settings_options
from mmrec.cli.streams import argument_text, read_standard_input
from mmrec.config import DEFAULT_MAX_TOKENS, SamplingConfig
from mmrec.errors import InputError


@settings_options(SamplingConfig.settings(), declared=SamplingConfig.settings())
def generate(
    where: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|CHECKPOINT]", help="The model; by default the newest run's."),
    ] = None,
    model: ModelOption = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; - reads standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = DEFAULT_MAX_TOKENS,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End at this text; repeatable.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Equal seeds give equal text.", **SEED_BOUNDS)
    ] = None,
    **sampling: Any,
) -> None:
    """Continue a prompt, for example: mmrec generate --prompt "It was"."""
    sampling_config = SamplingConfig(**sampling)
    from mmrec.checkpoint.checkpoint import load_model
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.inference.generate import generate
    from mmrec.runtime.malloc import return_large_blocks

    chosen = one_model(where, model)
    if where is not None and not where.exists():
        raise InputError(f"no model at {where}: no such file or folder; a prompt needs --prompt")
    path = find_checkpoint(chosen)
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        text = read_standard_input()
    else:
        text = argument_text(prompt or "", "--prompt")
    stop_texts = [argument_text(text, "--stop") for text in stop or ()]
    return_large_blocks()  # only a long prompt takes large blocks, and once
    loaded = load_model(path)
    pieces = generate(
        loaded.model,
        loaded.tokenizer,
        text,
        sampling=sampling_config,
        max_tokens=max_tokens,
        stop=stop_texts,
        seed=seed,
    )
    start, is_prompt_shown = time.perf_counter(), False
    for piece in pieces:
        if not is_prompt_shown:
            sys.stdout.write(text)
            is_prompt_shown = True
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n" if is_prompt_shown else f"{text}\n")
    if sys.stderr.isatty():
        typer.echo(f"[{loaded.path}, {time.perf_counter() - start:.1f} s]", err=True)
