"""CPU kernels that torch does not have, compiled by Numba and differentiable in torch.

>>> import torch
>>> from mmrec.kernels import scan
>>> output, final_state = scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))
>>> output.flatten().tolist()
[1.0, 1.5, 1.75]
>>> final_state.tolist()
[[1.75]]

Ops of one kernel share a folder: ``reference.py`` defines them in plain torch, ``kernel.py``
computes them and states their adjoint, ``op.py`` checks arguments and registers them with torch.

The model's presets use min_gru_mixer, gated_delta_rule, rmsnorm_conv1d, relu_squared, dropout_add
and fused_linear_cross_entropy. gated_recurrence serves layer types "s" and "b"; gru and lstm serve
mmrec.nn.GRU and LSTM. rowwise_rmsprop updates a large n-gram embedding and is not public. scan,
cumprod and log_cumprod serve no model here. The others have the names and shapes of
flash-linear-attention, mamba-ssm and causal-conv1d, and serve models made for these.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrec.kernels.causal_conv1d.op import causal_conv1d_fn, causal_conv1d_update
    from mmrec.kernels.cumprod.op import cumprod, log_cumprod
    from mmrec.kernels.dropout_add.op import dropout_add
    from mmrec.kernels.fused_linear_cross_entropy.op import fused_linear_cross_entropy
    from mmrec.kernels.gated_delta_rule.op import (
        delta_rule,
        fused_recurrent_gated_delta_rule,
        gated_delta_rule,
        gated_delta_rule_update,
    )
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
    from mmrec.kernels.gru.op import gru
    from mmrec.kernels.kda.op import fused_recurrent_kda, kda
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
    "dropout_add",
    "fused_linear_cross_entropy",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_simple_gla",
    "gated_delta_rule",
    "gated_delta_rule_update",
    "gated_recurrence",
    "gla",
    "gru",
    "hgrn",
    "kda",
    "lightning_attn",
    "log_cumprod",
    "lstm",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "min_gru_mixer",
    "relu_squared",
    "retention",
    "rmsnorm_conv1d",
    "scan",
    "selective_scan_fn",
    "selective_state_update",
    "simple_gla",
]

_OPS = {
    "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    "cumprod": ("cumprod", "log_cumprod"),
    "gated_delta_rule": (
        "delta_rule",
        "fused_recurrent_gated_delta_rule",
        "gated_delta_rule",
        "gated_delta_rule_update",
    ),
    "gla": (
        "fused_recurrent_gla",
        "fused_recurrent_simple_gla",
        "gla",
        "hgrn",
        "lightning_attn",
        "retention",
        "simple_gla",
    ),
    "kda": ("fused_recurrent_kda", "kda"),
    "selective_scan": ("mamba_inner_fn", "selective_scan_fn", "selective_state_update"),
    "ssd": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
}
"""The ops of each folder that has not one op of its own name."""
# Imported at first use: the ops need torch, and the compiled code of ``_simd.py`` does not.
_LAZY = {name: name for name in __all__} | {
    op: folder for folder, ops in _OPS.items() for op in ops
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
