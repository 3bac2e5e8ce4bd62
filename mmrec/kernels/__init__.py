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
fused_linear_cross_entropy. gated_recurrence serves layer types "s" and "b". gru and lstm serve
mmrec.nn.GRU and LSTM. selective_scan_fn, mamba_chunk_scan_combined, causal_conv1d_fn, delta_rule, kda,
gla and what stands beside them serve other people's models. scan, cumprod and log_cumprod serve no
model here.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrec.kernels.causal_conv1d.op import causal_conv1d_fn, causal_conv1d_update
    from mmrec.kernels.cumprod.op import cumprod, log_cumprod
    from mmrec.kernels.fused_linear_cross_entropy.op import fused_linear_cross_entropy
    from mmrec.kernels.gated_delta_rule.op import (
        delta_rule,
        fused_recurrent_gated_delta_rule,
        gated_delta_rule,
        gated_delta_rule_update,
    )
    from mmrec.kernels.gated_recurrence.op import gated_recurrence
    from mmrec.kernels.gru.op import gru
    from mmrec.kernels.lstm.op import lstm
    from mmrec.kernels.min_gru_mixer.op import min_gru_mixer
    from mmrec.kernels.relu_squared.op import relu_squared
    from mmrec.kernels.rmsnorm_conv1d.op import rmsnorm_conv1d
    from mmrec.kernels.scan.op import scan
    from mmrec.kernels.selective_scan.op import (
        mamba_inner_fn,
        selective_scan_fn,
        selective_state_update,
    )
    from mmrec.kernels.ssd.op import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "cumprod",
    "delta_rule",
    "fused_linear_cross_entropy",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_rule",
    "gated_delta_rule_update",
    "gated_recurrence",
    "gru",
    "log_cumprod",
    "lstm",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "min_gru_mixer",
    "relu_squared",
    "rmsnorm_conv1d",
    "scan",
    "selective_scan_fn",
    "selective_state_update",
]

# Imported at first use: the ops need torch, and the compiled code of ``_simd.py`` does not.
_LAZY = {name: name for name in __all__} | {
    "delta_rule": "gated_delta_rule",
    "fused_recurrent_gated_delta_rule": "gated_delta_rule",
    "gated_delta_rule_update": "gated_delta_rule",
    "log_cumprod": "cumprod",
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
    "mamba_chunk_scan_combined": "ssd",
    "mamba_split_conv1d_scan_combined": "ssd",
    "mamba_inner_fn": "selective_scan",
    "selective_scan_fn": "selective_scan",
    "selective_state_update": "selective_scan",
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
