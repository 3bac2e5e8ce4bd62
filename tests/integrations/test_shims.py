"""Stand-ins for fla, mamba_ssm and causal_conv1d: what they have, refuse, and leave alone."""

import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrec import kernels
from mmrec.integrations import shims


@pytest.fixture(autouse=True)
def _uninstalled_afterwards() -> Iterator[None]:
    if any(importlib.util.find_spec(name) for name in shims._PACKAGES):
        pytest.skip("a package that would be stood in for is installed")
    yield
    shims.uninstall()


def test_the_imports_of_vision_models_work() -> None:
    """As VMamba, MambaVision and others write them."""
    with shims.install() as installed:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        assert installed.packages == list(shims._PACKAGES)
    assert selective_scan_fn is selective_scan_ref is kernels.selective_scan_fn
    assert causal_conv1d_fn is kernels.causal_conv1d_fn
    assert selective_state_update is kernels.selective_state_update


def test_uninstalling_takes_everything_away() -> None:
    finders = list(sys.meta_path)
    with shims.install() as outer:
        with shims.install():
            pass
        importlib.import_module("fla.ops.gated_delta_rule")
    assert str(outer) == "mmrec stands in for causal_conv1d, fla, mamba_ssm"
    assert sys.meta_path == finders
    assert not [name for name in sys.modules if name.split(".")[0] in shims._PACKAGES]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fla.ops")
    shims.uninstall()


def test_an_installed_package_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text("is_real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with shims.install() as installed:
        assert installed.packages == ["fla", "mamba_ssm"]
        assert installed.kept == ["causal_conv1d"]
        assert "installed, so left alone: causal_conv1d" in str(installed)
        assert importlib.import_module("causal_conv1d").is_real
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("causal_conv1d.causal_conv1d_interface")
    assert sys.modules.pop("causal_conv1d").is_real


@pytest.mark.parametrize("path", sorted(shims._MODULES))
def test_every_function_is_there(path: str) -> None:
    with shims.install():
        module = importlib.import_module(path)
        own = {n for n, value in vars(module).items() if isinstance(value, types.FunctionType)}
    folder = path.removeprefix("fla.ops.")
    functions = shims._SAME.get(path, shims._FLA.get(folder, {}))
    assert own == set(functions) or path == "fla.ops"


FLA = {name: made for functions in shims._FLA.values() for name, made in functions.items()}


@pytest.mark.parametrize("name", FLA)
def test_parameters_given_by_place_reach_the_op(name: str) -> None:
    """Every parameter of the table is one of our op, or is refused unless it is None or False."""
    op_name, parameters = FLA[name]
    known = inspect.signature(getattr(kernels, op_name)).parameters
    q, k, v, x = torch.randn(4, 1, 7, 2, 8).unbind()
    values: dict[str, Any] = {"q": q, "k": k, "v": v, "scale": 0.5, "output_final_state": True}
    values |= {"x": x[..., 0], "layer_idx": 1, "num_layers": 3, "use_qk_l2norm_in_kernel": True}
    values |= {"gk": -torch.rand(1, 7, 2, 8), "beta": torch.rand(1, 7, 2)}
    is_wide = "g" in known and op_name in ("gla", "kda", "fused_recurrent_kda")
    values["g"] = values["gk"] if is_wide else values["gk"][..., 0]
    given = {p: values.get(p) for p in parameters.split()}
    expected = getattr(kernels, op_name)(**{p: x for p, x in given.items() if p in known})
    refused = [p for p in given if p not in known]
    for parameter in refused:
        given[parameter] = None
    with shims.install():
        function = getattr(importlib.import_module("fla.ops"), name)
        for ours, theirs in zip(function(*given.values()), expected, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
        for parameter in refused:
            with pytest.raises(NotImplementedError, match=f"{name}: mmrec has no {parameter}"):
                function(**given | {parameter: True})


def test_a_function_takes_flas_parameters_by_place_and_by_name() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind()
    g, beta, state = -torch.rand(1, 9, 2), torch.rand(1, 9, 2), torch.randn(1, 2, 8, 8)
    expected, final = kernels.gated_delta_rule(q, k, v, g, beta, 0.5, state, True, True)
    with shims.install():
        fla = importlib.import_module("fla.ops.gated_delta_rule")
        by_place, _ = fla.chunk_gated_delta_rule(q, k, v, g, beta, 0.5, state, True, True)
        by_name, last = fla.fused_recurrent_gated_delta_rule(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            scale=0.5,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            gk=None,
            state_v_first=False,
            cu_seqlens=None,
        )
        with pytest.raises(NotImplementedError, match="mmrec has no state_v_first; got True"):
            fla.chunk_gated_delta_rule(q, k, v, g, beta, state_v_first=True)
        with pytest.raises(TypeError):
            fla.chunk_gated_delta_rule(q, k, v, g, beta, 0.5, scale=0.5)
    torch.testing.assert_close(by_place, expected)
    torch.testing.assert_close(by_name, expected)
    torch.testing.assert_close(last, final)


def test_what_is_missing_fails_to_import_with_one_line() -> None:
    with shims.install():
        with pytest.raises(ModuleNotFoundError, match=r"mmrec stands in for mamba_ssm and has no"):
            importlib.import_module("mamba_ssm.modules.mamba_simple")
        with pytest.raises(ImportError, match=r"cannot import name 'Mamba'.*shims\.py"):
            exec("from mamba_ssm import Mamba")
        assert not hasattr(importlib.import_module("fla.ops"), "chunk_gsa")
        assert importlib.util.find_spec("other_package") is None
