"""Torch tensors as the arrays that kernels read and write, and the argument checks of public ops.

Axes: B batch, T time, D channels, N sequences.

Kernels index an input as ``array[b * stride_b + t * stride_t + d]``. Slices of one fused projection
and broadcast inputs are therefore read in place; only the last axis must have stride 1.

``sequence_bounds`` (N, 3) int64 is the one description of where sequences lie: row n holds the
batch row, the first step and the end of sequence n. Packed sequences and plain batches are the
same case to a kernel.
"""

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels._math import cdiv

FULL_PRECISION = (torch.float32, torch.float64)
LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Dtypes that most ops take and return, but compute in float32, with float32 states."""
KERNEL_DTYPES = (*FULL_PRECISION, torch.bfloat16)
"""Dtypes that the kernels with bfloat16 support read and write themselves; see ``_bf16.py``."""

_to_array: Callable[[Tensor], np.ndarray] = Tensor.numpy


def use_dlpack() -> None:
    """Pass tensors to kernels by DLPack from now on, not by ``Tensor.numpy``.

    FSDP frees the storage of a layer's weights after use and allocates it again before the next.
    torch refuses to resize a storage that ``Tensor.numpy`` has shared with NumPy; it does not
    refuse one that DLPack has shared. ``Tensor.numpy`` is the default because it is faster per
    call. DLPack needs NumPy 2.1 or newer, whose arrays from DLPack are writable.
    """
    global _to_array
    _to_array = np.from_dlpack


def _bits(x: Tensor) -> Tensor:
    """A bfloat16 tensor as uint16, because NumPy has no bfloat16; any other tensor as it is."""
    return x.view(torch.uint16) if x.dtype == torch.bfloat16 else x


def flat(x: Tensor) -> np.ndarray:
    """All elements of a tensor as a 1-D array. Copies only a tensor that is not contiguous."""
    return _to_array(_bits(x.detach().contiguous()).view(-1))


def flat_with_strides(x: Tensor) -> tuple[np.ndarray, int, int]:
    """View x (B, T, …) as a 1-D array, without a copy where possible.

    The axes after T must be dense; a tensor whose axes after T are not dense is copied.

    Returns:
        The array, and the strides of x over B and over T in elements. bfloat16 comes as uint16.
    """
    x = _bits(x.detach()).resolve_conj().resolve_neg()
    if x.is_contiguous() and x.numel():  # the common case, at a lower cost per call
        stride_t = x.numel() // (x.shape[0] * x.shape[1])
        return _to_array(x).reshape(-1), x.shape[1] * stride_t, stride_t  # faster than Tensor.view
    dense = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != dense:
            x = x.contiguous()
            break
        dense *= size
    if x.numel() == 0:
        return x.reshape(-1).numpy(), 0, 0
    batch, time = x.shape[:2]
    stride_b, stride_t = (
        stride if size > 1 else 0 for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True)
    )
    length = (batch - 1) * stride_b + (time - 1) * stride_t + x[0, 0].numel()
    return _to_array(x.as_strided((length,), (1,))), stride_b, stride_t


@functools.lru_cache(maxsize=16)  # a step of decoding asks for the same every time; none writes it
def _plain_bounds(batch: int, time: int) -> np.ndarray:
    """(B, 3) where each batch row is one sequence."""
    sequence_bounds = np.empty((batch, 3), np.int64)
    sequence_bounds[:, 0], sequence_bounds[:, 1] = np.arange(batch), 0
    sequence_bounds[:, 2] = time
    return sequence_bounds


def make_sequence_bounds(batch: int, time: int, cu_seqlens: Tensor | None) -> np.ndarray:
    """(N, 3) int64: the batch row, first step and end of each sequence.

    Args:
        batch: B.
        time: T.
        cu_seqlens: (N + 1,) int32 or int64, the ends of the N sequences packed in the one row, from
            0 on; None if each of the B rows is one sequence.

    Raises:
        ValueError: cu_seqlens does not rise from 0 to T.
    """
    if cu_seqlens is None:
        return _plain_bounds(batch, time)
    edges = cu_seqlens.numpy().astype(np.int64)
    if edges[0] != 0 or edges[-1] != time or (np.diff(edges) < 0).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {time} without falling; got {edges.tolist()[:8]}"
        )
    sequence_bounds = np.zeros((len(edges) - 1, 3), np.int64)
    sequence_bounds[:, 1], sequence_bounds[:, 2] = edges[:-1], edges[1:]
    return sequence_bounds


def _find_madvise() -> Callable[..., Any] | None:
    """The C library's madvise, or None where the system has no huge pages on request."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux only
        return None
    with contextlib.suppress(OSError, TypeError, AttributeError):
        madvise: Callable[..., Any] = ctypes.CDLL(None).madvise
        return madvise
    return None


_madvise = _find_madvise()
_HUGE_PAGE_BYTES = 1 << 24
"""Size from which a tensor is put on huge pages. glibc reuses smaller blocks with their pages."""


def empty(like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """An uninitialised contiguous tensor, on huge pages if it is large and Linux offers them.

    The first write to each page of fresh memory causes a page fault. With pages of 4 KiB these take
    longer than a scan of 128 MiB itself; with pages of 2 MiB they do not show. The request is only
    advice: if the system refuses it, nothing else changes.

    Args:
        like: gives the dtype.
        shape: shape of the result; that of ``like`` if None.
    """
    if shape is None:
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
    else:
        x = like.new_empty(shape)
    size = x.numel() * x.element_size()
    # a subclass, such as a fake tensor, may have no memory
    if _madvise is not None and size >= _HUGE_PAGE_BYTES and type(x) is Tensor:
        begin = cdiv(x.data_ptr(), mmap.PAGESIZE) * mmap.PAGESIZE
        length = (x.data_ptr() + size - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return x


def to_compute_dtype(x: Tensor) -> Tensor:
    """A bfloat16 or float16 tensor in float32; anything else as it is."""
    return x.float() if isinstance(x, Tensor) and x.dtype in LOW_PRECISION else x


def promote(*inputs: Any) -> tuple[Any, ...]:
    """Under autocast, cast real tensors to the widest dtype among them; else leave all as they are.

    This is autocast's rule for ops of several inputs that need no particular precision, such as
    ``torch.cat``. Without autocast, mixed dtypes remain an error, as in ``torch.nn.GRU``.
    """
    if not torch.is_autocast_enabled("cpu"):
        return inputs
    real = (*FULL_PRECISION, *LOW_PRECISION)
    widest: torch.dtype | None = None
    for x in inputs:
        if isinstance(x, Tensor) and x.dtype in real:
            widest = x.dtype if widest is None else torch.promote_types(widest, x.dtype)
    return tuple(
        cast(x, widest) if widest and isinstance(x, Tensor) and x.dtype in real else x
        for x in inputs
    )


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype. (``Tensor.to`` takes 2 µs to find out that x has it already.)"""
    return x if x.dtype == dtype else x.to(dtype)


def sequence_count(batch: int, cu_seqlens: Tensor | None) -> int:
    """N: the number of batch rows, or of packed sequences."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_input(
    name: str,
    x: Tensor,
    axes: str,
    cu_seqlens: Tensor | None,
    dtypes: tuple[torch.dtype, ...] = (*FULL_PRECISION, *LOW_PRECISION),
) -> None:
    """Check the input that sets an op's sizes and dtype, and check cu_seqlens.

    Args:
        name: of the input, for messages.
        x: the input.
        axes: its axes, such as "B, T, D".
        cu_seqlens: (N + 1,) int32 or int64, or None.
        dtypes: dtypes that the op takes.

    Raises:
        ValueError: x is no CPU tensor with these axes and one of these dtypes; or cu_seqlens has
            another shape or dtype, or is given for more than one batch row.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor of shape ({axes}); got {type(x).__name__}")
    if x.ndim != len(axes.split(", ")):
        raise ValueError(f"{name} must have axes ({axes}); got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        known = ", ".join(map(_dtype_name, dtypes))
        raise ValueError(f"{name} must have one of the dtypes {known}; got {_dtype_name(x.dtype)}")
    _check_device(name, x)
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = (
            _dtype_name(cu_seqlens.dtype)
            if isinstance(cu_seqlens, Tensor)
            else type(cu_seqlens).__name__
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
    _check_device("cu_seqlens", cu_seqlens)


def check_tensor(
    name: str, x: Tensor | None, shape: tuple[int, ...], axes: str, dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless x is a CPU tensor of that shape and, if one is given, that dtype."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name} must be a tensor of shape ({axes}) = {shape}; got {type(x).__name__}"
        )
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape ({axes}) = {shape}; got {tuple(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} must have dtype {_dtype_name(dtype)}; got {_dtype_name(x.dtype)}")
    _check_device(name, x)


def broadcast_to(
    name: str, x: Tensor, shape: tuple[int, ...], axes: str, dtype: torch.dtype
) -> Tensor:
    """Broadcast x to the shape, without a copy.

    Raises:
        ValueError: x does not broadcast to the shape, has another dtype, or is not on the CPU.
    """
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
    check_tensor(name, x, tuple(x.shape), axes, dtype)
    return x if x.shape == shape else x.expand(shape)


def resolve_initial_state(
    state: Tensor | None,
    like: Tensor,
    shape: tuple[int, ...],
    axes: str,
    fill: float = 0.0,
    name: str = "initial_state",
) -> Tensor:
    """The state before the first step: the given one, or a constant one.

    Args:
        state: of that shape, or None.
        like: gives the dtype, which is not bfloat16 or float16.
        shape: shape of the state.
        axes: its axes, for messages.
        fill: value of the state if None is given.
        name: of the argument, for messages.

    Raises:
        ValueError: the state has another shape or dtype, or is not on the CPU.
    """
    if state is None:
        return like.new_full(shape, fill)
    state = to_compute_dtype(state)
    check_tensor(name, state, shape, axes, like.dtype)
    return state


def require_finite(**tensors: Tensor | None) -> None:
    """Raise ValueError if a tensor holds NaN or infinity. Reads every element."""
    for name, x in tensors.items():
        if x is not None and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} must be finite; it holds NaN or infinity")


def _check_device(name: str, x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, where these kernels run; got {x.device}")
