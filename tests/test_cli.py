"""The command line as a user meets it: commands work, mistakes are one line and code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from mmrec.cli import main
from mmrec.storage import seal


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder with a trained run, and files that are wrong in every way."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MMREC_CACHE", str(folder / "cache"))
        Path("small.toml").write_text(
            'preset = "tiny"\n[model]\nwidth = 32\ndepth = 2\nheads = 2\n'
        )
        arguments = f"train --config small.toml --data {text_file} --tokenizer byte --steps 6 "
        assert call(patch, arguments + "--batch 2 --seq-len 32 --eval-every 3 --out runs/one") == 0
        whole = Path("runs/one/last.h5").read_bytes()
        Path("cut.h5").write_bytes(whole[:5000])
        Path("text.h5").write_text("not HDF5")
        for name, schema in (("newer.h5", 99), ("older.h5", 1)):
            Path(name).write_bytes(whole)
            with h5py.File(name, "a") as file:
                file.attrs["schema"] = schema
            seal(Path(name))
        Path("bad.txt").write_bytes(b"abc\xff")
        Path("empty.txt").touch()
        Path("short.txt").write_text("a few words only, not enough " * 3)
        Path("lr.toml").write_text("[train]\nlr = nan\n")
    return folder


def call(patch: pytest.MonkeyPatch, arguments: str) -> int:
    patch.setattr(sys, "argv", ["mmrec", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        main.run()
    return int(caught.value.code or 0)


MISTAKES = [
    ("train tinny", "unknown preset 'tinny': expected one of tiny, .*; did you mean 'tiny'?"),
    ("train", "name a preset: mmrec train tiny"),
    ("train tiny --data stdlob", "unknown corpus 'stdlob'.*did you mean 'stdlib'?"),
    ("train tiny --data none.txt", "no data at none.txt: no such file or folder"),
    ("train tiny --data bad.txt", "bad.txt must be UTF-8 text; byte 0xff at offset 3 is not"),
    ("train tiny --data empty.txt", "empty.txt is empty"),
    ("train tiny --data short.txt --tokenizer byte --out n", "one batch needs 16 windows of 256"),
    ("train tiny --data short.txt --tokenizer byte --batch 1 --seq-len 20 --out n",
     "validation split must hold one window of 21 tokens"),
    ("train tiny --data cut.h5", "corpus cut.h5 is damaged or truncated"),
    ("train tiny --data newer.h5", "newer.h5 must be a corpus; it is a checkpoint"),
    ("train tiny --lr nan", "lr must be finite and > 0; got nan"),
    ("train tiny --lr inf", "lr must be finite and > 0; got inf"),
    ("train tiny --seq-len 0", "seq_len must be a whole number >= 1; got 0"),
    ("train tiny --seq-len -5", "seq_len must be a whole number >= 1; got -5"),
    ("train tiny --batch 0", "batch must be a whole number >= 1; got 0"),
    ("train tiny --steps 0", "steps must be finite and > 0; got 0"),
    ("train tiny --steps 5 --minutes 1", "only one of steps, epochs, minutes"),
    ("train tiny --vocab 10", "bpe vocabulary must hold at least 257 tokens"),
    ("train tiny --tokenizer words", "tokenizer must be one of bpe, char, byte"),
    ("train tiny --layers q", "layers must be letters out of"),
    ("train tiny --config none.toml", "cannot read config file none.toml"),
    ("train tiny --config lr.toml", "lr must be finite and > 0; got nan"),
    ("train --resume --lr 1", "--resume keeps the settings of its run; --lr cannot be given"),
    ("train tiny --resume", "--resume keeps the settings of its run; PRESET cannot be given"),
    ("train --resume --out nowhere", "no run at nowhere to resume"),
    ("eval nowhere", "no checkpoint at nowhere: no such file"),
    ("eval cut.h5", "checkpoint cut.h5 is damaged or truncated"),
    ("eval text.h5", "text.h5 is not an HDF5 file"),
    ("eval older.h5", r"earlier mmrec \(schema 1; this one reads from 3 on\): make it again"),
    ("eval newer.h5", r"newer mmrec \(schema 99; this one reads up to 3\): upgrade mmrec"),
    ("eval --data bad.txt", "bad.txt must be UTF-8"),
    ("generate --model nowhere.h5 --prompt x", "no checkpoint at nowhere.h5: no such file"),
    ("generate --model text.h5 --prompt x", "text.h5 is not an HDF5 file"),
    ("generate --prompt x --temperature -1", "temperature must be finite and >= 0"),
    ("generate --prompt x --top-p 0", r"top_p must be in \(0, 1\]"),
    ("generate --prompt x --max-tokens -1", "max_tokens must be >= 0"),
    ("info huge", "unknown preset 'huge'"),
    ("data prepare none/", "no data at none/"),
    ("data inspect text.h5", "text.h5 is not an HDF5 file"),
    ("bench scan --shape 4x5", "--shape must be 3 sizes joined by 'x', .*; got '4x5'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_and_code_2(
    world: Path,
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    monkeypatch.chdir(world)
    before = sorted(p for p in world.rglob("*") if "cache" not in p.parts)
    assert call(monkeypatch, arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert re.search(message, errors)
    assert sorted(p for p in world.rglob("*") if "cache" not in p.parts) == before


def test_a_run_is_not_overwritten(
    world: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    before = Path("runs/one/last.h5").read_bytes()
    arguments = f"train --config small.toml --data {text_file} --tokenizer byte --steps 2 --batch 2"
    assert call(monkeypatch, arguments + " --seq-len 32 --out runs/one") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert Path("runs/one/last.h5").read_bytes() == before


def test_a_path_inside_a_checkpoint_is_not_read(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the config.toml beside it, which anyone can look at, makes eval read a text."""
    monkeypatch.chdir(world)
    alone = world / "alone"
    alone.mkdir()
    shutil.copy("runs/one/best.h5", alone)
    try:
        assert call(monkeypatch, "eval alone/best.h5") == 2
        assert "what a file names is not read unless the config.toml beside it" in (
            capsys.readouterr().err
        )
    finally:
        shutil.rmtree(alone)


def test_commands_that_work(
    world: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    assert call(monkeypatch, "eval --json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert 0 < scores["bits_per_byte"] < 8.2
    assert call(monkeypatch, f"eval runs/one/last.h5 --data {text_file}") == 0
    assert "bits per byte" in capsys.readouterr().out
    texts = []
    for _ in range(2):
        assert call(monkeypatch, "generate --prompt def --max-tokens 20 --seed 7") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("def")
    assert call(monkeypatch, "info 7b --json") == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] > 6e9
    assert call(monkeypatch, "info tiny") == 0
    assert "feed-forward" in capsys.readouterr().out
    assert call(monkeypatch, f"data inspect {text_file} --tokenizer byte --json") == 0
    assert json.loads(capsys.readouterr().out)["train"]["documents"] == 1
    assert call(monkeypatch, f"data inspect {text_file} --tokenizer char") == 0
    assert "bytes/token" in capsys.readouterr().out
    assert call(monkeypatch, f"data prepare {text_file} --out made.h5") == 0
    assert Path("made.h5").exists()
    assert call(monkeypatch, "--version") == 0


@pytest.mark.parametrize(
    ("arguments", "op"),
    [("scan --shape 2x8x4", "product scan"), ("recurrence --shape 2x8x4", "torch.nn.GRU"),
     ("memory --shape 1x40x2x4", "Python loop")],
)  # fmt: skip
def test_bench(
    arguments: str, op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, f"bench {arguments} --repeats 3") == 0
    table = capsys.readouterr().out
    assert op in table
    assert "mmrec" in table
    assert call(monkeypatch, f"bench {arguments} --repeats 3 --json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    ours = [r for r in rows if r["name"].startswith("mmrec")]
    assert all(r["error"] < 2e-4 and r["both_ms"] > 0 for r in ours)


def test_a_wrong_contender_is_not_timed() -> None:
    import torch

    from mmrec.bench import Contender, compare

    wrong = Contender("wrong", lambda x: x * 1.01)
    right = Contender("right", lambda x: x * 1.0)
    rows = list(compare("op", (4, 4, 4), [wrong, right], lambda x: x * 1.0, [torch.randn(4, 4, 4)]))
    assert [r.forward_ms > 0 for r in rows] == [False, True]
    assert rows[0].error == pytest.approx(0.01, rel=1e-3)


def test_as_a_program(world: Path) -> None:
    """A real process: help is quick to load nothing heavy, standard input is a prompt."""
    code = "import sys, mmrec.cli.main; print({'torch', 'numba', 'h5py'} & set(sys.modules))"
    lean = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert lean.stdout.strip() == "set()"
    command = ["-m", "mmrec", "generate", "--seed", "1", "--max-tokens", "5"]
    run = subprocess.run([sys.executable, *command,
                          "--model", "runs/one"], input="import", cwd=world, capture_output=True,
                         text=True, check=False)  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("import")


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux counts there")
def test_a_busy_neighbour_is_noticed() -> None:
    from mmrec.cli.startup import others_work

    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert others_work(0.5)
    finally:
        neighbour.kill()
        neighbour.wait()


def test_how_threads_wait_is_the_users_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmrec.cli import startup

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for busy, want in ((True, ("passive", None)), (False, (None, None))):
        monkeypatch.setattr(startup, "others_work", lambda busy=busy: busy)
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {})
            startup.prepare_process(["train"])
            assert (os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")) == want
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
            startup.prepare_process(["train"])
            assert os.environ == {"OMP_WAIT_POLICY": "active"}
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {})
            startup.prepare_process(["bench"])
            assert os.environ == {}


def test_bench_train_says_where_a_step_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "bench train tiny --vocab 50 --batch 2 --seq-len 16 --profile") == 0
    out = capsys.readouterr().out
    for part in ("projections", "recurrence", "memory", "loss", "optimizer", "data", "rest"):
        assert f"\n{part} " in out
    assert "tokens/s" in out
    assert call(monkeypatch, "bench train tiny --vocab 50 --batch 2 --seq-len 16 --json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["flops"] == pytest.approx(sum(p["flops"] for p in made["parts"]))
    whole = sum(p["seconds"] for p in made["parts"])
    assert whole >= made["seconds"] * 0.99
    assert 0 < made["share"] < 2
