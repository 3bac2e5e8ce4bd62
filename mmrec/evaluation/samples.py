"""Generated samples: texts from prompts at several temperatures, measured and shown side by side.

The measures show what is wrong with a text, not what is good about it: it repeats itself, has few
different words, or copies the training text.
"""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.config import SamplingConfig
from mmrec.evaluation.evaluate import read_context
from mmrec.inference.engine import Request, complete
from mmrec.runtime.names import printable

SPAN_LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Bytes of the spans that are looked for by their hash."""
HASH_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so that it has an inverse modulo 2^64
STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em;max-width:90em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.4em .7em;vertical-align:top;text-align:left}"
    "pre{white-space:pre-wrap;margin:0;font-size:13px}small{color:#666}"
)


@dataclass(frozen=True)
class Sample:
    """One generated text."""

    checkpoint: str
    """Path of the checkpoint that generated it."""
    prompt: str
    temperature: float
    text: str
    """The text after the prompt."""
    nats_per_token: float
    """Mean cross-entropy of the text under the same model at temperature 1."""
    copied: str
    """The longest span, of 16 bytes or more, that occurs in the training text; may be empty."""

    @property
    def repeated(self) -> float:
        """Fraction of its word 4-grams that occurred earlier in the text.

        Source: Welleck et al. 2020, arXiv:1908.04319, section 6 (seq-rep-4).
        """
        found = word_ngrams(self.text, 4)
        return 1 - len(set(found)) / max(1, len(found)) if found else 0.0


def word_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Return the n-grams of the words of a text, in order."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the number of different word n-grams of all texts over the number of all of them.

    Source: Li et al. 2016, arXiv:1510.03055, section 5.
    """
    found = [ngram for text in texts for ngram in word_ngrams(text, n)]
    return len(set(found)) / max(1, len(found))


class CopyFinder:
    """Finds the longest span of a text that occurs in another, long text."""

    def __init__(self, text: bytes) -> None:
        """Index the long text, in 24 bytes of memory per byte of it."""
        self._text = text
        self._hashes, self._inverse = _prefix_hashes(text)

    def longest_copies(self, texts: Sequence[bytes]) -> list[bytes]:
        """Return the longest copied span, of 16 bytes or more, of each text; empty without one.

        Hashes of all spans of a few lengths show where a text shares the longest of these lengths
        with the long text. There, the span is looked up in the long text itself and extended byte
        by byte.
        """
        hits: dict[int, tuple[int, np.ndarray]] = {}
        """Index of a text -> the longest shared length, and where such spans start."""
        remaining = list(range(len(texts)))
        for size in SPAN_LENGTHS:
            remaining = [i for i in remaining if len(texts[i]) >= size]
            if not remaining or len(self._text) < size:
                break
            spans = {i: _span_hashes(*_prefix_hashes(texts[i]), size) for i in remaining}
            queries = np.unique(np.concatenate(list(spans.values())))
            known = _span_hashes(self._hashes, self._inverse, size)
            at = np.searchsorted(queries, known).clip(max=len(queries) - 1)
            shared = np.unique(known[queries[at] == known])
            starts = {i: np.flatnonzero(np.isin(spans[i], shared)) for i in remaining}
            remaining = [i for i in remaining if len(starts[i])]
            hits |= {i: (size, starts[i]) for i in remaining}
        longest = [b""] * len(texts)
        for i, (size, span_starts) in hits.items():
            for start in span_starts.tolist():
                span = texts[i][start : start + max(size, len(longest[i]) + 1)]
                if len(span) > len(longest[i]) and span in self._text:
                    longest[i] = self._extend(texts[i], start, len(span))
        return longest

    def _extend(self, text: bytes, start: int, size: int) -> bytes:
        """The longest copied span from ``start`` on, given that ``size`` bytes are copied."""
        while start + size < len(text) and text[start : start + size + 1] in self._text:
            size += 1
        return text[start : start + size]


def _prefix_hashes(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Polynomial hashes modulo 2^64 of all prefixes, and the inverse powers of the base.

    The inverse power of its start makes the hash of a span independent of where it starts.
    """
    count = len(text)
    powers = np.cumprod(np.full(count, HASH_BASE, np.uint64))
    inverse = np.cumprod(np.full(count, pow(HASH_BASE, -1, 1 << 64), np.uint64))
    values = np.frombuffer(text, np.uint8).astype(np.uint64) + np.uint64(1)
    return np.concatenate(([np.uint64(0)], np.cumsum(values * powers))), inverse


def _span_hashes(prefixes: np.ndarray, inverse: np.ndarray, size: int) -> np.ndarray:
    """Hashes of all spans of ``size`` bytes."""
    return (prefixes[size:] - prefixes[:-size]) * inverse[: len(prefixes) - size]


def write_samples(
    models: Sequence[LoadedModel],
    prompts: Sequence[str],
    temperatures: Sequence[float],
    training_texts: Sequence[bytes],
    max_tokens: int,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Sample]:
    """Generate a text with every model from every prompt at every temperature.

    The seed is 0 and top_p is 0.95.

    Args:
        models: the checkpoints.
        prompts: texts to continue.
        temperatures: see ``SamplingConfig``.
        training_texts: for each model its training text, in which copies are looked for; an empty
            one has none.
        max_tokens: largest number of tokens per text.
        progress: called with 1 after each text.

    Raises:
        InputError: see ``mmrec.inference.engine.complete``.
    """
    samples: list[Sample] = []
    for loaded in models:  # before any text is generated
        for number, prompt in enumerate(prompts, 1):
            loaded.tokenizer.check_text(prompt, f"prompt {number}")
    cases = [(prompt, temperature) for prompt in prompts for temperature in temperatures]
    for loaded, training_text in zip(models, training_texts, strict=True):
        requests = [
            Request(
                prompt,
                SamplingConfig(temperature=temperature),
                max_tokens=max_tokens,
                seed=0,
                return_state=False,
            )
            for prompt, temperature in cases
        ]
        drafts, texts = [], []
        completions = complete(loaded.decoder, requests)
        for (prompt, temperature), completion in zip(cases, completions, strict=True):
            text = completion.text
            context = [loaded.tokenizer.eot, *loaded.tokenizer.encode(prompt).tolist()]
            ids = loaded.tokenizer.encode(text).tolist()
            nats, _ = read_context(loaded.model, context).score(ids)
            mean = float(nats.mean()) if len(nats) else 0.0
            drafts.append((str(loaded.path), prompt, temperature, text, mean))
            texts.append(text.encode())
            progress(1)
        copies = CopyFinder(training_text).longest_copies(texts)
        samples += [
            Sample(*draft, span.decode("utf-8", "ignore"))  # a span may end inside a character
            for draft, span in zip(drafts, copies, strict=True)
        ]
    return samples


COLUMNS = (
    "checkpoint",
    "temperature",
    "distinct-1",
    "distinct-2",
    "distinct-3",
    "repeated",
    "copied (characters)",
    "nats/token",
)


def sample_rows(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    """Return the cells under COLUMNS, one row per checkpoint and temperature.

    Cells are means over prompts; copies have their mean and their largest length.
    """
    rows = []
    for checkpoint, temperature in dict.fromkeys((s.checkpoint, s.temperature) for s in samples):
        group = [s for s in samples if (s.checkpoint, s.temperature) == (checkpoint, temperature)]
        texts, copies = [s.text for s in group], [len(s.copied) for s in group]
        rows.append(
            (
                checkpoint,
                f"{temperature:g}",
                *(f"{distinct_n(texts, n):.2f}" for n in (1, 2, 3)),
                f"{np.mean([s.repeated for s in group]):.1%}",
                f"{np.mean(copies):.0f}, at most {max(copies)}",
                f"{np.mean([s.nats_per_token for s in group]):.2f}",
            )
        )
    return rows


def _summary(sample: Sample) -> str:
    return (
        f"{sample.nats_per_token:.2f} nats/token, {sample.repeated:.0%} repeated, "
        f"{len(sample.copied)} characters copied"
    )


def _escape_markdown(text: str) -> str:
    """One line of text without what Markdown would read as markup, or as the end of a cell."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", printable(text))


def to_markdown(samples: Sequence[Sample]) -> str:
    """Return a Markdown page: the table, then every prompt with the texts that continue it.

    Names and prompts are escaped; the texts are blocks of code.
    """
    lines = ["# Generated samples", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(map(_escape_markdown, row))} |" for row in sample_rows(samples)]
    for prompt in dict.fromkeys(s.prompt for s in samples):
        title = prompt.strip().splitlines()[0] if prompt.strip() else "(empty)"
        lines += ["", f"## {_escape_markdown(title)}"]
        for s in samples:
            if s.prompt == prompt:
                name = _escape_markdown(s.checkpoint)
                lines += ["", f"{name}, temperature {s.temperature:g}, {_summary(s)}:", ""]
                lines += [f"    {line}" for line in (s.prompt + s.text).splitlines()]
    return "\n".join(lines) + "\n"


def to_html(samples: Sequence[Sample]) -> str:
    """Return one HTML page: the table, then a table per prompt with a column per checkpoint.

    The page loads nothing from elsewhere, and all text is escaped.
    """
    checkpoints = list(dict.fromkeys(s.checkpoint for s in samples))
    header = "".join(f"<th>{title}</th>" for title in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(printable(cell))}</td>" for cell in row) + "</tr>"
        for row in sample_rows(samples)
    )
    page = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Generated samples</title>"
        f"<style>{STYLE}</style><h1>Generated samples</h1><table><tr>{header}</tr>{rows}</table>"
    ]
    for prompt in dict.fromkeys(s.prompt for s in samples):
        header = "".join(f"<th>{html.escape(printable(name))}</th>" for name in checkpoints)
        page.append(f"<h2>{html.escape(prompt)}</h2><table><tr><th>temperature</th>{header}</tr>")
        for temperature in dict.fromkeys(s.temperature for s in samples):
            page.append(f"<tr><td>{temperature:g}</td>")
            for s in samples:
                if (s.prompt, s.temperature) == (prompt, temperature):
                    text = html.escape(s.text)
                    if s.copied:  # split first: the escaped span may stand elsewhere by chance
                        parts = s.text.partition(s.copied)
                        text = "{}<mark>{}</mark>{}".format(*map(html.escape, parts))
                    page.append(f"<td><pre>{text}</pre><small>{_summary(s)}</small></td>")
            page.append("</tr>")
        page.append("</table>")
    return "".join(page) + "\n"
