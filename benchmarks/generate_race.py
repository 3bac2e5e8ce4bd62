"""Generation against llama2.c, side by side in one run.

    python benchmarks/generate_race.py --llama2c FOLDER [--long 1000000] [--model RUN]
    python benchmarks/generate_race.py --show

FOLDER holds ``run.c`` and ``runq.c`` of https://github.com/karpathy/llama2.c, which are compiled
into a temporary folder. Both sides get random weights of equal number and equal vocabulary, whose
logits have equal spread. Correctness comes first: the decoder's float32 logits must be those of the
torch model, and the tokens of llama2.c those of a NumPy network with the weights that were written.
Then both take turns; medians count. Writes results/generate.json; --show prints it as Markdown.

Our side is timed in processes that never import torch, as ``mmrec generate`` does not. It includes
making text of the tokens, as llama2.c's own figure does.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from llama2c import BOS, EQUAL_PARAMETERS, EQUAL_READS, Shape, check, forward, programs
from llama2c import random_weights as llama2c_weights
from outputs import add_force, check_results

from mmrec.config import PRESETS, WEIGHT_DTYPES, parameter_shapes, state_layout
from mmrec.inference.decoder import Decoder
from mmrec.profiling.generate_bench import (
    BOUND,
    LOGIT_STD,
    PROMPT_TOKENS,
    SAMPLING,
    STREAMS,
    TOLERANCE,
    bound_call,
    logit_error,
    matrix_sizes,
    read_tokens,
    thread_counts,
    write_tokens,
)

RESULTS = Path(__file__).parent / "results" / "generate.json"
TOKENS = {"tiny": 256, "mini": 256, "small": 64}
"""Tokens of a text: 256 is what llama2.c writes by default. Its attention gets slower with more."""
LONGER = 1024
NEW_LOGIT_STD = 0.02 * 128**0.5
"""Spread of the logits of new weights of width 128. They are nearly equal, so that top-p keeps most
of the vocabulary, which llama2.c sorts."""
REPEATS = {"tiny": 15, "mini": 5, "small": 3}
"""Turns, by default."""
LONG_PART = 1000  # tokens of a long text that one call draws
NEARLY_EQUAL = "tiny, one stream, nearly equal logits"
MAX_GAP = {False: 1e-3, True: 0.1}
"""Most by which the logit of a token that llama2.c took may lie below NumPy's largest; with int8
activations a rounding that falls the other way moves a logit by some hundredths."""


@dataclass(frozen=True)
class Row:
    """A median rate."""

    group: str
    """The rows that took turns."""
    name: str
    """mmrec, run or runq, or the bound."""
    what: str
    weights: str
    threads: int
    parameters: int
    bytes_per_token: int
    """Bytes of weights that a token reads."""
    tokens_per_second: float
    slowest: float
    fastest: float
    repeats: int
    load: float
    """Of the machine before the first turn."""


Contender = tuple[Row, Callable[[], float]]
"""A row without its rates, and what measures the tokens per second once."""


def take_turns(contenders: list[Contender], repeats: int) -> list[Row]:
    """Measure contenders one after the other, after one turn that does not count."""
    load = round(os.getloadavg()[0], 2)
    for _, measure in contenders:
        measure()
    rates: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for values, (_, measure) in zip(rates, contenders, strict=True):
            values.append(measure())
    rows = [
        replace(
            row,
            tokens_per_second=statistics.median(values),
            slowest=min(values),
            fastest=max(values),
            repeats=repeats,
            load=load,
        )
        for (row, _), values in zip(contenders, rates, strict=True)
    ]
    for row in rows:
        print(
            f"{row.group}: {row.name}, {row.what}, {row.weights}, threads {row.threads}: "
            f"{row.tokens_per_second:,.0f} tokens/s ({row.slowest:,.0f} to {row.fastest:,.0f})",
            flush=True,
        )
    return rows


def timed(call: Callable[[], int]) -> float:
    """Tokens per second of a call that returns its number of tokens."""
    begin = time.perf_counter()
    tokens = call()
    return tokens / (time.perf_counter() - begin)


def prepare(folder: Path, names: list[str], model: Path | None) -> dict[str, Any]:
    """Write what our side needs, in a process of its own, since it needs torch.

    Args:
        folder: where it is written: NAME.h5, and NAME.npz with logits of the torch model.
        names: presets; "tiny-new" is tiny with logits as new weights give them.
        model: a trained model, which becomes "model", or None.

    Returns:
        A description of the machine.
    """
    from mmrec.checkpoint.checkpoint import load_model, save_checkpoint
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.profiling.generate_bench import Subject, random_subject, torch_logits
    from mmrec.profiling.kernel_bench import describe_machine

    subjects = [
        random_subject(
            name,
            PRESETS[name.removesuffix("-new")],
            logit_std=NEW_LOGIT_STD if name.endswith("-new") else LOGIT_STD,
        )
        for name in names
    ]
    if model:
        loaded = load_model(find_checkpoint(model))
        subjects.append(Subject("model", loaded.model, loaded.tokenizer))
    for subject in subjects:
        save_checkpoint(folder / f"{subject.name}.h5", subject.model, subject.tokenizer, 0, {})
        tokens, logits = torch_logits(subject)
        np.savez(folder / f"{subject.name}.npz", tokens=tokens, logits=logits)
    return describe_machine()


def in_process(function: str, *arguments: Any) -> Any:
    """Run a function of this file in a new process; return what it returns, by JSON."""
    command = [sys.executable, __file__, "--call", function, json.dumps(arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def load(folder: Path, name: str, weights: str, threads: int) -> Decoder:
    """Load a decoder, and check its logits.

    Raises:
        SystemExit: float32 logits differ from the torch model's.
    """
    decoder = Decoder.load(folder / f"{name}.h5", weights=weights, threads=threads)
    with np.load(folder / f"{name}.npz") as stored:
        error = logit_error(decoder, stored["tokens"], stored["logits"])
    print(f"{name}, {weights}, threads {threads}: logits differ by {error:.1e}", flush=True)
    if weights == "float32" and not error <= TOLERANCE:
        raise SystemExit(f"the float32 logits of {name} are not those of the torch model")
    return decoder


def parameters_of(decoder: Decoder) -> int:
    """Number of parameters of a model."""
    return sum(math.prod(shape) for shape in parameter_shapes(decoder.config).values())


def ours(
    decoder: Decoder, group: str, what: str, threads: int, call: Callable[[Decoder], int]
) -> Contender:
    """A contender that is a decoder."""
    read = decoder.bytes_per_token
    row = Row(
        group, "mmrec", what, decoder.weights, threads, parameters_of(decoder), read, *[0] * 5
    )
    return row, lambda: timed(lambda: call(decoder))


def bound(decoder: Decoder, group: str) -> Contender:
    """The plain float32 products of a token's weights on one core."""
    read, call = sum(4 * r * c for r, c in matrix_sizes(decoder.config)), bound_call(decoder.config)
    row = Row(group, BOUND, "", "float32", 1, parameters_of(decoder), read, *[0] * 5)
    return row, lambda: timed(call)


def theirs(
    source: Path,
    folder: Path,
    group: str,
    shape: Shape,
    kinds: dict[str, str],
    *,
    int8: bool,
    tokens: int,
    logit_std: float = LOGIT_STD,
) -> list[Contender]:
    """Contenders that are programs of llama2.c.

    Args:
        source: folder of its sources.
        folder: where programs and models are written.
        group: the rows that take turns.
        shape: the shape of the model.
        kinds: what the rows say, and which of SAMPLING they use.
        int8: ``runq`` instead of ``run``.
        tokens: tokens of a text.
        logit_std: spread of the logits.

    Raises:
        SystemExit: its tokens are not those of the NumPy network.
    """
    weights = llama2c_weights(shape, logit_std, seed=0)
    read = shape.parameters * (4 if not int8 else 1) + int8 * shape.parameters // 16
    found = []
    for program in programs(source, folder, shape, weights, int8=int8):
        gap = check(program, shape, weights, int8=int8)
        if not gap <= MAX_GAP[int8]:
            raise SystemExit(f"{program.binary.name} does not compute what NumPy does: {gap:.2g}")
        name = program.binary.name
        for what, kind in kinds.items():
            sampling = SAMPLING[kind]

            def measure(program: Any = program, sampling: Any = sampling) -> float:
                drawn, rate = program.generate(
                    tokens, temperature=sampling.temperature, top_p=sampling.top_p
                )
                if len(drawn) != tokens:
                    raise SystemExit(f"{program.binary.name} wrote {len(drawn)} tokens")
                return rate

            row = Row(
                group,
                name,
                what,
                "int8" if int8 else "float32",
                program.threads,
                shape.parameters,
                read,
                *[0] * 5,
            )
            found.append((row, measure))
    return found


def race(preset: str, source: Path, folder: Path, repeats: int, tokens: int) -> list[Row]:
    """One stream with a preset, against llama2.c with as many parameters."""
    group, contenders = f"{preset}, one stream", []
    kinds = {kind: kind for kind in SAMPLING}
    for weights in WEIGHT_DTYPES:
        for threads in thread_counts():
            decoder = load(folder, preset, weights, threads)
            for kind in SAMPLING:
                call = partial(write_tokens, sampling=SAMPLING[kind], tokens=tokens)
                contenders.append(ours(decoder, group, kind, threads, call))
    contenders.append(bound(decoder, group))
    for int8 in (False, True):
        shape = EQUAL_PARAMETERS[preset]
        contenders += theirs(source, folder, group, shape, kinds, int8=int8, tokens=tokens)
    shape, kind = EQUAL_READS[preset], {"greedy, equal weights per token": "greedy"}
    contenders += theirs(source, folder, group, shape, kind, int8=False, tokens=tokens)
    return take_turns(contenders, repeats)


def race_of_tiny(
    source: Path,
    folder: Path,
    group: str,
    name: str,
    kind: str,
    repeats: int,
    tokens: int,
    logit_std: float = LOGIT_STD,
) -> list[Row]:
    """One kind of generation with tiny in float32, against ``run``.

    Args:
        source: folder of the sources of llama2.c.
        folder: where our models are, and those of llama2.c are written in a folder of the group.
        group: the rows that take turns.
        name: our model.
        kind: one of SAMPLING.
        repeats: turns.
        tokens: tokens of a text.
        logit_std: spread of the logits.
    """
    contenders = []
    for threads in thread_counts():
        call = partial(write_tokens, sampling=SAMPLING[kind], tokens=tokens)
        decoder = load(folder, name, "float32", threads)
        contenders.append(ours(decoder, group, kind, threads, call))
    own_folder, shape = folder / group, EQUAL_PARAMETERS["tiny"]
    own_folder.mkdir()
    contenders += theirs(
        source,
        own_folder,
        group,
        shape,
        {kind: kind},
        int8=False,
        tokens=tokens,
        logit_std=logit_std,
    )
    return take_turns(contenders, repeats)


def other_work(folder: Path, name: str, repeats: int, tokens: int) -> list[Row]:
    """Streams together, and reading a prompt."""
    rng = np.random.default_rng(0)
    together, reading = [], []
    for threads in thread_counts():
        decoder = load(folder, name, "float32", threads)
        for n in STREAMS:
            call = partial(write_tokens, sampling=SAMPLING["top-p"], tokens=tokens, streams=n)
            what = f"{n} stream{'s' * (n > 1)}, top-p"
            together.append(ours(decoder, f"{name}, streams", what, threads, call))
        prompt = rng.integers(0, decoder.config.vocab_size, PROMPT_TOKENS)
        what, call = f"reading {PROMPT_TOKENS:,} tokens", partial(read_tokens, tokens=prompt)
        reading.append(ours(decoder, f"{name}, reading", what, threads, call))
    return take_turns(together, repeats) + take_turns(reading, repeats)


def trained_model(folder: Path, repeats: int, tokens: int) -> list[Row]:
    """One stream with a trained model: its feed-forward activations have more zeros, or fewer."""
    group, contenders = "trained model, one stream", []
    for weights in WEIGHT_DTYPES:
        for threads in thread_counts():
            decoder = load(folder, "model", weights, threads)
            for kind, sampling in SAMPLING.items():
                call = partial(write_tokens, sampling=sampling, tokens=tokens)
                contenders.append(ours(decoder, group, kind, threads, call))
    contenders.append(bound(decoder, group))
    return take_turns(contenders, repeats) + other_work(folder, "model", repeats, tokens)


def _resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def long_text(checkpoint: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Write a long text; compare its end with its beginning.

    Args:
        checkpoint: the model.
        tokens: tokens of the text.
        repeats: turns.

    Returns:
        Seconds per token after 100 tokens and after all, in turns; resident memory at both places
        in pages; and the rate of writing it all.
    """
    decoder, sampling = Decoder.load(Path(checkpoint), threads=1), SAMPLING["top-p"]
    late = decoder.initial_state()
    write_tokens(decoder, sampling, 100, state=late)
    early = late.copy()
    places = {"token 100": early, f"token {tokens:,}": late}

    def measure(state: Any) -> float:
        return 1 / timed(
            partial(write_tokens, decoder, sampling, 2 * TOKENS["tiny"], state=state.copy())
        )

    for state in places.values():  # all memory that a part of the text needs is taken
        write_tokens(decoder, sampling, LONG_PART, state=state.copy())
    pages, begin = [_resident_pages()], time.perf_counter()
    while late.length < tokens:
        write_tokens(decoder, sampling, min(LONG_PART, tokens - late.length), state=late)
    rate = (tokens - 100) / (time.perf_counter() - begin)
    pages.append(_resident_pages())
    seconds: dict[str, list[float]] = {place: [] for place in places}
    for _ in range(4 * repeats):
        for place, state in places.items():
            seconds[place].append(measure(state))
    return {
        "tokens": tokens,
        "tokens_per_second": rate,
        "seconds_per_token": {place: statistics.median(x) for place, x in seconds.items()},
        "resident_pages": dict(zip(places, pages, strict=True)),
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
        "load": os.getloadavg()[0],
    }


def whole_process(checkpoint: Path, repeats: int) -> dict[str, Any]:
    """Run ``mmrec generate --max-tokens 1``, with warm caches."""
    command = [sys.executable, "-m", "mmrec", "generate", "--model", str(checkpoint)]
    command += ["--prompt", "x", "--max-tokens", "1", "--seed", "1"]
    seconds, resident = [], []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit("mmrec generate failed")
        seconds.append(time.perf_counter() - begin)
        resident.append(1024 * usage.ru_maxrss)
    print(f"mmrec generate --max-tokens 1: {statistics.median(seconds[1:]):.2f} s", flush=True)
    return {"seconds": statistics.median(seconds[1:]), "resident_bytes": max(resident)}


def nucleus_sizes(folder: Path) -> dict[str, float]:
    """Mean number of tokens that top-p keeps, of both sides, so that their work can be compared."""

    def mean(logits: np.ndarray) -> float:
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p = -np.sort(-p / p.sum(-1, keepdims=True))
        return float(1 + (p.cumsum(-1) < SAMPLING["top-p"].top_p).sum(-1).mean())

    sizes, shape = {}, EQUAL_PARAMETERS["tiny"]
    tokens = np.random.default_rng(0).integers(2, shape.vocab, 64)
    for name, std in (("tiny", LOGIT_STD), ("tiny-new", NEW_LOGIT_STD)):
        with np.load(folder / f"{name}.npz") as stored:
            sizes[f"mmrec, {name}"] = mean(stored["logits"])
        weights = llama2c_weights(shape, std, seed=0)
        text = np.array([BOS, *tokens])
        sizes[f"llama2.c, {name}"] = mean(forward(shape, weights, text, int8=False))
    return sizes


def best(
    rows: list[Row], group: str, name: str, what: str, weights: str, threads: int = 0
) -> float:
    """The highest rate among rows, over programs and threads; NaN if there is none."""
    return max(
        (
            row.tokens_per_second
            for row in rows
            if (row.group, row.what) == (group, what)
            and row.name.startswith(name)
            and row.weights in weights
            and threads in (0, row.threads)
        ),
        default=math.nan,
    )


def goals(result: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """Say what was aimed at, and what was reached.

    Args:
        result: as it is kept.

    Returns:
        What, the aim, the figure, and whether it reaches the aim.
    """
    rows = [Row(**row) for row in result["rows"]]
    found: list[tuple[str, str, float, bool]] = []

    def at_least(what: str, aim: float, figure: float, unit: str = " ×") -> None:
        if not math.isnan(figure):
            found.append((what, f"≥ {aim:,g}{unit}", figure, figure >= aim))

    def at_most(what: str, aim: float, figure: float, unit: str) -> None:
        found.append((what, f"≤ {aim:,g}{unit}", figure, figure <= aim))

    tiny, new = "tiny, one stream", NEARLY_EQUAL
    for what, group, kind, aim in (
        ("tiny, float32, greedy, against run", tiny, "greedy", 1.5),
        ("tiny, float32, top-p, against run", tiny, "top-p", 6.0),
        ("the same with nearly equal logits", new, "top-p", 6.0),
    ):
        ratio = best(rows, group, "mmrec", kind, "float32") / best(
            rows, group, "run", kind, "float32"
        )
        at_least(what, aim, ratio)
    limit = best(rows, tiny, BOUND, "", "float32")
    one = best(rows, tiny, "mmrec", "greedy", "float32", 1)
    at_least("tiny, float32, greedy, one thread, against its products", 0.6, one / limit)
    for preset in REPEATS:
        group = f"{preset}, one stream"
        exact = best(rows, group, "mmrec", "greedy", "float32")
        rounded = best(rows, group, "mmrec", "greedy", "bfloat16 int8")
        at_least(f"{preset}, bfloat16 or int8 against float32", 1.0, rounded / exact)
    small = "small, one stream"
    ratio = best(rows, small, "mmrec", "greedy", "int8") / best(
        rows, small, "runq", "greedy", "int8"
    )
    at_least("small, int8, greedy, against runq", 2.0, ratio)
    most = f"{STREAMS[-1]} streams, top-p"
    ratio = best(rows, "tiny, streams", "mmrec", most, "float32") / best(
        rows, "tiny, streams", "mmrec", "1 stream, top-p", "float32"
    )
    at_least(f"tiny, {STREAMS[-1]} streams against one", 4.0, ratio)
    reading = f"reading {PROMPT_TOKENS:,} tokens"
    rate = best(rows, "tiny, reading", "mmrec", reading, "float32")
    at_least(f"tiny, {reading}", 60_000, rate, " tokens/s")
    if "long_text" in result:
        text = result["long_text"]
        early, late = text["seconds_per_token"].values()
        name = f"token {text['tokens']:,} against token 100"
        at_most(f"{name}, time", 5, 100 * abs(late / early - 1), " % more or less")
        first, last = text["resident_pages"].values()
        at_most(f"{name}, memory", 1, abs(last - first), " page more or less")
    process = result["whole_process"]
    at_most("mmrec generate --max-tokens 1, whole process", 0.8, process["seconds"], " s")
    at_most("the same, resident", 200, process["resident_bytes"] / 1e6, " MB")
    return found


def markdown(result: dict[str, Any]) -> list[str]:
    """The results as Markdown: goals, then all rates."""
    lines = ["| what | goal | figure | reached |", "|---|---|---|---|"]
    for what, aim, figure, reached in goals(result):
        figure_text = f"{figure:,.0f}" if figure >= 1000 else f"{figure:.3g}"
        lines.append(f"| {what} | {aim} | {figure_text} | {'yes' if reached else 'no'} |")
    states = ", ".join(f"{n} {size / 1e3:,.1f} kB" for n, size in result["state_bytes"].items())
    lines += ["", f"State of a text, read and written by each token: {states}."]
    if "top_p_keeps" in result:
        kept = ", ".join(f"{name} {count:,.0f}" for name, count in result["top_p_keeps"].items())
        lines += ["", f"Tokens that top-p keeps, mean: {kept}."]
    rows = [Row(**row) for row in result["rows"]]
    for group in dict.fromkeys(row.group for row in rows):
        own = [row for row in rows if row.group == group]
        lines += ["", f"**{group}** (load {own[0].load}, {own[0].repeats} turns)", ""]
        lines += ["| | | weights | threads | parameters | MB per token | tokens/s | range | GB/s |"]
        lines += ["|---" * 9 + "|"]
        for row in own:
            read = row.bytes_per_token
            lines.append(
                f"| {row.name} | {row.what} | {row.weights} | {row.threads} | "
                f"{row.parameters / 1e6:.2f} M | {read / 1e6:.2f} | {row.tokens_per_second:,.0f} | "
                f"{row.slowest:,.0f} to {row.fastest:,.0f} | "
                f"{read * row.tokens_per_second / 1e9:.1f} |"
            )
    return lines


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure everything; results are kept after each part."""
    names = [*args.presets, "tiny-new"] if "tiny" in args.presets else args.presets
    model = str(args.model) if args.model else None
    result: dict[str, Any] = {"machine": in_process("prepare", str(folder), names, model)}
    state_sizes = {name: state_layout(PRESETS[name])[-1][-1][2] for name in args.presets}
    result["state_bytes"] = {name: 4 * size for name, size in state_sizes.items()}
    rows: list[Row] = []

    def keep(*more: Row) -> None:
        rows.extend(more)
        result["rows"] = [asdict(row) for row in rows]
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    first = args.presets[0]
    result["whole_process"] = whole_process(folder / f"{first}.h5", args.repeats or 5)
    for preset in args.presets:
        turns, tokens = args.repeats or REPEATS[preset], args.tokens or TOKENS[preset]
        keep(*race(preset, args.llama2c, folder, turns, tokens))
    turns, tokens = args.repeats or REPEATS["tiny"], args.tokens or TOKENS["tiny"]
    if "tiny" in args.presets:
        result["top_p_keeps"] = nucleus_sizes(folder)
        tiny = partial(race_of_tiny, args.llama2c, folder)
        keep(*tiny(NEARLY_EQUAL, "tiny-new", "top-p", turns, tokens, NEW_LOGIT_STD))
        more = args.tokens or LONGER
        keep(*tiny(f"tiny, one stream, {more:,} tokens", "tiny", "greedy", min(turns, 5), more))
        keep(*other_work(folder, "tiny", turns, tokens))
    if args.model:
        keep(*trained_model(folder, turns, tokens))
    if args.long:
        checkpoint = str(folder / f"{first}.h5")
        result["long_text"] = in_process("long_text", checkpoint, args.long, turns)
        keep()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama2c", type=Path, metavar="FOLDER", help="where run.c lies")
    parser.add_argument("--presets", nargs="+", choices=list(REPEATS), default=list(REPEATS))
    parser.add_argument("--model", type=Path, metavar="RUN", help="a trained model, too")
    parser.add_argument("--repeats", type=int, help="turns; default: 15, 5 and 3")
    parser.add_argument("--tokens", type=int, help="tokens of a text; default: 256, 256 and 64")
    parser.add_argument("--long", type=int, default=0, help="tokens of a long text; 0 has none")
    parser.add_argument("--show", action="store_true", help="print the results that are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    add_force(parser)
    args = parser.parse_args()
    if args.call:
        function, arguments = args.call[0], json.loads(args.call[1])
        if function == "prepare":
            folder, names, model = arguments
            print(json.dumps(prepare(Path(folder), names, model and Path(model))))
        else:
            print(json.dumps(long_text(*arguments)))
        return
    if args.show:
        print("\n".join(markdown(json.loads(args.out.read_text()))))
        return
    if not args.llama2c or not (args.llama2c / "run.c").exists():
        parser.error(f"--llama2c must be the folder of run.c and runq.c; got {args.llama2c}")
    check_results(parser, args, args.out)
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    print("\n".join(markdown(result)))


if __name__ == "__main__":
    main()
