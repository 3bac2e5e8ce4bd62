"""Log-probability of every token and line of a text, and a page that colours it by surprise.

The tokens are scored as ``mmrec.evaluation.evaluate`` scores them, with the same places where the
context starts anew, so the totals of both agree.
"""

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from mmrec.checkpoint.outputs import PAGE_MARK
from mmrec.config import TrainConfig
from mmrec.data.corpus import Split, count_evaluation_streams
from mmrec.data.tokenizer import Tokenizer
from mmrec.inference.decoder import Decoder, TokenScores
from mmrec.runtime import pages
from mmrec.runtime.names import printable
from mmrec.runtime.numeric import cdiv

CHUNK = 1024
"""Tokens that are scored at once."""
PAGE_TOKENS = 50_000
"""Most tokens of a text that a page shows, in about 10 MB. Browsers are slow with more."""
MAX_LEVEL = 12
"""Surprise in bits from which on the colour stays the same."""


class ScoredLine(NamedTuple):
    """One line of a text. A token belongs to the line in which it begins."""

    document: int
    """Number of the document, from 1."""
    number: int
    """Number of the line in its document, from 1."""
    tokens: np.ndarray
    """(n,) token ids. The last line of a document ends with the end token."""
    scores: TokenScores
    """How likely each of them was."""
    context_starts: Sequence[int]
    """Indices of tokens before which the context starts anew, inside a document."""

    @property
    def logprob(self) -> float:
        """Log-probability of the line in nats."""
        return float(self.scores.logprobs.sum(dtype=np.float64))


@dataclass
class Totals:
    """Sums over the lines of a text that were scored so far."""

    nats: float = 0.0
    """Minus the log-probability of all tokens."""
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def add(self, line: ScoredLine, n_bytes: int) -> None:
        """Add a line of ``n_bytes`` UTF-8 bytes."""
        self.nats -= line.logprob
        self.tokens += len(line.tokens)
        self.bytes += n_bytes
        self.documents = line.document

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Sum of the cross-entropies, in bits, over the UTF-8 bytes of the text."""
        return to_bits(-self.nats) / self.bytes

    def as_json(self) -> dict[str, Any]:
        """Return the figures under the names of ``mmrec eval --json``."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }


@dataclass
class _OpenLine:
    """The parts of a line that is not complete yet."""

    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """Tokens, and the arrays of their scores."""
    context_starts: list[int] = field(default_factory=list)
    size: int = 0

    def add(self, arrays: Sequence[np.ndarray], part: slice) -> None:
        self.parts.append(tuple(array[part] for array in arrays))
        self.size += len(self.parts[-1][0])

    def finish(self, document: int, number: int) -> ScoredLine:
        tokens, *scores = (np.concatenate(arrays) for arrays in zip(*self.parts, strict=True))
        return ScoredLine(document, number, tokens, TokenScores(*scores), self.context_starts)


def score_lines(
    decoder: Decoder,
    split: Split,
    *,
    top: int = 0,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[ScoredLine]:
    """Score every token of a text once, and yield its lines as they are complete.

    As in ``mmrec eval``, a text of 2,048 tokens or more is scored in several streams, of which each
    starts without context; and a model that was trained with a state of its own for each document
    starts each document without context. With a neural cache there is one stream, and the cache
    goes on over documents.

    Args:
        decoder: The model.
        split: The tokens of the text; every document ends with the end token.
        top: How many of the most likely tokens to return for each place.
        progress: Called with the number of tokens just scored.

    Yields:
        The lines in order.
    """
    train = TrainConfig.from_dict(decoder.metadata.get("train", {}))
    document_starts = split.doc_offsets[:-1] if train.data.state != "window" else [0]
    state = decoder.initial_state()
    streams = 1 if state.cache_size else count_evaluation_streams(split.n_tokens)
    stream_length = cdiv(max(1, split.n_tokens), streams)
    starts = {*map(int, document_starts), *range(0, split.n_tokens, stream_length)}
    inside = starts.difference(split.doc_offsets.tolist())
    line_ends = _line_ends(decoder.tokenizer)
    open_line, document, number = _OpenLine(), 1, 1
    for lo, hi in _cut(split.n_tokens, starts):
        if lo in starts:
            state = replace(decoder.initial_state(), cache=state.cache)
            if lo:
                state.recent[-1] = split.tokens[lo - 1]
        if lo in inside:
            open_line.context_starts.append(open_line.size)
        tokens = np.asarray(split.tokens[lo:hi], np.int64)
        arrays = (tokens, *decoder.score(state, tokens, top=top))
        progress(hi - lo)
        begin = 0
        for i in np.flatnonzero(line_ends[tokens]):
            open_line.add(arrays, slice(begin, i + 1))
            yield open_line.finish(document, number)
            open_line, begin = _OpenLine(), int(i) + 1
            number += int(line_ends[tokens[i]])
            if tokens[i] == decoder.tokenizer.eot:
                document, number = document + 1, 1
        if begin < len(tokens):
            open_line.add(arrays, slice(begin, None))


def _cut(n_tokens: int, starts: set[int]) -> Iterator[tuple[int, int]]:
    """Cut a text at places, and what lies between them into chunks."""
    ends = [*sorted(starts)[1:], n_tokens]
    for begin, end in zip(sorted(starts), ends, strict=True):
        for lo in range(begin, end, CHUNK):
            yield lo, min(lo + CHUNK, end)


def _line_ends(tokenizer: Tokenizer) -> np.ndarray:
    """Line ends in each token, (V,) int64. The end token ends the last line of a document."""
    counts = [tokenizer.token_bytes(i).count(b"\n") for i in range(tokenizer.vocab_size)]
    counts[tokenizer.eot] = 1
    return np.array(counts, np.int64)


# ---- showing what was scored


def line_bytes(tokenizer: Tokenizer, line: ScoredLine) -> bytes:
    """Return the UTF-8 bytes of a line, its line end included."""
    return b"".join(tokenizer.token_bytes(t) for t in line.tokens.tolist())


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""Return the text of a token; bytes that are no character as escapes, such as ``\xe2``."""
    if name := tokenizer.special_name(token):
        return name
    return tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")


def line_json(tokenizer: Tokenizer, line: ScoredLine) -> dict[str, Any]:
    """Return a line and its tokens as JSON values. Log-probabilities are in nats."""
    tokens, scores = [], line.scores
    for i, (token, logprob) in enumerate(zip(line.tokens.tolist(), scores.logprobs, strict=True)):
        entry = {"id": token, "text": token_text(tokenizer, token), "logprob": _rounded(logprob)}
        if scores.top_tokens.shape[1]:
            entry["top"] = [
                {"id": t, "text": token_text(tokenizer, t), "logprob": _rounded(x)}
                for t, x in zip(scores.top_tokens[i].tolist(), scores.top_logprobs[i], strict=True)
            ]
        tokens.append(entry)
    data = line_bytes(tokenizer, line)
    return {
        "document": line.document,
        "line": line.number,
        "text": data.decode("utf-8", "replace"),
        "bytes": len(data),
        "logprob": _rounded(line.logprob),
        "tokens": tokens,
    }


def to_bits(logprob: float) -> float:
    """Return the surprise in bits of what has a log-probability in nats."""
    return -logprob / math.log(2)


def _rounded(x: Any) -> float:
    return round(float(x), 6)


# ---- the page


class Page:
    """One HTML page that shows a text, the background of each token coloured by its surprise."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lines: list[str] = []
        self._shown = 0
        self._document = 0

    def add(self, line: ScoredLine) -> None:
        """Add a line, unless ``PAGE_TOKENS`` are shown already."""
        if self._shown >= PAGE_TOKENS:
            return
        if line.document != self._document:
            self._document = line.document
            self._lines.append("<hr>" if self._lines else "")
        count = min(len(line.tokens), PAGE_TOKENS - self._shown)
        self._shown += count
        n_bytes = len(line_bytes(self._tokenizer, line))
        rate = f"{to_bits(line.logprob) / n_bytes:.2f}" if n_bytes else ""
        units = "".join(_units(self._tokenizer, line, count))
        self._lines.append(
            f"<div><b>{line.number}</b><u title='bits per byte of the line'>{rate}</u>"
            f"<p>{units}</p></div>\n"
        )

    def render(self, title: str, totals: Totals) -> str:
        """Return the page, which loads nothing from elsewhere.

        Args:
            title: What was scored, and by which model.
            totals: The sums over the whole text.
        """
        shown = ""
        if self._shown < totals.tokens:
            shown = f" The first {self._shown:,} tokens are shown; the figures are of all."
        levels = "".join(
            f"<i class=s{k}>{k}{'+' * (k == MAX_LEVEL)}</i>" for k in range(MAX_LEVEL + 1)
        )
        figures = {
            "bits per byte": f"{totals.bits_per_byte:.4f}",
            "perplexity": f"{totals.perplexity:.2f}",
            "nats per token": f"{totals.loss:.4f}",
            "tokens": f"{totals.tokens:,}",
            "bytes": f"{totals.bytes:,}",
        }
        body = (
            f"<h1>{pages.text(title)}</h1>{pages.figures(figures)}"
            f"<figure><figcaption>Surprise, bits</figcaption>{levels}</figure>"
            "<small>A token of k bits had the probability 1 in 2<sup>k</sup>. Point at one to see "
            "what the model expected. In the margin: the line, and its bits per byte."
            f"{shown}</small><main>\n{''.join(self._lines)}</main><aside hidden></aside>"
        )
        return pages.page(PAGE_MARK, title, body, style=STYLE + _level_rules(), script=SCRIPT)


def _units(tokenizer: Tokenizer, line: ScoredLine, count: int) -> Iterator[str]:
    """Yield the first tokens of a line as HTML. Tokens that share a character are one unit."""
    pending, first = b"", 0
    for i, token in enumerate(line.tokens[:count].tolist()):
        if i in line.context_starts:
            yield "<s title='The context starts anew here, as in mmrec eval.'>↻</s>"
        pending += tokenizer.token_bytes(token)
        try:
            text = pending.decode()
        except UnicodeDecodeError:
            if i + 1 < count:
                continue
            text = pending.decode("utf-8", "replace")
        bits = to_bits(float(line.scores.logprobs[first : i + 1].sum(dtype=np.float64)))
        notes = [_note(tokenizer, line, j) for j in range(first, i + 1)]
        level = min(MAX_LEVEL, int(bits)) if bits >= 0 else 0  # false for NaN, too
        mark = "end" if token == tokenizer.eot else "n" if "\n" in text else ""
        hover = html.escape("\n\n".join(notes))
        yield f'<i class="s{level} {mark}" data-h="{hover}">{html.escape(text)}</i>'
        pending, first = b"", i + 1


def _note(tokenizer: Tokenizer, line: ScoredLine, i: int) -> str:
    """What is shown of a token on hover: bits, probability, rank, and the likeliest tokens."""
    token, logprob = int(line.tokens[i]), float(line.scores.logprobs[i])
    top = line.scores.top_tokens[i].tolist()
    rank = f"rank {top.index(token) + 1}" if token in top else f"not among the {len(top)} likeliest"
    bits = to_bits(logprob)
    rows = [f"{quoted(tokenizer, token)}  {bits:.2f} bits, {_percent(logprob)}, {rank}"]
    for t, x in zip(top, line.scores.top_logprobs[i], strict=True):
        rows.append(f"{'→' if t == token else ' '} {_percent(float(x)):>7}  {quoted(tokenizer, t)}")
    return "\n".join(rows)


def quoted(tokenizer: Tokenizer, token: int) -> str:
    """Return a token on one line, in quotation marks."""
    return f'"{printable(token_text(tokenizer, token))}"'


def _percent(logprob: float) -> str:
    p = 100 * math.exp(logprob)
    return f"{p:.1f} %" if p >= 0.1 else f"{p:.2g} %"


def _level_rules() -> str:
    """A background for each level of surprise: more of one colour, over either background."""
    return "".join(
        f".s{k}{{background:rgb(var(--heat)/{0.78 * (k / MAX_LEVEL) ** 0.8:.2f})}}"
        for k in range(MAX_LEVEL + 1)
    )


STYLE = """
:root{--heat:235 80 40}
@media(prefers-color-scheme:dark){:root{--heat:255 70 40}}
figure{display:flex;align-items:center;margin:0 0 .4rem;flex-wrap:wrap}
figcaption{margin-right:.8rem}
figure i{font-style:normal;font-size:.78rem;min-width:2.1rem;padding:.15rem 0;text-align:center}
main{margin-top:1.2rem;border-top:1px solid var(--rule);padding-top:.8rem}
main div{display:flex;align-items:baseline;font:14px/1.65 ui-monospace,monospace}
main b,main u{flex:none;color:var(--dim);font-weight:400;text-decoration:none;text-align:right;
user-select:none;font-size:.78rem;font-variant-numeric:tabular-nums}
main b{width:3rem}main u{width:3rem;margin-right:1rem}
main p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;min-width:0}
main i{font-style:normal;padding:.18em 0}
main i:hover{outline:2px solid var(--text)}
.n::before{content:"↵";color:var(--dim)}.end::before{content:"∎";color:var(--dim)}
main s{text-decoration:none;color:var(--dim)}
hr{border:0;border-top:1px dashed var(--rule);margin:1rem 0}
aside{position:fixed;background:var(--text);color:var(--back);border-radius:.4rem;
padding:.5rem .7rem;
font:12.5px/1.45 ui-monospace,monospace;white-space:pre;pointer-events:none;max-width:90vw;
overflow:hidden}
"""
SCRIPT = """
const tip = document.querySelector("aside");
document.querySelector("main").addEventListener("mouseover", event => {
  const note = event.target.dataset.h;
  tip.hidden = !note;
  if (!note) return;
  tip.textContent = note;
  const box = event.target.getClientRects()[0], size = tip.getBoundingClientRect();
  const below = box.bottom + 6 + size.height < innerHeight;
  tip.style.left = Math.max(6, Math.min(box.left, innerWidth - size.width - 6)) + "px";
  tip.style.top = (below ? box.bottom + 6 : Math.max(6, box.top - size.height - 6)) + "px";
});
document.querySelector("main").addEventListener("mouseleave", () => { tip.hidden = true; });
"""
