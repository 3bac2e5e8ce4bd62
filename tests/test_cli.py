"""The command line as a user meets it: commands work, mistakes are one line and code 2."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
            '[train]\ntokenizer = "byte"\nbatch = 2\nseq_len = 32\neval_every = 3\n'
        )
        start = f"train --config small.toml --data {text_file} --steps"
        assert call(patch, f"{start} 6 --out runs/one") == 0
        assert call(patch, f"{start} 1 --tokenizer char --out char") == 0
        bpe = "--tokenizer bpe --vocab 300 --out bpe"
        assert call(patch, f"{start} 1 {bpe}") == 0
        assert call(patch, f"data prepare {text_file} --tokenizer char --out char.h5") == 0
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
        Path("world.txt").write_text(text_file.read_text())
        Path("records.jsonl").write_text('{"text": "good", "url": 1}\nbroken\n')
        assert call(patch, "data prepare world.txt --tokenizer char --out other.h5") == 0
        Path("lr.toml").write_text("[train]\nlr = nan\n")
        Path("cut.toml").write_text("[train\n")
        Path("word.toml").write_text('preset = "tiny"\n[train]\nlrr = 1\n')
        Path("type.toml").write_text('preset = "tiny"\n[train]\nsteps = "x"\n')
    return folder


def call(patch: pytest.MonkeyPatch, arguments: str) -> int:
    patch.setattr(sys, "argv", ["mmrec", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        main.run()
    return int(caught.value.code or 0)


BIG = 10**30
# command, the option or argument at fault, arguments, what standard error says
MISTAKES = [
    ("", "COMMAND", "trian", "No such command 'trian'. Did you mean 'train'"),
    ("data", "COMMAND", "", "Missing command"),
    ("bench", "COMMAND", "skan", "No such command 'skan'"),
    ("compare", "RUN...", "runs/none", "runs/none must be a run folder; it holds no metrics.jsonl"),
    ("compare", "RUN...", "", "Missing argument 'RUN...'"),
    ("eval", "--plot", "--plot runs", "--plot must be a file to write; runs is a folder"),
    ("compare", "--out", "runs/one --out runs", "--out must be a file .*; runs is a folder"),
    ("train", "PRESET", "tinny",
     "unknown preset 'tinny': expected one of tiny, .*; did you mean 'tiny'"),
    ("train", "PRESET", "", "name a preset: mmrec train tiny"),
    ("train", "PRESET", "tiny mini", r"unexpected extra argument\(s\) \(mini\)"),
    ("train", "--config", "--config none.toml", "cannot read config file none.toml: No such file"),
    ("train", "--config", "--config .", "cannot read config file .: Is a directory"),
    ("train", "--config", "--config lr.toml tiny", "lr must be finite and > 0; got nan"),
    ("train", "--config", "--config cut.toml", "config file cut.toml is not TOML"),
    ("train", "--config", "--config word.toml",
     "unknown setting 'lrr' for TrainConfig; did you mean 'lr'"),
    ("train", "--config", "--config type.toml", "steps must be of type int | None; got 'x'"),
    ("train", "--config", "--config cut.h5", "config file cut.h5 is not TOML"),
    ("train", "--data", "tiny --data stdlob", "unknown corpus 'stdlob'.*did you mean 'stdlib'"),
    ("train", "--data", "tiny --data none.txt", "no data at none.txt: no such file or folder"),
    ("train", "--data", "tiny --data *.none", r"no file matches \*.none"),
    ("train", "--data", "tiny --data bad.txt",
     "bad.txt must be UTF-8 text; byte 0xff at offset 3 is not"),
    ("train", "--data", "tiny --data empty.txt", "empty.txt is empty"),
    ("train", "--data", "tiny --data short.txt --tokenizer byte",
     "one batch needs 16 windows of 256"),
    ("train", "--data", "tiny --data short.txt --tokenizer byte --batch 1 --seq-len 20",
     "validation split must hold one window of 21 tokens"),
    ("train", "--data", "tiny --data cut.h5", "corpus cut.h5 is damaged or truncated"),
    ("train", "--data", "tiny --data newer.h5", "newer.h5 must be a corpus; it is a checkpoint"),
    ("train", "--text-field", "tiny --data records.jsonl --text-field body",
     "records.jsonl line 1 must have a field 'body' .*; its fields are: text, url"),
    ("train", "--data", "tiny --data records.jsonl", "records.jsonl line 2 must be JSON"),
    ("train", "--data", "tiny --data hf:a:b:c:d", r"must be hf:NAME\[:CONFIG\]\[:SPLIT\]"),
    ("train", "--data", "tiny --data 0:world.txt,1:stdlib",
     "weights of a mixture must be > 0; got 0:world.txt,1:stdlib"),
    ("train", "--max-bytes", "tiny --max-bytes -1", r"max_bytes must lie in 0 to 10\^15; got -1"),
    ("train", "--val-share", "tiny --val-share 0", r"val_share must lie in \(0, 0.5\]; got 0"),
    ("train", "--val-share", "tiny --val-share nan", r"val_share must lie in \(0, 0.5\]; got nan"),
    ("train", "--val-file", "tiny --data world.txt --val-file none.txt", "no data at none.txt"),
    ("train", "--tokenizer", "tiny --tokenizer words",
     "tokenizer must be one of bpe, char, byte; got 'words'"),
    ("train", "--vocab", "tiny --vocab 10",
     "bpe vocabulary must hold at least 257 tokens, .*; got 10"),
    ("train", "--vocab", "tiny --vocab -1", "vocab must be >= 0; got -1"),
    ("train", "--vocab", f"tiny --vocab {BIG}", r"at most 2\^32; got 1000000"),
    ("train", "--epochs", "tiny --epochs 0", r"epochs must be > 0 and at most 10\^15; got 0"),
    ("train", "--epochs", "tiny --epochs nan", "epochs must be > 0 and at most .*; got nan"),
    ("train", "--steps", "tiny --steps 0", "steps must be > 0 and at most .*; got 0"),
    ("train", "--steps", "tiny --steps 1.5", "'--steps': .* integer.*; got '1.5'"),
    ("train", "--steps", f"tiny --steps={BIG}", "steps must be > 0 and at most .*; got 1000"),
    ("train", "--steps", "tiny --steps", "'--steps' requires an argument"),
    ("train", "--steps", "tiny --stpes 4", "No such option: --stpes.*--steps"),
    ("train", "--minutes", "tiny --minutes -1", "minutes must be > 0 and at most .*; got -1"),
    ("train", "--minutes", "tiny --steps 5 --minutes 1", "only one of steps, epochs, minutes"),
    ("train", "--batch", "tiny --batch 0", "batch must be a whole number from 1 to .*; got 0"),
    ("train", "--batch", f"tiny --batch {BIG}", r"batch must be a whole number from 1 to 10\^15"),
    ("train", "--seq-len", "tiny --seq-len -5", "seq_len must be a whole number from 1 .*; got -5"),
    ("train", "--state", "tiny --state epoch",
     "state must be one of window, document, carry; got 'epoch'"),
    ("train", "--accumulate", "tiny --accumulate 0",
     "accumulate must be a whole number from 1 .*; got 0"),
    ("train", "--lr", "tiny --lr nan", "lr must be finite and > 0; got nan"),
    ("train", "--lr", "tiny --lr inf", "lr must be finite and > 0; got inf"),
    ("train", "--lr", "tiny --lr fast", "'--lr': .*; got 'fast'"),
    ("train", "--muon-lr", "tiny --muon-lr 0", "muon_lr must be finite and > 0; got 0"),
    ("train", "--min-lr", "tiny --min-lr 1.5", r"min_lr must lie in \[0, 1\]; got 1.5"),
    ("train", "--warmup", "tiny --warmup -0.1", r"warmup must lie in \[0, 1\]; got -0.1"),
    ("train", "--schedule", "tiny --schedule step",
     "schedule must be one of cosine, linear, constant; got 'step'"),
    ("train", "--table-decay", "tiny --table-decay -1",
     "table_decay must be finite and >= 0; got -1"),
    ("train", "--weight-decay", "tiny --weight-decay -1",
     "weight_decay must be finite and >= 0; got -1"),
    ("train", "--clip", "tiny --clip 0", "clip must be finite and > 0; got 0"),
    ("train", "--dropout", "tiny --dropout 1", r"dropout must lie in \[0, 1\); got 1"),
    ("train", "--layers", "tiny --layers q", "layers must be letters out of .*; got 'q'"),
    ("train", "--precision", "tiny --precision float16",
     "precision must be one of auto, float32, bfloat16; got 'float16'"),
    ("train", "--seed", "tiny --seed -1", r"seed must lie in 0 to 2\^63 - 1; got -1"),
    ("train", "--seed", f"tiny --seed {BIG}", "seed must lie in 0 to .*; got 1000"),
    ("train", "--eval-every", "tiny --eval-every 0",
     "eval_every must be a whole number from 1 .*; got 0"),
    ("train", "--save-every", "tiny --save-every 0",
     "save_every must be a whole number from 1 .*; got 0"),
    ("train", "--keep", "tiny --keep -1", "keep must be >= 0; got -1"),
    ("train", "--keep", "tiny --keep 0 --on-nan rollback",
     "keep must be >= 1, or on_nan rollback has nowhere"),
    ("train", "--patience", "tiny --patience -1", "patience must be >= 0; got -1"),
    ("train", "--on-nan", "tiny --on-nan ignore",
     "on_nan must be one of stop, skip, rollback; got 'ignore'"),
    ("train", "--out", "--config small.toml --data world.txt --out small.toml",
     "the run folder small.toml must be a folder; it is a file"),
    ("train", "--out", "--config small.toml --data world.txt --out /proc/none",
     "cannot write in the run folder /proc/none"),
    ("train", "--out", "--config small.toml --data world.txt --out runs/one",
     "runs/one already holds a run: choose another --out"),
    ("train", "--resume", "--resume --lr 1",
     "--resume keeps the settings of its run; --lr cannot be given"),
    ("train", "--resume", "tiny --resume",
     "--resume keeps the settings of its run; PRESET cannot be given"),
    ("train", "--resume", "--resume --config small.toml",
     "--resume keeps .*; --config cannot be given"),
    ("train", "--resume", "--resume --out nowhere",
     "no run at nowhere to resume: expected a folder with a config.toml"),
    ("train", "--force", "--resume --force", "--resume keeps .*; --force cannot be given"),
    ("eval", "[RUN|CHECKPOINT]...", "nowhere", "no checkpoint at nowhere: no such file"),
    ("eval", "[RUN|CHECKPOINT]...", "runs",
     "no checkpoint in runs: expected best.h5, last.h5 or step-N.h5"),
    ("eval", "[RUN|CHECKPOINT]...", "cut.h5", "checkpoint cut.h5 is damaged or truncated"),
    ("eval", "[RUN|CHECKPOINT]...", "text.h5", "text.h5 is not an HDF5 file"),
    ("eval", "[RUN|CHECKPOINT]...", "older.h5",
     r"earlier mmrec \(schema 1; this one reads from \d on\): make it again"),
    ("eval", "[RUN|CHECKPOINT]...", "newer.h5",
     r"newer mmrec \(schema 99; this one reads up to \d\): upgrade mmrec"),
    ("eval", "--data", "--data bad.txt", "bad.txt must be UTF-8"),
    ("eval", "--data", "--data none.txt", "no data at none.txt"),
    ("eval", "--data", "--data empty.txt", "empty.txt is empty"),
    ("eval", "--data", "--data other.h5", "other.h5 must have the tokenizer of .*; it has another"),
    ("eval", "--text-field", "--data records.jsonl --text-field body", "must have a field 'body'"),
    ("eval", "[RUN|CHECKPOINT]...", "runs/one char",
     "one model at a time is scored; got 2: --prompts takes several"),
    ("eval", "--prompts", "--prompts none.txt", "cannot read none.txt: No such file"),
    ("eval", "--prompts", "--prompts empty.txt", "empty.txt must hold prompts, one a line"),
    ("eval", "--prompts", "--prompts bad.txt", "bad.txt must be UTF-8 text"),
    ("eval", "--prompts", "--prompts records.jsonl",
     "records.jsonl line 1 must be a JSON object with a field 'prompt'"),
    ("eval", "--temperatures", "--prompts short.txt --temperatures 0,warm",
     "--temperatures must be numbers joined by commas; got '0,warm'"),
    ("eval", "--temperatures", "--prompts short.txt --temperatures -1",
     "temperature must be finite and >= 0; got -1"),
    ("eval", "--max-tokens", "--prompts short.txt --max-tokens 0", "'--max-tokens': .*1; got '0'"),
    ("eval", "--report", "--prompts short.txt --report r.pdf", "must end in .md or .html; got r.p"),
    ("eval", "--report", "--prompts short.txt --report runs", "--report must be a file to write"),
    ("eval", "--tasks", "--tasks none-such", "the harness has no task 'none-such'"),
    ("eval", "--include-path", "--tasks x --include-path none", "must be a folder of tasks; none"),
    ("generate", "--model", "--model nowhere.h5 --prompt x",
     "no checkpoint at nowhere.h5: no such file"),
    ("generate", "--model", "--model text.h5 --prompt x", "text.h5 is not an HDF5 file"),
    ("generate", "--prompt", "--prompt", "'--prompt' requires an argument"),
    ("generate", "--prompt", "--model char --prompt ☃", "char.*'☃'|'☃'.*char"),
    ("generate", "--max-tokens", "--prompt x --max-tokens -1", "max_tokens must be >= 0; got -1"),
    ("generate", "--temperature", "--prompt x --temperature -1",
     "temperature must be finite and >= 0; got -1"),
    ("generate", "--temperature", "--prompt x --temperature nan",
     "temperature must be finite and >= 0; got nan"),
    ("generate", "--top-k", "--prompt x --top-k -1", "top_k must be >= 0; got -1"),
    ("generate", "--top-p", "--prompt x --top-p 0", r"top_p must be in \(0, 1\]; got 0"),
    ("generate", "--min-p", "--prompt x --min-p 2", r"min_p must be in \[0, 1\]; got 2"),
    ("generate", "--repetition-penalty", "--prompt x --repetition-penalty 0",
     "repetition_penalty must be finite and > 0; got 0"),
    ("generate", "--seed", "--prompt x --seed -1", "'--seed': .*; got '-1'"),
    ("generate", "--seed", f"--prompt x --seed {BIG}", "'--seed': .*; got '1000"),
    ("generate", "--stop", "--prompt x --stop=", "a stop text must not be empty"),
    ("train", "--grow-from", "tiny --grow-from none", "no checkpoint at none: no such file"),
    ("train", "--grow-from", "--config small.toml --grow-from char --tokenizer byte",
     "keeps the tokenizer of its source, char of .*: leave out --tokenizer and --vocab; got byte"),
    ("train", "--grow-from", "tiny --grow-from runs/one --vocab 300",
     "keeps the tokenizer of its source, byte of 257: .*; got byte of 300"),
    ("train", "--grow-from", "tiny --grow-from runs/one --layers l",
     "must hold the source's in their order.*'nn', the grown ones 'llll'"),
    ("train", "--grow-from", "tiny --grow-from runs/one --layers b --data char.h5",
     "char.h5 must be tokenised as the model's text was"),
    ("train", "--grow-from", "--resume --grow-from char", "--resume keeps .*; --grow-from cannot"),
    ("grow", "RUN|CHECKPOINT", "none --to mini", "no checkpoint at none: no such file"),
    ("grow", "RUN|CHECKPOINT", "runs/one", "say what to grow: --to PRESET, or --width"),
    ("grow", "RUN|CHECKPOINT", "runs/one --width 32", "nothing to grow: .* has this shape already"),
    ("grow", "RUN|CHECKPOINT", "text.h5 --to mini", "text.h5 is not an HDF5 file"),
    ("grow", "RUN|CHECKPOINT", "older.h5 --to mini", "earlier mmrec .schema 1"),
    ("grow", "--to", "runs/one --to minni", "unknown preset 'minni'.*did you mean 'mini'"),
    ("grow", "--width", "runs/one --width 16", "never shrinks: the width must be .* 32; got 16"),
    ("grow", "--width", "runs/one --width 33", "heads must divide the width 33; got 2"),
    ("grow", "--depth", "runs/one --depth 1", "the depth must be at least the source's 2; got 1"),
    ("grow", "--depth", f"runs/one --depth {BIG}", "depth must be a whole number from 1 to"),
    ("grow", "--heads", "runs/one --heads 4", "the width of a head must be .* 16; got 8"),
    ("grow", "--ngrams", "runs/one --ngrams -1", "ngrams must be >= 0; got -1"),
    ("grow", "--ffn", "runs/one --ffn 0.5", "the feed-forward width must be .*; got 16"),
    ("grow", "--layers", "runs/one --layers l", "must hold the source's in their order"),
    ("grow", "--vocab", "runs/one --vocab 300", "only a bpe vocabulary can grow; .* is 'byte'"),
    ("grow", "--vocab", "bpe --vocab 300", "must hold more than the 300 tokens .*; got 300"),
    ("grow", "--data", "bpe --vocab 400 --data none.txt", "no data at none.txt"),
    ("grow", "--data", "runs/one --width 64 --data world.txt", "--vocab takes .*; give both"),
    ("grow", "--how", "runs/one --width 64 --how wish",
     "how must be one of preserve, stack, random; got 'wish'"),
    ("grow", "--seed", "runs/one --width 64 --seed -1", "'--seed': .*; got '-1'"),
    ("grow", "--out", "runs/one --width 64 --out runs", "--out must be a file .*; runs is a"),
    ("grow", "--out", "runs/one --width 64 --out world.txt", "world.txt is there already"),
    ("finetune", "RUN|CHECKPOINT", "none --data world.txt", "no checkpoint at none: no such file"),
    ("finetune", "RUN|CHECKPOINT", "older.h5 --data world.txt", "earlier mmrec .schema 1"),
    ("finetune", "--data", "runs/one", "Missing option '--data'"),
    ("finetune", "--data", "runs/one --data none.txt", "no data at none.txt"),
    ("finetune", "--data", "runs/one --data char.h5", "char.h5 must be tokenised as the model's"),
    ("finetune", "--old", "runs/one --data world.txt --old none.txt", "no data at none.txt"),
    *(("finetune", "--freeze", f"runs/one --data world.txt --freeze {word}", message)
      for word, message in (
          ("heads", "freeze must be words out of embeddings, memory, layers:0-2.*; got 'heads'"),
          ("layers:1-2", "freeze must name layers from 0 to 1, .*; got 'layers:1-2'"),
          ("embeddings,layers:0-1", "freeze must leave something to learn; got 'emb"))),
    *(("finetune", f"--{name}", f"runs/one --data world.txt --{name} {value}", message)
      for name, value, message in (
          ("layer-decay", "0", r"layer_decay must lie in \(0, 1\]; got 0"),
          ("replay", "1", r"replay must lie in \[0, 1\); got 1"),
          ("replay", "0.1 --old bad.txt", "bad.txt must be UTF-8"),
          ("epochs", "0", "epochs must be > 0 and at most"),
          ("steps", "0", "steps must be > 0 and at most"),
          ("minutes", "-1", "minutes must be > 0 and at most"),
          ("batch", "0", "batch must be a whole number from 1"),
          ("seq-len", "0", "seq_len must be a whole number from 1"),
          ("lr", "nan", "lr must be finite and > 0; got nan"),
          ("muon-lr", "0", "muon_lr must be finite and > 0; got 0"),
          ("warmup", "2", r"warmup must lie in \[0, 1\]; got 2"),
          ("dropout", "1", r"dropout must lie in \[0, 1\); got 1"),
          ("eval-every", "0", "eval_every must be a whole number from 1"),
          ("patience", "-1", "patience must be >= 0; got -1"),
          ("seed", "-1", "seed must lie in 0 to"),
          ("out", "runs/one", "runs/one already holds a run"))),
    ("info", "PRESET", "huge", "unknown preset 'huge'"),
    ("info", "PRESET", "", "Missing argument 'PRESET'"),
    ("data prepare", "[source]", "none/", "no data at none/"),
    ("data prepare", "--tokenizer", "world.txt --tokenizer words",
     "tokenizer must be one of bpe, char, byte; got 'words'"),
    ("data prepare", "--vocab", "world.txt --vocab 3",
     "vocabulary must hold at least 257 tokens, .*; got 3"),
    ("data prepare", "--out", "world.txt --out .", "--out must be a file to write; . is a folder"),
    ("data inspect", "[source]", "text.h5", "text.h5 is not an HDF5 file"),
    ("data inspect", "--tokenizer", "world.txt --tokenizer words",
     "tokenizer must be one of bpe, char, byte; got 'words'"),
    ("data inspect", "--vocab", "world.txt --vocab 3",
     "vocabulary must hold at least 257 tokens, .*; got 3"),
    *((name, option, f"{before}{source} {option} {value}", message)
      for name, before in (("data prepare", ""), ("data inspect", ""),
                           ("finetune", "runs/one --data ")) for source, option, value, message in (
          ("records.jsonl", "--text-field", "body", "its fields are: text, url"),
          ("world.txt", "--max-bytes", "-1", "max_bytes must lie in 0 to .*; got -1"),
          ("world.txt", "--val-share", "0.6", r"val_share must lie in \(0, 0.5\]; got 0.6"),
          ("world.txt", "--val-file", "bad.txt", "bad.txt must be UTF-8 text"))),
    *((f"bench {name}", option, arguments, message) for name in ("scan", "recurrence", "memory")
      for option, arguments, message in (
          ("--shape", "--shape 4x5", "--shape must be . sizes joined by 'x', .*; got '4x5'"),
          ("--shape", "--shape 4x0x5x6", "--shape must be . sizes .*; got '4x0x5x6'"),
          ("--repeats", "--repeats 2", "'--repeats': .*3; got '2'"))),
    ("bench scan", "--shape", "--shape 999999999x9999999x99", "not enough memory: smaller sizes"),
    ("bench train", "PRESET", "tinny", "unknown preset 'tinny'.*did you mean 'tiny'"),
    ("bench train", "--vocab", "tiny --vocab 1", "'--vocab': .*2; got '1'"),
    ("bench train", "--batch", "tiny --batch 0", "'--batch': .*1; got '0'"),
    ("bench train", "--batch", "tiny --batch 999999999 --seq-len 1000",
     "not enough memory: smaller sizes"),
    ("bench train", "--seq-len", "tiny --seq-len 0", "'--seq-len': .*1; got '0'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "at_fault", "arguments", "message"), MISTAKES,
    ids=[f"{m[0]} {m[2]}"[:60] for m in MISTAKES],
)  # fmt: skip
def test_a_mistake_is_one_line_and_code_2(
    world: Path,
    command: str,
    at_fault: str,
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    monkeypatch.chdir(world)
    before = sorted(p for p in world.rglob("*") if "cache" not in p.parts)
    assert call(monkeypatch, f"{command} {arguments}") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert re.search(message, errors), errors
    assert sorted(p for p in world.rglob("*") if "cache" not in p.parts) == before


def test_the_table_of_mistakes_is_complete() -> None:
    """Every argument, and every option that takes a value, of every command."""
    import typer

    def walk(command: Any, path: str) -> Iterator[tuple[str, str]]:
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{path} {name}".strip())
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                yield path, parameter.metavar or f"[{parameter.name}]"
            elif not parameter.is_flag:
                yield path, parameter.opts[0]

    wanted = set(walk(typer.main.get_command(main.app), ""))
    assert len(wanted) > 45
    assert wanted - {(m[0], m[1]) for m in MISTAKES} == set()


def test_a_run_is_not_overwritten(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    before = Path("runs/one/last.h5").read_bytes()
    assert call(monkeypatch, "train --config small.toml --data world.txt --out runs/one") == 2
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


def test_characters_get_longer_runs_from_text_and_from_a_corpus_file(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    for data in ("world.txt --tokenizer char", "other.h5"):
        wish = f"train tiny --data {data} --steps 1 --batch 1 --seq-len 8 --out runs/chars --force"
        assert call(monkeypatch, wish) == 0
        made = tomllib.loads(Path("runs/chars/config.toml").read_text())["model"]
        assert (made["runs"], made["ngrams"]) == (4, 8192)
    shutil.rmtree("runs/chars")


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
    assert call(monkeypatch, "info tiny") == 0
    assert "feed-forward" in capsys.readouterr().out
    assert call(monkeypatch, f"data inspect {text_file} --tokenizer byte --json") == 0
    assert json.loads(capsys.readouterr().out)["train"]["documents"] == 1
    assert call(monkeypatch, f"data inspect {text_file} --tokenizer char") == 0
    assert "bytes/token" in capsys.readouterr().out
    assert call(monkeypatch, f"data prepare {text_file} --tokenizer byte --out made.h5") == 0
    assert Path("made.h5").exists()
    capsys.readouterr()
    assert call(monkeypatch, "eval --data made.h5 --json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["bits_per_byte"] == scores["bits_per_byte"]
    assert again["data"] == "validation split of made.h5"
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
    assert curve["checks"] == [
        [x["step"], x["bits_per_byte"]] for x in logged if x["kind"] == "val"
    ]
    assert curve["ended"] == "done"
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


def program(world: Path, arguments: str) -> str:
    """Standard output of a real process, which must end well and complain of nothing."""
    command = [sys.executable, "-W", "error", "-m", "mmrec", *arguments.split()]
    environment = os.environ | {"MMREC_CACHE": str(world / "cache")}
    run = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True,
                         check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def scores(world: Path, where: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(program(world, f"eval {where} --json"))
    return made


def test_grow_then_train_on(world: Path, tmp_path: Path) -> None:
    """Grown, a run scores the same on real text; training goes on with its tokenizer and moments;
    a resume and an evaluation find them again."""
    shutil.copytree(world / "runs/one", tmp_path / "one")
    for name in ("small.toml", "world.txt"):
        shutil.copy(world / name, tmp_path)
    out = program(tmp_path, "grow one/last.h5 --width 64 --depth 3 --out grown.h5")
    assert "to   width 64, 3 layers (nnn), 2 heads, vocabulary 257, " in out
    before = scores(tmp_path, "one/last.h5")
    after = json.loads(program(tmp_path, "eval grown.h5 --data world.txt --json"))
    again = json.loads(program(tmp_path, "eval one/last.h5 --data world.txt --json"))
    assert after["loss"] == pytest.approx(again["loss"], abs=1e-4)

    options = "--batch 2 --seq-len 32 --eval-every 4 --data world.txt"
    out = program(tmp_path, f"train --grow-from grown.h5 {options} --steps 12 --out more")
    assert "start   grown.h5, step 6, with its moments" in out
    assert (tmp_path / "more/step-0.h5").exists()
    assert scores(tmp_path, "more")["loss"] < before["loss"]

    whole = program(tmp_path, f"train --grow-from grown.h5 {options} --steps 6 --out cut")
    assert "with its moments" in whole
    out = program(tmp_path, "train --resume --out cut --steps 12")
    assert "resume  cut/last.h5, step 6" in out
    assert scores(tmp_path, "cut")["loss"] < before["loss"]


def test_a_bpe_run_grows_with_its_own_tokenizer(world: Path, tmp_path: Path) -> None:
    """Another text under the tokenizer of the first, which training anew would not give."""
    shutil.copy(world / "world.txt", tmp_path)
    (tmp_path / "other.txt").write_text(Path(__file__).read_text() * 2)
    (tmp_path / "s.toml").write_text(
        'preset = "tiny"\n[model]\nwidth = 32\ndepth = 2\nheads = 2\n'
        "[train]\nbatch = 2\nseq_len = 32\neval_every = 3\nsteps = 4\n"
    )
    program(tmp_path, "train --config s.toml --data world.txt --vocab 400 --out a")
    out = program(tmp_path, "train --config s.toml --data other.txt --grow-from a --out b")
    assert "start   a/best.h5, step" in out
    assert "training the bpe" not in out
    with h5py.File(tmp_path / "a/last.h5") as a, h5py.File(tmp_path / "b/last.h5") as b:
        assert a["tokenizer"][()].tobytes() == b["tokenizer"][()].tobytes()
    program(tmp_path, "train --resume --out b --steps 6")
    assert scores(tmp_path, "b")["step"] > 0
    for name in ("step-0.h5", "last.h5", "best.h5"):
        (tmp_path / "b" / name).unlink()
    command = [sys.executable, "-m", "mmrec", "train", "--resume", "--out", "b"]
    lost = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert lost.returncode == 2
    assert lost.stderr.count("\n") == 1
    assert "b holds no whole checkpoint, so its tokenizer is lost" in lost.stderr


def test_finetune_on_another_text(world: Path, tmp_path: Path) -> None:
    """The new text gets better, the report says so of both texts, and what is frozen stays."""
    shutil.copytree(world / "runs/one", tmp_path / "one")
    (tmp_path / "new.txt").write_text(Path(__file__).read_text())
    out = program(tmp_path, "finetune one --data new.txt --freeze embeddings,layers:0 --steps 12 "
                  "--eval-every 4 --replay 0.3 --lr 5e-3 --muon-lr 1e-2 --out two")  # fmt: skip
    made = json.loads((tmp_path / "two/summary.json").read_text())["bits_per_byte"]
    assert made["new"]["after"] < made["new"]["before"]
    assert set(made) == {"new", "old"}
    assert f"new text new.txt: {made['new']['before']:.4f} bits per byte before, " in out
    scored = json.loads(program(tmp_path, "eval two --json"))
    assert scored["bits_per_byte"] == pytest.approx(made["new"]["after"], abs=1e-6)
    with h5py.File(tmp_path / "one/best.h5") as a, h5py.File(tmp_path / "two/last.h5") as b:
        same = {}
        for name in ("embedding", "ngrams", "layers.0.ffn_in.weight", "layers.1.ffn_in.weight"):
            same[name] = bool((a[f"model/{name}"][()] == b[f"model/{name}"][()]).all())
    assert list(same.values()) == [True, True, True, False]
    out = program(tmp_path, "train --resume --out two --steps 14")
    assert "resume  two/last.h5, step 12" in out
    Path(tmp_path / "one/config.toml").unlink()
    out = program(tmp_path, "finetune one --data new.txt --steps 1 --out three")
    assert "note: what is forgotten of the old text is not measured" in out


def test_a_vocabulary_grows(world: Path, tmp_path: Path) -> None:
    """Fewer, longer tokens of the same text, a model that knows of them, and training goes on."""
    from mmrec.checkpoint import load_model

    shutil.copytree(world / "bpe", tmp_path / "bpe")
    shutil.copy(world / "world.txt", tmp_path)
    out = program(tmp_path, "grow bpe/last.h5 --vocab 500 --width 64 --out more.h5")
    assert "to   width 64, 2 layers (nn), 2 heads, vocabulary 500, " in out
    text = (world / "world.txt").read_text()
    old, new = load_model(tmp_path / "bpe/last.h5"), load_model(tmp_path / "more.h5")
    ids = new.tokenizer.encode(text)
    assert len(ids) < 0.95 * len(old.tokenizer.encode(text))
    assert new.tokenizer.decode(ids) == text
    out = program(tmp_path, "train --grow-from more.h5 --data world.txt --batch 2 --seq-len 32 "
                  "--steps 4 --out on")  # fmt: skip
    assert "with its moments" in out
