"""Scores of tokens and lines agree with ``mmrec eval``; the page shows the text itself."""

import html.parser
import math
from typing import Any

import numpy as np
import pytest
import torch

from mmrec.data.corpus import Split
from mmrec.data.readers import ReadOptions, split_documents
from mmrec.data.tokenize import encode_documents
from mmrec.data.tokenizer import EOT, Tokenizer, train_tokenizer
from mmrec.evaluation.evaluate import evaluate_split
from mmrec.inference import score as score_module
from mmrec.inference.decoder import Decoder
from mmrec.inference.score import (
    Page,
    ScoredLine,
    Totals,
    line_bytes,
    line_json,
    score_lines,
)
from mmrec.model import Model
from tests.conftest import SMALL

TEXT = "\n\ndef read(self):\n    return 1 < 2  # ☃\n\n\nlast & open"


def make_model(tokenizer: Tokenizer) -> Model:
    shape = SMALL.__dict__ | {"vocab_size": tokenizer.vocab_size, "ngram_buckets": 64}
    model = Model(type(SMALL)(**shape)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return model


def make_decoder(model: Model, tokenizer: Tokenizer, state: str = "window") -> Decoder:
    decoder = Decoder.from_model(model, tokenizer)
    decoder.metadata = {"train": {"data": {"state": state}}}
    return decoder


def split_of(tokenizer: Tokenizer, text: str) -> Split:
    return encode_documents(tokenizer, split_documents(text, "text", ReadOptions()))


def totals_of(tokenizer: Tokenizer, lines: list[ScoredLine]) -> Totals:
    totals = Totals()
    for line in lines:
        totals.add(line, len(line_bytes(tokenizer, line)))
    return totals


@pytest.mark.parametrize(
    ("kind", "state", "repeats"),
    [
        ("byte", "window", 40),
        ("char", "document", 40),
        ("byte", "document", 4),
        ("bpe", "window", 4),
        ("bpe", "document", 4),
    ],
)
def test_totals_are_those_of_eval(kind: str, state: str, repeats: int) -> None:
    """The long text has two streams, and documents that end inside of them."""
    text = EOT.join([TEXT, TEXT * 4, "x", TEXT * repeats])
    tokenizer = train_tokenizer(kind, [text], 260)
    model, split = make_model(tokenizer), split_of(tokenizer, text)
    assert (split.n_tokens >= 2048) == (repeats == 40)
    want = evaluate_split(model, split, tokenizer, reset_at_documents=state == "document")
    counts: list[int] = []
    decoder = make_decoder(model, tokenizer, state)
    lines = list(score_lines(decoder, split, progress=counts.append))
    found = totals_of(tokenizer, lines)
    assert found.loss == pytest.approx(want.loss, abs=1e-5)
    assert found.bits_per_byte == pytest.approx(want.bits_per_byte, abs=1e-5)
    assert found.perplexity == pytest.approx(want.perplexity, rel=1e-5)
    assert (found.tokens, found.bytes, found.documents) == (want.tokens, want.bytes, 4)
    assert sum(counts) == split.n_tokens


def test_lines_are_those_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "CHUNK", 7)  # lines go on from chunk to chunk
    tokenizer = train_tokenizer("byte", [])
    decoder = make_decoder(make_model(tokenizer), tokenizer)
    split = split_of(tokenizer, TEXT + EOT + "x\n")
    lines = list(score_lines(decoder, split, top=3))
    texts = [line_bytes(tokenizer, line).decode() for line in lines]
    assert texts == [*TEXT.splitlines(keepends=True), "x\n", ""]
    assert [(line.document, line.number) for line in lines[-4:]] == [(1, 6), (1, 7), (2, 1), (2, 2)]
    assert [int(line.tokens[-1]) for line in lines[-3:]] == [tokenizer.eot, 10, tokenizer.eot]
    state = decoder.initial_state()
    alone = decoder.score(state, split.tokens, top=3)
    for name in ("logprobs", "top_tokens", "top_logprobs"):
        joined = np.concatenate([getattr(line.scores, name) for line in lines])
        assert (joined == getattr(alone, name)).all()


def test_a_token_with_several_line_ends_counts_them() -> None:
    tokenizer = train_tokenizer("bpe", ["a\n\n\n"] * 50, 262)
    decoder = make_decoder(make_model(tokenizer), tokenizer)
    lines = list(score_lines(decoder, split_of(tokenizer, "a\n\n\na")))
    assert [line_bytes(tokenizer, line) for line in lines] == [b"a\n\n", b"\n", b"a"]
    assert [line.number for line in lines] == [1, 3, 4]


def test_where_the_context_starts_anew() -> None:
    tokenizer = train_tokenizer("byte", [])
    decoder = make_decoder(make_model(tokenizer), tokenizer)
    split = split_of(tokenizer, "0123456789\n" * 190)
    lines = list(score_lines(decoder, split))
    assert split.n_tokens == 2091
    assert [(n.number, n.context_starts) for n in lines if n.context_starts] == [(96, [1])]


def test_json_of_a_line() -> None:
    tokenizer = train_tokenizer("byte", [])
    decoder = make_decoder(make_model(tokenizer), tokenizer)
    (line,) = score_lines(decoder, split_of(tokenizer, "é"), top=2)
    found = line_json(tokenizer, line)
    assert {k: found[k] for k in ("document", "line", "text", "bytes")} == {
        "document": 1,
        "line": 1,
        "text": "é",
        "bytes": 2,
    }
    assert [t["text"] for t in found["tokens"]] == ["\\xc3", "\\xa9", EOT]
    assert [t["id"] for t in found["tokens"]] == [0xC3, 0xA9, 256]
    logprobs = [t["logprob"] for t in found["tokens"]]
    assert sum(logprobs) == pytest.approx(found["logprob"], abs=1e-5)
    assert [len(t["top"]) for t in found["tokens"]] == [2, 2, 2]
    assert found["tokens"][0]["top"][0]["logprob"] >= found["tokens"][0]["logprob"]


class PageReader(html.parser.HTMLParser):
    """Collects the tokens of a page: text, class, and what hover shows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str, str]] = []
        self.addresses: list[str] = []
        self._open: dict[str, Any] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.addresses += [str(values[k]) for k in ("src", "href") if k in values]
        if tag == "i" and "data-h" in values:
            self._open = values
            self.tokens.append(("", str(values["class"]), str(values["data-h"])))

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            text, *others = self.tokens[-1]
            self.tokens[-1] = (text + data, *others)  # type: ignore[assignment]


def page_of(tokenizer: Tokenizer, text: str) -> tuple[str, list[ScoredLine]]:
    decoder = make_decoder(make_model(tokenizer), tokenizer)
    lines, page = list(score_lines(decoder, split_of(tokenizer, text), top=5)), Page(tokenizer)
    for line in lines:
        page.add(line)
    return page.render("<model>", totals_of(tokenizer, lines)), lines


def test_the_page_shows_each_token_with_its_surprise() -> None:
    tokenizer = train_tokenizer("char", [TEXT])
    page, lines = page_of(tokenizer, TEXT)
    found = PageReader(page)
    assert "".join(text for text, *_ in found.tokens) == TEXT
    assert found.addresses == []
    assert "<title>&lt;model&gt;</title>" in page
    logprobs = np.concatenate([line.scores.logprobs for line in lines])
    tokens = np.concatenate([line.tokens for line in lines])
    top = np.concatenate([line.scores.top_tokens for line in lines])
    for (_, kind, note), logprob, token, likeliest in zip(
        found.tokens, logprobs, tokens, top, strict=True
    ):
        bits = -logprob / math.log(2)
        assert kind.split()[0] == f"s{min(12, int(bits))}"
        assert f"{bits:.2f} bits" in note
        rank = f"rank {likeliest.tolist().index(token) + 1}" if token in likeliest else "not among"
        assert rank in note
        assert len(note.splitlines()) == 6
    assert found.tokens[-1][1].split()[1] == "end"
    assert f"{totals_of(tokenizer, lines).bits_per_byte:.4f}" in page


def test_tokens_that_share_a_character_are_one_on_the_page() -> None:
    tokenizer = train_tokenizer("byte", [])
    page, lines = page_of(tokenizer, "a☃\n")
    found = PageReader(page)
    assert [text for text, *_ in found.tokens] == ["a", "☃", "\n", ""]
    bits = -float(lines[0].scores.logprobs[1:4].sum()) / math.log(2)
    assert found.tokens[1][1].split()[0] == f"s{min(12, int(bits))}"
    for byte in "☃".encode():
        assert f'"\\x{byte:02x}"  ' in found.tokens[1][2]


def test_the_page_of_a_long_text_shows_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "PAGE_TOKENS", 8)
    tokenizer = train_tokenizer("byte", [])
    page, _ = page_of(tokenizer, "one\ntwo three\nfour\n")
    assert "".join(text for text, *_ in PageReader(page).tokens) == "one\ntwo "
    assert "The first 8 tokens are shown" in page
