"""Staged training: its recipe, processes that are interrupted and killed, and its report."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmrec.checkpoint.checkpoint import load_model
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.errors import InputError
from mmrec.evaluation.compare import Curve, read_run
from mmrec.evaluation.evaluate import evaluate
from mmrec.model import flops_per_token
from mmrec.training import staged
from mmrec.training.staged import read_recipe
from tests.runtime.test_interrupts import lines, wait_for

COMMON = """data = "book.txt"
tokenizer = "byte"
out = "c"
batch_size = 2
seq_len = 32
eval_every = 5
eval_tokens = 500
sample_tokens = 4
save_every = 10
ema_decay = 0.9
"""
STAGE = '[[stage]]\npreset = "tiny"\nsteps = 12\n'
SIZES = "model = {{ width = {}, depth = {}, heads = 2, ngram_buckets = 64, layer_types = 'n' }}\n"
FIRST = STAGE + SIZES.format(16, 1)
SECOND = FIRST.replace("tiny", "mini").replace("12", "200") + "lr = 5e-3\n"
THIRD = STAGE + SIZES.format(32, 2) + 'method = "stack"\n'


@pytest.fixture
def folder(tmp_path: Path, text_file: Path) -> Iterator[Path]:
    """A working folder for processes, which get the default signal handlers."""
    (tmp_path / "book.txt").write_text(text_file.read_text()[:20_000])
    (tmp_path / "r.toml").write_text(COMMON + FIRST + SECOND + THIRD)
    before = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for s, handler in before.items():
        signal.signal(s, handler)


CHAIN = ["chain", "r.toml"]


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "mmrec", *CHAIN]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    return out, errors


def test_an_interrupted_chain_continues(
    folder: Path, run_command: Callable[..., tuple[str, str]]
) -> None:
    """After SIGTERM and SIGKILL, finished stages are kept and the interrupted one takes the steps
    that are left. The report agrees with the files of the runs.
    """
    process, second = start(folder), folder / "c/2-mini"
    wait_for(lambda: lines(second) > 5, process)
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process, 143)
    assert errors.splitlines()[-1].endswith("and saved; continue with: mmrec chain r.toml")
    first = (folder / "c/1-tiny/last.h5").read_bytes()
    stopped = load_model(second / "last.h5").step
    assert 0 < stopped < 200

    process = start(folder)
    wait_for(lambda: lines(second) > stopped + 20, process)
    process.kill()
    process.communicate()
    out, _ = run_command(folder, *CHAIN)
    assert "stage   c/1-tiny: finished before" in out
    assert "resume  c/2-mini/step-" in out
    assert (folder / "c/1-tiny/last.h5").read_bytes() == first

    rows = json.loads((folder / "c/report.json").read_text())
    assert [r["stage"] for r in rows] == ["1-tiny", "2-mini", "3-tiny"]
    for row in rows:
        run = folder / "c" / row["stage"]
        curve, last = read_run(run), load_model(run / "last.h5")
        summary = json.loads((run / "summary.json").read_text())
        assert (row["steps"], row["tokens"]) == (summary["steps"], summary["tokens"])
        assert (row["steps"], row["ended"]) == (200 if "mini" in row["stage"] else 12, "done")
        assert row["seconds"] == summary["seconds"]
        assert row["parameters"] == sum(p.numel() for p in last.model.parameters())
        flops = flops_per_token(last.model.config)["training"]
        assert row["flops"] == row["tokens"] * flops
        assert row["whole_split"] == summary["epochs"][-1]["bits_per_byte"]
        assert row["end"] == curve.validations[-1][1]
        corpus = Corpus.open(prepare(str(folder / "book.txt"), "byte"))
        val = corpus.val
        last.model.set_precision(last.metadata["precision"])  # bfloat16 where the processor has it
        scores = evaluate(last.model, val.tokens, corpus.tokenizer.eot, val.n_bytes)
        assert row["whole_split"] == pytest.approx(scores.bits_per_byte, abs=1e-5)
        assert f"\n{row['stage']} " in out
    assert rows[0]["start"] is None
    assert rows[1]["start"] == pytest.approx(rows[0]["end"], abs=1e-4)
    assert abs(rows[2]["start"] - rows[1]["end"]) > 1e-3  # stack keeps no function
    assert (folder / "c/chain.png").read_bytes()[:4] == b"\x89PNG"

    again, _ = run_command(folder, *CHAIN)
    assert again.count("finished before") == 3
    assert json.loads((folder / "c/report.json").read_text()) == rows


def test_a_report_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages are trained by then, and their table is printed in any case."""
    path = tmp_path / "r.toml"
    path.write_text(COMMON + FIRST + THIRD)
    stages = read_recipe(path)
    models = {stage.folder: stage.model for stage in stages}
    monkeypatch.setattr(
        staged,
        "read_run",
        lambda run: Curve(str(run), "", 64, 12, 768, 1.0, [(12, 2.0)], 2.0, "done"),
    )
    monkeypatch.setattr(staged, "read_metadata", lambda path: (12, {}, models[path.parent]))
    warnings: list[str] = []
    rows = staged.write_report(tmp_path / "none", stages, [None, 3.0], warnings.append)
    assert [row["stage"] for row in rows] == ["1-tiny", "2-tiny"]
    assert [line.split(":")[0] for line in warnings] == ["warning", "warning"]
    assert "report.json" in warnings[0]
    assert "chain.png" in warnings[1]


def test_stages_use_the_training_settings_of_their_presets(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        "[[stage]]\npreset = 'tiny'\nsteps = 9\n[[stage]]\npreset = 'mini'\nsteps = 9\n"
    )
    assert [s.train.data.seq_len for s in read_recipe(recipe)] == [128, 256]
    recipe.write_text("seq_len = 64\n" + recipe.read_text())
    assert [s.train.data.seq_len for s in read_recipe(recipe)] == [64, 64]


def test_a_changed_recipe_needs_force(
    folder: Path, run_command: Callable[..., tuple[str, str]]
) -> None:
    recipe = folder / "r.toml"
    recipe.write_text(COMMON + FIRST)
    run_command(folder, *CHAIN)
    recipe.write_text(COMMON + FIRST.replace("12", "13"))
    _, errors = run_command(folder, *CHAIN, code=2)
    assert errors.count("\n") == 1
    assert "c holds stages of another recipe (stage 1: steps was 12, now 13): go back" in errors
    recipe.write_text(COMMON + FIRST + SECOND)
    _, errors = run_command(folder, *CHAIN, code=2)
    assert "1 of them, now 2" in errors
    recipe.write_text(COMMON + FIRST.replace("12", "13"))
    run_command(folder, *CHAIN, "--force")
    assert json.loads((folder / "c/1-tiny/summary.json").read_text())["steps"] == 13
    (folder / "c/chain.json").unlink()
    _, errors = run_command(folder, *CHAIN, code=2)
    assert "c/1-tiny exists, but c holds no recipe for it" in errors


def test_all_stages_train_on_the_same_text(
    folder: Path, run_command: Callable[..., tuple[str, str]]
) -> None:
    """A text that changed between two stages is refused; with the old text the chain continues."""
    (folder / "r.toml").write_text(COMMON + FIRST + THIRD)
    run_command(folder, *CHAIN)
    shutil.rmtree(folder / "c/2-tiny")
    text = (folder / "book.txt").read_text()
    (folder / "book.txt").write_text(text + "more")
    _, errors = run_command(folder, *CHAIN, code=2)
    assert "error: the text of book.txt changed since stage 1 was trained on it: put it" in errors
    (folder / "book.txt").write_text(text)
    out, _ = run_command(folder, *CHAIN)
    assert "stage   c/1-tiny: finished before" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must hold one \[\[stage\]\] or more; it holds none"),
        ("stage = 3", r"must hold one \[\[stage\]\] or more"),
        ("lrr = 1.0\n" + STAGE, "unknown setting 'lrr' in recipe .*; did you mean 'lr'"),
        ("steps = 3\n" + STAGE, r"steps must stand in each \[\[stage\]\], not in recipe"),
        (STAGE + "vocab = 300", "stage 1: vocab must stand above all stages, not in a stage"),
        (STAGE + "initialize_from = 'x'", "stage 1: unknown setting 'initialize_from' in a stage"),
        (STAGE + "presett = 1", "stage 1: unknown setting 'presett' .*; did you mean 'preset'"),
        (STAGE + "method = 'wish'", "stage 1: method must be one of .*; got 'wish'"),
        (STAGE + "lr = -1", "stage 1: lr must be finite and > 0; got -1"),
        (STAGE + "model = 3", "stage 1: model must be a table of width, .*; got 3"),
        (
            STAGE + "model = { widht = 3 }",
            "stage 1: unknown setting 'widht'.*; did you mean 'width'",
        ),
        (STAGE + "minutes = 1", "stage 1: its length must be one of .*; got steps and minutes"),
        ("[[stage]]\npreset = 'tiny'", "stage 1: its length must be one of steps, .*; got none"),
        ("[[stage]]\nsteps = 1", "stage 1: preset must name its size, such as 'tiny'; got None"),
        ("[[stage]]\nsteps = 1\npreset = 'tinny'", "stage 1: unknown preset 'tinny'"),
        (
            STAGE + STAGE.replace("tiny", "small") + STAGE.replace("tiny", "mini"),
            "stage 3: growth never shrinks: the width must be at least the source's 512; got 256",
        ),
        (
            STAGE + STAGE + "model = { layer_types = 'l' }",
            "stage 2: .* must hold the source's in their",
        ),
        ("out = 3\n" + STAGE, "out must be the folder of all stages; got 3"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path / "r.toml")


def test_one_vocabulary_serves_all_stages(tmp_path: Path) -> None:
    """It is that of the last stage's preset, unless the recipe sets another one."""
    stages = STAGE + STAGE.replace("tiny", "mini") + "seed = 3"
    recipe: list[Any] = []
    for head, vocab in (("", 8192), ("vocab = 700\nbatch_size = 4\n", 700)):
        (tmp_path / "r.toml").write_text(head + stages)
        recipe = read_recipe(tmp_path / "r.toml")
        assert {(s.model.vocab_size, s.train.data.vocab) for s in recipe} == {(vocab, vocab)}
    assert [str(s.folder) for s in recipe] == ["runs/chain/1-tiny", "runs/chain/2-mini"]
    assert [s.train.finetune.initialize_from for s in recipe] == ["", "runs/chain/1-tiny"]
    assert [(s.train.data.batch_size, s.train.optimizer.seed) for s in recipe] == [(4, 0), (4, 3)]


def test_learning_rates_fall_in_the_last_stage_only(tmp_path: Path) -> None:
    """Unless the recipe, or a stage of it, sets another schedule."""
    stage = STAGE + "schedule = 'cosine'\n"
    for text, schedules in (
        (STAGE * 3, ["constant", "constant", "linear"]),
        (STAGE + stage + STAGE, ["constant", "cosine", "linear"]),
        ("schedule = 'cosine'\n" + STAGE * 2, ["cosine", "cosine"]),
    ):
        (tmp_path / "r.toml").write_text(text)
        assert [s.train.optimizer.schedule for s in read_recipe(tmp_path / "r.toml")] == schedules
