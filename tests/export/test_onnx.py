"""The graphs compute under onnxruntime what our model computes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.errors import InputError
from mmrec.export import onnx
from mmrec.export.onnx import export_onnx
from tests.conftest import ROOT
from tests.export.conftest import Run
from tests.export.test_safetensors import NAMES

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folders(
    checkpoints: dict[str, LoadedModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An export of each checkpoint."""
    root = tmp_path_factory.mktemp("graphs")
    for name, loaded in checkpoints.items():
        export_onnx(loaded, root / name)
    return {name: root / name for name in checkpoints}


def open_session(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "model.onnx", options)


def zeros(session: Any, batch: int) -> dict[str, np.ndarray]:
    """The states before the first token."""
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    inputs = session.get_inputs()[1:]
    return {x.name: np.zeros((batch, *x.shape[1:]), types[x.type]) for x in inputs}


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_states_are_those_of_the_model(
    name: str, is_plain: bool, checkpoints: dict[str, LoadedModel], tmp_path: Path
) -> None:
    """For batches of several sizes and texts that are read in pieces of several lengths."""
    export_onnx(checkpoints[name], tmp_path / "out", is_plain=is_plain)
    session, model = open_session(tmp_path / "out"), checkpoints[name].model
    for batch in (1, 3):
        tokens = torch.randint(0, model.config.vocab_size, (batch, 17))
        with torch.no_grad():
            expected = model(tokens)[0].numpy()
        state, begin = zeros(session, batch), 0
        for length in (1, 1, 9, 2, 4):
            piece = tokens[:, begin : begin + length]
            logits, *new = session.run(None, {"tokens": piece.numpy()} | state)
            np.testing.assert_allclose(
                logits, expected[:, begin : begin + length], rtol=1e-4, atol=1e-4
            )
            state = dict(zip(state, new, strict=True))
            begin += length


@pytest.mark.parametrize("is_plain", [False, True])
def test_operators(is_plain: bool, checkpoints: dict[str, LoadedModel], tmp_path: Path) -> None:
    """The model has a layer of each type; two have a gate that looks at the state before it."""
    package = pytest.importorskip("onnx")
    export_onnx(checkpoints["byte"], tmp_path / "out", is_plain=is_plain)
    model = package.load(tmp_path / "out" / "model.onnx")
    package.checker.check_model(model, full_check=True)
    used = [node.op_type for node in model.graph.node]
    counts = [used.count(x) for x in ("Scan", "LinearAttention", "CausalConvWithState")]
    assert counts == ([5, 0, 0] if is_plain else [2, 3, 4])
    domains = {x.domain for x in model.opset_import}
    assert domains == ({""} if is_plain else {"", "com.microsoft"})


def test_inputs_and_outputs_have_names(folders: dict[str, Path]) -> None:
    session = open_session(folders["byte"])
    names = [x.name for x in session.get_inputs()]
    assert names[:4] == ["tokens", "recent_tokens", "layers.0.conv_state", "layers.0.hidden_state"]
    outputs = [x.name for x in session.get_outputs()]
    assert outputs == ["logits", *(f"new_{name}" for name in names[1:])]
    assert {x.shape[0] for x in (*session.get_inputs(), *session.get_outputs())} == {"batch"}


def example() -> str:
    """The program of the guide that generates text."""
    page = (ROOT / "docs/guides/export.md").read_text(encoding="utf-8")
    [found] = re.findall(r"^```python\n(import numpy.*?)^```", page, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.mark.parametrize("name", ["bpe", "char", "lora"])
def test_the_example_of_the_guide_writes_the_text_of_mmrec_generate(
    name: str,
    checkpoints: dict[str, LoadedModel],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = example()
    assert "mmrec" not in re.findall(r"import (\w+)|from (\w+)", program)
    folder = folders[name].rename(folders[name].with_name("tiny-onnx"))
    monkeypatch.chdir(folder.parent)
    try:
        exec(compile(program, "export.md", "exec"), {})
    finally:
        folder.rename(folders[name])
    prompt = re.findall(r'prompt = "(.*)"', program)[0]
    text = checkpoints[name].generate(prompt, temperature=0, max_tokens=100)
    assert capsys.readouterr().out == f"{prompt}{text}\n"


def test_the_command_writes_both_files(
    checkpoints: dict[str, LoadedModel],
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("export", checkpoints["plain"].path, tmp_path / "out", "--to", "onnx") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.endswith("model.onnx, tokenizer.json\n")
    assert run("import", tmp_path / "out", "--out", tmp_path / "back.h5") == 2
    assert "it holds no config.json" in capsys.readouterr().err


def test_a_model_beyond_protobuf_is_refused(
    checkpoints: dict[str, LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="--to onnx writes models of up to .* GB; this one has"):
        export_onnx(checkpoints["byte"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
