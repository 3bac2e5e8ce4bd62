"""Pretrained models: found by name, checked, used by every command, begun from by ``auto``."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmrec
import mmrec.pretrained
from mmrec.checkpoint.checkpoint import load_model, read_progress, save_compact
from mmrec.checkpoint.weights import is_compact
from mmrec.config import LENGTHS, PRETRAINED_SETTINGS
from mmrec.data import sources
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import TextSize
from mmrec.data.readers import Document
from mmrec.errors import InputError
from mmrec.inference.decoder import Decoder
from mmrec.pretrained import PretrainedModel, find_pretrained, pretrained_models
from mmrec.training import auto, finetuning, pretrained
from mmrec.training.finetuning import begin_finetuning
from mmrec.training.setup import resume_run
from tests.conftest import make_trainer

Installed = dict[str, PretrainedModel]
Command = Callable[..., tuple[str, str]]
SMALL_RUN: dict[str, Any] = {
    "batch_size": 2,
    "seq_len": 32,
    "eval_tokens": 300,
    "sample_tokens": 0,
    "precision": "float32",
}


@pytest.fixture(scope="session")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of bytes, trained for a moment on real text."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    make_trainer(corpus, folder, steps=60, draw_curve=False).fit()
    return folder / "best.h5"


@pytest.fixture
def installed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """An installation with one pretrained model, named code."""
    folder = tmp_path / "installed"
    folder.mkdir()
    loaded = load_model(trained)
    save_compact(folder / "code.h5", loaded, {"preset": "tiny", "train": loaded.metadata["train"]})
    digest = hashlib.sha256((folder / "code.h5").read_bytes()).hexdigest()
    (folder / "code.md").write_text("# code\n\nA model card.\n")
    (folder / "index.toml").write_text(
        f'[code]\nsummary = "Python"\nparameters = 1\ntokenizer = "byte"\nvocab_size = 257\n'
        f'preset = "tiny"\nsha256 = "{digest}"\nlicence = "MIT"\n'
    )
    monkeypatch.setattr(mmrec.pretrained, "FOLDER", folder)
    monkeypatch.setattr(mmrec.pretrained, "_folders_of_packages", tuple)
    monkeypatch.setattr(pretrained, "WRITING_TEXTS", 12)
    monkeypatch.setattr(pretrained, "WRITING_TOKENS", 200)
    return pretrained_models()


def test_a_compact_checkpoint_holds_the_weights_in_a_quarter_of_the_bytes(
    trained: Path, installed: Installed
) -> None:
    path = installed["code"].path
    before, after = load_model(trained), load_model(path)
    compact = 0
    for name, p in before.model.named_parameters():
        values, found = p.detach().numpy(), after.model.get_parameter(name).detach().numpy()
        if is_compact(values.shape):
            compact += values.size
            half_a_step = np.abs(values).max(1, keepdims=True) / 127 / 2
            assert (np.abs(found - values) <= half_a_step * 1.0001).all()
        else:
            np.testing.assert_array_equal(found, values)
    assert compact > 0.9 * sum(p.numel() for p in before.model.parameters())
    with pytest.raises(InputError, match="a model but no training state"):
        read_progress(path)
    # without torch the same weights are read
    decoder, other = Decoder.load(path), Decoder.from_model(after.model, after.tokenizer)
    assert decoder.fingerprint == other.fingerprint
    text = decoder.tokenizer.encode("import json")
    scores = [d.score(d.initial_state(), text).logprobs for d in (decoder, other)]
    np.testing.assert_array_equal(*scores)


def test_a_file_or_folder_goes_before_a_name(
    installed: Installed, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mmrec.load("code").path == installed["code"].path
    Path("code").mkdir()
    shutil.copy(trained, "code/best.h5")
    assert find_pretrained("code") is None
    assert mmrec.load("code").path == Path("code/best.h5")


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        ("eval cod --data book.txt", "no checkpoint at cod: no such .*; did you mean 'code'"),
        ("eval code", "pretrained model code comes without its text: give --data, a text"),
        ("chat zzz", "no checkpoint at zzz: .* no pretrained model of this name: there are code"),
        ("generate", "no trained model under runs/: .* a pretrained one: mmrec generate code"),
        ("code", "No such command 'code'.*; to use this pretrained model: mmrec generate code"),
        ("train code", "PRESET must be one of .*; to fine-tune it: mmrec finetune code --data"),
        ("models cod", "no pretrained model is named 'cod'; did you mean 'code'"),
        (
            "models english-mini",
            "package mmrec-models, which is not installed; in a clone",
        ),
        ("generate english-mini", "no checkpoint at english-mini: .* in the package mmrec-models"),
        ("eval english-minj", "no checkpoint at english-minj: .*; did you mean 'english-mini'"),
        ("train tiny --initialize-from code --tokenizer char", "keeps the tokenizer of its source"),
    ],
)
def test_a_wrong_name_is_one_line(
    installed: Installed, run_command: Command, tmp_path: Path, words: str, pattern: str
) -> None:
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 99)
    _, errors = run_command(tmp_path, *words.split(), code=2)
    assert re.search(pattern, errors.splitlines()[-1]), errors
    assert "Traceback" not in errors


def test_a_file_with_another_hash_is_refused(
    installed: Installed, trained: Path, run_command: Command, tmp_path: Path
) -> None:
    """Also one that is an intact checkpoint."""
    path = installed["code"].path
    shutil.copy(trained, path)
    _, errors = run_command(tmp_path, "generate", "code", "--prompt", "def", code=2)
    assert f"SHA-256 of {path} must be" in errors
    path.unlink()
    _, errors = run_command(tmp_path, "generate", "code", "--prompt", "def", code=2)
    assert "is missing from this installation" in errors


MODELS_PACKAGE = Path(__file__).parents[2] / "benchmarks" / "bases" / "mmrec-models"
folders_of_packages = mmrec.pretrained._folders_of_packages.__wrapped__


def test_a_package_brings_models(
    installed: Installed, run_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmrec-models, built and installed by pip, with a small model in place of its own."""
    source, site = tmp_path / "source", tmp_path / "site"
    module = source / "mmrec_models"
    module.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "mmrec_models/__init__.py"):
        shutil.copy(MODELS_PACKAGE / name, source / name)
    for path in installed["code"].path.parent.iterdir():
        shutil.copy(path, module / path.name.replace("code", "english-mini"))
    index = (module / "index.toml").read_text()
    (module / "index.toml").write_text(index.replace("[code]", "[english-mini]") + index)
    install = ["install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", *install, str(source)], check=True)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(mmrec.pretrained, "_folders_of_packages", folders_of_packages)

    found = pretrained_models()
    assert list(found) == ["code", "english-mini"]
    assert found["english-mini"].path == site / "mmrec_models" / "english-mini.h5"
    assert found["code"] == installed["code"]  # of two with one name the first
    out, _ = run_command(tmp_path, "models")
    assert out.count("\nenglish-mini ") == 1
    assert "not installed" not in out
    out, _ = run_command(tmp_path, "models", "english-mini")
    assert out == "# code\n\nA model card.\n"
    options = ("--prompt", "def", "--max-tokens", "9", "--seed", "1")
    out, _ = run_command(tmp_path, "generate", "english-mini", *options)
    assert out == run_command(tmp_path, "generate", "code", *options)[0]


def test_the_list_and_the_card(installed: Installed, run_command: Command, tmp_path: Path) -> None:
    out, _ = run_command(tmp_path, "models")
    assert "not installed: english-mini (package mmrec-models)" in out.splitlines()
    [line] = [line for line in out.splitlines() if line.startswith("code ")]
    assert line.split()[1:] == ["tiny", "0.00", "M", "byte", *line.split()[5:7], "Python"]
    out, _ = run_command(tmp_path, "models", "code")
    assert out == "# code\n\nA model card.\n"
    out, _ = run_command(tmp_path, "models", "--json")
    [facts] = json.loads(out)
    assert (facts["name"], facts["licence"]) == ("code", "MIT")
    out, _ = run_command(tmp_path, "models", "code", "--json")
    assert json.loads(out) == facts


def test_fine_tuning_measures_and_replays_what_the_model_writes(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("It costs $5 or €7 in 漢, and eight pounds in all.\n" * 80)
    lines: list[str] = []
    given = {"data": "book.txt", "out": "run", "steps": 30, "replay_fraction": 0.25} | SMALL_RUN
    run = begin_finetuning("code", dict(given), echo=lines.append, draw_curve=False)
    assert any("12 texts that it writes itself stand for it" in line for line in lines)
    assert run.names == {"new": "book.txt", "earlier": "that code writes itself"}
    texts = Path(run.corpora["earlier"].info["source"])
    assert len(texts.read_text().splitlines()) == 12
    with run.lock:
        summary = run.trainer.fit(lock=run.lock)
    scores = run.score_best()
    assert summary["ended"] == "done"
    assert scores["new"]["after"] < scores["new"]["before"]
    config = tomllib.loads(Path("run/config.toml").read_text())
    assert config["finetune"]["initialize_from"] == str(installed["code"].path)
    written = texts.stat().st_mtime_ns
    lines.clear()
    again = begin_finetuning("code", given | {"out": "again"}, echo=lines.append)
    again.lock.release()
    assert texts.stat().st_mtime_ns == written  # they are written once
    lock, trainer = resume_run({"out": "run", "steps": 31}, draw_curve=False)
    with lock:
        assert trainer.fit(resume=True, lock=lock)["ended"] == "done"


def test_fine_tuning_takes_the_precision_of_this_machine(installed: Installed) -> None:
    loaded = load_model(installed["code"].path)
    assert loaded.metadata["train"]["optimizer"]["precision"] == "float32"
    settings, _ = finetuning._resolve(loaded, {"data": "book.txt"}, print)
    assert settings["precision"] == "auto"
    assert settings["lr"] == PRETRAINED_SETTINGS["lr"]


def _candidate(installed: Installed, bits: float) -> pretrained.Candidate:
    return pretrained.Candidate(installed["code"], bits)


def test_auto_begins_from_the_model_that_explains_the_text(
    installed: Installed, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(text_file.read_text()[:30_000])
    given = {"steps": 3, "seq_len": 64, "batch_size": 4, "eval_tokens": 300}
    run = mmrec.train("book.txt", preset="auto", out="run", progress=False, **given)
    config = tomllib.loads(Path("run/config.toml").read_text())
    assert config["finetune"]["initialize_from"] == str(installed["code"].path)
    assert config["optimizer"]["lr"] == PRETRAINED_SETTINGS["lr"]
    assert config["data"]["tokenizer"] == "byte"
    assert run.summary["steps"] == 3


@pytest.mark.parametrize(
    "given",
    [{"from_scratch": True}, {"vocab": 300}, {"tokenizer": "char"}, {"width": 16}, {"depth": 1}],
    ids=str,
)
def test_auto_begins_anew_where_the_model_would_not_fit(
    installed: Installed,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(text_file.read_text()[:30_000])
    from mmrec.training.setup import plan_run

    sizes = {"data": "book.txt", "steps": 3, "seq_len": 16, "batch_size": 2}
    plan = plan_run("auto", None, sizes | given)
    assert plan.source is None
    assert plan.preset == "tiny"
    if "from_scratch" in given:
        with pytest.raises(InputError, match="--from-scratch has no effect without auto"):
            plan_run("tiny", None, sizes | given)


def test_auto_begins_anew_where_the_model_does_not_know_the_text(installed: Installed) -> None:
    for size, bits, is_chosen in (
        (90_000, auto.MAX_BITS_PER_BYTE - 0.1, True),
        (90_000, auto.MAX_BITS_PER_BYTE + 0.1, False),
        (auto.MIN_NEW_CHARACTERS - 1, 7.9, True),  # of so little text a new model learns less
    ):
        text = TextSize("book.txt", size, size, 10_000, 10_000)
        choice = auto.choose(
            text, {}, cores=2, has_bfloat16=False, candidate=_candidate(installed, bits)
        )
        assert (choice.settings.get("initialize_from") == "code") is is_chosen
        assert choice.note.startswith("auto    from the pretrained model code (") is is_chosen
        assert "\n" not in choice.note


@pytest.mark.parametrize(
    ("size", "given", "length"),
    [
        (90_000, {"minutes": 3.0}, {"epochs": 3.0}),  # the time would be enough for many passes
        (90_000, {"until": "2099-01-01 07:00"}, {"epochs": 3.0}),
        (90_000, {}, {"epochs": 3.0}),
        (1_000_000, {"minutes": 3.0}, {"minutes": 3.0}),
        (90_000, {"epochs": 9.0}, {"epochs": 9.0}),
        (90_000, {"steps": 900}, {"steps": 900}),
        (50_000_000, {"epochs": 3.0}, None),  # more tokens than a new model needs
    ],
    ids=str,
)
def test_auto_reads_a_small_text_three_times(
    installed: Installed, size: int, given: dict[str, Any], length: dict[str, Any] | None
) -> None:
    text = TextSize("book.txt", size, size, size // 9, size // 9)
    choice = auto.choose(
        text, given, cores=2, has_bfloat16=False, candidate=_candidate(installed, 2.0)
    )
    is_pretrained = "initialize_from" in choice.settings
    assert is_pretrained is (length is not None)
    if length is not None:
        found = {n: choice.settings[n] for n in LENGTHS if n in choice.settings}
        assert found == length
        assert ("as more passes were not better" in choice.note) is (given.keys() != length.keys())


def test_a_corpus_that_a_model_has_read_does_not_measure_it(
    installed: Installed,
    run_command: Command,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a small standard library
    pieces = [Document(f"{i}.py", text_file.read_text()[i * 9000 :][:9000]) for i in range(9)]
    monkeypatch.setattr(sources, "stdlib_documents", lambda: iter(pieces))
    index = installed["code"].path.with_name("index.toml")
    sample = pretrained.sample_text([text_file.read_text()])
    assert len(pretrained.score_candidates(sample, ["byte"], "stdlib")) == 1
    index.write_text(index.read_text() + 'read_corpora = ["stdlib"]\n')
    assert pretrained.score_candidates(sample, ["byte"], "stdlib") == []
    assert len(pretrained.score_candidates(sample, ["byte"], str(text_file))) == 1
    note = "code has read stdlib, so scores on it say nothing about new text"
    _, errors = run_command(tmp_path, "eval", "code", "--data", "stdlib")
    assert note in errors
    _, errors = run_command(tmp_path, "eval", "code", "--data", str(text_file))
    assert note not in errors
    sizes = ("--steps", "1", "--seq-len", "32", "--batch-size", "2", "--eval-tokens", "300")
    words = ("--data", "stdlib", "--out", "tuned")
    out, _ = run_command(tmp_path, "finetune", "code", *words, *sizes)
    assert note in out
    for given in (("--data", "stdlib"), ()):
        _, errors = run_command(tmp_path, "eval", "tuned", *given)
        assert "the model began from code, which has read stdlib, so scores on it say" in errors


def test_a_sample_is_spread_over_the_text() -> None:
    text = "".join(chr(0x4E00 + i // 1000) for i in range(400_000))
    sample = pretrained.sample_text([text[:100_000], text[100_000:]])
    assert len(sample) == pretrained.SAMPLE_PIECES
    assert [len(piece) for piece in sample] == [pretrained.SAMPLE_CHARS] * 8
    assert len({piece[0] for piece in sample}) == 8
    assert pretrained.sample_text(["short"]) == ["short"]
    assert pretrained.sample_text([]) == []


INSTALLED = pretrained_models()
for model in pretrained_models(MODELS_PACKAGE / "mmrec_models").values():
    if model.path.exists():  # the source distribution has no large files
        INSTALLED[model.name] = model


@pytest.mark.parametrize("name", INSTALLED)
def test_what_is_installed_is_what_the_index_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "pretrained_models", lambda: INSTALLED)
    model = INSTALLED[name]
    loaded = load_model(model.checked_path())
    assert model.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert (model.tokenizer, model.vocab_size) == (
        loaded.tokenizer.kind,
        loaded.tokenizer.vocab_size,
    )
    assert model.preset == loaded.metadata["preset"]
    assert model.path.stat().st_size <= (3_000_000 if model.preset == "tiny" else 12_000_000)
    assert model.card.startswith(f"# {name}\n")
    # it has learnt: text that is not its own, which none of its training text holds
    readme = (Path(__file__).parents[2] / "docs/concepts/packing.md").read_text()
    assert mmrec.generate(loaded, "It was", max_tokens=40, seed=1)
    split = pretrained.sample_text([readme])
    candidates = pretrained.score_candidates(split, [model.tokenizer], "packing.md")
    [mine] = [c for c in candidates if c.model == model]
    assert mine.bits_per_byte < 4.0
