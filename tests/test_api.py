"""The Python API as a notebook uses it: train, resume after a kill, load, generate, evaluate."""

import inspect
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mmrec
from mmrec.training.trainer import Trainer

SIZES: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "ngram_buckets": 64}
SHORT: dict[str, Any] = {
    "batch_size": 2,
    "seq_len": 32,
    "eval_every": 4,
    "sample_tokens": 4,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> mmrec.Run:
    """A short run through the API."""
    out = tmp_path_factory.mktemp("api") / "run"
    return mmrec.train(
        text_file, steps=8, tokenizer="byte", out=str(out), progress=False, **SHORT, **SIZES
    )


def test_train_load_generate_evaluate(run: mmrec.Run, text_file: Path) -> None:
    assert run.summary["ended"] == "done"
    assert [x["step"] for x in run.metrics if x["kind"] == "train"] == list(range(1, 9))
    model = mmrec.load(run.best)
    text = model.generate("def", max_tokens=20, seed=1)
    assert isinstance(text, str)
    pieces = model.generate("def", max_tokens=20, seed=1, stream=True)
    assert "".join(pieces) == text
    assert mmrec.generate(run, "def", max_tokens=20, seed=1) == text
    assert mmrec.generate(run, "def", max_tokens=20, seed=1, temperature=0) != ""
    two = mmrec.generate(run, ["import", "def"], max_tokens=20, seed=0)
    assert two == [mmrec.generate(run, "import", max_tokens=20, seed=0), text]
    scores = mmrec.evaluate(model)
    assert scores.bits_per_byte == pytest.approx(mmrec.evaluate(run.folder).bits_per_byte)
    assert 0 < mmrec.evaluate(model, text_file).bits_per_byte < 8.2


def test_progress_false_prints_nothing(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for progress in (False, True):
        mmrec.train(
            text_file,
            steps=2,
            tokenizer="byte",
            out=str(tmp_path / str(progress)),
            progress=progress,
            **SHORT,
            **SIZES,
        )
        printed = capsys.readouterr()
        assert ("time    about" in printed.out) == progress
        assert bool(printed.out + printed.err) == progress


def test_without_progress_no_bar_is_shown(
    run: mmrec.Run,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bars of the data appear after two seconds, so that a test of a small text sees none."""
    monkeypatch.setattr("mmrec.runtime.progress.DELAY_SECONDS", 0)
    for progress in (False, True):
        monkeypatch.setenv("MMREC_CACHE", str(tmp_path / f"cache-{progress}"))
        options = {"tokenizer": "byte", "out": str(tmp_path / str(progress))}
        mmrec.train(text_file, steps=1, progress=progress, **options, **SHORT, **SIZES)
        assert ("tokenising" in capsys.readouterr().err) == progress
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    mmrec.evaluate(run)
    assert capsys.readouterr() == ("", "")


def test_streaming_refuses_wrong_arguments_at_the_call(run: mmrec.Run) -> None:
    with pytest.raises(mmrec.InputError, match="max_tokens must be >= 0"):
        mmrec.generate(run, "def", max_tokens=-1, stream=True)


def test_data_may_be_a_list_or_an_iterator_of_documents(text_file: Path, tmp_path: Path) -> None:
    """A list and an iterator of the same documents give the same corpus and the same losses."""
    text = text_file.read_text()
    documents = [text[i : i + 1000] for i in range(0, len(text), 1000)]

    def iterate() -> Iterator[str]:
        yield from documents

    losses = []
    for name, data in (("list", documents), ("iterator", iterate())):
        run = mmrec.train(
            data,
            steps=3,
            tokenizer="byte",
            out=str(tmp_path / name),
            progress=False,
            **SHORT,
            **SIZES,
        )
        losses.append([x["loss"] for x in run.metrics if x["kind"] == "train"])
    assert losses[0] == losses[1]
    resumed = mmrec.train(resume=tmp_path / "iterator", steps=5, progress=False)
    assert resumed.summary["steps"] == 5  # a resume reads the prepared corpus, not the documents


def test_a_validation_text_from_a_pipe_is_there_for_a_resume(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = io.BytesIO(text_file.read_bytes()[:5000])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(text))
    common: dict[str, Any] = {"steps": 2, "tokenizer": "byte", "progress": False, **SHORT, **SIZES}
    out = tmp_path / "run"
    mmrec.train(["some other text " * 99], val_file="-", out=out, **common)
    assert mmrec.train(resume=out, steps=3, progress=False).summary["steps"] == 3
    monkeypatch.setattr("sys.stdin", None)
    assert mmrec.evaluate(out).bytes == 5000


def test_the_command_line_trains_the_same_model(
    run: mmrec.Run,
    text_file: Path,
    tmp_path: Path,
    run_command: Callable[..., tuple[str, str]],
) -> None:
    options = {**SHORT, **SIZES, "steps": 8, "tokenizer": "byte", "out": "cli"}
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    run_command(tmp_path, "train", "tiny", "--data", str(text_file), *arguments)
    cli, api = mmrec.load(tmp_path / "cli/last.h5"), mmrec.load(run.last)
    for a, b in zip(cli.model.parameters(), api.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_callback_logs_metrics_and_stops_the_run(text_file: Path, tmp_path: Path) -> None:
    class StopAtThree(mmrec.Callback):
        def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            trainer.log_metrics(double=2 * metrics["loss"])
            if metrics["step"] == 3:
                trainer.request_stop()

    out = str(tmp_path / "run")
    run = mmrec.train(
        text_file,
        steps=9,
        tokenizer="byte",
        out=out,
        progress=False,
        callbacks=[StopAtThree()],
        **SHORT,
        **SIZES,
    )
    assert (run.summary["ended"], run.summary["steps"]) == ("stopped", 3)
    assert [x["kind"] for x in run.metrics].count("callback") == 3
    assert mmrec.train(resume=out, progress=False).summary["steps"] == 9


def test_a_killed_script_resumes_bit_for_bit(text_file: Path, tmp_path: Path) -> None:
    settings = {**SHORT, **SIZES, "steps": 60, "save_every": 5, "tokenizer": "byte"}
    uninterrupted = mmrec.train(text_file, out=tmp_path / "whole", progress=False, **settings)
    code = (
        "import mmrec; "
        f"mmrec.train({str(text_file)!r}, out={str(tmp_path / 'killed')!r}, progress=False, "
        f"**{settings!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        end = time.monotonic() + 120
        while not (tmp_path / "killed/step-10.h5").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    resumed = mmrec.train(resume=tmp_path / "killed", progress=False)
    assert resumed.summary["steps"] == 60
    a, b = mmrec.load(uninterrupted.last), mmrec.load(resumed.last)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert uninterrupted.metrics == resumed.metrics


def test_a_config_file_without_a_preset_trains_tiny(text_file: Path, tmp_path: Path) -> None:
    """A configuration from Python, with paths as Path objects, begun from an earlier model."""
    config = tmp_path / "config.toml"
    config.write_text("[model]\nwidth = 32\ndepth = 2\nheads = 2\nngram_buckets = 64\n")
    settings = {**SHORT, "steps": 1, "tokenizer": "byte", "progress": False}
    first = mmrec.train(text_file, config=config, out=tmp_path / "first", **settings)
    assert 'preset = "tiny"' in (first.folder / "config.toml").read_text()
    second = mmrec.train(
        text_file, initialize_from=first.last, out=tmp_path / "second", steps=1, progress=False
    )
    assert mmrec.load(second).model.config == mmrec.load(first).model.config


TRAIN_MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    # the argument at fault, all arguments, the message
    ("settings", {"lr": -1}, "lr must be finite and > 0; got -1"),
    ("settings", {"lrr": 1}, "unknown setting 'lrr'; did you mean 'lr'"),
    ("settings", {"vocab_size": 5}, "unknown setting 'vocab_size'"),
    ("settings", {"width": 0}, "width must be a whole number from 1"),
    ("settings", {"out": 3}, "out must be of type str; got 3"),
    ("settings", {"initialize_from": "nowhere"}, "no checkpoint at nowhere"),
    ("preset", {"preset": "tinny"}, "unknown preset 'tinny'"),
    ("preset", {"preset": 3}, "preset must be a name or None; got 3"),
    ("data", {"data": "none.txt"}, "no data at none.txt"),
    ("data", {"data": 3}, "a source must be a name, a path, or a list"),
    ("data", {"data": [], "tokenizer": "byte"}, "is empty"),
    ("data", {"data": ["text", 3], "tokenizer": "byte"}, "int"),
    ("config", {"config": "none.toml"}, "cannot read config file none.toml"),
    ("config", {"config": 3}, "config must be the path of a TOML file or None; got 3"),
    ("resume", {"resume": "nowhere"}, "no run at nowhere to resume"),
    ("resume", {"resume": 3}, "resume must be True, False or a run folder; got 3"),
    ("resume", {"resume": True, "preset": "tiny"}, "resume keeps the settings of its run"),
    ("resume", {"resume": "nowhere", "lr": 1.0}, "resume keeps the settings of its run; lr cannot"),
    ("resume", {"resume": "nowhere", "out": "other"}, "give the folder once"),
    ("force", {"resume": "nowhere", "force": True}, "config and force cannot be given"),
    ("callbacks", {"callbacks": 3}, "callbacks must be a list; got 3"),
    ("callbacks", {"callbacks": [print]}, "callbacks must be instances of mmrec.Callback"),
]


@pytest.mark.parametrize(("at_fault", "arguments", "message"), TRAIN_MISTAKES)
def test_wrong_arguments_of_train(
    at_fault: str,
    arguments: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mmrec.InputError, match=message):
        mmrec.train(progress=False, **arguments)
    assert not list(tmp_path.iterdir())


OTHER_MISTAKES: list[tuple[Callable[..., object], str, dict[str, Any], str]] = [
    # the function, the argument at fault, arguments besides the source, the message
    (mmrec.load, "source", {"source": "nowhere"}, "no checkpoint at nowhere"),
    (mmrec.load, "source", {"source": "."}, "no checkpoint in"),
    (mmrec.load, "source", {"source": 3}, "source must be a model, a run, a path or None; got 3"),
    (mmrec.evaluate, "source", {"source": "nowhere"}, "no checkpoint at nowhere"),
    (mmrec.evaluate, "data", {"data": "none.txt"}, "no data at none.txt"),
    (mmrec.evaluate, "data", {"data": ["text"]}, "data must be a name, a path or None; got"),
    (mmrec.evaluate, "text_field", {"text_field": 3}, "text_field must be of type str; got 3"),
    (mmrec.evaluate, "adapt", {"adapt": True, "data": "none.txt"}, "no data at none.txt"),
    (mmrec.evaluate, "adapt_lr", {"adapt_lr": 0.1}, "adapt_lr"),
    (mmrec.evaluate, "neural_cache", {"neural_cache": -1}, "neural_cache must be a whole number"),
    (mmrec.generate, "neural_cache", {"neural_cache": -1}, "neural_cache must be a whole number"),
    (mmrec.generate, "neural_cache", {"neural_cache": 0.5}, "neural_cache must be of type int"),
    (mmrec.generate, "source", {"source": "nowhere"}, "no checkpoint at nowhere"),
    (mmrec.generate, "prompt", {"prompt": 3}, "prompt must be a text or a list of texts; got 3"),
    (mmrec.generate, "max_tokens", {"max_tokens": -1}, "max_tokens must be >= 0"),
    (mmrec.generate, "max_tokens", {"max_tokens": 1.5}, "max_tokens must be of type int; got 1.5"),
    (mmrec.generate, "stop", {"stop": [""]}, "a stop text must not be empty"),
    (mmrec.generate, "stop", {"stop": "end"}, "stop must be a list of texts; got 'end'"),
    (mmrec.generate, "seed", {"seed": -1}, "seed must be a whole number from 0 to .*; got -1"),
    (mmrec.generate, "logit_bias", {"logit_bias": {999: 1}}, "must lie in 0 to 256; got 999"),
    (mmrec.generate, "sampling", {"temperature": -1}, "temperature must be finite and >= 0"),
    (mmrec.generate, "sampling", {"temperatur": 1}, "did you mean 'temperature'"),
]


@pytest.mark.parametrize(("function", "at_fault", "arguments", "message"), OTHER_MISTAKES)
def test_wrong_arguments_of_the_others(
    run: mmrec.Run,
    function: Callable[..., object],
    at_fault: str,
    arguments: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mmrec.InputError, match=message):
        function(**{"source": run} | arguments)


def test_every_argument_has_a_mistake() -> None:
    """Except flags, of which any value is one or the other."""
    mistakes = {(mmrec.train, at_fault) for at_fault, *_ in TRAIN_MISTAKES}
    mistakes |= {(function, at_fault) for function, at_fault, *_ in OTHER_MISTAKES}
    for function in (mmrec.train, mmrec.load, mmrec.generate, mmrec.evaluate):
        for name in inspect.signature(function).parameters:
            if name not in ("progress", "stream", "skip_bad"):
                assert (function, name) in mistakes


def test_importing_mmrec_loads_no_torch() -> None:
    code = "import mmrec, sys; print('torch' in sys.modules, len(mmrec.__all__) > 10)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]
    for name in mmrec.__all__:
        assert getattr(mmrec, name) is not None
    with pytest.raises(AttributeError):
        mmrec.nonsense  # noqa: B018


def test_metrics_are_json_lines(run: mmrec.Run) -> None:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.metrics
