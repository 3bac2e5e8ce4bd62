"""CPU recurrences that torch does not have, compiled by Numba and differentiable in torch.

>>> import torch
>>> from mmrec.kernels import scan
>>> h, h_last = scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))
>>> h.flatten().tolist()
[1.0, 1.5, 1.75]
"""

from mmrec.kernels.gated_scan.autograd import gated_scan
from mmrec.kernels.memory.autograd import associative_memory
from mmrec.kernels.norm_conv.autograd import norm_conv
from mmrec.kernels.recurrence.autograd import gated_recurrence
from mmrec.kernels.scan.autograd import scan
from mmrec.kernels.scan.products import cumprod, log_cumprod
from mmrec.kernels.softmax.autograd import softmax_parts
from mmrec.kernels.squared_relu.autograd import squared_relu

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
