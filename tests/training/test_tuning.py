"""Searching settings: the plan, the log, kills, and a search of a second."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmrec.config import ModelConfig, preset, read_config_file
from mmrec.errors import InputError
from mmrec.training import tuning
from mmrec.training.tuning import SEARCHED, Search, Trial, open_search, plan_rungs, space_of

pytest.importorskip("optuna")
SMALL = """preset = "tiny"
[model]
width = 16
depth = 1
heads = 2
[data]
tokenizer = "byte"
seq_len = 16
"""
RunCommand = Callable[..., tuple[str, str]]


@pytest.fixture
def folder(tmp_path: Path, text_file: Path) -> Path:
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "a book's text.txt").write_text(text_file.read_text())
    return tmp_path


WORDS = ["tune", "--config", "small.toml", "--data", "a book's text.txt", "--eval-tokens", "200"]


@pytest.fixture
def search(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Search]:
    """A search of 18 minutes that has not begun."""
    monkeypatch.chdir(folder)
    given = {"data": "a book's text.txt", "eval_tokens": 200}
    opened = open_search(
        None, 18, None, given, config_path=Path("small.toml"), echo=lambda line: None
    )
    with opened:
        yield opened


def drawn(number: int, loss: float | None, rung: int = 0, seconds: float = 10.0) -> Trial:
    """A trial, as if it had been run."""
    settings: dict[str, Any] = {
        "lr": round(0.002 + number * 1e-4, 4),
        "matrix_lr": 0.02,
        "weight_decay": 0.1,
        "dropout": 0.1,
        "batch_size": 8,
    }
    return Trial(rung, number, settings, loss, seconds)


def written_trials(log: Path) -> list[dict[str, Any]]:
    """The trials of a log, read without optuna."""
    lines = map(json.loads, log.read_text().splitlines())
    return [line["user_attrs"] for line in lines if "rung" in line.get("user_attrs", {})]


def test_rungs_share_the_time_and_triple_in_length() -> None:
    rungs = plan_rungs(18)
    assert [r.deadline for r in rungs] == [360, 720, 1080]
    assert [r.seconds for r in rungs] == pytest.approx([120 / 9, 40, 120])
    # three of the longest trials fit into a third of the time
    assert 3 * rungs[-1].seconds == rungs[0].deadline
    # a short search has no time for trials of two lengths, a long one for many
    assert [len(plan_rungs(minutes)) for minutes in (0.1, 4, 18, 60, 600)] == [1, 2, 3, 4, 4]


def test_no_trial_is_longer_than_the_training_that_the_search_is_for() -> None:
    assert plan_rungs(600, 2)[-1].seconds == 120
    assert plan_rungs(18, 60)[-1].seconds == 120


def test_what_is_given_is_not_searched() -> None:
    space = space_of(preset("tiny"), ["lr", "dropout", "seq_len"])
    assert set(space) == {*SEARCHED, "width"} - {"lr", "dropout"}
    assert space["width"] == [64, 96, 128, 192, 256]
    assert space_of(ModelConfig(width=96, heads=32))["width"] == [96, 192]
    with pytest.raises(InputError, match="nothing is left to search"):
        space_of(preset("tiny"), [*SEARCHED, "width"])


def test_every_setting_that_is_searched_can_stay_as_it_is(search: Search) -> None:
    step = search._next()
    assert step is not None
    assert step[:2] == (0, 0)
    assert step[2] == {
        "lr": 0.01,
        "matrix_lr": 0.02,
        "weight_decay": 0.1,
        "dropout": 0.0,
        "batch_size": 16,
    }


def test_the_best_are_promoted_and_so_are_the_settings_as_they_are(search: Search) -> None:
    losses = [3.0, 2.5, None, 2.0, 2.8]
    for number, loss in enumerate(losses):
        search.log.add(drawn(number, loss, seconds=72))
    promoted = []
    while (step := search._next()) is not None:
        rung, number, settings = step
        assert settings == drawn(number, None).settings
        promoted.append((rung, number))
        # 4 has luck in a short trial
        loss = {4: 2.4, 3: 2.1}.get(number, 2.6)
        search.log.add(drawn(number, loss, rung, search.rungs[rung].seconds))
        assert len(promoted) < 20
    assert promoted == [(1, 0), (1, 3), (1, 1), (1, 4), (2, 0), (2, 3), (2, 4), (2, 1)]
    assert search.best()[0].number == 3
    assert search.best()[0].rung == 2
    assert "19.2% below the settings as they are (2.6000)" in search.conclusion()[0]


def test_draws_follow_what_was_found(search: Search) -> None:
    for number in range(20):
        search.log.add(drawn(number, 2 + abs(number - 10) / 10))
    step = search._next()
    assert step is not None
    assert step[:2] == (0, 20)
    for name, values in search._space.items():
        if isinstance(values, tuple):
            assert values[0] <= step[2][name] <= values[1]
        else:
            assert step[2][name] in values


def test_a_trial_that_diverges_is_left_out(search: Search) -> None:
    bad = drawn(1, None).settings | {"lr": 1e30, "matrix_lr": 1e30}
    trial = search._run_trial(0, 1, bad, seconds=60)  # it ends at the second step
    assert trial is not None
    assert trial.loss is None
    assert "not finite" in trial.reason or "nan" in trial.reason
    search.log.add(dataclasses.replace(trial, settings=drawn(1, None).settings))
    assert search.best() == []
    assert search._next() is not None
    good = search._run_trial(0, 2, drawn(2, None).settings, seconds=0.1)
    assert good is not None
    assert good.loss is not None
    assert good.loss < 5.7  # log 257 is 5.55


def test_a_search_of_a_second(
    folder: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with a table and with a command that the real command line runs."""
    monkeypatch.setattr(tuning, "SHORTEST_SECONDS", 0.01)
    words = [*WORDS, "--minutes", "0.02", "--for", "0.001", "--seed", "3"]
    out, _ = run_command(folder, *words)
    log = folder / "runs" / "tune-tiny-a-book-s-text" / "trials.log"
    trials = written_trials(log)
    rungs = max(t["rung"] for t in trials) + 1
    assert rungs > 1
    assert {t["number"] for t in trials if t["rung"] == rungs - 1} >= {0}
    best = min((t for t in trials if t["rung"] == rungs - 1), key=lambda t: t["loss"])
    [line] = [line for line in out.splitlines() if line.startswith("train with: ")]
    command = shlex.split(line.removeprefix("train with: "))
    assert command[0] == "mmrec"
    run_command(folder, *command[1:], "--out", "found")
    config = read_config_file(folder / "found" / "config.toml")
    found = config.train | config.model
    assert {name: found[name] for name in best["settings"]} == best["settings"]
    assert (found["width"], found["seed"], found["seq_len"]) == (16, 3, 16)
    assert found["minutes"] == 0.001
    # a search that is over ends at once, with the same result
    before = log.read_bytes()
    again, _ = run_command(folder, *words)
    assert again.splitlines()[-1] == out.splitlines()[-1]
    assert log.read_bytes() == before
    assert sorted(p.name for p in log.parent.iterdir()) == ["trials.log"]


def test_a_killed_search_continues(folder: Path, run_command: RunCommand) -> None:
    words = [*WORDS, "--minutes", "0.03", "--out", "search"]
    code = "import mmrec.cli.main; mmrec.cli.main.run()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=folder, stdout=subprocess.DEVNULL
    )
    log, end = folder / "search" / "trials.log", time.monotonic() + 120
    try:
        while not (log.exists() and b'"loss"' in log.read_bytes()):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = log.read_bytes()
    with log.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id')  # as if the kill had cut a line
    out, _ = run_command(folder, *words)
    after = log.read_bytes()
    assert after.startswith(before)
    numbers = [t["number"] for t in written_trials(log)]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= 2
    assert "of it used before" in out
    assert "train with: mmrec train tiny" in out


def test_another_search_in_the_folder_is_refused(folder: Path, run_command: RunCommand) -> None:
    words = [*WORDS, "--minutes", "0.0001"]
    run_command(folder, *words)
    log = folder / "runs" / "tune-tiny-a-book-s-text" / "trials.log"
    before = log.read_bytes()
    for change, message in (
        (["--lr", "0.01"], "with lr none; got 0.01"),
        (["--seed", "1"], "with seed 0; got 1"),
        (["--for", "5"], "with for .*; got 5.0"),
    ):
        _, errors = run_command(folder, *words, *change, code=2)
        assert re.search(message, errors), errors
        assert errors.count("\n") == 1
    text = folder / "a book's text.txt"
    text.write_text(text.read_text() + "\nmore\n")
    _, errors = run_command(folder, *words, code=2)
    assert "another text, or the text of a book's text.txt has changed" in errors
    assert log.read_bytes() == before
    run_command(folder, *words, "--force")
    log.write_text("mine\n")
    _, errors = run_command(folder, *words, code=2)
    assert "is no log of trials" in errors
    assert log.read_text() == "mine\n"


def test_ctrl_c_loses_the_running_trial_only(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.rungs = [tuning.Rung(0.05, 1e9)]

    def interrupt(watch: Any, trainer: Any, metrics: Any) -> None:
        if len(search.log.trials(0)) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(tuning._Watch, "on_step", interrupt)
    search.run()
    assert search.signal_number == signal.SIGINT
    assert [t.number for t in search.log.trials(0)] == [0, 1]
