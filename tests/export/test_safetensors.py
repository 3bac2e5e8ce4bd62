"""A model leaves as safetensors and comes back bit for bit, and damaged folders are refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmrec.checkpoint.checkpoint import LoadedModel, load_model
from mmrec.errors import DamagedError, InputError
from mmrec.export.safetensors import export_safetensors, import_folder
from tests.export.conftest import METADATA, Run

NAMES = ("bpe", "byte", "char", "lora", "plain")


def parameters(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in loaded.model.named_parameters()}


def assert_equal(ours: LoadedModel, theirs: LoadedModel) -> None:
    """Weights, configuration, tokenizer and facts of two models are the same, bit for bit."""
    assert ours.model.config == theirs.model.config
    assert ours.tokenizer.to_json() == theirs.tokenizer.to_json()
    expected, found = parameters(theirs), parameters(ours)
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert torch.equal(found[name].view(torch.int32), value.view(torch.int32)), name


@pytest.mark.parametrize("form", ["safetensors", "transformers"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_bit_for_bit(
    name: str, form: str, checkpoints: dict[str, LoadedModel], tmp_path: Path, run: Run
) -> None:
    before = checkpoints[name]
    assert run("export", before.path, tmp_path / "out", "--to", form) == 0
    assert run("import", tmp_path / "out", "--out", tmp_path / "back.h5") == 0
    after = load_model(tmp_path / "back.h5")
    assert_equal(after, before)
    assert (after.step, after.metadata) == (before.step, before.metadata) == (7, METADATA)
    assert after.generate("def", temperature=0, max_tokens=20) == (
        before.generate("def", temperature=0, max_tokens=20)
    )


def test_an_import_is_named_after_its_folder(
    checkpoints: dict[str, LoadedModel],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the commands that take a model take it."""
    monkeypatch.chdir(tmp_path)
    assert run("export", checkpoints["byte"].path, "shared", "--to", "safetensors") == 0
    assert run("import", "shared") == 0
    capsys.readouterr()
    words = ("--prompt", "def", "--temperature", 0, "--max-tokens", 9)
    assert run("generate", "shared.h5", *words) == 0
    text = checkpoints["byte"].generate("def", temperature=0, max_tokens=9)
    assert capsys.readouterr().out == f"def{text}\n"


def test_the_file_holds_float32_by_the_names_of_the_modelling_code(
    checkpoints: dict[str, LoadedModel], tmp_path: Path
) -> None:
    export_safetensors(checkpoints["bpe"], tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.float32}
    weights = parameters(checkpoints["bpe"])
    assert torch.equal(stored.pop("model.embed_tokens.weight"), weights.pop("embedding"))
    assert torch.equal(stored.pop("model.ngram_embedding.weight"), weights.pop("ngram_embedding"))
    assert stored.keys() == {f"model.{name}" for name in weights}


def test_no_code_of_the_folder_is_run(
    checkpoints: dict[str, LoadedModel], tmp_path: Path, run: Run
) -> None:
    assert run("export", checkpoints["byte"].path, tmp_path / "out", "--to", "transformers") == 0
    for path in (tmp_path / "out").glob("*.py"):
        path.write_text("raise SystemExit('the code was run')")
    assert_equal(import_folder(tmp_path / "out"), checkpoints["byte"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_another_program(
    dtype: torch.dtype, checkpoints: dict[str, LoadedModel], tmp_path: Path
) -> None:
    """Their numbers are exact in float32, and nothing is said of their training."""
    export_safetensors(checkpoints["char"], tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: x.to(dtype) for name, x in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    loaded = import_folder(tmp_path)
    expected = {name: p.to(dtype).float() for name, p in parameters(checkpoints["char"]).items()}
    for name, value in parameters(loaded).items():
        assert torch.equal(value, expected[name])
    assert loaded.step == 0
    train = {"data": {"source": "another program", "tokenizer": "char"}}
    assert loaded.metadata == {"train": train}


def change_weights(folder: Path, **changes: Tensor | None) -> None:
    """Put tensors in place of some, or leave them out; the header stays."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    weights = load_file(path) | {name.replace("__", "."): x for name, x in changes.items()}
    kept = {name: x for name, x in weights.items() if x is not None}
    save_file(kept, path, metadata=header)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_header(folder: Path, text: str) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "mmrec": text})


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def remove_setting(folder: Path) -> None:
    stored = json.loads((folder / "config.json").read_text())
    del stored["layer_pattern"]
    (folder / "config.json").write_text(json.dumps(stored))


DAMAGES: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "it holds no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "it holds no model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "it holds no tokenizer.json"),
    "config cut short": (lambda f: cut(f / "config.json", 40), "config.json is not JSON"),
    "config of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff"), "is not UTF-8"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "of type 'mmrec'; got None"),
    "config nested": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "config.json is not JSON",
    ),
    "another model": (
        lambda f: change_config(f, model_type="llama"),
        "config.json must describe a model of type 'mmrec'; got 'llama'",
    ),
    "a setting is missing": (remove_setting, "layer_pattern.*; layer_pattern is missing"),
    "a setting is wrong": (lambda f: change_config(f, width=0), "width must be .*; got 0"),
    "more layers": (lambda f: change_config(f, depth=10**9), "must hold 1,000,000,000 layers; it"),
    "another shape": (
        lambda f: change_config(f, ngram_buckets=51),
        r"model.ngram_embedding.weight in .* must have shape \(51, 24\); got \(50, 24\)",
    ),
    "tokens": (lambda f: change_config(f, vocab_size=300), "config.json says, 300; it has 257"),
    "tokenizer cut short": (lambda f: cut(f / "tokenizer.json", 99), "tokenizer.json cannot be u"),
    "weights cut short": (
        lambda f: cut(f / "model.safetensors", 20_000),
        "model.safetensors is damaged or truncated",
    ),
    "weights empty": (lambda f: cut(f / "model.safetensors", 0), "is damaged or truncated"),
    "weights are text": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs"),
        "is damaged or truncated",
    ),
    "a tensor is missing": (
        lambda f: change_weights(f, model__norm__weight=None),
        r"must hold model.norm.weight of shape \(24,\); it is missing",
    ),
    "a tensor too many": (
        lambda f: change_weights(f, lm_head__weight=torch.zeros(257, 24)),
        "holds lm_head.weight, which a model of this shape does not have",
    ),
    "a tensor of another shape": (
        lambda f: change_weights(f, model__norm__weight=torch.zeros(4, 6)),
        r"model.norm.weight in .* must have shape \(24,\); got \(4, 6\)",
    ),
    "a tensor of whole numbers": (
        lambda f: change_weights(f, model__norm__weight=torch.zeros(24, dtype=torch.int32)),
        "model.norm.weight in .* must be one of F32, BF16, F16; got I32",
    ),
    "facts are no JSON": (lambda f: change_header(f, "{"), "what it says of its training"),
    "facts are others": (
        lambda f: change_header(f, '{"step": -1, "metadata": {}}'),
        "step must be >= 0",
    ),
    "facts are wrong": (
        lambda f: change_header(f, '{"step": 1, "metadata": {"train": 3}}'),
        "what it says of its training",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line(
    name: str,
    checkpoints: dict[str, LoadedModel],
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    damage, message = DAMAGES[name]
    export_safetensors(checkpoints["byte"], tmp_path / "out")
    damage(tmp_path / "out")
    assert run("import", tmp_path / "out", "--out", tmp_path / "back.h5") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "back.h5").exists()


def test_every_length_of_a_file_cut_short_is_refused(
    checkpoints: dict[str, LoadedModel], tmp_path: Path
) -> None:
    export_safetensors(checkpoints["byte"], tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for size in [*range(0, 3000, 100), *range(3000, len(data), len(data) // 20), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(DamagedError):
            import_folder(tmp_path)


def test_a_folder_that_holds_something_is_left_alone(
    checkpoints: dict[str, LoadedModel], tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    words = ("export", checkpoints["byte"].path, out, "--to", "safetensors")
    assert run(*words) == 2
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("config.json", "mine")]
    assert run(*words, "--force") == 0
    assert_equal(import_folder(out), checkpoints["byte"])


def test_a_full_disk_is_one_line(
    checkpoints: dict[str, LoadedModel],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The library's error names no file, and leaves a part of one."""
    import safetensors
    import safetensors.torch

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"part")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    words = ("export", checkpoints["byte"].path, tmp_path / "out", "--to", "safetensors")
    assert run(*words) == 2
    assert "could not write" in (error := capsys.readouterr().err)
    assert "No space left" in error
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("package", "form"),
    [("safetensors", "safetensors"), ("safetensors", "transformers"), ("onnx", "onnx")],
)
def test_a_missing_package_is_one_line(
    package: str,
    form: str,
    checkpoints: dict[str, LoadedModel],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert run("export", checkpoints["byte"].path, tmp_path / "out", "--to", form) == 2
    error = f"error: this needs the package {package}: pip install 'mmrec[export]'\n"
    assert capsys.readouterr().err == error
    assert not (tmp_path / "out").exists()


def test_an_import_replaces_no_checkpoint(
    checkpoints: dict[str, LoadedModel], tmp_path: Path, run: Run
) -> None:
    export_safetensors(checkpoints["byte"], tmp_path / "out")
    target = tmp_path / "other.h5"
    shutil.copy(checkpoints["char"].path, target)
    assert run("import", tmp_path / "out", "--out", target) == 2
    assert_equal(load_model(target), checkpoints["char"])
    assert run("import", tmp_path / "out", "--out", target, "--force") == 0
    assert_equal(load_model(target), checkpoints["byte"])


def test_a_file_is_no_folder(checkpoints: dict[str, LoadedModel]) -> None:
    with pytest.raises(InputError, match="must be a folder that mmrec export wrote; it is a file"):
        import_folder(checkpoints["byte"].path)
