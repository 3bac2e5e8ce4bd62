"""``mmrec generate``."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrec.cli.options import (
    ALL_SETTINGS,
    MODEL_HELP,
    SEED_BOUNDS,
    ModelOption,
    ThreadsOption,
    WeightsOption,
    one_model,
    settings_options,
)
from mmrec.cli.streams import argument_text, print_json, print_note, read_standard_input
from mmrec.config import DEFAULT_MAX_TOKENS, AdaptationConfig, NeuralCacheConfig, SamplingConfig
from mmrec.errors import InputError
from mmrec.pretrained import names_pretrained

if TYPE_CHECKING:
    from mmrec.data.tokenizer import Tokenizer
    from mmrec.inference.decoder import Decoder
    from mmrec.inference.engine import Completion, Request
    from mmrec.inference.session import Session

READ_SETTINGS = ("text_field", "skip_bad")
SAMPLING = SamplingConfig.settings()
ADAPTATION = AdaptationConfig.settings()
NEURAL_CACHE = NeuralCacheConfig.settings()
CHARACTERS_PER_TOKEN = 4  # about, of a prompt by bpe; others read more tokens, which is soon done


@settings_options(
    [*SAMPLING, *READ_SETTINGS, *ADAPTATION, *NEURAL_CACHE],
    declared=ALL_SETTINGS | SAMPLING | ADAPTATION | NEURAL_CACHE,
)
def generate(
    where: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|CHECKPOINT]", help=MODEL_HELP),
    ] = None,
    model: ModelOption = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; - reads standard input.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|-",
            help="Continue many prompts: one per line, or records. - reads standard input.",
        ),
    ] = None,
    read: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A text before the prompt, as for --data; it is not printed."
        ),
    ] = None,
    adapt: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="As --read; and the model learns from the text first. Its file stays as it is.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Continue a session that --save-state or mmrec chat wrote."),
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(help="Write the session that the text ends in.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts per prompt.")] = 1,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens to generate per text.")
    ] = DEFAULT_MAX_TOKENS,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End at this text; repeatable.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Equal seeds give equal text; each further text adds 1.", **SEED_BOUNDS),
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN=BIAS",
            help="Add a bias, -100 to 100, to the logit of a token: an id, or a text in double "
            "quotes; repeatable.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON per text.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="In JSON, the log-probabilities of the tokens, and the most likely ones of each "
            "place, as many as given.",
        ),
    ] = None,
    weights: WeightsOption = "float32",
    threads: ThreadsOption = None,
    **settings: Any,
) -> None:
    """Continue a prompt, for example: mmrec generate --prompt "It was"."""
    sampling = SamplingConfig(**{k: v for k, v in settings.items() if k in SAMPLING})
    reading = {k: v for k, v in settings.items() if k in READ_SETTINGS}
    adaptation = {k: v for k, v in settings.items() if k in ADAPTATION}
    if adapt is not None:
        options = {"--read": read, "--state": state, "--save-state": save_state}
        _check_adapt(adapt, weights, options)
        read = adapt
    elif adaptation:
        raise InputError("--adapt-lr has no effect without --adapt")
    config = AdaptationConfig(**adaptation)
    cache = {k: v for k, v in settings.items() if k in NEURAL_CACHE and v}
    NeuralCacheConfig(**cache)
    if prompts is not None and prompt is not None:
        raise InputError("give prompts once, by --prompt or by --prompts; got both")
    if prompts is None and read is None:
        for name in reading:
            raise InputError(
                f"--{name.replace('_', '-')} has no effect without --prompts, --read or --adapt"
            )
    if prompts is not None and read is not None and reading:
        option = "--read" if adapt is None else "--adapt"
        raise InputError(f"--text-field and --skip-bad are for --prompts or for {option}; got both")
    if read == "-" and "-" in (prompt, str(prompts)):
        raise InputError("standard input can be read only once; got - twice")
    if save_state is not None and (prompts is not None or samples > 1 or as_json):
        raise InputError("--save-state is for one text: leave out --prompts, --samples and --json")
    if logprobs is not None and not as_json:
        raise InputError("--logprobs has no effect without --json")
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.inference.decoder import Decoder
    from mmrec.inference.decoder_choice import load_decoder
    from mmrec.inference.engine import Request
    from mmrec.inference.generate import generate
    from mmrec.inference.neural_cache import CachingDecoder

    chosen = one_model(where, model)
    if where is not None and not (where.exists() or names_pretrained(where)):
        raise InputError(f"no model at {where}: no such file or folder; a prompt needs --prompt")
    path = find_checkpoint(chosen)
    if save_state is not None:
        from mmrec.checkpoint.outputs import check_output
        from mmrec.data.sources import source_files

        inputs = [path, *source_files(read or "")]
        check_output(save_state, "session", option="--save-state", inputs=inputs, force=None)
    if prompts is not None:
        from mmrec.data.sources import read_prompts

        texts = read_prompts(prompts, note=print_note, **reading)
    elif prompt == "-" or (prompt is None and read != "-" and not sys.stdin.isatty()):
        texts = [read_standard_input()]
    else:
        texts = [argument_text(prompt or "", "--prompt")]
    request = Request(
        sampling=sampling,
        max_tokens=max_tokens,
        stop=[argument_text(text, "--stop") for text in stop or ()],
        seed=seed,
        logprobs=logprobs,
        return_state=False,
    )
    if adapt is not None:
        reading = reading if prompts is None else {}
        decoder = _adapted_decoder(path, adapt, config, reading, threads, cache)
    elif cache:
        decoder = CachingDecoder.load(path, weights=weights, threads=threads, **cache)
    elif weights == "float32" and {threads, read, state, save_state} == {None}:
        prompt_tokens = sum(map(len, texts)) // CHARACTERS_PER_TOKEN
        decoder = load_decoder(path, prompt_tokens + len(texts) * samples * max_tokens)
    else:
        decoder = Decoder.load(path, weights=weights, threads=threads)
    request = replace(request, logit_bias=_parse_biases(logit_bias or [], decoder.tokenizer))
    session = None
    if read is not None or state is not None or save_state is not None:
        session = _open_session(decoder, state, read, {} if prompts is not None else reading)
        request = replace(request, state=session.state)
    begin = time.perf_counter()
    if prompts is None and samples == 1 and not as_json:
        request = replace(request, prompt=texts[0])
        _print_text(
            generate(decoder, request) if session is None else session.stream(request), texts[0]
        )
        if session is not None and save_state is not None:
            session.save(save_state, option="--save-state", force=None)
    else:
        if prompts is not None:
            for number, text in enumerate(texts, 1):
                decoder.tokenizer.check_text(text, f"prompt {number}")
        _print_all(decoder, request, texts, samples, as_json=as_json)
    if sys.stderr.isatty():
        typer.echo(f"[{path}, {time.perf_counter() - begin:.1f} s]", err=True)


def _check_adapt(text: str, weights: str, options: dict[str, Any]) -> None:
    """Raise InputError if --adapt cannot be used with this text or these options."""
    from mmrec.data.corpus import is_prepared
    from mmrec.data.sources import is_single_pass

    for option, value in options.items():
        if value is not None:
            reason = (
                "both read a text before the prompt"
                if option == "--read"
                else "a session belongs to the weights of a file"
            )
            raise InputError(f"{option} cannot be used with --adapt: {reason}")
    if weights != "float32":
        raise InputError(f"--adapt needs weights that can learn: --weights float32; got {weights}")
    if is_single_pass(text):
        raise InputError(f"--adapt reads its text twice, so it must be a file; got {text}")
    if is_prepared(text):
        raise InputError(f"--adapt must be a text; {text} is a prepared corpus")


def _adapted_decoder(
    path: Path,
    text: str,
    config: AdaptationConfig,
    reading: dict[str, Any],
    threads: int | None,
    cache: dict[str, int],
) -> "Decoder":
    """The model after it learnt from a text."""
    from tqdm import tqdm

    from mmrec.checkpoint.checkpoint import load_model  # with torch
    from mmrec.evaluation.source import adapt_to_source
    from mmrec.inference.decoder import Decoder
    from mmrec.inference.neural_cache import CachingDecoder

    with tqdm(unit="tok", unit_scale=True, leave=False, disable=None) as bar:

        def show(count: int, total: int) -> None:
            bar.total = total
            bar.update(count)

        adapted, scores = adapt_to_source(load_model(path), text, config, progress=show, **reading)
    dynamic = scores.dynamic
    assert dynamic is not None
    print_note(
        f"adapted to {text} by {dynamic.updates:,} updates in {dynamic.seconds:.1f} s; bits per "
        f"byte of that text, each part before it was learnt: {dynamic.bits_per_byte:.4f}; without "
        f"adapting {scores.bits_per_byte:.4f}"
    )
    if cache:
        return CachingDecoder.from_model(
            adapted.model, adapted.tokenizer, threads=threads, neural_cache=cache["neural_cache"]
        )
    return Decoder.from_model(adapted.model, adapted.tokenizer, threads=threads)


def _open_session(
    decoder: "Decoder", state: Path | None, read: str | None, reading: dict[str, Any]
) -> "Session":
    """The session before the prompt: an empty one or a saved one, and then a text that is read."""
    from mmrec.data.readers import ReadOptions
    from mmrec.inference.session import Session
    from mmrec.runtime.progress import progress_bar

    session = Session(decoder) if state is None else Session.load(state, decoder)
    if read is not None:
        options = ReadOptions(**reading)
        with progress_bar(None, "reading", "tok") as bar:
            session.read(Path(read), options=options, progress=bar.update)
        if options.skipped_records:
            print_note(f"records and files skipped: {options.skipped_records:,}")
    return session


def _parse_biases(given: list[str], tokenizer: "Tokenizer") -> dict[int, float]:
    """Biases by token id. TOKEN is an id, or the text of one token as a JSON string."""
    biases: dict[int, float] = {}
    for item in given:
        name, _, value = argument_text(item, "--logit-bias").rpartition("=")
        try:
            bias = float(value)
            token = json.loads(name)
        except ValueError:
            token = None
        if isinstance(token, str):
            ids = tokenizer.encode(token, "--logit-bias").tolist()
            if len(ids) != 1:
                raise InputError(
                    f"a text of --logit-bias must be one token; {token!r} is {len(ids)} tokens: "
                    f"{', '.join(map(str, ids[:8])) or 'it is empty'}"
                )
            [token] = ids
        elif not isinstance(token, int) or isinstance(token, bool):
            raise InputError(
                f"--logit-bias must be ID=BIAS or '\"TEXT\"=BIAS', such as 42=-100; got {item!r}"
            )
        if token in biases:
            raise InputError(f"--logit-bias must name a token once; got {token} twice")
        biases[token] = bias
    return biases


def _print_text(pieces: Iterator[str], prompt: str) -> None:
    """Print a prompt and its continuation as it comes."""
    is_prompt_shown = False
    for piece in pieces:
        if not is_prompt_shown:
            sys.stdout.write(prompt)
            is_prompt_shown = True
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n" if is_prompt_shown else f"{prompt}\n")


def _print_all(
    decoder: "Decoder", request: "Request", prompts: list[str], samples: int, *, as_json: bool
) -> None:
    """Print the continuations of prompts in order, each as soon as those before it are there."""
    from tqdm import tqdm

    from mmrec.inference.engine import complete, nth_seed

    count = len(prompts) * samples
    request.check(decoder)

    def requests() -> Iterator["Request"]:
        for index in range(count):
            prompt = prompts[index // samples]
            yield replace(request, prompt=prompt, seed=nth_seed(request.seed, index))

    is_bar_shown = count > 1 and sys.stderr.isatty() and not sys.stdout.isatty()
    completions = complete(decoder, requests())
    with tqdm(total=count, unit="text", leave=False, disable=not is_bar_shown) as bar:
        for index, completion in enumerate(completions):
            number, sample = divmod(index, samples)
            if as_json:
                place = {"prompt_index": number, "sample_index": sample, "prompt": prompts[number]}
                print_json(place | _facts(completion, decoder.tokenizer), indent=None)
            else:
                if count > 1:
                    title = f"prompt {number + 1}, sample {sample + 1}, seed {completion.seed}"
                    sys.stdout.write("\n" * (index > 0) + f"==> {title} <==\n")
                sys.stdout.write(f"{prompts[number]}{completion.text}\n")
                sys.stdout.flush()
            bar.update(1)


def _facts(completion: "Completion", tokenizer: "Tokenizer") -> dict[str, Any]:
    """A completion as JSON."""
    facts: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "prompt_tokens": completion.prompt_tokens,
        "tokens": completion.tokens,
    }
    if completion.logprobs is not None:
        facts["logprobs"] = [round(value, 6) for value in completion.logprobs]
    if completion.top_logprobs is not None and any(completion.top_logprobs):
        facts["top_logprobs"] = [
            [
                {"token": token, "text": tokenizer.decode([token]), "logprob": round(value, 6)}
                for token, value in place
            ]
            for place in completion.top_logprobs
        ]
    return facts
