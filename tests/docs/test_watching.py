"""The example for MLflow in the guide: run with a stand-in of its functions, and with MLflow."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import mmrec
from tests.conftest import ROOT

EXAMPLE = re.compile(r"<!-- example: mlflow -->\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHORT = {"steps": 4, "eval_every": 2, "batch_size": 1, "seq_len": 16, "eval_tokens": 500}
SHAPE = {"width": 32, "depth": 2, "heads": 2, "ngram_buckets": 16, "tokenizer": "byte"}


@pytest.fixture
def run_example(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the example on a small text; returns the run."""
    train, runs = mmrec.train, []

    def train_shortly(data: str, *, minutes: float, callbacks: list[mmrec.Callback]) -> None:
        assert (data, minutes) == ("book.txt", 5)
        settings = SHORT | SHAPE | {"out": tmp_path / "run", "progress": False}
        runs.append(train(text_file, callbacks=callbacks, sample_tokens=3, **settings))

    monkeypatch.setattr(mmrec, "train", train_shortly)
    page = (ROOT / "docs/guides/watching.md").read_text(encoding="utf-8")
    [source] = EXAMPLE.findall(page)

    def run() -> mmrec.Run:
        exec(compile(source, "watching.md", "exec"), {"__name__": "example"})
        return runs[0]

    return run


def losses(run: mmrec.Run, kind: str) -> list[tuple[int, float]]:
    return [(x["step"], x["loss"]) for x in run.metrics if x["kind"] == kind]


def texts(run: mmrec.Run) -> dict[int, str]:
    lines = map(json.loads, (run.folder / "samples.jsonl").read_text().splitlines())
    return {line["step"]: line["text"] for line in lines}


def test_the_example_calls_mlflow(run_example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with the call signatures of MLflow 3 takes its place."""
    metrics: dict[str, list[tuple[int, float]]] = {}
    params: dict[str, Any] = {}
    files: dict[str, str] = {}
    state = []

    def start_run(
        run_id: str | None = None,
        experiment_id: str | None = None,
        run_name: str | None = None,
        nested: bool = False,
    ) -> None:
        state.append(run_name)

    def log_params(params_: dict[str, Any], synchronous: bool | None = None) -> None:
        assert state == ["run"]
        params.update(params_)

    def log_metrics(values: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        for name, value in values.items():
            metrics.setdefault(name, []).append((step, value))

    def log_text(text: str, artifact_file: str, run_id: str | None = None) -> None:
        files[artifact_file] = text

    def end_run(status: str = "FINISHED") -> None:
        state.append(status)

    fake = types.ModuleType("mlflow")
    for function in (start_run, log_params, log_metrics, log_text, end_run):
        setattr(fake, function.__name__, function)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    run = run_example()
    assert state == ["run", "FINISHED"]
    assert params["seq_len"] == 16
    assert metrics["loss"] == losses(run, "train")
    assert metrics["val_loss"] == losses(run, "val")
    assert files == {f"samples/{step}.txt": text for step, text in texts(run).items()}


@pytest.mark.filterwarnings("default")  # MLflow's own
def test_mlflow_reads_the_run_back(
    run_example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri()),
        ("MLFLOW_ALLOW_FILE_STORE", "true"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ):
        monkeypatch.setenv(name, value)
    mlflow = pytest.importorskip("mlflow")
    run = run_example()
    client = mlflow.MlflowClient()
    [stored] = client.search_runs(["0"])
    assert stored.info.status == "FINISHED"
    assert stored.data.params["seq_len"] == "16"
    for name, kind in (("loss", "train"), ("val_loss", "val")):
        history = client.get_metric_history(stored.info.run_id, name)
        assert [(m.step, m.value) for m in history] == losses(run, kind)
    for step, text in texts(run).items():
        path = client.download_artifacts(stored.info.run_id, f"samples/{step}.txt", str(tmp_path))
        assert Path(path).read_text(encoding="utf-8") == text
