"""Between torch tensors and the flat arrays that kernels walk, and the checks of public ops.

Axes: B batch, T time, D channels. Kernels index ``flat[b * sb + t * st + d]``, so slices of one
fused projection and broadcast inputs are read in place; only the last axis must have stride 1.
"""

import ctypes
import mmap
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)  # taken and given back; float32 inside, and for states

as_array: Callable[[Tensor], np.ndarray] = Tensor.numpy
"""How inputs are lent to kernels; distributed.py sets another way."""


def flat(x: Tensor) -> tuple[np.ndarray, int, int]:
    """View x (B, T, …) as a 1-D array with its strides over B and T, copying only if it must.

    The axes after T must be dense; a tensor where they are not is copied.
    """
    x = x.detach().resolve_conj().resolve_neg()
    if x.is_contiguous() and x.numel():  # the same as below, for less
        st = x.numel() // (x.shape[0] * x.shape[1])
        return as_array(x.view(-1)), x.shape[1] * st, st
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
    return as_array(x.as_strided((length,), (1,))), sb, st


_HUGE = 1 << 24  # bytes; what is smaller, glibc gives out again with its pages in place
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None


def empty(like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """An uninitialised contiguous tensor, on huge pages where it is large and Linux has them.

    Its dtype is that of ``like``, and so is its shape if none is given.

    A first write to fresh memory faults once a page. At 4 KiB a page that takes longer than a scan
    of 128 MiB itself; at 2 MiB a page it does not count. It is advice: refused, nothing changes.
    """
    if shape is None:
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
    else:
        x = like.new_empty(shape)
    size = x.numel() * x.element_size()
    if _madvise is not None and size >= _HUGE and type(x) is Tensor:  # one that has memory
        low = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (x.data_ptr() + size - low) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(ctypes.c_void_p(low), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return x


def widen(x: Tensor | None) -> Tensor | None:
    """A half-precision tensor in float32; any other as it is."""
    return x.float() if x is not None and x.dtype in HALF else x


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Back from ``widen``. (That x has the dtype already is not for torch to find out, in 2 µs.)"""
    return x if x.dtype == dtype else x.to(dtype)


def count(batch: int, cu_seqlens: Tensor | None) -> int:
    """Number of sequences: batch rows, or packed pieces."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_lead(
    name: str,
    x: Tensor,
    axes: str,
    cu_seqlens: Tensor | None,
    dtypes: tuple[torch.dtype, ...] = (*DTYPES, *HALF),
) -> None:
    """Raise ValueError unless x, which sets the sizes, and cu_seqlens are as an op takes them."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor of shape ({axes}); got {type(x).__name__}")
    if x.ndim != len(axes.split(", ")):
        raise ValueError(f"{name} must have axes ({axes}); got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        known = ", ".join(map(_name, dtypes))
        raise ValueError(f"{name} must have one of the dtypes {known}; got {_name(x.dtype)}")
    _check_cpu(name, x)
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = (
            _name(cu_seqlens.dtype) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        )
        raise ValueError(f"cu_seqlens must be a tensor of dtype int32 or int64; got {got}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must have shape (N + 1,), N >= 1 sequences; got {tuple(cu_seqlens.shape)}"
        )
    if x.shape[0] != 1:
        raise ValueError(
            f"with cu_seqlens all sequences lie in one row, so B of {name} must be 1; got "
            f"{x.shape[0]}"
        )
    _check_cpu("cu_seqlens", cu_seqlens)


def check(
    name: str, x: Tensor | None, shape: tuple[int, ...], axes: str, dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless x is a CPU tensor of that shape and, if given, of that dtype."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name} must be a tensor of shape ({axes}) = {shape}; got {type(x).__name__}"
        )
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape ({axes}) = {shape}; got {tuple(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} must have dtype {_name(dtype)}; got {_name(x.dtype)}")
    _check_cpu(name, x)


def expand(name: str, x: Tensor, shape: tuple[int, ...], axes: str, dtype: torch.dtype) -> Tensor:
    """Broadcast x to the shape without a copy. Raises ValueError if it does not broadcast."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name} must be a tensor that broadcasts to ({axes}) = {shape}; got {type(x).__name__}"
        )
    fits = x.shape == shape or (
        x.ndim <= len(shape)
        and all(n in (1, m) for n, m in zip(reversed(x.shape), reversed(shape), strict=False))
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to ({axes}) = {shape}; got {tuple(x.shape)}")
    check(name, x, tuple(x.shape), axes, dtype)
    return x if x.shape == shape else x.expand(shape)


def start(
    name: str,
    state: Tensor | None,
    like: Tensor,
    shape: tuple[int, ...],
    axes: str,
    fill: float = 0.0,
) -> Tensor:
    """The initial state: as given, or filled; of the dtype of ``like``, which is not half."""
    if state is None:
        return like.new_full(shape, fill)
    state = widen(state)
    check(name, state, shape, axes, like.dtype)
    return state  # type: ignore[return-value]


def check_values(**tensors: Tensor | None) -> None:
    """Raise ValueError if a tensor holds NaN or infinity; reads all of them."""
    for name, x in tensors.items():
        if x is not None and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} must be finite; it holds NaN or infinity")


def _check_cpu(name: str, x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, where these kernels run; got {x.device}")
