"""Public associative memory: checked once, then one registered op over compiled kernels.

Axes: B batch, T time, H heads, P head width, N sequences (B, or packed pieces of one row).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.kernels import _register as ops
from mmrec.kernels import _tensors as arrays
from mmrec.kernels._launch import sequences
from mmrec.kernels._tensors import flat
from mmrec.kernels.gated_delta_rule import kernel


def chunks(batch: int, time: int, cu_seqlens: Tensor | None) -> int:
    """Room for the chunk states of all sequences, from shapes alone: packed, an upper bound."""
    whole = -(-time // kernel.CHUNK)
    return batch * whole if cu_seqlens is None else whole + cu_seqlens.shape[0] - 1


def _work(q: Tensor) -> float:
    """Nanoseconds of the forward, about."""
    size = q.shape[-1]
    return q.numel() / max(size, 1) * (60 + 0.1 * size * size)


def _pieces(q: Tensor, cu_seqlens: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The sequences (N, 3), and where the chunk states of each begin and end (N + 1,)."""
    pieces = sequences(q.shape[0], q.shape[1], cu_seqlens)
    counts = -(-(pieces[:, 2] - pieces[:, 1]) // kernel.CHUNK)
    return pieces, np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))


def _shapes(q: Tensor, cu_seqlens: Tensor | None, keep: bool) -> tuple[tuple[int, ...], ...]:
    """Shapes of the output, the last states and the chunk states."""
    batch, time, heads, size = q.shape
    states = (arrays.count(batch, cu_seqlens), heads, size, size)
    return q.shape, states, (chunks(batch, time, cu_seqlens) if keep else 0, heads, size, size)


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    write: Tensor,
    s0: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    out, state, kept = (arrays.empty(q, n) for n in _shapes(q, cu_seqlens, keep))
    state.copy_(s0)
    pieces, first = _pieces(q, cu_seqlens)
    kept[first[-1] :].zero_()  # room that packing did not need
    inputs = [item for x in (q, k, v, decay, write) for item in flat(x)]
    results = (state.numpy(), out.numpy(), kept.numpy())
    kernel.memory_fwd(
        pieces, first, *inputs, *results, tasks=len(pieces) * q.shape[2], work=_work(q)
    )
    return out, state, kept


def _fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    write: Tensor,
    s0: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(n) for n in _shapes(q, cu_seqlens, keep))


def _bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    write: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    dout: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, ...]:
    *grads, adjoint = (arrays.empty(x) for x in (q, k, v, decay, write, dstate))
    adjoint.copy_(dstate)
    inputs = [item for x in (q, k, v, decay, write) for item in flat(x)]
    results = (x.numpy() for x in (adjoint, *grads))
    pieces, first = _pieces(q, cu_seqlens)
    kernel.memory_bwd(
        pieces,
        first,
        *inputs,
        kept.numpy(),
        *flat(dout),
        *results,
        tasks=len(pieces) * q.shape[2],
        work=3 * _work(q),
    )
    return *grads, adjoint


def _bwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    write: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    dout: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(x.shape) for x in (q, k, v, decay, write, dstate))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, cu_seqlens, keep = inputs
    ctx.save_for_backward(*tensors, output[2], cu_seqlens)
    ctx.mark_non_differentiable(output[2])
    ctx.keep = keep


def _backward(ctx: Any, dout: Tensor, dstate: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.keep:
        raise RuntimeError("mmrec::associative_memory has a gradient only with keep=True")
    return *_memory_bwd(*ctx.saved_tensors, dout, dstate), None, None


_memory_bwd = ops.register(
    "associative_memory_bwd",
    "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor write, Tensor kept, Tensor? cu_seqlens,"
    " Tensor dout, Tensor dstate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)
_memory = ops.register(
    "associative_memory",
    "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor write, Tensor s0, Tensor? cu_seqlens,"
    " bool keep) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    setup=_setup,
    backward=_backward,
)


def associative_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    write: Tensor,
    s0: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Associative memory under the gated delta rule, the long-term memory of MM-Rec.

    A matrix S per head is read by content and written with what it does not yet know:
    ``S_t = α_t S_{t-1} + k̂_t β_t (v_t - α_t S_{t-1}ᵀ k̂_t)ᵀ`` and ``o_t = S_tᵀ q̂_t``, where hats
    divide by the norm, ``α = σ(decay)`` and ``β = σ(write)``. If a gradient may be asked for, one
    state in 16 steps is stored, and the others are not needed.

    Args:
        q, k, v: (B, T, H, P) float32, float64, or bfloat16 and float16, which are computed in
            float32: queries, keys (both normalised inside), values.
        decay, write: logits of α and β of the same dtype, (B, T, H) or what broadcasts to it.
        s0: (N, H, P, P), the state before the first step, indexed [key, value]; zero if None.
            float32 for half-precision inputs, else of their dtype.
        cu_seqlens: (N + 1,) int32 or int64: the one row (B = 1) holds N sequences, and sequence n
            has the steps from cu_seqlens[n] up to cu_seqlens[n + 1]. None: each row is one.
        check: also raise ValueError if an input holds NaN or infinity.

    Returns:
        o (B, T, H, P), of the dtype of q, and the last states (N, H, P, P), of that of s0.

    Raises:
        ValueError: an argument is not as above.
        RuntimeError: a second derivative or one in forward mode is asked for.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024, arXiv:2412.06464), eq. 10.
    """
    arrays.check_lead("q", q, "B, T, H, P", cu_seqlens)
    batch, time, heads, size = q.shape
    if size == 0:
        raise ValueError(f"q must have a head width P of at least 1; got shape {tuple(q.shape)}")
    arrays.check("k", k, (batch, time, heads, size), "B, T, H, P", q.dtype)
    arrays.check("v", v, (batch, time, heads, size), "B, T, H, P", q.dtype)
    gates = [
        arrays.expand(name, x, (batch, time, heads), "B, T, H", q.dtype)
        for name, x in (("decay", decay), ("write", write))
    ]
    inputs: list[Any] = [arrays.widen(x) for x in (q, k, v, *gates)]
    shape = (arrays.count(batch, cu_seqlens), heads, size, size)
    axes = "B, H, P, P" if cu_seqlens is None else "N, H, P, P"
    inputs.append(arrays.start("s0", s0, inputs[0], shape, axes))
    if check:
        names = ("q", "k", "v", "decay", "write", "s0")
        arrays.check_values(**dict(zip(names, inputs, strict=True)))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    out, last, _ = _memory(*inputs, cu_seqlens, keep)
    return arrays.narrowed(out, q.dtype), last
