"""Stand-ins for packages that need a GPU: fla, mamba_ssm and causal_conv1d, with mmrec's kernels.

    import mmrec.integrations.shims

    mmrec.integrations.shims.install()
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # mmrec's, on a CPU

For code that imports these packages by name, such as VMamba and MambaVision. (Models of
transformers need ``mmrec.integrations.transformers`` instead.) A package that is really installed
is never covered up. What a stand-in does not have fails to import, as anything missing does.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from mmrec import kernels

_STATES = "scale initial_state output_final_state"
_DELTA = f"{_STATES} use_qk_l2norm_in_kernel"
_FLA = {
    "delta_rule": {
        "chunk_delta_rule": ("delta_rule", f"q k v beta {_DELTA} cu_seqlens"),
        "fused_recurrent_delta_rule": ("delta_rule", f"q k v beta {_DELTA} cu_seqlens"),
    },
    "gated_delta_rule": {
        "chunk_gated_delta_rule": (
            "gated_delta_rule",
            f"q k v g beta {_DELTA} use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first",
        ),
        "fused_recurrent_gated_delta_rule": (
            "fused_recurrent_gated_delta_rule",
            f"q k v g gk gv beta {_DELTA}",
        ),
    },
    "kda": {
        "chunk_kda": ("kda", f"q k v g beta {_DELTA}"),
        "fused_recurrent_kda": ("fused_recurrent_kda", f"q k v g beta A_log dt_bias {_DELTA}"),
    },
    "gla": {
        "chunk_gla": ("gla", f"q k v g {_STATES} state_v_first cu_seqlens"),
        "fused_recurrent_gla": (
            "fused_recurrent_gla",
            f"q k v gk gv {_STATES} reverse state_v_first cu_seqlens",
        ),
    },
    "simple_gla": {
        "chunk_simple_gla": ("simple_gla", f"q k v g g_gamma {_STATES} state_v_first cu_seqlens"),
        "fused_recurrent_simple_gla": (
            "fused_recurrent_simple_gla",
            f"q k v g g_gamma {_STATES} reverse state_v_first cu_seqlens",
        ),
        "parallel_simple_gla": ("simple_gla", "q k v g scale output_attentions cu_seqlens"),
    },
    "retention": {
        "chunk_retention": ("retention", f"q k v {_STATES} cu_seqlens"),
        "fused_recurrent_retention": ("retention", f"q k v {_STATES} reverse state_v_first"),
        "parallel_retention": ("retention", "q k v scale output_attentions cu_seqlens"),
    },
    "lightning_attn": {
        "chunk_lightning_attn": (
            "lightning_attn",
            f"q k v layer_idx num_layers {_STATES} cu_seqlens",
        ),
        "fused_recurrent_lightning_attn": (
            "lightning_attn",
            f"q k v layer_idx num_layers {_STATES} reverse cu_seqlens",
        ),
    },
    "hgrn": {
        "chunk_hgrn": ("hgrn", "x g initial_state output_final_state"),
        "fused_recurrent_hgrn": ("hgrn", "x g initial_state output_final_state cu_seqlens"),
    },
}
"""fla's functions by the folder of ``fla.ops``: our op, and fla's parameters in their order."""

_NO_EFFECT = {"cu_seqlens_cpu", "chunk_indices", "chunk_size", "disable_recompute"}
"""Parameters of fla that choose how a GPU computes, and not what."""

_CAUSAL_CONV1D = {
    "causal_conv1d_fn": "causal_conv1d_fn",
    "causal_conv1d_update": "causal_conv1d_update",
}
_SELECTIVE_SCAN = {"mamba_inner_fn": "mamba_inner_fn", "selective_scan_fn": "selective_scan_fn"}
_SAME = {
    "causal_conv1d": _CAUSAL_CONV1D,
    "causal_conv1d.causal_conv1d_interface": _CAUSAL_CONV1D,
    "mamba_ssm": _SELECTIVE_SCAN,
    "mamba_ssm.ops": {},
    # Code often imports the reference beside the function.
    "mamba_ssm.ops.selective_scan_interface": {
        **_SELECTIVE_SCAN,
        "selective_scan_ref": "selective_scan_fn",
    },
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.selective_state_update": {
        "selective_state_update": "selective_state_update"
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": "mamba_chunk_scan_combined",
        "mamba_split_conv1d_scan_combined": "mamba_split_conv1d_scan_combined",
    },
}
"""Modules whose functions are our ops as they are: name there, name in ``mmrec.kernels``."""

_MODULES = {*_SAME, "fla", "fla.ops", *(f"fla.ops.{folder}" for folder in _FLA)}
_PACKAGES = ("causal_conv1d", "fla", "mamba_ssm")


class _StandIn(types.ModuleType):
    """A module that stands in for one of a package."""


def _function(name: str, op_name: str, parameters: str) -> Callable[..., Any]:
    """A function of fla: our op, called with fla's parameters.

    Args:
        name: the function's.
        op_name: the op's, in ``mmrec.kernels``.
        parameters: fla's parameters that may be given by position, in their order.
    """
    op = getattr(kernels, op_name)
    known = inspect.signature(op).parameters
    positional = parameters.split()

    def function(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(positional, args, strict=False))
        if len(args) > len(positional) or given.keys() & kwargs.keys():
            raise TypeError(f"{name} takes {', '.join(positional)}, then keywords; got {args}")
        options = {}
        for key, value in (given | kwargs).items():
            if key in known:
                options[key] = value
            elif key not in _NO_EFFECT and value is not None and value is not False:
                raise NotImplementedError(f"{name}: mmrec has no {key}; got {value!r}")
        return op(**options)

    function.__name__ = function.__qualname__ = name
    return function


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-ins. It stands last, so that installed packages are found before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package = fullname.partition(".")[0]
        is_ours = fullname == package or isinstance(sys.modules.get(package), _StandIn)
        if package not in _PACKAGES or not is_ours:
            return None
        if fullname not in _MODULES:
            raise ModuleNotFoundError(
                f"mmrec stands in for {package} and has no {fullname}; it has "
                f"{', '.join(sorted(n for n in _MODULES if n.startswith(package)))}",
                name=fullname,
            )
        is_package = any(name.startswith(f"{fullname}.") for name in _MODULES)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        module.__file__ = __file__  # Python names it when a function is missing
        for function, op in _SAME.get(name, {}).items():
            setattr(module, function, getattr(kernels, op))
        for folder, functions in _FLA.items():
            if name in ("fla.ops", f"fla.ops.{folder}"):
                for function, (op, parameters) in functions.items():
                    setattr(module, function, _function(function, op, parameters))


class Installed(AbstractContextManager["Installed"]):
    """What ``install`` put in place. As a context manager it takes that away at the end.

    Attributes:
        packages: names that stand-ins answer to.
        kept: names of packages that are really installed, and were left alone.
    """

    def __init__(self, packages: list[str], kept: list[str], *, was_installed: bool) -> None:
        """Create the handle; ``install`` does."""
        self.packages, self.kept, self._was_installed = packages, kept, was_installed

    def __exit__(self, *_: object) -> None:
        if not self._was_installed:
            uninstall()

    def __str__(self) -> str:
        kept = f"; installed, so left alone: {', '.join(self.kept)}" if self.kept else ""
        return f"mmrec stands in for {', '.join(self.packages) or 'no package'}{kept}"


def install() -> Installed:
    """Put stand-ins for fla, mamba_ssm and causal_conv1d in place of those that are not installed.

    Installing twice changes nothing.

    Returns:
        A handle that says what was done. As a context manager it ends with ``uninstall``.
    """
    was_installed = _find() is not None
    if not was_installed:
        sys.meta_path.append(_Finder())
    specs = {name: importlib.util.find_spec(name) for name in _PACKAGES}
    packages = [n for n, spec in specs.items() if spec and isinstance(spec.loader, _Finder)]
    kept = [name for name in _PACKAGES if name not in packages]
    return Installed(packages, kept, was_installed=was_installed)


def uninstall() -> None:
    """Take the stand-ins away; functions that were imported from them keep working."""
    finder = _find()
    if finder is not None:
        sys.meta_path.remove(finder)
    for name, module in list(sys.modules.items()):
        if isinstance(module, _StandIn):
            del sys.modules[name]


def _find() -> _Finder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
