"""The command line: commands work, and each mistake prints one line and exits with code 2."""

import errno
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from mmrec.checkpoint.hdf5 import seal
from mmrec.cli import main
from mmrec.config import read_config_file
from mmrec.runtime.names import printable
from tests.cli.mistakes import MISTAKES
from tests.conversations import made_up_stories, message, story_conversations, write_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A working folder with trained runs, and with damaged and unsuitable files."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MMREC_CACHE", str(folder / "cache"))
        Path("small.toml").write_text(
            'preset = "tiny"\n[model]\nwidth = 32\ndepth = 2\nheads = 2\n'
            '[data]\ntokenizer = "byte"\nbatch_size = 2\nseq_len = 32\n'
            "[evaluation]\neval_every = 3\nsample_tokens = 4\n"
        )
        train = f"train --config small.toml --data {text_file} --steps"
        assert call(patch, f"{train} 6 --out runs/one") == 0
        assert call(patch, f"{train} 1 --tokenizer char --out char") == 0
        bpe = "--tokenizer bpe --vocab 300 --out bpe"
        assert call(patch, f"{train} 1 {bpe}") == 0
        assert call(patch, f"data prepare {text_file} --tokenizer char --out char.h5") == 0
        checkpoint = Path("runs/one/last.h5").read_bytes()
        Path("cut.h5").write_bytes(checkpoint[:5000])
        Path("text.h5").write_text("not HDF5")
        for name, schema in (("newer.h5", 99), ("older.h5", 1)):
            Path(name).write_bytes(checkpoint)
            with h5py.File(name, "a") as file:
                file.attrs["schema"] = schema
            seal(Path(name))
        Path("bad.txt").write_bytes(b"abc\xff")
        Path("empty.txt").touch()
        Path("latin.txt").write_bytes(b"caf\xe9")
        Path("utf16.txt").write_text("a text", "utf-16")
        Path("nul.txt").write_bytes(b"some text\0 and more")
        Path("pretty.json").write_text('{\n  "text": "x"\n}\n')
        with zipfile.ZipFile("zip.txt", "w") as zip_file, tarfile.open("tar.txt", "w") as tar_file:
            zip_file.write("small.toml")
            tar_file.add("small.toml")
        Path("word.txt").write_text("one word")
        Path("short.txt").write_text("a few words only, not enough " * 3)
        Path("book.txt").write_text(text_file.read_text())
        Path("snow.txt").write_text("def\nin ☃: pass\n" * 40)
        write_lines(Path("chats.jsonl"), story_conversations(made_up_stories()))
        bad = [message("user", "hello"), message("bot", "hi")]
        write_lines(Path("bot.jsonl"), [{"prompt": "a", "completion": "b"}, {"messages": bad}])
        Path("roles.jinja").write_text("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
        Path("records.jsonl").write_text('{"text": "good", "url": 1}\nbroken\n')
        assert call(patch, "data prepare book.txt --tokenizer char --out other.h5") == 0
        Path("lr.toml").write_text("[optimizer]\nlr = nan\n")
        Path("cut.toml").write_text("[train\n")
        Path("chain.toml").write_text("lr = 1.0\n")
        Path("exp").mkdir()  # files of a user with the names of a run's and a chain's
        shutil.copy("small.toml", "exp/config.toml")
        Path("exp/report.json").write_text('{"mine": 1}')
        Path("taken.toml").write_text(
            'out = "exp"\ndata = "book.txt"\n[[stage]]\npreset = "tiny"\nsteps = 1\n'
        )
        Path("runs.h5").mkdir()
        Path("word.toml").write_text('preset = "tiny"\n[optimizer]\nlrr = 1\n')
        Path("type.toml").write_text('preset = "tiny"\n[length]\nsteps = "x"\n')
    return folder


def call(patch: pytest.MonkeyPatch, arguments: str) -> int:
    """Run a command in this process; return its exit code."""
    return call_words(patch, arguments.split())


def call_words(patch: pytest.MonkeyPatch, words: list[str]) -> int:
    """The same, of arguments that may hold white space."""
    patch.setattr(sys, "argv", ["mmrec", *words])
    with pytest.raises(SystemExit) as caught:
        main.run()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("command", "at_fault", "arguments", "message"),
    MISTAKES,
    ids=[f"{m[0]} {m[2]}"[:60] for m in MISTAKES],
)
def test_a_mistake_is_one_line_and_code_2(
    folder: Path,
    command: str,
    at_fault: str,
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if at_fault == "--tasks":  # the list of the harness's own tasks takes many seconds
        from lm_eval import tasks as harness

        own = functools.partial(harness.TaskManager, include_defaults=False)
        monkeypatch.setattr(harness, "TaskManager", own)
    monkeypatch.chdir(folder)
    before = sorted(p for p in folder.rglob("*") if "cache" not in p.parts)
    assert call(monkeypatch, f"{command} {arguments}") == 2
    errors = capsys.readouterr().err
    # a bar that vanished: reading begins with compiling where no kernel is kept yet
    errors = re.sub(r"\r[^\r\n]*\r *\r", "", errors)
    errors = re.sub(r"^mmrec: compiling kernels .*\n", "", errors)
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert re.search(message, errors), errors
    assert sorted(p for p in folder.rglob("*") if "cache" not in p.parts) == before


def test_the_table_of_mistakes_is_complete() -> None:
    """It holds every argument, and every option with a value, of every command."""
    import typer

    def walk(command: Any, path: str) -> Iterator[tuple[str, str]]:
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{path} {name}".strip())
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                yield path, parameter.metavar or f"[{parameter.name}]"
            elif not parameter.is_flag:
                yield path, parameter.opts[0]

    options = set(walk(typer.main.get_command(main.app), ""))
    assert len(options) > 45
    assert options - {(m[0], m[1]) for m in MISTAKES} == set()


def test_a_run_is_not_overwritten_without_force(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = Path("runs/one/last.h5").read_bytes()
    assert call(monkeypatch, "train --config small.toml --data book.txt --out runs/one") == 2
    assert Path("runs/one/last.h5").read_bytes() == before


def test_a_text_that_only_the_checkpoint_names_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config.toml beside the checkpoint, which a user can look at, must name it too."""
    monkeypatch.chdir(folder)
    alone = folder / "alone"
    alone.mkdir()
    shutil.copy("runs/one/best.h5", alone)
    try:
        assert call(monkeypatch, "eval alone/best.h5") == 2
        assert "what a file names is not read unless the config.toml beside it" in (
            capsys.readouterr().err
        )
    finally:
        shutil.rmtree(alone)


def test_a_char_model_gets_the_characters_of_a_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert call(monkeypatch, "grow char --data snow.txt --out snow.h5") == 0
    assert call(monkeypatch, "generate --model snow.h5 --prompt ☃ --max-tokens 1") == 0
    assert "☃" in capsys.readouterr().out
    assert call(monkeypatch, "eval snow.h5 --data snow.txt") == 0
    small = "--batch-size 2 --seq-len 32 --steps 1 --out runs/snow --eval-tokens 99"
    assert call(monkeypatch, f"train {small} --initialize-from char --data snow.txt") == 0
    assert "new to the model, which get embeddings of their own: 1\n" in capsys.readouterr().out
    shutil.rmtree("runs/snow")


def test_the_char_tokenizer_gets_longer_ngrams_for_text_and_for_a_corpus_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for data in ("book.txt --tokenizer char", "other.h5"):
        command = f"train tiny --data {data} --steps 1 --batch-size 1 --seq-len 8"
        command += " --width 32 --depth 1 --heads 2 --out runs/chars --force"
        assert call(monkeypatch, command) == 0
        model = tomllib.loads(Path("runs/chars/config.toml").read_text())["model"]
        assert (model["max_ngram"], model["ngram_buckets"]) == (4, 8192)
    shutil.rmtree("runs/chars")


def test_tasks_without_the_harness_name_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "lm_eval.utils", None)
    assert call(monkeypatch, "eval --tasks x") == 2
    assert "--tasks needs a package: pip install 'mmrec[harness]'" in capsys.readouterr().err


def test_prompts_without_their_training_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    Path("alone").mkdir()
    shutil.copy("runs/one/best.h5", "alone")
    try:
        command = "eval alone/best.h5 runs/one --prompts short.txt --temperatures 0"
        assert call(monkeypatch, f"{command} --max-tokens 9") == 0
        printed = capsys.readouterr()
        assert "copies of the training text are not searched for" in printed.err
        assert printed.out.count("temperature 0,") == 2
    finally:
        shutil.rmtree("alone")


def test_commands_that_work(
    folder: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert call(monkeypatch, "eval --json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert 0 < scores["bits_per_byte"] < 8.2
    assert scores["interval"] is None or scores["interval"][0] <= scores["bits_per_byte"]
    assert sum(b["tokens"] for b in scores["positions"]) == scores["tokens"]
    assert call(monkeypatch, f"eval runs/one/last.h5 --data {text_file} --plot eval.png") == 0
    assert Path("eval.png").read_bytes()[:4] == b"\x89PNG"
    assert "bits per byte" in capsys.readouterr().out
    texts = []
    for _ in range(2):
        assert call(monkeypatch, "generate --prompt def --max-tokens 20 --seed 7") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("def")
    assert call(monkeypatch, "info 7b --json") == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] > 6e9
    assert call(monkeypatch, "info tiny --ema-decay 0.99") == 0
    shown = capsys.readouterr().out
    assert "feed-forward" in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert rows["average"] == rows["weights"]
    assert "batch of 16 × 128 tokens" in shown
    assert call(monkeypatch, f"data inspect {text_file} --tokenizer byte --json") == 0
    assert json.loads(capsys.readouterr().out)["train"]["documents"] == 1
    assert call(monkeypatch, f"data inspect {text_file} --tokenizer char") == 0
    assert "bytes/token" in capsys.readouterr().out
    assert call(monkeypatch, f"data prepare {text_file} --tokenizer byte --out byte.h5") == 0
    assert Path("byte.h5").exists()
    capsys.readouterr()
    assert call(monkeypatch, "eval --data byte.h5 --json") == 0
    scores_of_corpus = json.loads(capsys.readouterr().out)
    assert scores_of_corpus["bits_per_byte"] == scores["bits_per_byte"]
    assert scores_of_corpus["data"] == "validation split of byte.h5"
    assert call(monkeypatch, "eval --data records.jsonl --skip-bad --json") == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == len("good")
    assert call(monkeypatch, "compare runs/one runs/one --out both.png") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[0] == "run"
    assert table[1] == table[2]
    assert Path("both.png").read_bytes()[:4] == b"\x89PNG"
    assert call(monkeypatch, "compare runs/one --json") == 0
    [curve] = json.loads(capsys.readouterr().out)
    logged = [json.loads(x) for x in Path("runs/one/metrics.jsonl").read_text().splitlines()]
    assert curve["validations"] == [
        [x["step"], x["bits_per_byte"]] for x in logged if x["kind"] == "val"
    ]
    assert curve["ended"] == "done"
    assert call(monkeypatch, "--version") == 0


def test_results_are_printed_before_a_picture_or_report_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert call(monkeypatch, "eval runs/one") == 0  # the corpus is in the cache from here on
    capsys.readouterr()

    def refuse(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    for arguments, printed in {
        "eval runs/one --plot p.png": "bits per byte",
        "compare runs/one --out p.png": "whole split",
        "eval runs/one --prompts short.txt --temperatures 0 --max-tokens 3 --report r.md": (
            "# Generated samples"
        ),
    }.items():
        assert call(monkeypatch, arguments) == 2
        out, errors = capsys.readouterr()
        assert printed in out
        assert "error: could not write " in errors
        assert "No space left" in errors


@pytest.mark.parametrize("name", ["$HOME_$USER", "[bold] %s", "x\ny", "\x1b[31m日本😀", "v" * 250])
def test_a_run_folder_may_have_any_name(
    name: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is trained in, resumed, scored and compared. What is printed is quoted for a shell."""
    monkeypatch.chdir(tmp_path)
    config, text = folder / "small.toml", folder / "book.txt"
    for words in (
        ["train", f"--config={config}", f"--data={text}", "--steps=1", f"--out={name}"],
        ["train", "--resume", f"--out={name}", "--steps=2"],
    ):
        assert call_words(monkeypatch, words) == 0
        out, errors = capsys.readouterr()
        assert "\x1b[31m" not in out
        assert "warning" not in (out + errors).lower()
        [line] = [line for line in out.splitlines() if "next: " in line]
        assert shlex.split(line)[-3] == printable(name)
        assert (Path(name) / "loss.png").read_bytes()[:4] == b"\x89PNG"
        assert read_config_file(Path(name) / "config.toml").train["out"] == str(tmp_path / name)
    assert call_words(monkeypatch, ["eval", name, "--plot=p.png"]) == 0
    assert call_words(monkeypatch, ["compare", name, name, "--out=c.png"]) == 0
    assert printable(name) in capsys.readouterr().out
    assert call_words(monkeypatch, ["generate", "--model", name, "--prompt=x"]) == 0
    capsys.readouterr()
    assert call_words(monkeypatch, ["data", "inspect", f"{name}/  none.txt"]) == 2
    assert len(name) > 99 or f" {printable(name)}/  none.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "op"),
    [
        ("scan --shape 2x8x4", "cumprod"),
        ("gated-recurrence --shape 2x8x4", "torch.nn.GRU"),
        ("gated-delta-rule --shape 1x40x2x4", "Python loop"),
        ("kda --shape 1x40x2x4", "Python loop"),
        ("gla --shape 1x64x2x4", "simple_gla"),
        ("selective-scan --shape 1x40x5x4", "Python loop"),
        ("ssd --shape 1x40x2x3x4", "Python loop"),
        ("causal-conv1d --shape 2x9x5x4", "torch conv1d"),
    ],
)
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


@pytest.fixture
def small_generate_bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``mmrec.profiling.generate_bench`` with little to do."""
    from mmrec.profiling import generate_bench

    for name, value in (("PROMPT_TOKENS", 24), ("LONG_TOKENS", 12), ("BOUND_BYTES", 1)):
        monkeypatch.setattr(generate_bench, name, value)
    monkeypatch.setattr(generate_bench, "STREAMS", (1, 2))
    return generate_bench


def test_bench_generate(
    small_generate_bench: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert call(monkeypatch, "bench generate --model runs/one --tokens 4 --repeats 3") == 0
    table = capsys.readouterr().out
    assert re.search(r"\n  one stream, greedy +float32 +1 +[\d,]+ +\d+% +\de-\d+\n", table)
    assert "from token" not in table
    options = "--tokens 4 --repeats 3 --full --json"
    assert call(monkeypatch, f"bench generate runs/one {options}") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {r["what"] for r in rows} == {
        *(small_generate_bench.BOUND, "one stream, greedy", "one stream, top-p"),
        *("1 stream, top-p", "2 streams, top-p", "reading 24 tokens"),
        *("from token 1, top-p", "from token 13, top-p"),
    }
    assert all(r["tokens_per_second"] > 0 for r in rows)
    exact = [r["error"] for r in rows if r["weights"] == "float32"]
    rounded = [r["error"] for r in rows if r["weights"] != "float32"]
    assert max(exact) < 1e-4 < min(rounded)


def test_bench_generate_does_not_time_a_wrong_decoder(
    small_generate_bench: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    real = small_generate_bench.torch_logits

    def torch_logits(subject: Any) -> Any:
        tokens, logits = real(subject)
        return tokens, logits + 0.01

    monkeypatch.setattr(small_generate_bench, "torch_logits", torch_logits)
    assert call(monkeypatch, "bench generate runs/one --tokens 4 --repeats 3") == 0
    table = capsys.readouterr().out
    assert re.search(r"one stream, greedy +float32 +1 +not timed: wrong by 0.01\n", table)
    assert re.search(r"one stream, greedy +int8 +1 +[\d,]+ ", table)


def test_bench_shows_progress_and_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmrec.cli import bench

    monkeypatch.setattr(bench, "PROGRESS_DELAY", 0)
    monkeypatch.setattr(bench, "MAX_SECONDS", 0)  # no time for a second case
    assert call(monkeypatch, "bench scan --shape 2x8x4 --shape 1x4x4 --repeats 3") == 0
    out, err = capsys.readouterr()
    assert "scan (2, 8, 4)" in out
    assert "(1, 4, 4)" not in out
    assert "left out after 0 s: scan 1x4x4, cumprod 2x8x4, cumprod 1x4x4 (--full)" in err
    assert re.search(r"scan 2x8x4: \w+ .* \d+% \[\d\d:\d\d<\d\d:\d\d\]", err)
    assert call(monkeypatch, "bench scan --shape 2x8x4 --shape 1x4x4 --repeats 3 --full") == 0
    assert "cumprod (1, 4, 4)" in capsys.readouterr().out


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_shows_what_bench_measured_so_far(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    calls = []

    def cumprod(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 8:  # a reference, a check, a first call, then those that are timed
            raise KeyboardInterrupt
        return real(*arguments)

    real = torch.cumprod
    monkeypatch.setattr(torch, "cumprod", cumprod)
    arguments = "bench scan --shape 2x8x4 --repeats 9" + " --json" * as_json
    assert call(monkeypatch, arguments) == 130
    out, err = capsys.readouterr()
    assert "measured so far" in err
    if as_json:
        result = json.loads(out)
        assert result["interrupted"]
        measured = {r["name"]: r["forward_ms"] for r in result["rows"] if r["op"] == "cumprod"}
        assert measured["mmrec"] > 0
    else:
        assert "scan (2, 8, 4)" in out
        assert re.search(r"cumprod \(2, 8, 4\).*\n.*\n  mmrec +[\d.]+ ", out)


def test_ctrl_c_shows_the_step_that_bench_train_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmrec.profiling.step import Stopwatch

    real = Stopwatch.median_seconds

    def median_seconds(self: Stopwatch, name: str, call: Any) -> float:
        if name == "loss":
            raise KeyboardInterrupt
        return real(self, name, call)

    monkeypatch.setattr(Stopwatch, "median_seconds", median_seconds)
    arguments = "bench train tiny --vocab 50 --batch-size 1 --seq-len 16 --profile"
    assert call(monkeypatch, arguments) == 130
    out, err = capsys.readouterr()
    assert re.search(r"\nstep [\d.]+ ms, [\d,]+ tokens/s\n$", out)
    assert "\nrecurrence " in out
    assert "\nother " not in out
    assert "interrupted" in err


def test_a_wrong_implementation_is_not_timed() -> None:
    import torch

    from mmrec.profiling.baselines import Implementation
    from mmrec.profiling.kernel_bench import compare

    wrong = Implementation("wrong", lambda x: x * 1.01)
    right = Implementation("right", lambda x: x * 1.0)
    rows = list(compare("op", (4, 4, 4), [wrong, right], lambda x: x * 1.0, [torch.randn(4, 4, 4)]))
    assert [r.forward_ms > 0 for r in rows] == [False, True]
    assert rows[0].error == pytest.approx(0.01, rel=1e-3)


def test_as_a_process(folder: Path) -> None:
    """The command line imports nothing heavy. Standard input is a prompt."""
    code = "import sys, mmrec.cli.main; print({'torch', 'numba', 'h5py'} & set(sys.modules))"
    imports = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert imports.stdout.strip() == "set()"
    command = ["-m", "mmrec", "generate", "--seed", "1", "--max-tokens", "5"]
    run = subprocess.run(
        [sys.executable, *command, "--model", "runs/one"],
        input="import",
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("import")


def test_bench_train_shows_the_time_of_each_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        call(monkeypatch, "bench train tiny --vocab 50 --batch-size 2 --seq-len 16 --profile") == 0
    )
    out = capsys.readouterr().out
    for part in ("projections", "recurrence", "delta rule", "loss", "optimizer", "data", "other"):
        assert f"\n{part} " in out
    assert "tokens/s" in out
    assert call(monkeypatch, "bench train tiny --vocab 50 --batch-size 2 --seq-len 16 --json") == 0
    step = json.loads(capsys.readouterr().out)
    assert step["flops"] == pytest.approx(sum(p["flops"] for p in step["parts"]))
    assert sum(p["seconds"] for p in step["parts"]) >= step["seconds"] * 0.99
    assert 0 < step["peak_fraction"] < 2


@pytest.fixture
def program(
    run_command: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], str]:
    """Run mmrec in ``tmp_path`` without an error or a warning; return what it prints."""
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    return lambda arguments: run_command(tmp_path, *arguments.split())[0]


def test_a_grown_model_can_be_trained(
    folder: Path, tmp_path: Path, program: Callable[[str], str]
) -> None:
    """A grown model scores the same. Training and a resume keep its tokenizer and moments."""
    shutil.copytree(folder / "runs/one", tmp_path / "one")
    for name in ("small.toml", "book.txt"):
        shutil.copy(folder / name, tmp_path)
    out = program("grow one/last.h5 --width 64 --depth 3 --out grown.h5")
    assert "to   width 64, 3 layers (nnn), 2 heads, vocabulary 257, " in out
    before = json.loads(program("eval one/last.h5 --json"))
    after = json.loads(program("eval grown.h5 --data book.txt --json"))
    ungrown = json.loads(program("eval one/last.h5 --data book.txt --json"))
    assert after["loss"] == pytest.approx(ungrown["loss"], abs=1e-4)

    options = "--batch-size 2 --seq-len 32 --eval-every 4 --sample-tokens 4 --data book.txt"
    out = program(f"train --initialize-from grown.h5 {options} --steps 12 --out more")
    assert "start   grown.h5, step 6, with its moments" in out
    assert (tmp_path / "more/step-0.h5").exists()
    assert json.loads(program("eval more --json"))["loss"] < before["loss"]

    out = program(f"train --initialize-from grown.h5 {options} --steps 6 --out short")
    assert "with its moments" in out
    out = program("train --resume --out short --steps 12")
    assert "resume  short/last.h5, step 6" in out
    assert json.loads(program("eval short --json"))["loss"] < before["loss"]


def test_the_preset_and_the_tokenizer_set_the_sequence_length(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a configuration file or an option sets it."""
    shutil.copy(folder / "book.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    sizes = "[model]\nwidth = 32\ndepth = 1\nheads = 2\nngram_buckets = 64\n"
    (tmp_path / "s.toml").write_text(sizes)
    (tmp_path / "t.toml").write_text(f"{sizes}[data]\nseq_len = 96\n")
    common = "--data book.txt --steps 1 --batch-size 2"
    for number, (arguments, seq_len) in enumerate(
        {
            "tiny --config s.toml --vocab 300": 128,
            "tiny --config s.toml --tokenizer char": 256,
            "mini --config s.toml --vocab 300": 256,
            "tiny --config t.toml --vocab 300": 96,
            "tiny --config t.toml --vocab 300 --seq-len 64": 64,
            "tiny --config s.toml --initialize-from 0": 128,
            "tiny --config s.toml --initialize-from 1": 256,
        }.items()
    ):
        assert call(monkeypatch, f"train {arguments} {common} --out {number}") == 0
        config = tomllib.loads(Path(f"{number}/config.toml").read_text())
        assert config["data"]["seq_len"] == seq_len, arguments


def test_a_bpe_run_grows_with_its_own_tokenizer(
    folder: Path,
    tmp_path: Path,
    program: Callable[[str], str],
    run_command: Callable[..., tuple[str, str]],
) -> None:
    """Another text is tokenised with the tokenizer of the first run; none is trained on it."""
    shutil.copy(folder / "book.txt", tmp_path)
    (tmp_path / "other.txt").write_text(Path(__file__).read_text() * 2)
    (tmp_path / "s.toml").write_text(
        'preset = "tiny"\n[model]\nwidth = 32\ndepth = 2\nheads = 2\n'
        "[data]\nbatch_size = 2\nseq_len = 32\n[length]\nsteps = 4\n"
        "[evaluation]\neval_every = 3\nsample_tokens = 4\n"
    )
    program("train --config s.toml --data book.txt --vocab 400 --out a")
    out = program("train --config s.toml --data other.txt --initialize-from a --out b")
    assert "start   a/best.h5, step" in out
    assert "training the bpe" not in out
    with h5py.File(tmp_path / "a/last.h5") as a, h5py.File(tmp_path / "b/last.h5") as b:
        assert a["tokenizer"][()].tobytes() == b["tokenizer"][()].tobytes()
    program("train --resume --out b --steps 6")
    assert json.loads(program("eval b --json"))["step"] > 0
    for name in ("step-0.h5", "last.h5", "best.h5"):
        (tmp_path / "b" / name).unlink()
    _, errors = run_command(tmp_path, "train", "--resume", "--out", "b", code=2)
    assert errors.count("\n") == 1
    assert "b holds no whole checkpoint, so its tokenizer is lost" in errors


def test_finetune_on_another_text(
    folder: Path, tmp_path: Path, program: Callable[[str], str]
) -> None:
    """The new text's score improves, both texts are scored, and frozen weights do not change."""
    shutil.copytree(folder / "runs/one", tmp_path / "one")
    (tmp_path / "new.txt").write_text(Path(__file__).read_text())
    out = program(
        "finetune one --data new.txt --freeze embeddings,layers:0 --steps 12 "
        "--eval-every 4 --replay-fraction 0.3 --lr 5e-3 --matrix-lr 1e-2 --out two",
    )
    reported = json.loads((tmp_path / "two/summary.json").read_text())["bits_per_byte"]
    assert reported["new"]["after"] < reported["new"]["before"]
    assert set(reported) == {"new", "earlier"}
    assert f"new text new.txt: {reported['new']['before']:.4f} bits per byte before, " in out
    scored = json.loads(program("eval two --json"))
    assert scored["bits_per_byte"] == pytest.approx(reported["new"]["after"], abs=1e-6)
    with h5py.File(tmp_path / "one/best.h5") as a, h5py.File(tmp_path / "two/last.h5") as b:
        unchanged = {}
        for name in (
            "embedding",
            "ngram_embedding",
            "layers.0.up_proj.weight",
            "layers.1.up_proj.weight",
        ):
            unchanged[name] = bool((a[f"model/{name}"][()] == b[f"model/{name}"][()]).all())
    assert list(unchanged.values()) == [True, True, True, False]
    out = program("train --resume --out two --steps 14")
    assert "resume  two/last.h5, step 12" in out
    Path(tmp_path / "one/config.toml").unlink()
    out = program("finetune one --data new.txt --steps 1 --out three")
    assert "forgetting of the earlier text is not measured" in out


def test_a_vocabulary_can_be_extended(
    folder: Path, tmp_path: Path, program: Callable[[str], str]
) -> None:
    """The same text has fewer, longer tokens, and training continues with them."""
    from mmrec.checkpoint.checkpoint import load_model

    shutil.copytree(folder / "bpe", tmp_path / "bpe")
    shutil.copy(folder / "book.txt", tmp_path)
    out = program("grow bpe/last.h5 --vocab 500 --width 64 --out more.h5")
    assert "to   width 64, 2 layers (nn), 2 heads, vocabulary 500, " in out
    text = (folder / "book.txt").read_text()
    old, new = load_model(tmp_path / "bpe/last.h5"), load_model(tmp_path / "more.h5")
    ids = new.tokenizer.encode(text)
    assert len(ids) < 0.95 * len(old.tokenizer.encode(text))
    assert new.tokenizer.decode(ids) == text
    out = program(
        "train --initialize-from more.h5 --data book.txt --batch-size 2 --seq-len 32 --steps 4 "
        "--out longer",
    )
    assert "with its moments" in out
