"""TensorBoard and trackio get the curves and texts of a run; their own readers read them back."""

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mmrec
from mmrec.data.corpus import Corpus
from mmrec.errors import InputError
from mmrec.training.callbacks import Callback
from mmrec.training.run_dir import EVENTS_SUFFIX, open_run_dir, run_files
from mmrec.training.trackers import make_trackers
from mmrec.training.trainer import Trainer
from tests.conftest import make_trainer


class Killed(BaseException):
    """Ends a run as SIGKILL does: no code of the run catches it."""


def train(
    corpus: Corpus,
    folder: Path,
    tracker: Callback,
    *,
    killed_at: int | None = None,
    resume: bool = False,
    **settings: Any,
) -> Trainer:
    """Train with a tracker; a killed run ends before the step."""
    trainer = make_trainer(corpus, folder, callbacks=[tracker], **settings)
    compute_gradients = trainer.compute_gradients

    def compute_or_die(data_step: int) -> float:
        if trainer.progress.step + 1 == killed_at:
            raise Killed
        return compute_gradients(data_step)

    trainer.compute_gradients = compute_or_die  # type: ignore[method-assign]
    try:
        trainer.fit(resume=resume)
    except Killed:
        assert killed_at is not None
    return trainer


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """What metrics.jsonl says: losses by step, of steps and of validations."""
    curves: dict[str, dict[int, float]] = {"train": {}, "val": {}}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] in curves:
            curves[line["kind"]][line["step"]] = line["loss"]
    return curves


def texts(folder: Path) -> dict[int, str]:
    """The texts of samples.jsonl by step, prompt included."""
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return {line["step"]: line["prompt"] + line["text"] for line in lines}


def unindented(markdown: str) -> list[str]:
    assert all(line.startswith("    ") for line in markdown.splitlines())
    return [line[4:] for line in markdown.splitlines()]


# ---- TensorBoard


def read_events(folder: Path) -> Any:
    """TensorBoard's own reader of a folder."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return reader.EventAccumulator(str(folder), {"scalars": 0, "tensors": 0}).Reload()


def read_texts(folder: Path) -> Any:
    """The reader of TensorBoard's page, which takes back texts, too."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    return reader.EventAccumulator(str(folder), tensor_size_guidance={"text": 0}).Reload()


def scalars(events: Any, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def close(curve: dict[int, float]) -> list[Any]:
    """A curve as TensorBoard stores it: in float32."""
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in sorted(curve.items())]


def check_events(folder: Path) -> Any:
    """Each step is there once, with the values of the run's own log."""
    events, curves = read_events(folder), logged(folder)
    assert sorted(events.Tags()["scalars"]) == [
        *(f"train/{name}" for name in ("grad_norm", "loss", "lr", "tokens_per_second")),
        *(f"val/{name}" for name in ("accuracy", "bits_per_byte", "loss", "perplexity")),
    ]
    for kind in ("train", "val"):
        assert scalars(events, f"{kind}/loss") == close(curves[kind])
    found = [
        (event.step, unindented(event.tensor_proto.string_val[0].decode()))
        for event in read_texts(folder).Tensors("sample/text_summary")
    ]
    assert found == [(step, text.splitlines()) for step, text in texts(folder).items()]
    return events


def test_tensorboard_reads_the_curves_and_texts(corpus: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer = train(corpus, tmp_path, mmrec.TensorBoard())
    events = check_events(tmp_path)
    assert len(scalars(events, "train/loss")) == 12
    [settings] = events.Tensors("settings/text_summary")
    assert "seq_len = 32" in settings.tensor_proto.string_val[0].decode()
    accuracy = dict(scalars(events, "val/accuracy"))
    assert accuracy[12] == pytest.approx(trainer.scores.accuracy)  # type: ignore[union-attr]


@pytest.mark.parametrize("killed_at", [4, 9])
def test_tensorboard_shows_a_resumed_run_once(
    corpus: Corpus, tmp_path: Path, killed_at: int
) -> None:
    """Killed before the first checkpoint, or after it: what came after it counts no more."""
    pytest.importorskip("tensorboard")
    killed = mmrec.TensorBoard()
    train(corpus, tmp_path, killed, killed_at=killed_at)
    killed._close()  # what the process had sent, it had; a kill may lose the newest steps
    assert len(scalars(read_events(tmp_path), "train/loss")) == killed_at - 1
    train(corpus, tmp_path, mmrec.TensorBoard(), resume=True)
    assert len(list(tmp_path.glob(f"*{EVENTS_SUFFIX}"))) == 2
    check_events(tmp_path)


def test_what_a_checkpoint_has_tensorboard_has(corpus: Corpus, tmp_path: Path) -> None:
    """A killed process loses what it had not written; a resume sends only later steps."""
    pytest.importorskip("tensorboard")
    tracker = mmrec.TensorBoard()
    train(corpus, tmp_path, tracker, killed_at=6)  # step-5.h5 is written
    seen = [step for step, _ in scalars(read_events(tmp_path), "train/loss")]
    assert seen[:5] == [1, 2, 3, 4, 5]
    tracker._close()


def test_tensorboard_reads_a_quick_resume_in_order(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads files by name, and within a second a later one may have the lower name."""
    pytest.importorskip("tensorboard")
    train(corpus, tmp_path, mmrec.TensorBoard(), steps=2)
    monkeypatch.setattr("os.getpid", lambda: 0)  # the name of this second that comes first
    train(corpus, tmp_path, mmrec.TensorBoard(), steps=3, resume=True)
    assert [step for step, _ in scalars(check_events(tmp_path), "train/loss")] == [1, 2, 3]


def test_tensorboard_follows_a_rollback(corpus: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer = make_trainer(
        corpus,
        tmp_path,
        on_nan="rollback",
        eval_every=3,
        callbacks=[mmrec.TensorBoard()],
    )
    compute_gradients = trainer.compute_gradients
    trainer.compute_gradients = lambda step: math.nan if step == 8 else compute_gradients(step)  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.progress.rollbacks == 1
    check_events(tmp_path)


def test_event_files_belong_to_the_run(corpus: Corpus, tmp_path: Path) -> None:
    """They go with the run that --force overwrites; those of other programs stay."""
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    train(corpus, folder, mmrec.TensorBoard(), steps=2)
    other = folder / "events.out.tfevents.1.mine.1.0"
    other.touch()
    [events] = folder.glob(f"*{EVENTS_SUFFIX}")
    assert events in run_files(folder)
    with open_run_dir(str(folder), folder, force=True):
        assert [p for p in folder.iterdir() if "tfevents" in p.name] == [other]


# ---- trackio


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """trackio's storage in a folder of its own, and no way to the network."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio")
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # the folder is read when it is imported
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage


def check_trackio(storage: Any, folder: Path, project: str = "mmrec") -> Any:
    """Each step is there once, with the values of the run's own log."""
    import trackio

    [run] = trackio.Api().runs(project)
    lines = storage.get_logs(project, run.name, run_id=run.id)
    for kind, curve in logged(folder).items():
        found = [(x["step"], x[f"{kind}/loss"]) for x in lines if f"{kind}/loss" in x]
        assert sorted(found) == sorted(curve.items())
    found_texts = {x["step"]: x["sample"]["_value"] for x in lines if "sample" in x}
    written = texts(folder)
    assert found_texts.keys() == written.keys()
    assert all(unindented(found_texts[s]) == written[s].splitlines() for s in written)
    return run


def test_trackio_stores_the_curves_and_texts(
    storage: Any, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(corpus, tmp_path / "run", mmrec.Trackio("books"), seed=7)
    run = check_trackio(storage, tmp_path / "run", "books")
    assert run.name.startswith("run-")
    assert (run.config["seq_len"], run.config["width"], run.config["seed"]) == (32, 32, 7)
    assert capsys.readouterr().out == ""


def test_trackio_goes_on_with_a_resumed_run(storage: Any, corpus: Corpus, tmp_path: Path) -> None:
    """And a run of another folder with the same name is another run."""
    killed = mmrec.Trackio()
    train(corpus, tmp_path / "a/run", killed, killed_at=9)
    killed._close()
    [before] = storage.get_run_records("mmrec")
    assert storage.get_last_step("mmrec", run_id=before["id"]) == 8
    train(corpus, tmp_path / "a/run", mmrec.Trackio(), resume=True)
    assert check_trackio(storage, tmp_path / "a/run").id == before["id"]
    train(corpus, tmp_path / "b/run", mmrec.Trackio(), steps=2)
    names = sorted(run["name"] for run in storage.get_run_records("mmrec"))
    assert len(set(names)) == 2


# ---- the setting


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "trackio"):
        line = f"log {name} needs a package: pip install 'mmrec\\[{name}\\]'"
        with pytest.raises(InputError, match=line):
            make_trackers([name])


def test_the_command_line_logs_and_resumes(
    text_file: Path, tmp_path: Path, run_command: Callable[..., tuple[str, str]]
) -> None:
    """The setting is kept, and a resume may change it."""
    pytest.importorskip("tensorboard")
    shape = ["--width", "32", "--depth", "2", "--heads", "2", "--ngram-buckets", "16"]
    sizes = ["--tokenizer", "byte", "--batch-size", "1", "--seq-len", "16", "--eval-tokens", "500"]
    train = ["train", "tiny", "--data", str(text_file), "--steps", "2", "--out", "run"]
    run_command(tmp_path, *train, *shape, *sizes, "--sample-tokens", "3", "--log", "tensorboard")
    resume = ["train", "--resume", "run", "--steps"]
    run_command(tmp_path, *resume, "3")
    assert [step for step, _ in scalars(check_events(tmp_path / "run"), "train/loss")] == [1, 2, 3]
