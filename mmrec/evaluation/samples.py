"""What a model writes: prompts at several temperatures, judged by numbers and side by side.

The numbers say what is wrong, not what is good: text that repeats itself, says little, or copies
its training text.
"""

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.errors import InputError
from mmrec.evaluation.evaluate import continuation
from mmrec.inference.generate import Sampling, generate

LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # bytes looked for
BASE = 0x9E3779B97F4A7C15 | 1  # odd, so that it has an inverse modulo 2^64
STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em;max-width:90em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.4em .7em;vertical-align:top;text-align:left}"
    "pre{white-space:pre-wrap;margin:0;font-size:13px}small{color:#666}"
)


@dataclass(frozen=True)
class Sample:
    """One text that a model wrote."""

    checkpoint: str
    prompt: str
    temperature: float
    text: str
    """What followed the prompt."""
    nats: float
    """Minus the log-probability of its own text, mean nats a token."""
    copied: str
    """The longest span of it that stands in the training text."""

    @property
    def repeated(self) -> float:
        """Share of its runs of four words that stood in it before (Welleck et al. 2020,
        arXiv:1908.04319, section 6, seq-rep-4)."""
        runs = ngrams(self.text, 4)
        return 1 - len(set(runs)) / max(1, len(runs)) if runs else 0.0


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of n words."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct runs of n words over all of them (Li et al. 2016, arXiv:1510.03055, section 5)."""
    runs = [run for text in texts for run in ngrams(text, n)]
    return len(set(runs)) / max(1, len(runs))


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: a line each, or JSON lines with a field ``prompt`` if it ends in .jsonl.

    Raises InputError if it cannot be read or holds none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text; byte {error.start} is not") from None
    if path.suffix != ".jsonl":
        made = [line for line in lines if line.strip()]
    else:
        made = []
        for number, line in enumerate(lines, 1):
            try:
                made.append(str(json.loads(line)["prompt"]))
            except (ValueError, LookupError, TypeError):
                raise InputError(
                    f"{path} line {number} must be a JSON object with a field 'prompt'"
                ) from None
    if not made:
        raise InputError(f"{path} must hold prompts, one a line; it holds none")
    return made


class Copies:
    """Finds the longest span of a text that stands in another, long one."""

    def __init__(self, text: bytes) -> None:
        """Index a text: 24 bytes of memory a byte of it, while texts are looked for."""
        self._text = text
        self._hashes, self._inverse = _prefixes(text)

    def longest(self, texts: Sequence[bytes]) -> list[bytes]:
        """The longest span, of 16 bytes or more, of each text; empty where there is none.

        Hashes of all spans of a few lengths say where a text shares the greatest of them; there the
        span is looked up in the text itself, and grown byte by byte.
        """
        hits: dict[int, tuple[int, np.ndarray]] = {}  # by number of the text: a length, and places
        alive = list(range(len(texts)))
        for size in LENGTHS:
            alive = [i for i in alive if len(texts[i]) >= size]
            if not alive or len(self._text) < size:
                break
            spans = {i: _spans(*_prefixes(texts[i]), size) for i in alive}
            wanted = np.unique(np.concatenate(list(spans.values())))
            there = _spans(self._hashes, self._inverse, size)
            at = np.searchsorted(wanted, there).clip(max=len(wanted) - 1)
            found = np.unique(there[wanted[at] == there])
            places = {i: np.flatnonzero(np.isin(spans[i], found)) for i in alive}
            alive = [i for i in alive if len(places[i])]
            hits |= {i: (size, places[i]) for i in alive}
        best = [b""] * len(texts)
        for i, (size, starts) in hits.items():
            for lo in starts.tolist():
                span = texts[i][lo : lo + max(size, len(best[i]) + 1)]
                if len(span) > len(best[i]) and span in self._text:
                    best[i] = self._grow(texts[i], lo, len(span))
        return best

    def _grow(self, text: bytes, lo: int, size: int) -> bytes:
        """The span from ``lo`` on as far as it stands in the text."""
        high = size
        while lo + high < len(text) and text[lo : lo + high + 1] in self._text:
            high += 1
        return text[lo : lo + high]


def _prefixes(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Polynomial hashes modulo 2^64 of all prefixes, and the powers that bring a span to 0."""
    count = len(text)
    powers = np.cumprod(np.full(count, BASE, np.uint64))
    inverse = np.cumprod(np.full(count, pow(BASE, -1, 1 << 64), np.uint64))
    values = np.frombuffer(text, np.uint8).astype(np.uint64) + np.uint64(1)
    return np.concatenate(([np.uint64(0)], np.cumsum(values * powers))), inverse


def _spans(prefixes: np.ndarray, inverse: np.ndarray, size: int) -> np.ndarray:
    """Hashes of all spans of a size."""
    return (prefixes[size:] - prefixes[:-size]) * inverse[: len(prefixes) - size]


def write_samples(
    models: Sequence[LoadedModel],
    prompts: Sequence[str],
    temperatures: Sequence[float],
    training: Sequence[bytes],
    max_tokens: int,
    progress: Callable[[int], object],
) -> list[Sample]:
    """Every model writes on from every prompt at every temperature, with seed 0 and top_p 0.95.

    ``training`` is each model's own training text, in which copies are looked for; an empty one has
    none.
    """
    made: list[Sample] = []
    for loaded, text_before in zip(models, training, strict=True):
        drafts, bodies = [], []
        for prompt in prompts:
            for warm in temperatures:
                how = Sampling(temperature=warm)
                text = "".join(
                    generate(
                        loaded.model,
                        loaded.tokenizer,
                        prompt,
                        how=how,
                        seed=0,
                        max_tokens=max_tokens,
                    )
                )
                start = [loaded.tokenizer.eot, *loaded.tokenizer.encode(prompt).tolist()]
                ids = loaded.tokenizer.encode(text).tolist()
                nats, _ = continuation(loaded.model, start).score(ids)
                mean = float(nats.mean()) if len(nats) else 0.0
                drafts.append((str(loaded.path), prompt, warm, text, mean))
                bodies.append(text.encode())
                progress(1)
        copied = Copies(text_before).longest(bodies)
        made += [
            Sample(*draft, span.decode("utf-8", "ignore"))  # its ends may cut a character
            for draft, span in zip(drafts, copied, strict=True)
        ]
    return made


HEAD = (
    "checkpoint",
    "temperature",
    "distinct-1",
    "distinct-2",
    "distinct-3",
    "repeated",
    "copied (characters)",
    "nats/token",
)


def table(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    """A row a checkpoint and temperature: means over prompts; of copies the mean and the most."""
    rows = []
    for key in dict.fromkeys((s.checkpoint, s.temperature) for s in samples):
        mine = [s for s in samples if (s.checkpoint, s.temperature) == key]
        texts, copies = [s.text for s in mine], [len(s.copied) for s in mine]
        rows.append(
            (
                key[0],
                f"{key[1]:g}",
                *(f"{distinct(texts, n):.2f}" for n in (1, 2, 3)),
                f"{np.mean([s.repeated for s in mine]):.1%}",
                f"{np.mean(copies):.0f}, at most {max(copies)}",
                f"{np.mean([s.nats for s in mine]):.2f}",
            )
        )
    return rows


def as_markdown(samples: Sequence[Sample]) -> str:
    """The table, then every prompt with what followed it."""
    lines = ["# What the model writes", "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in table(samples)]
    for prompt in dict.fromkeys(s.prompt for s in samples):
        lines += ["", f"## {prompt.strip().splitlines()[0] if prompt.strip() else '(empty)'}"]
        for s in samples:
            if s.prompt == prompt:
                lines += [
                    "",
                    f"{s.checkpoint}, temperature {s.temperature:g}, {s.nats:.2f} "
                    f"nats/token, {s.repeated:.0%} repeated, {len(s.copied)} characters "
                    "copied:",
                    "",
                ]
                lines += [f"    {line}" for line in (s.prompt + s.text).splitlines()]
    return "\n".join(lines) + "\n"


def as_html(samples: Sequence[Sample]) -> str:
    """One page without outside parts: the table, then prompts down and checkpoints across."""
    names = list(dict.fromkeys(s.checkpoint for s in samples))
    cells = "".join(f"<th>{h}</th>" for h in HEAD)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
        for row in table(samples)
    )
    page = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>What the model writes"
        f"</title><style>{STYLE}</style><h1>What the model writes</h1><table><tr>{cells}</tr>"
        f"{rows}</table>"
    ]
    for prompt in dict.fromkeys(s.prompt for s in samples):
        heads = "".join(f"<th>{html.escape(n)}</th>" for n in names)
        page.append(f"<h2>{html.escape(prompt)}</h2><table><tr><th>temperature</th>{heads}</tr>")
        for warm in dict.fromkeys(s.temperature for s in samples):
            page.append(f"<tr><td>{warm:g}</td>")
            for s in samples:
                if (s.prompt, s.temperature) == (prompt, warm):
                    text = html.escape(s.text)
                    if s.copied:
                        span = html.escape(s.copied)
                        text = text.replace(span, f"<mark>{span}</mark>", 1)
                    page.append(
                        f"<td><pre>{text}</pre><small>{s.nats:.2f} nats/token, "
                        f"{s.repeated:.0%} repeated, {len(s.copied)} characters copied"
                        "</small></td>"
                    )
            page.append("</tr>")
        page.append("</table>")
    return "".join(page) + "\n"
