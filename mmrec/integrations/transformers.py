"""Models of Hugging Face transformers compute with mmrec's kernels on CPU tensors.

    from mmrec.integrations.transformers import enable

    print(enable())

Transformers marks the functions that a GPU's package may compute, such as the gated delta rule of
Qwen3.5 or the scan of Mamba, with a hook. ``enable`` puts a function of mmrec in front of each:
tensors on a CPU go to ``mmrec.kernels``, and all other calls go where they went before.
"""

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mmrec.errors import InputError
from mmrec.integrations._transformers_ops import OPS, is_packed

VERSIONS = ">=5.22,<5.25"
"""Versions of transformers whose hook and functions are known; the extra ``transformers``."""

_HOOKS = "transformers.integrations.hub_kernels"
_HOOK = "use_kernel_func_from_hub_with_fallback"
"""The decorator. It makes a function of (name on the hub, package) and the model's own function."""
_MARK = "__mmrec_hub_name__"
"""Attribute of our functions: the name on the hub that they answer to."""


class Taken(AbstractContextManager["Taken"]):
    """What ``enable`` took over. As a context manager it gives that back at the end.

    Attributes:
        version: the version of transformers.
    """

    def __init__(self, version: str, *, was_enabled: bool) -> None:
        """Create the handle; ``enable`` does."""
        self.version, self._was_enabled = version, was_enabled

    @property
    def functions(self) -> dict[str, list[str]]:
        """The functions taken over by now, by module; models that are imported later add theirs."""
        found: dict[str, set[str]] = {}
        for module, name, value in _find():
            if _ours(value) is not None and name != _HOOK:
                found.setdefault(module.__name__, set()).add(name)
        return {module: sorted(names) for module, names in sorted(found.items())}

    def __exit__(self, *_: object) -> None:
        if not self._was_enabled:
            disable()

    def __str__(self) -> str:
        lines = [f"transformers {self.version} computes with mmrec on CPU tensors:"]
        lines += [f"  {module}: {', '.join(names)}" for module, names in self.functions.items()]
        return "\n".join([*lines, "  and the same functions of models that are imported later"])


def enable() -> Taken:
    """Let models of transformers compute with mmrec's kernels on CPU tensors.

    It holds for models that were imported or built before, and for those to come. Where mmrec has
    no kernel for a call (heads wider than 256, an activation other than SiLU), and under
    ``torch.export``, the function of transformers computes it as before. Enabling twice changes
    nothing.

    Returns:
        A handle that says what was taken over. As a context manager it ends with ``disable``.

    Raises:
        InputError: transformers is missing, or of a version that mmrec does not know.
    """
    try:
        version = str(importlib.import_module("transformers").__version__)
    except ModuleNotFoundError:
        raise InputError(
            "mmrec.integrations.transformers needs a package: pip install 'mmrec[transformers]'"
        ) from None
    check_version(version)
    hook = getattr(importlib.import_module(_HOOKS), _HOOK)
    taken = Taken(version, was_enabled=_ours(hook) is not None)
    for module, name, value in _find():
        setattr(module, name, _take_over(value, module.__name__))
    return taken


def disable() -> None:
    """Give back to transformers what ``enable`` took over; without it, nothing changes."""
    for module, name, value in _find():
        setattr(module, name, _give_back(value))


def check_version(version: str) -> None:
    """Raise InputError unless transformers of a version has the functions that mmrec knows."""
    specifiers = importlib.import_module("packaging.specifiers")  # transformers depends on it
    if not specifiers.SpecifierSet(VERSIONS).contains(version, prereleases=True):
        raise InputError(
            f"transformers must be {VERSIONS}, whose functions are known; got {version}"
        )


def _find() -> list[tuple[types.ModuleType, str, Any]]:
    """Attributes of modules that hold the hook, or a function made by it that we have an op for."""
    if _HOOKS not in sys.modules:
        return []
    names = {_HOOK, *OPS}
    return [
        (module, name, value)
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType)
        for name, value in list(vars(module).items())
        if _hub_name(value) in names
    ]


def _hub_name(value: Any) -> str | None:
    """The name on the hub of what the hook made or what stands in front of it, or the hook's."""
    kind = type(value)  # isinstance would ask proxies for their class, and some warn then
    if kind is types.FunctionType:
        if hasattr(value, _MARK):
            return str(getattr(value, _MARK))
        if value.__globals__ is vars(sys.modules[_HOOKS]):
            if value.__name__ == _HOOK:
                return _HOOK
            if "func_name" in value.__code__.co_freevars:
                return str(inspect.getclosurevars(value).nonlocals["func_name"])
    # The package ``kernels`` makes a module of each function.
    if issubclass(kind, nn.Module) and hasattr(kind, "kernel_layer_name"):
        return str(kind.kernel_layer_name)
    return None


def _ours(value: Any) -> Callable[..., Any] | None:
    """Our function, if one stands in front of what the hook made."""
    function = vars(value).get("forward") if isinstance(value, nn.Module) else value
    return function if hasattr(function, _MARK) else None


def _take_over(value: Any, module: str) -> Any:
    """``value`` with our function in front, which answers for calls from a module."""
    name = _hub_name(value)
    if _ours(value) is not None or name is None:
        return value
    if name == _HOOK:
        return _in_front_of_hook(value)
    if name not in OPS or not _has_known_parameters(value, name):
        return value
    if isinstance(value, nn.Module):
        # A kernel that ``kernelize`` chose stands there already, because the user asked for it.
        if "forward" not in vars(value):
            value.forward = _in_front(value.forward, name, module)
        return value
    return _in_front(value, name, module)


def _give_back(value: Any) -> Any:
    """``value`` without our function."""
    ours = _ours(value)
    if ours is None:
        return value
    if isinstance(value, nn.Module):
        del value.forward
        return value
    return vars(ours)["__wrapped__"]


def _has_known_parameters(value: Any, name: str) -> bool:
    """Whether a model's function takes what ours takes, in the same order."""
    function = value.forward if isinstance(value, nn.Module) else value
    ours, theirs = (
        [p.name for p in inspect.signature(f).parameters.values() if p.kind != p.VAR_KEYWORD]
        for f in (OPS[name], function)
    )
    return ours in (theirs, ["arguments"])


def _in_front(before: Callable[..., Any], name: str, module: str) -> Callable[..., Any]:
    """Our function in front of a model's: CPU tensors go to our op, other calls to ``before``."""
    op = OPS[name]

    @functools.wraps(before)
    def function(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if torch.compiler.is_exporting() or not all(x.device.type == "cpu" for x in tensors):
            return before(*args, **kwargs)
        if name == "causal_conv1d_fn" and is_packed(kwargs):
            _check_packing(module)
        result = op(*args, **kwargs)
        return before(*args, **kwargs) if result is NotImplemented else result

    setattr(function, _MARK, name)
    return function


def _in_front_of_hook(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, whose functions we take over as they are made."""

    @functools.wraps(hook)
    def marked(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        decorator = hook(*args, **kwargs)
        return lambda function: _take_over(decorator(function), function.__module__)

    setattr(marked, _MARK, _HOOK)
    return marked


def _check_packing(module: str) -> None:
    """Refuse packed sequences in models of Mamba 1, whose scan is not told of them."""
    if "selective_scan_fn" in map(_hub_name, vars(sys.modules[module]).values()):
        raise ValueError(
            f"{module} must have one sequence per row, because its scan is not told where packed "
            "sequences start; got several (seq_idx or cu_seq_lens_q)"
        )
