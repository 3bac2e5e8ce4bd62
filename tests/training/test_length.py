"""The length of a run: its budget, epochs and notes agree with the tokens that it reads."""

import dataclasses
import datetime
import json
import math
import re
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmrec
from mmrec.config import LengthConfig, seconds_until
from mmrec.data.corpus import Corpus, Split
from mmrec.errors import InputError
from mmrec.evaluation.evaluate import Evaluation
from mmrec.training import trainer as trainer_module
from mmrec.training.length import given_lengths, resumed_length
from mmrec.training.metrics import Progress
from mmrec.training.trainer import Trainer
from tests.conftest import make_trainer
from tests.training.test_moved import SETTINGS
from tests.training.test_trainer import Recorder, losses

SEQ_LEN = 4
SCORES = Evaluation(1.0, math.e, 1.0, 0.5, 1, 1, 0.0)
LENGTHS = st.one_of(
    st.tuples(st.just("epochs"), st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.0])),
    st.tuples(st.just("steps"), st.integers(1, 12)),
    st.tuples(st.just("minutes"), st.just(1e-9)),
)


def cut_corpus(corpus: Corpus, sizes: list[int]) -> Corpus:
    """A mixture of sources of so many tokens, each token its own index."""
    tokens, ends = np.arange(sum(sizes)), np.cumsum(sizes).tolist()
    mixture = [{"source": f"s{i}", "weight": 1.0 + i, "end": end} for i, end in enumerate(ends)]
    train = Split(tokens, np.array([0, len(tokens)]), np.array([len(tokens)]))
    val = Split(corpus.val.tokens[:300], np.array([0, 300]), np.array([300]))
    return dataclasses.replace(
        corpus, train=train, val=val, info=corpus.info | {"mixture": mixture}
    )


class ReadWindows:
    """In place of forward and backward: records the first token of each window."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(
        self, model: Any, replicas: Any, tokens: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        assert tokens.shape[1] == SEQ_LEN
        self.batches.append(tokens[:, 0].tolist())
        return 1.0 / (1 + len(self.batches)), None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trainer_module, "forward_backward", self)
        monkeypatch.setattr(Trainer, "_time_steps", lambda self: (0.0, 1.0))
        monkeypatch.setattr(Trainer, "save", lambda self, name, **kw: None)
        monkeypatch.setattr(Trainer, "_score", lambda self, *arguments: SCORES)


def told_epochs(lines: list[str]) -> tuple[int, float]:
    """Tokens and epochs of the printed budget."""
    [budget] = [line for line in lines if line.startswith("budget")]
    tokens, epochs = re.findall(r"= ([\d,]+), ([\d.]+) epochs", budget)[0]
    return int(tokens.replace(",", "")), float(epochs)


@settings(max_examples=30)
@given(
    length=LENGTHS,
    sizes=st.lists(st.integers(SEQ_LEN + 1, 150), min_size=1, max_size=3),
    batch=st.integers(1, 6),
    accumulation=st.integers(1, 9),
    data=st.data(),
)
def test_budget_epochs_and_notes_agree_with_the_tokens_read(
    corpus: Corpus,
    length: tuple[str, float],
    sizes: list[int],
    batch: int,
    accumulation: int,
    data: st.DataObject,
) -> None:
    kind, amount = length
    carry = len(sizes) == 1 and data.draw(st.booleans())
    read = ReadWindows()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        read.install(patch)
        options = {"steps": None, kind: amount, "batch_size": batch, "seq_len": SEQ_LEN}
        options |= {"state": "carry" if carry else "window"}
        options |= {"gradient_accumulation_steps": accumulation, "eval_tokens": 20}
        windows = sum((size - 1) // SEQ_LEN for size in sizes)
        if windows < batch:
            with pytest.raises(InputError, match=f"one batch needs {batch} windows of 4 tokens"):
                make_trainer(cut_corpus(corpus, sizes), Path(folder), **options)
            return
        trainer = make_trainer(cut_corpus(corpus, sizes), Path(folder), **options)
        trainer._show_progress = False
        trainer.model.config = dataclasses.replace(trainer.model.config, dropout=0.0)
        summary = trainer.fit()
        text = (Path(folder) / "metrics.jsonl").read_text()
        told_tokens, told = told_epochs(trainer.lines)  # type: ignore[attr-defined]
    tokens, per_epoch = SEQ_LEN * sum(map(len, read.batches)), windows // batch
    epochs = tokens / (per_epoch * batch * SEQ_LEN)
    assert summary["ended"] == "done"
    assert summary["tokens"] == tokens == told_tokens
    assert told == pytest.approx(epochs, abs=0.005)
    logged = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "epoch"]
    for rows in (logged, summary["epochs"]):
        assert rows[-1]["epoch"] == pytest.approx(epochs, abs=1e-4)
        assert [r["epoch"] for r in rows] == sorted({r["epoch"] for r in rows})
        assert len(rows) <= math.ceil(epochs + 1e-9)
    if kind == "epochs":
        assert len(read.batches) == max(1, round(amount * per_epoch))
        assert summary["steps"] == math.ceil(len(read.batches) / accumulation)
    else:
        assert len(read.batches) == summary["steps"] * accumulation
        assert summary["steps"] == (amount if kind == "steps" else 1)
    firsts = [first for rows in read.batches for first in rows]
    if len(sizes) == 1:  # each pass visits every window once
        for begin in range(0, len(firsts), per_epoch * batch):
            assert max(Counter(firsts[begin : begin + per_epoch * batch]).values()) == 1
    told_notes = "\n".join(trainer.lines)  # type: ignore[attr-defined]
    assert ("gradient_accumulation_steps" in told_notes) == (accumulation > per_epoch)
    assert ("of the" in told_notes) == (per_epoch * batch * SEQ_LEN < 0.95 * sum(sizes))
    passes = max(trainer_passes(trainer, len(read.batches)))
    assert ("memorises" in told_notes) == (passes > 4)


def trainer_passes(trainer: Trainer, batches: int) -> list[float]:
    """How many times each source is read in so many batches."""
    loader: Any = trainer.loader
    return (
        loader.passes(batches)
        if hasattr(loader, "passes")
        else [batches / loader.batches_per_epoch]
    )


def test_a_length_in_epochs_is_resumed_and_extended_exactly(corpus: Corpus, tmp_path: Path) -> None:
    """Seven batches per epoch in steps of four: the last step of the first epoch reads three."""
    small = cut_corpus(corpus, [7 * 2 * 32 + 1])
    tokens = np.asarray(corpus.train.tokens[: small.train.n_tokens])
    small = dataclasses.replace(small, train=dataclasses.replace(small.train, tokens=tokens))
    options = {
        "steps": None,
        "gradient_accumulation_steps": 4,
        "state": "carry",
        "schedule": "constant",
    }
    straight = make_trainer(small, tmp_path / "straight", epochs=2.0, **options)
    straight.fit()
    assert [row["epoch"] for row in straight.progress.epochs] == [1.1429, 2]
    stopped = make_trainer(
        small, tmp_path / "cut", epochs=2.0, callbacks=[Recorder(stop_at=1)], **options
    )
    assert stopped.fit()["steps"] == 1
    resumed = make_trainer(small, tmp_path / "cut", epochs=2.0, **options)
    assert resumed.fit(resume=True)["tokens"] == 2 * 7 * 64
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.MonkeyPatch.context() as patch:
        one = make_trainer(small, tmp_path / "one", epochs=1.0, **options)
        assert one.fit()["tokens"] == 7 * 64
        longer = make_trainer(small, tmp_path / "one", epochs=2.0, **options)
        first, batch_at = [], longer.loader.batch_at
        patch.setattr(longer.loader, "batch_at", lambda n: (first.append(n), batch_at(n))[1])
        patch.setattr(trainer_module, "forward_backward", lambda *a, **k: (1.0, None))
        summary = longer.fit(resume=True)
    assert first[-7:] == list(range(7, 14))
    assert set(first[:-7]) == {0, 1, 2, 3}  # the timed ones
    assert (summary["steps"], summary["tokens"]) == (4, 14 * 64)
    assert [row["epoch"] for row in summary["epochs"]] == [1, 2]
    shorter = make_trainer(small, tmp_path / "one", epochs=1.0, **options)
    assert shorter.fit(resume=True)["tokens"] == 14 * 64


class Clock:
    """The time of day, which moves by a second at each step."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, now: float = 0.0) -> None:
        self.now, self.end = now, 10.0
        monkeypatch.setattr(trainer_module, "seconds_until", lambda moment: self.end - self.now)
        train_step = trainer.train_step

        def step() -> tuple[float, float, float]:
            self.now += 1
            return train_step()

        trainer.train_step = step  # type: ignore[method-assign]


def test_a_run_until_a_moment_ends_then_and_keeps_it(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume keeps the moment: the pause counts, and the schedule fits what is left."""
    options = {"steps": None, "until": "2099-12-01 07:00", "eval_every": 100}
    first = make_trainer(corpus, tmp_path, callbacks=[Recorder(stop_at=3)], **options)
    clock = Clock(first, monkeypatch)
    assert first.fit()["ended"] == "stopped"
    config = tomllib.loads((tmp_path / "config.toml").read_text())
    until = config["length"]["until"]
    assert datetime.datetime.fromisoformat(until) == datetime.datetime(2099, 12, 1, 7).astimezone()
    second = make_trainer(corpus, tmp_path, **options | {"until": until})
    Clock(second, monkeypatch, now=clock.now + 2)
    summary = second.fit(resume=True)
    assert (summary["ended"], summary["steps"]) == ("done", 8)  # seconds 3 and 4 were the pause
    assert second.progress.validations[-1]["step"] == 8  # at the end, as in every run
    assert second.fraction_done() == 1.0
    told = "\n".join(second.lines)  # type: ignore[attr-defined]
    assert f"budget  until {until}, about" in told


def test_a_run_until_a_moment_takes_a_step_at_least(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparing the text may have taken longer than there was time."""
    trainer = make_trainer(corpus, tmp_path, steps=None, until="2099-12-01 07:00")
    Clock(trainer, monkeypatch, now=11.0)
    summary = trainer.fit()
    assert (summary["ended"], summary["steps"], summary["best_step"]) == ("done", 1, 1)


def test_the_next_time_that_a_clock_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.datetime.now().astimezone()
    for minutes in (-60, -1, 1, 60):
        wanted = (now + datetime.timedelta(minutes=minutes)).replace(second=0, microsecond=0)
        until = LengthConfig(until=f"{wanted:%H:%M}").until
        assert until is not None
        if wanted <= now:
            wanted = wanted.replace(tzinfo=None) + datetime.timedelta(days=1)
        assert datetime.datetime.fromisoformat(until) == wanted.astimezone()
        assert LengthConfig(until=until).until == until
        assert 0 < seconds_until(until) <= 90_000  # a day may have 25 hours
    with pytest.raises(InputError, match="only one of steps, epochs, minutes, until may be given"):
        LengthConfig(until="07:00", steps=1)
    for text in ("noon", "2026-12-01", "24:30", "2026-13-01 07:00", "07:00+02:00", "-1", ""):
        with pytest.raises(InputError, match="until must be a time such as 07:00, .*; got"):
            LengthConfig(until=text)


def test_a_length_is_added_to_what_was_trained(tmp_path: Path) -> None:
    progress = Progress(step=10, seconds=90.0, missing_batches=1)

    def extend(before: LengthConfig, **given: Any) -> LengthConfig:
        return resumed_length(
            given_lengths(given),
            before,
            progress,
            batches_per_step=2,
            batches_per_epoch=38,
            folder=Path("r"),
        )

    steps = LengthConfig(steps=10)
    assert extend(steps) == steps
    assert extend(steps, steps="+5") == extend(LengthConfig(), steps=15) == LengthConfig(steps=15)
    assert extend(steps, minutes="+60") == LengthConfig(minutes=61.5)
    assert extend(steps, epochs="+1.5") == LengthConfig(epochs=2.0)  # 19 of 38 batches were read
    assert extend(steps, until="2099-12-01 07:00").until is not None
    assert extend(steps, steps=10) == steps
    assert extend(LengthConfig(minutes=1.49), minutes=1.49).minutes == 1.49  # a step took longer
    for length, words in (
        ({"steps": 9}, "steps must not be less than the 10 that r has trained; got 9"),
        ({"epochs": 0.4}, "epochs must not be less than the 0.5 that r has trained; got 0.4"),
        ({"minutes": 1}, "minutes must not be less than the 1.5 that r has trained; got 1"),
        ({"steps": "+0"}, "steps must be a whole number from 1 to 10.15; got 0"),
        ({"steps": "+1.5"}, "steps must be a whole number, or . and .*; got '.1.5'"),
        ({"minutes": "+nan"}, "minutes must lie in"),
        ({"steps": 20, "minutes": 1}, "only one of"),
        ({"until": "2020-01-01 07:00"}, "until must lie ahead; 2020-01-01 07:00 has passed"),
    ):
        with pytest.raises(InputError, match=words):
            extend(steps, **length)


def test_a_run_goes_on_longer(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the API: from the end of the run, or of one that patience ended, in other units."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(text_file.read_text()[:12_000])
    options = SETTINGS | {"lr": 1.0, "matrix_lr": 1.0, "max_grad_norm": 1e9, "schedule": "linear"}
    run = mmrec.train("book.txt", out="run", steps=40, patience=2, **options)
    assert run.summary["ended"] == "early"
    step = run.summary["steps"]
    with pytest.raises(InputError, match="run ended early, after 2 validations .*: .*--patience"):
        mmrec.train(resume="run", steps="+3", progress=False)
    run = mmrec.train(resume="run", steps="+3", patience=0, progress=False)
    assert (run.summary["ended"], run.summary["steps"]) == ("done", step + 3)
    rates = [x["lr"] for x in run.metrics if x["kind"] == "train"]
    assert rates[-3:] == pytest.approx([1 - (step + i + 0.5) / (step + 3) for i in range(3)])
    with pytest.raises(InputError, match="steps must not be less than"):
        mmrec.train(resume="run", steps=2, progress=False)
    per_epoch = run.summary["tokens"] // run.summary["steps"]
    epochs = tomllib.loads(Path("run/config.toml").read_text())["length"]
    assert epochs == {"steps": step + 3}
    longer = mmrec.train(resume="run", epochs="+0.01", progress=False)
    assert longer.summary["steps"] > step + 3
    assert longer.summary["tokens"] == longer.summary["steps"] * per_epoch
    assert "epochs" in tomllib.loads(Path("run/config.toml").read_text())["length"]
