"""``--adapt`` of eval and generate, and of the Python API: figures apart, the model as it was."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import mmrec
from mmrec.cli import main
from mmrec.errors import InputError
from mmrec.evaluation.adapt import SEGMENT_TOKENS

WORDS = "It was the best of times,\nit was the worst of times.\nthe best times. " * 3


@pytest.fixture
def _folder(tmp_path: Path, char_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a run and a text, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(char_run)
    Path("text.txt").write_text(WORDS)


@pytest.mark.usefixtures("_folder")
def test_the_api_keeps_the_figures_apart_and_the_model_as_it_is() -> None:
    model = mmrec.load("run")
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    file = model.path.read_bytes()
    plain = mmrec.evaluate(model, "text.txt")
    scores = mmrec.evaluate(model, "text.txt", adapt=True, adapt_lr=1e-2)
    adapted, same = mmrec.adapt(model, "text.txt", adapt_lr=1e-2)
    assert plain.dynamic is None
    assert dataclasses.replace(scores, seconds=0, dynamic=None) == dataclasses.replace(
        plain, seconds=0
    )
    assert scores.dynamic is not None
    assert same.dynamic is not None
    assert scores.dynamic.bits_per_byte < 0.95 * plain.bits_per_byte
    assert scores.dynamic.bits_per_byte == same.dynamic.bits_per_byte
    assert scores.dynamic.learning_rate == 1e-2
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())
    assert model.path.read_bytes() == file
    after = mmrec.evaluate(adapted, "text.txt")
    assert after.bits_per_byte < scores.dynamic.bits_per_byte  # it has learnt the text by then
    with pytest.raises(InputError, match="adapt_lr has no effect without adapt"):
        mmrec.evaluate(model, "text.txt", adapt_lr=1e-2)
    with pytest.raises(InputError, match=r"adapt_lr must be finite and > 0; got 0"):
        mmrec.adapt(model, "text.txt", adapt_lr=0)


def run(
    words: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """What a command prints on standard output and on standard error."""
    patch.setattr(sys, "argv", ["mmrec", *words.split()])
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main.run()
    printed = capsys.readouterr()
    assert not caught.value.code, printed.err
    return printed.out, printed.err


@pytest.mark.usefixtures("_folder")
def test_eval_has_a_row_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "eval run --data text.txt"
    plain = json.loads(run(f"{words} --json", monkeypatch, capsys)[0])
    both = json.loads(run(f"{words} --json --adapt --adapt-lr 0.01", monkeypatch, capsys)[0])
    dynamic = both.pop("dynamic")
    assert plain | {"seconds": 0} == both | {"seconds": 0}
    assert dynamic["updates"] == math.ceil(plain["tokens"] / SEGMENT_TOKENS)
    assert dynamic["bits_per_byte"] < 0.95 * plain["bits_per_byte"]
    lines = run(f"{words} --adapt --adapt-lr 0.01", monkeypatch, capsys)[0].splitlines()
    assert f"{plain['bits_per_byte']:.4f}" in next(x for x in lines if "bits per byte " in x)
    assert f"{dynamic['bits_per_byte']:.4f}" in next(x for x in lines if "--adapt " in x)


@pytest.mark.usefixtures("_folder")
def test_generate_continues_a_text_that_the_model_adapted_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is what the parts of the Python API write; the file of the model stays."""
    file = Path("run/best.h5").read_bytes()
    options = "--max-tokens 30 --seed 1 --temperature 0.5 --prompt the"
    plain, _ = run(f"generate run --read text.txt {options}", monkeypatch, capsys)
    words = f"generate run --adapt text.txt --adapt-lr 0.01 {options}"
    text, note = run(words, monkeypatch, capsys)
    adapted, scores = mmrec.adapt("run", "text.txt", adapt_lr=0.01)
    session = mmrec.Session(adapted.decoder)
    session.read(Path("text.txt"))
    session.read("the")
    want = "".join(session.generate(max_tokens=30, seed=1, temperature=0.5))
    assert text == f"the{want}\n" != plain
    assert scores.dynamic is not None
    assert note.count("\n") == 1
    for number in (scores.bits_per_byte, scores.dynamic.bits_per_byte):
        assert f"{number:.4f}" in note
    lines = run(f"{words} --samples 2 --json", monkeypatch, capsys)[0].splitlines()
    assert json.loads(lines[0])["text"] == want
    assert Path("run/best.h5").read_bytes() == file
