"""Pictures: any name is drawn as it is, and no picture ends a run."""

import json
import os
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from mmrec.data.corpus import Corpus
from mmrec.errors import StorageError
from mmrec.evaluation.compare import Curve, draw_curves
from mmrec.evaluation.report import Report, draw_report
from mmrec.runtime.pictures import LABEL_CHARS
from mmrec.training import metrics
from mmrec.training.metrics import MetricsLog
from mmrec.training.plots import draw_loss_curve, draw_stages
from tests.conftest import make_trainer

LINES = [{"kind": kind, "step": i, "loss": 5.0 - i} for i in range(3) for kind in ("train", "val")]
BIN = {"from": 0, "to": 99, "tokens": 3, "loss": 1.0, "confidence": 0.5, "correct": 0.5}
REPORT = Report(2, None, [BIN], [BIN], 0.1)
NAMES = [
    "$HOME_$USER",
    "a{b}^_\\frac{",
    "%s 50% #1 & ~x",
    "_hidden",
    "[bold]x",
    "x\ny\r\t\x1b[31m",
    "日本😀",
    os.fsdecode(b"caf\xe9"),
    "v" * 300,
    "",
]


def curve(name: str) -> Curve:
    return Curve(name, "", 64, 6, 384, 2.0, [(3, 2.5), (6, 2.0)], 2.0, "done")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are in a figure when it is saved."""
    texts: list[str] = []
    save = Figure.savefig

    def record(self: Figure, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        found = [text for text in self.findobj(Text) if text.get_visible()]
        texts.extend(text.get_text() for text in found)
        assert not any(text.get_parse_math() or text.get_usetex() for text in found)

    monkeypatch.setattr(Figure, "savefig", record)
    return texts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tex", [False, True])  # as a user's own matplotlibrc may say
def test_any_name_is_drawn_as_it_is(name: str, tex: bool, tmp_path: Path, drawn: list[str]) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    with matplotlib.rc_context({"text.usetex": tex}):
        draw_loss_curve(LINES, paths[0], name)
        draw_stages([curve(f"runs/{name}")], [None], paths[1])
        draw_curves([curve(name), curve("other")], paths[2])
        draw_report(REPORT, paths[3], name)
        assert matplotlib.rcParams["text.usetex"] == tex
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    title = name if name.isprintable() else name.encode("unicode_escape").decode()
    if 0 < len(title) <= LABEL_CHARS:
        assert {title, "./_hidden" if title == "_hidden" else title} <= set(drawn)
    assert "100" in drawn  # on the logarithmic axis, and not as a formula
    assert max(map(len, drawn)) <= LABEL_CHARS + 2


def break_matplotlib(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(Figure, "savefig", fail)


@pytest.mark.parametrize("error", [ValueError("bad\nfont"), MemoryError(), OSError(28, "No space")])
def test_a_picture_that_fails_is_one_warning_and_training_goes_on(
    error: Exception, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_matplotlib(monkeypatch, error)
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    trainer = make_trainer(corpus, tmp_path, steps=3, draw_curve=True)
    assert trainer.fit()["ended"] == "done"
    warnings = [line for line in trainer.lines if line.startswith("warning")]  # type: ignore[attr-defined]
    assert len(warnings) == 1
    assert "loss.png" in warnings[0]
    assert "\n" not in warnings[0]
    assert (tmp_path / "last.h5").exists()
    assert not list(tmp_path.glob("*.png"))
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(StorageError, match="could not (draw|write) .*c.png"):
        draw_curves([curve("a")], tmp_path / "c.png")


def test_metrics_of_callbacks_may_have_any_name(tmp_path: Path) -> None:
    values = {"$a_$": 1.0, "x\ny\u2028": "t\nu", "": float("nan"), "caf\udce9": "日本\udce9"}
    log = MetricsLog(tmp_path)
    log.write("callback", 1, **values)
    log.write("train", 2, loss=1.0)
    log.close()
    read = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in read] == ["callback", "train"]
    assert json.loads(read[0])["x\ny\u2028"] == "t\nu"
    assert json.loads(read[0])["caf\udce9"] == "日本\udce9"
