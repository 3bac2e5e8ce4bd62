"""Settings for every test, and a small real corpus with a small model trained on it."""

import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Four threads even on two cores: results must not depend on their number. Read at Numba's import.
os.environ.setdefault("NUMBA_NUM_THREADS", "4")
# Tests run side by side, so an idle thread must not spin on the core of another test. The processes
# that tests start inherit this, and need not measure whether the machine is busy. Read at torch's
# import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

from mmrec.cli import main
from mmrec.config import ModelConfig, TrainConfig
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.training.trainer import Trainer

# A job in a shell's background ignores SIGINT, one under nohup SIGHUP, and so would what is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The first call of a kernel compiles, so property tests have no deadline.
hypothesis.settings.register_profile("mmrec", deadline=None, max_examples=15, derandomize=True)
hypothesis.settings.load_profile("mmrec")

command_line = functools.cache(main.build_command)
"""Build the command line, once for all tests: that takes longer than many a test."""
ROOT = Path(__file__).parent.parent
SMALL = ModelConfig(
    width=32,
    depth=2,
    heads=2,
    vocab_size=257,
    layer_types="sb",
    ffn_multiplier=2.0,
    max_timescale=32,
)


@pytest.fixture(autouse=True)
def _own_world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache or depends on another's random numbers."""
    torch.manual_seed(0)
    monkeypatch.setattr(main, "build_command", command_line)
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real text of about 60 kB: modules of the running Python's json and email packages."""
    import email.message
    import json.decoder

    parts = [Path(str(m.__file__)).read_text() for m in (json.decoder, email.message)]
    path = tmp_path_factory.mktemp("text") / "modules.txt"
    path.write_text("\n".join(parts))
    return path


@pytest.fixture(scope="session")
def corpus(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The text in bytes."""
    out = tmp_path_factory.mktemp("corpus") / "modules.h5"
    return Corpus.open(prepare(str(text_file), "byte", out=out))


@pytest.fixture
def trainer(corpus: Corpus, tmp_path: Path) -> Trainer:
    """A run of 12 steps that is ready to start."""
    return make_trainer(corpus, tmp_path / "run")


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Run a command of mmrec in a folder, in this process: a new one imports torch for seconds.

    The function takes the folder, the words of the command and the exit ``code`` that it must have.
    It returns what was printed to standard output and to standard error.
    """

    def run(folder: Path, *words: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["mmrec", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main.run()
        out, errors = capsys.readouterr()
        assert int(caught.value.code or 0) == code, errors
        return out, errors

    return run


def make_trainer(corpus: Corpus, folder: Path, **settings: Any) -> Trainer:
    """A small trainer with dropout, so that the random state counts.

    It draws no curve, which would take most of the time of so short a run. ``settings`` are flat
    names of settings, laid over the defaults of tests, or arguments of ``Trainer``, or
    ``ngram_buckets``.
    ``trainer.lines`` collects what is printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = {"draw_curve": False}
    options |= {n: settings.pop(n) for n in ("callbacks", "retry", "draw_curve") if n in settings}
    model = dataclasses.replace(
        SMALL, dropout=0.1, ngram_buckets=settings.pop("ngram_buckets", SMALL.ngram_buckets)
    )
    config = TrainConfig.from_flat(
        {
            "data": str(corpus.info["source"]),
            "tokenizer": "byte",
            "steps": 12,
            "batch_size": 2,
            "seq_len": 32,
            "eval_every": 4,
            "save_every": 5,
            "eval_tokens": 500,
            "sample_tokens": 4,
            "precision": "float32",
        }
        | settings
    )
    lines: list[str] = []
    trainer = Trainer(folder, corpus, model, config, "tiny", echo=lines.append, **options)
    trainer.lines = lines  # type: ignore[attr-defined]
    return trainer


def pytest_make_parametrize_id(val: object) -> str | None:
    """Call bytes by their number in the names of tests: compressed ones hold the time of day.

    The workers of pytest-xdist must find the same names, and they do not start in the same second.
    """
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


def stop_by_signal(trainer: Trainer, step: int) -> None:
    """Let SIGTERM come during the step after so many steps."""
    train_step = trainer.train_step

    def interrupted() -> tuple[float, float, float]:
        if trainer.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step()

    trainer.train_step = interrupted  # type: ignore[method-assign]
