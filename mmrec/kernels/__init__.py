"""CPU recurrences that torch does not have, compiled by Numba and differentiable in torch.

>>> import torch
>>> from mmrec.kernels import scan
>>> h, h_last = scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))
>>> h.flatten().tolist()
[1.0, 1.5, 1.75]
"""

from mmrec.kernels.cumprod.op import cumprod, log_cumprod
from mmrec.kernels.fused_linear_cross_entropy.op import softmax_parts
from mmrec.kernels.gated_delta_rule.op import associative_memory
from mmrec.kernels.gated_recurrence.op import gated_recurrence
from mmrec.kernels.min_gru_mixer.op import gated_scan
from mmrec.kernels.relu_squared.op import squared_relu
from mmrec.kernels.rmsnorm_conv1d.op import norm_conv
from mmrec.kernels.scan.op import scan

__all__ = [
    "associative_memory",
    "cumprod",
    "gated_recurrence",
    "gated_scan",
    "log_cumprod",
    "norm_conv",
    "scan",
    "softmax_parts",
    "squared_relu",
]
