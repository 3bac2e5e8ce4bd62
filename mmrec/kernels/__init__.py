"""CPU kernels that torch does not have, compiled by Numba and differentiable in torch.

>>> import torch
>>> from mmrec.kernels import scan
>>> output, final_state = scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))
>>> output.flatten().tolist()
[1.0, 1.5, 1.75]
>>> final_state.tolist()
[[1.75]]

Each op is one folder: ``reference.py`` defines it in plain torch, ``kernel.py`` computes it and
states its adjoint, ``op.py`` checks the arguments and registers it with torch.

The model's presets use min_gru_mixer, gated_delta_rule, rmsnorm_conv1d, relu_squared and
fused_linear_cross_entropy. gated_recurrence serves layer types "s" and "b". The others serve no
model here: scan, cumprod, log_cumprod, and what has the names and shapes of flash-linear-attention,
which are kda, gla, simple_gla, retention, lightning_attn and hgrn.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrec.kernels.cumprod.op import cumprod, log_cumprod
    from mmrec.kernels.fused_linear_cross_entropy.op import fused_linear_cross_entropy
    from mmrec.kernels.gated_delta_rule.op import gated_delta_rule
    from mmrec.kernels.gated_recurrence.op import gated_recurrence
    from mmrec.kernels.gla.op import (
        fused_recurrent_gla,
        fused_recurrent_simple_gla,
        gla,
        hgrn,
        lightning_attn,
        retention,
        simple_gla,
    )
    from mmrec.kernels.kda.op import fused_recurrent_kda, kda
    from mmrec.kernels.min_gru_mixer.op import min_gru_mixer
    from mmrec.kernels.relu_squared.op import relu_squared
    from mmrec.kernels.rmsnorm_conv1d.op import rmsnorm_conv1d
    from mmrec.kernels.scan.op import scan

__all__ = [
    "cumprod",
    "fused_linear_cross_entropy",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_simple_gla",
    "gated_delta_rule",
    "gated_recurrence",
    "gla",
    "hgrn",
    "kda",
    "lightning_attn",
    "log_cumprod",
    "min_gru_mixer",
    "relu_squared",
    "retention",
    "rmsnorm_conv1d",
    "scan",
    "simple_gla",
]

# Imported at first use: the ops need torch, and the compiled code of ``_simd.py`` does not.
_LAZY = {name: name for name in __all__} | {
    "fused_recurrent_gla": "gla",
    "fused_recurrent_kda": "kda",
    "fused_recurrent_simple_gla": "gla",
    "hgrn": "gla",
    "lightning_attn": "gla",
    "log_cumprod": "cumprod",
    "retention": "gla",
    "simple_gla": "gla",
}
"""The folder of each op."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}.op"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Kernels(types.ModuleType):
    """This package. An op has the name of its folder, and here the name means the op."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, unless the import system wants to bind the folder of an op."""
        if not (name in _LAZY and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Kernels
