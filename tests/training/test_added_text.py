"""A run goes on with its text to which more was added, exactly, and loses nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mmrec
from mmrec.checkpoint.checkpoint import load_model
from mmrec.checkpoint.header import read_metadata
from mmrec.data.corpus import Corpus
from mmrec.errors import InputError
from mmrec.evaluation.provenance import training_corpus
from tests.training.test_moved import SETTINGS, resume, source_of

RUN: dict[str, Any] = SETTINGS | {"dropout": 0.1, "eval_every": 4, "save_every": 4}


@pytest.fixture
def text(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Some text. The current folder is empty."""
    monkeypatch.chdir(tmp_path)
    return text_file.read_text()[:12_000]


def same_weights(a: Path, b: Path) -> bool:
    models = [load_model(path).model.parameters() for path in (a, b)]
    return all(torch.equal(p, q) for p, q in zip(*models, strict=True))


def test_a_killed_run_takes_up_added_text_bit_for_bit(text: str) -> None:
    """SIGKILL after text was added, before and after the first checkpoint of the longer text."""
    Path("book.txt").write_text(text[:8000])
    for name in ("whole", "killed"):
        mmrec.train("book.txt", out=name, steps=6, **RUN)
    Path("book.txt").write_text(text)
    whole = resume("whole", 120, data="book.txt")
    code = "import mmrec; mmrec.train(resume='killed', steps=120, data='book.txt', progress=False)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        end = time.monotonic() + 120
        while not Path("killed/step-16.h5").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    stopped = mmrec.train(resume="killed", callbacks=[StopAt(60)], progress=False)
    assert stopped.summary["steps"] == 60
    last = mmrec.train(resume="killed", progress=False)
    assert last.metrics == whole.metrics
    assert same_weights(last.last, whole.last)
    assert same_weights(last.best, whole.best)
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in run.summary["epochs"]]
        for run in (last, whole)
    ]
    assert rows[0] == rows[1]


class StopAt(mmrec.Callback):
    """Stops a run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, metrics: dict[str, float]) -> None:
        if metrics["step"] == self.step:
            trainer.request_stop()


def test_a_kill_before_the_first_checkpoint_of_the_longer_text(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrec.training.trainer import Trainer

    Path("book.txt").write_text(text[:8000])
    for name in ("whole", "killed"):
        mmrec.train("book.txt", out=name, steps=6, **RUN)
    Path("book.txt").write_text(text)
    whole = resume("whole", 12, data="book.txt")

    class KilledError(BaseException):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", kill)
        with pytest.raises(KilledError):
            resume("killed", 12, data="book.txt")
    assert read_metadata(Path("killed/last.h5")).step == 6
    again = mmrec.train(resume="killed", progress=False)  # its text is the longer one by now
    assert again.metrics == whole.metrics
    assert same_weights(again.last, whole.last)


def test_what_was_added_is_read_once_per_epoch(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("book.txt").write_text(text[:8000])
    first = mmrec.train("book.txt", out="run", epochs=2, **RUN)
    assert first.summary["steps"] == 2 * (7200 // 64)
    Path("book.txt").write_text(text)
    with pytest.raises(InputError, match="has grown since run was saved, by 4,000 bytes: .*--data"):
        mmrec.train(resume="run", epochs="+1", progress=False)
    with pytest.raises(InputError, match="run has ended: .*a longer length, such as --epochs"):
        mmrec.train(resume="run", data="book.txt", progress=False)
    capsys.readouterr()
    run = mmrec.train(resume="run", data="book.txt", epochs="+1")
    told = capsys.readouterr().out
    assert "text    3,601 training tokens and 401 validation tokens were added to 7,201" in told
    assert run.summary["steps"] == 2 * (7200 // 64) + 10_801 // 64
    assert [row["epoch"] for row in run.summary["epochs"]] == [1, 2, 3]
    assert source_of("run").endswith(".h5")
    longer = resume("run", run.summary["steps"] + 4)  # needs no further word
    assert longer.summary["ended"] == "done"
    Path("book.txt").write_text(text + text[:2000].upper())
    again = mmrec.train(resume="run", data="book.txt", epochs="+1", progress=False)
    assert again.summary["epochs"][-1]["epoch"] > 4
    Path("book.txt").write_text(text[:-1])
    with pytest.raises(InputError, match="text of book.txt is another one, or changed since run"):
        mmrec.train(resume="run", data="book.txt", epochs="+1", progress=False)


def test_the_best_model_is_scored_on_the_longer_validation_text(text: str) -> None:
    """The new text is much harder; the old best loss would never be reached again."""
    Path("book.txt").write_text("aaaa bbbb " * 800)
    easy = mmrec.train("book.txt", out="run", steps=12, **RUN).summary["best_val_loss"]
    Path("book.txt").write_text("aaaa bbbb " * 800 + text)
    run = resume("run", 40, data="book.txt")
    assert run.summary["best_step"] > 12
    assert run.summary["best_val_loss"] > easy
    corpus = training_corpus(load_model(run.best))
    assert [text["split"][0] for text in corpus.earlier] == [7201]


def test_the_best_model_stays_if_no_later_one_is_better(text: str) -> None:
    Path("book.txt").write_text(text[:8000])
    first = mmrec.train("book.txt", out="run", steps=8, **RUN)
    Path("book.txt").write_text(text)
    run = resume("run", 12, data="book.txt", on_nan="stop")
    best = load_model(run.best)
    if best.step == first.summary["best_step"]:  # scored anew, on other text
        assert run.summary["best_val_loss"] != first.summary["best_val_loss"]
    assert training_corpus(best).val.n_tokens == Corpus.open(Path(source_of("run"))).val.n_tokens
