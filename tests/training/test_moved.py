"""A run goes on with its text wherever that is: content decides, names do not."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

import mmrec
from mmrec.checkpoint.checkpoint import load_model
from mmrec.config import TrainConfig
from mmrec.data.prepare import prepare
from mmrec.data.readers import ReadOptions
from mmrec.data.sources import absolute_source
from mmrec.errors import InputError
from mmrec.evaluation.provenance import training_corpus
from mmrec.training.trainer import check_same_text

SETTINGS: dict[str, Any] = {
    "tokenizer": "byte",
    "batch_size": 2,
    "seq_len": 32,
    "eval_every": 1,
    "eval_tokens": 500,
    "sample_tokens": 4,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "ngram_buckets": 64,
    "layer_types": "n",
    "precision": "float32",
    "schedule": "constant",
    "warmup": 0.0,
    "progress": False,
}


@pytest.fixture
def text(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Some text. The current folder is empty."""
    monkeypatch.chdir(tmp_path)
    return text_file.read_text()[:12_000]


def resume(run: str, steps: int, **settings: Any) -> mmrec.Run:
    """Resume a run for more steps."""
    return mmrec.train(resume=run, steps=steps, progress=False, **settings)


def source_of(run: str, name: str = "source") -> str:
    """A setting of the text in the run's config.toml."""
    return str(tomllib.loads(Path(run, "config.toml").read_text())["data"][name])


def test_a_run_goes_on_with_its_text_elsewhere(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("book.txt").write_text(text)
    Path("other.txt").write_text(text[::-1])
    whole = mmrec.train("book.txt", out="whole", steps=5, **SETTINGS)
    mmrec.train("book.txt", out="run", steps=2, **SETTINGS)
    assert source_of("run") == str(tmp_path / "book.txt")
    monkeypatch.chdir("/")  # a path that was relative is still that of the text
    resume(str(tmp_path / "run"), 3)
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("book.txt").rename("data/moved.txt")
    Path("run").rename("moved")
    with pytest.raises(InputError, match="book.txt.*; if the text was moved, say where it is"):
        resume("moved", 4)
    with pytest.raises(InputError, match="book.txt.* --resume moved --data NEW"):
        training_corpus(load_model(Path("moved/best.h5")))
    with pytest.raises(InputError, match="text of .*other.txt is another one.* the same text only"):
        resume("moved", 4, data="other.txt")
    assert source_of("moved") == str(tmp_path / "book.txt")
    resume("moved", 4, data="data/moved.txt")
    assert source_of("moved") == str(tmp_path / "data/moved.txt")
    assert training_corpus(load_model(Path("moved/last.h5"))).val.n_bytes == 1200
    last = resume("moved", 5, data=[text])  # the documents themselves
    assert last.last.parent == Path("moved")
    for kind in ("train", "val"):
        lines = [[x for x in run.metrics if x["kind"] == kind] for run in (last, whole)]
        assert lines[0] == lines[1]
    assert resume("moved", 6).summary["steps"] == 6  # their corpus was kept


def test_a_corpus_goes_on_for_its_text_and_no_other_split(text: str) -> None:
    Path("book.txt").write_text(text)
    prepare("book.txt", "byte", out=Path("a.h5"))
    prepare("book.txt", "byte", out=Path("b.h5"), options=ReadOptions(val_fraction=0.2))
    prepare("book.txt", "char", out=Path("c.h5"))
    mmrec.train("book.txt", out="run", steps=1, **SETTINGS)
    resume("run", 2, data="a.h5")
    Path("a.h5").rename("d.h5")
    with pytest.raises(InputError, match="no corpus at .*a.h5.*say where it is with --data"):
        resume("run", 3)
    resume("run", 3, data="d.h5")
    with pytest.raises(InputError, match="split of .*b.h5 is another one"):
        resume("run", 4, data="b.h5")
    with pytest.raises(InputError, match="tokenizer of .*c.h5 is another one"):
        resume("run", 4, data="c.h5")


def test_mixtures_and_validation_texts_move(text: str, tmp_path: Path) -> None:
    Path("m").mkdir()
    for name, part in (("x", text[:5000]), ("y", text[5000:9000]), ("v", text[9000:])):
        Path("m", f"{name}.txt").write_text(part)
    data, val_file = "3:m/x.txt,1:m/y.txt", "m/v.txt"
    mmrec.train(data, out="run", steps=1, val_file=val_file, **SETTINGS)
    assert source_of("run") == f"3:{tmp_path}/m/x.txt,1:{tmp_path}/m/y.txt"
    assert source_of("run", "val_file") == str(tmp_path / val_file)
    Path("m").rename("n")
    data, val_file = data.replace("m/", "n/"), "n/v.txt"
    with pytest.raises(InputError, match="no data at .*m/v.txt"):
        resume("run", 2, data=data)
    resume("run", 2, data=data, val_file=val_file)
    with pytest.raises(InputError, match="mixture of .* is another one"):
        resume("run", 3, data=data.replace("3:", "2:"))
    with pytest.raises(InputError, match="replay-data has no effect"):
        resume("run", 3, replay_data="n/x.txt")


def test_an_absolute_source_means_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a[1], b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("sub").mkdir()
    Path("x.txt").touch()
    (tmp_path / "link.txt").symlink_to(folder / "x.txt")
    for source, absolute in (
        ("stdlib", "stdlib"),
        ("-", "-"),
        ("", ""),
        ("hf:allenai/c4:en", "hf:allenai/c4:en"),
        ("hf:sub:train", f"hf:{folder}/sub:train"),
        ("x.txt", f"{folder}/x.txt"),
        ("sub/../x.txt", f"{folder}/x.txt"),
        ("../link.txt", f"{tmp_path}/link.txt"),
        ("*.txt", f"{tmp_path}/a[[]1], b/*.txt"),
        ("1:x.txt, 1:sub", f"1:{folder}/x.txt,1:{folder}/sub"),
    ):
        assert absolute_source(source) == absolute
    (tmp_path / "a,1:b").mkdir()
    monkeypatch.chdir(tmp_path / "a,1:b")  # its name holds what separates components
    assert absolute_source("1:x.txt,1:sub") == "1:x.txt,1:sub"


def test_a_partial_config_takes_what_the_checkpoint_says(text: str) -> None:
    Path("book.txt").write_text(text)
    mmrec.train("book.txt", out="run", steps=1, lr=0.003, **SETTINGS)
    config = Path("run/config.toml")
    whole = config.read_text()
    config.write_text('preset = "tiny"\n')
    resume("run", 2)
    assert config.read_text() == whole.replace("\nsteps = 1\n", "\nsteps = 2\n")
    config.write_text("[model]\nwidth = 32\n")
    with pytest.raises(InputError, match="shape of the run's checkpoints, width 16; it has 32"):
        resume("run", 3)
    Path("exp").mkdir()
    Path("exp/config.toml").write_text('preset = "tiny"\n')
    with pytest.raises(InputError, match="no run wrote its config.toml; begin one with it"):
        resume("exp", 3)
    Path("exp/config.toml").write_text(whole)
    with pytest.raises(InputError, match="no checkpoint yet that --data could be compared"):
        resume("exp", 3, data="book.txt")
    Path("exp/config.toml").write_text(whole.replace("width = 16\n", ""))
    with pytest.raises(InputError, match="must hold every setting .* it lacks width: start"):
        resume("exp", 3)


def test_weights_that_diverged_are_not_called_good(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step with a huge rate the weights are finite, but of no use."""
    from tests.cli.test_cli import call

    Path("book.txt").write_text(text)
    options = " ".join(
        f"--{k.replace('_', '-')} {v}"
        for k, v in (SETTINGS | {"eval_every": 9}).items()
        if k != "progress"
    )
    command = f"train tiny --data book.txt {options} --steps 4 --lr 1e30 --matrix-lr 1e30"
    for more, names, words in (
        ("", set(), "there is no good checkpoint; start again with a lower --lr and --matrix-lr\n"),
        ("--save-every 1", {"step-1.h5"}, "there is no good checkpoint; start again"),
        ("--on-nan rollback", {"step-0.h5"}, "the last good checkpoint is run/step-0.h5; start"),
    ):
        assert call(monkeypatch, f"{command} --out run --force {more}") == 1
        errors = capsys.readouterr().err
        assert "and on the first text too: the weights have diverged; " in errors
        assert words in errors
        assert {p.name for p in Path("run").glob("*.h5")} == names


def test_a_run_of_a_version_that_knew_texts_by_name_says_so() -> None:
    now = {"fingerprint": "b", "mixture": [], "split": [9, 1], "tokenizer": "t"}
    with pytest.raises(InputError, match=r"run/last.h5 was saved by mmrec 0.2 or earlier"):
        check_same_text({"fingerprint": "a"}, now, TrainConfig(), Path("run/last.h5"))
    check_same_text(now, now, TrainConfig(), Path("run/last.h5"))
