"""Benchmark of generation: tokens per second beside what the weights alone would allow.

A token reads every weight of the projections, of the feed-forward networks and of the embedding,
which gives the logits. The bound is the rate at which one core does plain float32 matrix-vector
products over them (``mmrec.kernels.decoder.products``), timed in turns with the decoder. A decoder
whose float32 logits are not those of the torch model is not timed.

torch is imported only where a torch model is made or run, so that benchmarks/generate_race.py can
time a process that never loads it.
"""

import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mmrec.config import WEIGHT_DTYPES, ModelConfig, SamplingConfig, parameter_shapes
from mmrec.data.tokenizer import Tokenizer
from mmrec.inference.decoder import Decoder, DecoderState, Stream
from mmrec.kernels.decoder.products import products

if TYPE_CHECKING:
    from mmrec.model import Model
    from mmrec.profiling.kernel_bench import Effort, Report

LOGIT_STD = 4.0
"""Standard deviation of the logits of a model with random weights. With vocabulary 5,000 the next
token then has an entropy of 3.3 nats, and top-p 0.9 keeps about 60 tokens, as with a trained model.
A new model's logits are nearly equal, and top-p keeps thousands."""
SAMPLING = {
    "greedy": SamplingConfig(temperature=0),
    "top-p": SamplingConfig(temperature=1, top_p=0.9),
}
STREAMS = (1, 4, 16)
"""Texts that are written together."""
PROMPT_TOKENS = 8_192
LONG_TOKENS = 100_000
"""Tokens of a long text."""
TOLERANCE = 1e-4
"""Largest difference of right float32 logits from those of the torch model."""
CHECKED_TOKENS = 16
BOUND = "products of a token's weights"
BOUND_BYTES = 1 << 27
"""Bytes of weights, about, that one timed call of the products reads."""

Work = Callable[[Decoder], int]
"""What is timed; it returns the number of tokens that it handled."""


@dataclass(frozen=True)
class Row:
    """The speed of one kind of work with one model."""

    model: str
    what: str
    """What is timed, such as "one stream, greedy"."""
    weights: str
    """One of WEIGHT_DTYPES."""
    threads: int
    tokens_per_second: float
    """Median, of all streams together; NaN if the logits are wrong."""
    bound_share: float
    """The same as a share of the bound; NaN where that says nothing."""
    error: float
    """Largest difference of the logits from those of the torch model in float32."""


@dataclass(frozen=True)
class Case:
    """Rows that are timed in turns."""

    title: str
    run: "Callable[[Report], Iterator[Row]]"


@dataclass(frozen=True)
class Subject:
    """A model to generate with."""

    name: str
    model: "Model"
    tokenizer: Tokenizer


def thread_counts() -> list[int]:
    """One thread, and one per core."""
    return sorted({1, os.cpu_count() or 1})


def vocabulary_of(size: int) -> Tokenizer:
    """Return a tokenizer with a vocabulary of a size: characters, and the end token."""
    characters = (chr(c) for c in range(32, 0x110000) if not 0xD800 <= c < 0xE000)
    return Tokenizer("char", "".join(itertools.islice(characters, size - 1)))


def random_subject(
    name: str, config: ModelConfig, *, logit_std: float = LOGIT_STD, seed: int = 0
) -> Subject:
    """Return a model with random weights.

    The embedding of the end token is zero, so that it is hardly ever drawn.

    Args:
        name: what the rows call it.
        config: its shape.
        logit_std: standard deviation of the logits, which decides how many tokens top-p keeps.
        seed: of the weights.
    """
    import torch

    from mmrec.model import Model

    tokenizer = vocabulary_of(config.vocab_size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Model(config).eval()
        for parameter_name, p in model.named_parameters():
            if parameter_name.endswith(("out_proj.weight", "down_proj.weight")):
                p.normal_(std=p.shape[1] ** -0.5)  # a new model has zeros there
            elif parameter_name.endswith("embedding"):
                p.normal_(std=logit_std * config.width**-0.5)
        model.embedding[tokenizer.eot] = 0
    return Subject(name, model, tokenizer)


def matrix_sizes(config: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of the matrices that every token is multiplied by."""
    return [
        (math.prod(shape[:-1]), shape[-1])
        for name, shape in parameter_shapes(config).items()
        if len(shape) > 1 and not name.endswith(("ngram_embedding", "conv_weight"))
    ]


def bound_call(config: ModelConfig) -> Callable[[], int]:
    """Return a call that does the plain products of some tokens, and returns their number."""
    sizes = np.array(matrix_sizes(config))
    most_rows, most_columns = sizes.max(0)
    weights = np.random.default_rng(0).standard_normal(sizes.prod(1).sum(), np.float32)
    x, y = weights[:most_columns].copy(), np.empty(most_rows, np.float32)
    tokens = max(1, BOUND_BYTES // weights.nbytes)

    def call() -> int:
        for _ in range(tokens):
            products(weights, sizes, x, y)
        return tokens

    return call


def torch_logits(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Return random tokens (n,), and the torch model's logits (n, V) before each of them."""
    import torch

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, subject.model.config.vocab_size, CHECKED_TOKENS)
    with torch.inference_mode():
        text = torch.tensor([[subject.tokenizer.eot, *tokens[:-1].tolist()]])
        return tokens, subject.model(text)[0][0].numpy()


def logit_error(decoder: Decoder, tokens: np.ndarray, logits: np.ndarray) -> float:
    """Return the largest difference of the decoder's logits from those of ``torch_logits``."""
    state, error = decoder.initial_state(), 0.0
    for token, want in zip(tokens, logits, strict=True):
        error = max(error, float(np.abs(decoder.next_token_logits(state) - want).max()))
        decoder.read(state, [int(token)])
    return error


def write_tokens(
    decoder: Decoder,
    sampling: SamplingConfig,
    tokens: int,
    *,
    streams: int = 1,
    state: DecoderState | None = None,
) -> int:
    """Draw tokens and make them text.

    Args:
        decoder: the model.
        sampling: how tokens are drawn.
        tokens: tokens of each text. Where the end token is drawn, the text goes on after it.
        streams: texts that are written together.
        state: where a single text stands, which advances in place; None begins at the beginning.

    Returns:
        The tokens of all texts.
    """
    texts = [
        Stream(state or decoder.initial_state(), sampling, seed, tokens) for seed in range(streams)
    ]
    while active := [text for text in texts if text.finished != "length"]:
        for text, result in zip(
            active, decoder.decode(active, tokens, logprobs=False), strict=True
        ):
            decoder.tokenizer.decode(result.tokens)
            if text.finished == "stop":
                decoder.read(text.state, [decoder.tokenizer.eot])
                text.finished, text.drawn, text.limit = None, text.drawn + 1, text.limit - 1
    return tokens * streams


def read_tokens(decoder: Decoder, tokens: np.ndarray) -> int:
    """Read a prompt (n,); return its length."""
    decoder.read(decoder.initial_state(), tokens)
    return len(tokens)


def rates_in_turns(
    calls: Sequence[Callable[[], int]],
    repeats: int,
    max_seconds: float,
    report: "Report | None" = None,
) -> Iterator[float]:
    """Time calls in turns, after one of each that does not count.

    Args:
        calls: each returns the number of tokens that it handled.
        repeats: turns; a slow call takes fewer.
        max_seconds: total time of a call, after which it is not timed again.
        report: told the share that is done.

    Yields:
        The median tokens per second of each call.

    Raises:
        KeyboardInterrupt: as it came, after the rates of the calls that were timed until then.
    """
    tell = report or (lambda share, what: None)
    rates: list[list[float]] = [[] for _ in calls]
    seconds = [0.0] * len(calls)
    interrupt: KeyboardInterrupt | None = None
    try:
        for call in calls:
            tell(0, "timing")
            call()
        for turn, n in itertools.product(range(repeats), range(len(calls))):
            if turn and seconds[n] >= max_seconds:
                continue
            tell((turn + n / len(calls)) / repeats, "timing")
            begin = time.perf_counter()
            tokens = calls[n]()
            duration = time.perf_counter() - begin
            seconds[n] += duration
            rates[n].append(tokens / duration)
    except KeyboardInterrupt as error:
        interrupt = error
    for values in rates:
        if values:
            yield statistics.median(values)
    if interrupt:
        raise interrupt


def generate_cases(subject: Subject, effort: "Effort", tokens: int) -> list[Case]:
    """List what is measured of a model.

    Args:
        subject: the model.
        effort: how much is done; the long text belongs to the full benchmark.
        tokens: tokens of a text.
    """
    name = subject.name
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, subject.model.config.vocab_size, PROMPT_TOKENS)
    single: dict[str, Work] = {
        f"one stream, {kind}": partial(write_tokens, sampling=sampling, tokens=tokens)
        for kind, sampling in SAMPLING.items()
    }
    together: dict[str, Work] = {
        f"{n} stream{'s' * (n > 1)}, top-p": partial(
            write_tokens, sampling=SAMPLING["top-p"], tokens=tokens, streams=n
        )
        for n in STREAMS
    }
    reading: dict[str, Work] = {
        f"reading {PROMPT_TOKENS:,} tokens": partial(read_tokens, tokens=prompt)
    }
    cases = [
        Case(f"{name}, one stream", partial(_measure, subject, single, WEIGHT_DTYPES, effort)),
        Case(f"{name}, streams", partial(_measure, subject, together, ("float32",), effort)),
        Case(f"{name}, reading", partial(_measure, subject, reading, ("float32",), effort)),
    ]
    if effort.full:
        cases.append(Case(f"{name}, a long text", partial(_long_text, subject, effort, tokens)))
    return cases


def _measure(
    subject: Subject,
    work: dict[str, Work],
    weight_dtypes: Sequence[str],
    effort: "Effort",
    report: "Report",
) -> Iterator[Row]:
    """Time kinds of work, by name, with weights of several dtypes on one thread and on all."""
    report(0, "checking")
    checked = torch_logits(subject)
    rows = [Row(subject.name, BOUND, "float32", 1, math.nan, math.nan, 0.0)]
    calls: list[Callable[[], int]] = [bound_call(subject.model.config)]
    for weights, threads in itertools.product(weight_dtypes, thread_counts()):
        decoder = Decoder.from_model(
            subject.model, subject.tokenizer, weights=weights, threads=threads
        )
        error = logit_error(decoder, *checked)
        for what, call in work.items():
            row = Row(subject.name, what, weights, threads, math.nan, math.nan, error)
            if weights == "float32" and not error <= TOLERANCE:
                yield row
                continue
            rows.append(row)
            calls.append(partial(call, decoder))
    bound = math.nan
    rates = rates_in_turns(calls, effort.repeats, effort.max_seconds, report)
    for row, rate in zip(rows, rates, strict=True):
        bound = rate if row.what == BOUND else bound
        yield dataclasses.replace(row, tokens_per_second=rate, bound_share=rate / bound)


def _long_text(subject: Subject, effort: "Effort", tokens: int, report: "Report") -> Iterator[Row]:
    """Time tokens at the beginning of a text and after LONG_TOKENS of it, in turns."""
    report(0, "checking")
    decoder = Decoder.from_model(subject.model, subject.tokenizer, threads=1)
    error = logit_error(decoder, *torch_logits(subject))
    sampling, late = SAMPLING["top-p"], decoder.initial_state()
    while late.length < LONG_TOKENS:
        report(0.8 * late.length / LONG_TOKENS, "writing")
        write_tokens(decoder, sampling, min(1000, LONG_TOKENS - late.length), state=late)
    places = {"from token 1": decoder.initial_state(), f"from token {late.length + 1:,}": late}
    calls: list[Callable[[], int]] = [
        lambda state=state: write_tokens(decoder, sampling, tokens, state=state.copy())  # type: ignore[misc]
        for state in places.values()
    ]
    rates = rates_in_turns(calls, effort.repeats, effort.max_seconds)
    for what, rate in zip(places, rates, strict=True):
        yield Row(subject.name, f"{what}, top-p", "float32", 1, rate, math.nan, error)
