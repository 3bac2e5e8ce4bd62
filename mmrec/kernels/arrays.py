"""Between torch tensors and the flat arrays that kernels walk, and the checks of public ops.

Axes: B batch, T time, D channels. Kernels index ``flat[b * sb + t * st + d]``, so slices of one
fused projection and broadcast inputs are read in place; only the last axis must have stride 1.
"""

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


def flat(x: Tensor) -> tuple[np.ndarray, int, int]:
    """View x (B, T, …) as a 1-D array with its strides over B and T, copying only if it must.

    The axes after T must be dense; a tensor where they are not is copied.
    """
    x = x.detach()
    dense = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != dense:
            x = x.contiguous()
            break
        dense *= size
    if x.numel() == 0:
        return x.reshape(-1).numpy(), 0, 0
    batch, time = x.shape[:2]
    sb, st = (
        stride if size > 1 else 0 for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True)
    )
    inner = x[0, 0].numel()
    length = (batch - 1) * sb + (time - 1) * st + inner
    return x.as_strided((length,), (1,)).numpy(), sb, st


def check(name: str, x: Tensor | None, shape: tuple[int, ...], axes: str, like: Tensor) -> None:
    """Raise ValueError unless x has that shape and the dtype and device of ``like``."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name} must be a tensor of shape ({axes}) = {shape}; got {type(x).__name__}"
        )
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape ({axes}) = {shape}; got {tuple(x.shape)}")
    if x.dtype != like.dtype:
        raise ValueError(f"{name} must have dtype {like.dtype}; got {x.dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU; got device {x.device}")


def check_lead(name: str, x: Tensor, axes: str) -> None:
    """Raise ValueError unless x, which sets the sizes, has these axes and a float dtype."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor of shape ({axes}); got {type(x).__name__}")
    if x.ndim != len(axes.split(", ")):
        raise ValueError(f"{name} must have axes ({axes}); got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must have dtype float32 or float64; got {x.dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU; got device {x.device}")
