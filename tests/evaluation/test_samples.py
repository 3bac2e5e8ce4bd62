"""Samples: their measures against plain computations, and their pages."""

import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.data.corpus import Corpus
from mmrec.data.sources import read_prompts
from mmrec.errors import InputError
from mmrec.evaluation.samples import (
    SPAN_LENGTHS,
    CopyFinder,
    Sample,
    distinct_n,
    sample_rows,
    to_html,
    to_markdown,
    write_samples,
)
from mmrec.model import Model
from tests.conftest import SMALL


@given(st.text("ab", max_size=300), st.text("ab", max_size=60), st.integers(0, 300))
def test_the_longest_copied_span(training: str, own: str, at: int) -> None:
    text = own + training[at : at + 40] + own[::-1]
    [found] = CopyFinder(training.encode()).longest_copies([text.encode()])
    spans = (text[lo:hi] for lo in range(len(text)) for hi in range(lo + 16, len(text) + 1))
    longest = max((len(s) for s in spans if s in training), default=0)
    assert len(found) == longest
    assert found in training.encode()
    assert found in text.encode()


def test_long_copies_are_found_whole(corpus: Corpus) -> None:
    training = corpus.tokenizer.decode(corpus.train.tokens)
    for size in (15, 16, 40, SPAN_LENGTHS[-1] + 500):
        taken = training[3000 : 3000 + size]
        texts = [f"☃{taken}☃".encode(), "☃☃☃☃☃☃".encode()]
        span, none = CopyFinder(training.encode()).longest_copies(texts)
        assert span.decode() == (taken if size >= 16 else "")
        assert none == b""


def sample(text: str, **other: object) -> Sample:
    return Sample(
        **{
            "checkpoint": "a",
            "prompt": "p",
            "temperature": 1.0,
            "text": text,
            "nats_per_token": 2.0,
            "copied": "",
            **other,
        }
    )  # type: ignore[arg-type]


def test_repetition_and_variety() -> None:
    assert sample("a b c d " * 5).repeated == pytest.approx(1 - 4 / 17)
    assert sample("one two three four five").repeated == 0
    assert sample("short").repeated == 0
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3
    rows = sample_rows([sample("a b", copied="xyz"), sample("c d"), sample("e", temperature=0.0)])
    assert [row[1] for row in rows] == ["1", "0"]
    assert rows[0][2:5] == ("1.00", "1.00", "0.00")
    assert rows[0][6] == "2, at most 3"


def test_reports_escape_what_was_written() -> None:
    samples = [
        sample("<script>alert(1)</script> copied words here", copied="copied words"),
        sample("other", checkpoint="b"),
    ]
    page = to_html(samples)
    assert "<script>" not in page
    assert "<mark>copied words</mark>" in page
    assert page.count("<th>a</th>") == page.count("<th>b</th>") == 1  # side by side
    text = to_markdown(samples)
    assert "    p<script>" in text  # as code, so that nothing of it is taken for Markdown


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("def f\n\nimport \n")
    assert read_prompts(tmp_path / "a.txt") == ["def f", "import "]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "two\nlines"}) + "\n")
    assert read_prompts(tmp_path / "a.jsonl") == ["two\nlines"]


LINES = "\ufeffa\u2028b\r\n\r\n  c\fd \n \n\x1ee<|endoftext|>f"
PROMPTS = ["a\u2028b", "  c\fd ", "\x1ee<|endoftext|>f"]


def as_records(field: str) -> str:
    lines = (json.dumps({field: p}, ensure_ascii=False) for p in ["", *PROMPTS])
    return "\ufeff" + "\n\n".join(lines)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.txt.gz"])
def test_prompts_are_read_by_the_rules_of_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only line feeds end a line; blank lines are left out; a record may be empty."""
    compress = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(compress(LINES.encode()))
    assert read_prompts(tmp_path / name) == PROMPTS
    (tmp_path / name).write_bytes(compress(as_records("prompt").encode()))
    assert read_prompts(tmp_path / name) == ["", *PROMPTS]
    (tmp_path / name).write_bytes(compress(as_records("body").encode()))
    assert read_prompts(tmp_path / name, text_field="body") == ["", *PROMPTS]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LINES.encode())))
    assert read_prompts("-") == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": null}', "line 2 .* field 'prompt' .*holds null"),
        ("a.jsonl", b'{"text": "x"}', "line 1 must have a field 'prompt' .*; its fields are: text"),
        ("a.jsonl", b"[1]", "line 1 must be a JSON object; it is a list"),
        ("a.txt", b"caf\xe9", "byte 0xe9 at offset 3 is not"),
        ("a.txt", b"a\0b", "a NUL byte at offset 1"),
        ("a.txt", b"%PDF-1.7", "it is a PDF document"),
        ("a.txt", b" \n\n", "must hold prompts, one per line; it holds none"),
        ("none.txt", None, "No such file"),
    ],
)
def test_prompts_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)
    if message.endswith("null"):
        notes: list[str] = []
        assert read_prompts(tmp_path / name, skip_bad=True, note=notes.append) == ["x"]
        assert len(notes) == 1
        assert re.match("records and files skipped: 1, the first because .* line 2 ", notes[0])


def test_a_field_of_prompts_without_records_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match="holds text without fields"):
        read_prompts(tmp_path / "a.txt", text_field="body")


def test_samples_of_a_model(corpus: Corpus) -> None:
    model = Model(replace(SMALL, dropout=0.1)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    loaded = LoadedModel(Path("model.h5"), model, corpus.tokenizer, 0, {})
    training = corpus.tokenizer.decode(corpus.train.tokens).encode()
    samples = write_samples([loaded], ["def ", "im"], [0.0, 1.0], [training], 40)
    assert [(s.prompt, s.temperature) for s in samples] == [
        ("def ", 0),
        ("def ", 1),
        ("im", 0),
        ("im", 1),
    ]
    assert all(s.copied.encode() in training for s in samples)
    [again] = write_samples([loaded], ["im"], [0.0], [b""], 40)
    assert (again.text, again.copied) == (samples[2].text, "")
    for s in samples:  # its log-probability, token by token in float64
        ids = [256, *s.prompt.encode(), *corpus.tokenizer.encode(s.text).tolist()]
        with torch.no_grad():
            logits, _ = model.double()(torch.tensor([ids[:-1]]))
        model.float()
        logp = torch.log_softmax(logits[0], -1).gather(1, torch.tensor(ids[1:])[:, None])
        assert s.nats_per_token == pytest.approx(-logp[len(s.prompt) :].mean().item(), rel=1e-4)
