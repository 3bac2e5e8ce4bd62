"""``mmrec generate``."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

Opt = typer.Option


def generate(
    prompt: Annotated[str | None, Opt(help="Text to go on from; '-' reads standard input.")] = None,
    model: Annotated[Path | None, Opt(help="Run or checkpoint; default: the newest run.")] = None,
    max_tokens: Annotated[int, Opt(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, Opt(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, Opt(help="Keep the k likeliest; 0: off.")] = 0,
    top_p: Annotated[float, Opt(help="Keep the likeliest with this much probability.")] = 0.95,
    min_p: Annotated[float, Opt(help="Drop those below this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, Opt(help="Above 1: repeat less.")] = 1.0,
    seed: Annotated[int | None, Opt(help="Same seed, same text.", min=0, max=2**63 - 1)] = None,
    stop: Annotated[list[str] | None, Opt(help="End at this text; may be repeated.")] = None,
) -> None:
    """Write on from a prompt, as it comes."""
    from mmrec.checkpoint.checkpoint import load_model
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.inference.generate import generate
    from mmrec.inference.sampling import SamplingConfig
    from mmrec.runtime.malloc import return_large_blocks

    return_large_blocks()  # only a long prompt takes large blocks, and once
    sampling = SamplingConfig(repetition_penalty, temperature, top_k, top_p, min_p)
    loaded = load_model(find_checkpoint(model))
    piped = prompt is None and not sys.stdin.isatty()
    text = sys.stdin.read() if prompt == "-" or piped else prompt or ""
    pieces = generate(
        loaded.model,
        loaded.tokenizer,
        text,
        sampling=sampling,
        max_tokens=max_tokens,
        stop=stop or (),
        seed=seed,
    )
    begin, shown = time.perf_counter(), False
    for piece in pieces:
        if not shown:
            sys.stdout.write(text)
            shown = True
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n" if shown else f"{text}\n")
    if sys.stderr.isatty():
        typer.echo(f"[{loaded.path}, {time.perf_counter() - begin:.1f} s]", err=True)
