"""Models of transformers with random weights give the same numbers with mmrec's kernels."""

import ast
import importlib
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrec.errors import InputError
from mmrec.integrations import transformers as integration
from mmrec.integrations._transformers_ops import MAX_WIDTH, OPS
from tests.conftest import ROOT
from tests.integrations.models import MODELS, VOCABULARY, make_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _disabled_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    integration.disable()
    torch.set_num_threads(threads)


def make_tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCABULARY, shape)


def left_padded(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the left, with their mask."""
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - n).long() for n in lengths])
    return {"input_ids": make_tokens(*mask.shape) * mask, "attention_mask": mask}


def loss_and_gradients(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The logits of the tokens that count, then the gradient of every parameter."""
    model.zero_grad()
    counts = inputs["attention_mask"].bool()
    logits = model(**inputs, use_cache=False).logits[counts]
    torch.nn.functional.cross_entropy(logits, inputs["input_ids"][counts]).backward()
    found = [p.grad for p in model.parameters()]
    return [logits.detach(), *[torch.zeros(1) if g is None else g for g in found]]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_same(name: str) -> None:
    """In training mode, of padded rows that are longer than a chunk."""
    model = make_model(name).train()
    inputs = left_padded((19, 12))
    expected = loss_and_gradients(model, inputs)
    with integration.enable():
        for ours, theirs in zip(loss_and_gradients(model, inputs), expected, strict=True):
            scale = float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_is_the_same(name: str) -> None:
    """Of rows of different lengths, one step per token after a prompt; then of more tokens."""
    model, inputs = make_model(name), left_padded((9, 6))
    choices = {"max_new_tokens": 12, "do_sample": False, "output_logits": True}
    choices["return_dict_in_generate"] = True
    expected = model.generate(**inputs, **choices)
    with integration.enable():
        ours = model.generate(**inputs, **choices)
    assert torch.equal(ours.sequences, expected.sequences)
    for mine, theirs in zip(ours.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def packed(lengths: tuple[int, ...]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Sequences, and the same ones as one row with what transformers' collator says of it."""
    sequences = [make_tokens(1, n) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    numbers = [torch.full((1, n), i, dtype=torch.int32) for i, n in enumerate(lengths)]
    return sequences, {
        "input_ids": torch.cat(sequences, 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "seq_idx": torch.cat(numbers, 1),
        "cu_seq_lens_q": bounds,
    }


@pytest.mark.parametrize("without", ["nothing", "seq_idx", "cu_seq_lens_q"])
@pytest.mark.parametrize("name", ["qwen3_5", "olmo_hybrid", "kimi_linear", "bamba", "lfm2"])
def test_packed_sequences_are_kept_apart(name: str, without: str) -> None:
    """Whichever of the two ways of saying where they start the model gets."""
    model = make_model(name).train()
    sequences, row = packed((11, 3, 20))
    row.pop(without, None)
    with integration.enable():
        expected = [model(input_ids=x, use_cache=False).logits for x in sequences]
        ours = model(**row, use_cache=False).logits
    torch.testing.assert_close(ours, torch.cat(expected, 1), rtol=1e-3, atol=1e-3)


def test_packed_sequences_are_refused_where_the_scan_is_not_told_of_them() -> None:
    """Zamba's convolution is told where they start, and its scan is not."""
    model = make_model("zamba")
    _, row = packed((11, 3))
    with integration.enable(), pytest.raises(ValueError, match="one sequence per row"):
        model(**row, use_cache=False)


@pytest.mark.parametrize("name", ["qwen3_5", "mamba", "mamba2", "lfm2"])
def test_half_precision_is_as_near_as_before(name: str) -> None:
    """The error of logits in bfloat16, against float32, is what it was without our kernels."""
    model, tokens = make_model(name), make_tokens(2, 19)
    exact = model(tokens).logits
    model.bfloat16()
    expected = model(tokens).logits
    with integration.enable():
        ours = model(tokens).logits
    assert ours.dtype == expected.dtype
    assert (ours - exact).norm() <= 1.3 * (expected - exact).norm()


def test_models_compile_and_are_checkpointed() -> None:
    model, inputs = make_model("qwen3_5").train(), left_padded((19, 12))
    expected = loss_and_gradients(model, inputs)
    old_name = model.gradient_checkpointing_enable  # newer versions deprecate it
    getattr(model, "activation_checkpointing_enable", old_name)()
    compiled = torch.compile(model, backend="aot_eager")
    with integration.enable():
        for ours, theirs in zip(loss_and_gradients(compiled, inputs), expected, strict=True):
            scale = float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 * scale)


def module_of(name: str) -> Any:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def test_enable_says_what_it_took_and_disable_gives_it_back() -> None:
    module = module_of("qwen3_5")
    before = dict(vars(module))
    taken = integration.enable()
    functions = taken.functions[module.__name__]
    assert set(functions) == {
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
    }
    assert f"{module.__name__}: {', '.join(functions)}" in str(taken)
    assert all(vars(module)[name] is not before[name] for name in functions)
    assert integration.enable().functions == taken.functions
    integration.disable()
    assert taken.functions == {}
    assert dict(vars(module)) == before
    integration.disable()


def test_an_inner_context_leaves_the_outer_one() -> None:
    module = module_of("qwen3_5")
    with integration.enable() as outer:
        with integration.enable():
            pass
        assert module.__name__ in outer.functions
    assert outer.functions == {}


def test_models_imported_later_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    module_of("lfm2")
    with integration.enable() as taken:
        monkeypatch.delitem(sys.modules, "transformers.models.lfm2.modeling_lfm2")
        module = module_of("lfm2")
        assert taken.functions[module.__name__] == ["causal_conv1d_fn", "causal_conv1d_update"]
        front = module.causal_conv1d_fn
    assert module.causal_conv1d_fn is front.__wrapped__
    hook = module.use_kernel_func_from_hub_with_fallback
    assert hook is vars(importlib.import_module(integration._HOOKS))[hook.__name__]


def test_other_devices_and_export_take_what_was_there() -> None:
    def before(hidden_states: Tensor, weight: Tensor, activation: str | None = None) -> str:
        return "before"

    front = integration._in_front(before, "causal_conv1d_fn", __name__)
    x, weight = torch.randn(1, 4, 8), torch.randn(4, 3)
    assert isinstance(front(x, weight), Tensor)
    assert front(x.to("meta"), weight.to("meta")) == "before"
    assert front(x, weight=weight.to("meta")) == "before"
    assert front(x, weight, activation="gelu") == "before"


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_kda"])
def test_heads_that_are_too_wide_are_left_to_transformers(name: str) -> None:
    assert importlib.import_module("mmrec.kernels.gated_delta_rule.op").MAX_WIDTH == MAX_WIDTH
    inputs = torch.zeros(1, 1, 1, MAX_WIDTH + 1).expand(3, -1, -1, -1, -1)
    assert OPS[name](*inputs, torch.zeros(1), torch.zeros(1), initial_state=None) is NotImplemented


def test_export_takes_the_functions_of_transformers() -> None:
    class Convolution(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return module_of("lfm2").causal_conv1d_fn(x, weight)

    inputs = (torch.randn(1, 4, 8), torch.randn(4, 3))
    with integration.enable():
        program = torch.export.export(Convolution(), inputs)
    assert "conv1d" in program.graph_module.code
    assert "mmrec" not in program.graph_module.code


def hooked_functions() -> Iterator[tuple[str, str, list[str]]]:
    """Model, name on the hub and parameters of every function under the hook, from the sources."""
    models = Path(transformers.__file__).parent / "models"
    for path in sorted(models.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body if integration._HOOK in source else ():
            for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(call, ast.Call) and ast.unparse(call.func) == integration._HOOK:
                    names = [argument.arg for argument in node.args.args]
                    yield path.parent.name, ast.literal_eval(call.args[0]), names


def test_every_function_under_the_hook_is_one_that_we_know() -> None:
    """Of all models in this version of transformers, also those that no test here builds."""
    functions = list(hooked_functions())
    assert {model for model, _, _ in functions} >= MODELS.keys()
    for model, name, parameters in functions:
        ours = inspect.signature(OPS[name]).parameters.values()
        expected = [p.name for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert not expected or parameters == expected, (model, name)


def test_functions_of_other_parameters_are_left_alone() -> None:
    hub_kernels = importlib.import_module(integration._HOOKS)

    def causal_conv1d_fn(weight: Tensor, hidden_states: Tensor) -> None: ...

    with integration.enable():
        hook = getattr(hub_kernels, integration._HOOK)
        made = hook("causal_conv1d_fn", "causal_conv1d")(causal_conv1d_fn)
        assert integration._ours(made) is None
        made = hook("another_op", "causal_conv1d")(causal_conv1d_fn)
        assert integration._ours(made) is None


@pytest.mark.parametrize("version", ["4.57.6", "5.21.1", "5.25.0", "5.25.0.dev0", "6.0.0"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(InputError, match=f"transformers must be .*; got {version}"):
        integration.check_version(version)


def test_the_extra_has_the_versions_that_are_known() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["transformers"] == [
        f"transformers{integration.VERSIONS}"
    ]
    integration.check_version("5.22.0")
    integration.check_version("5.24.0")
