"""Gated linear attention and its relatives, all on the kernel of ``mmrec.kernels.kda``.

Axes: B batch, T time, H heads, K and V head widths, D channels, N sequences (B, or the packed
sequences of one row).
"""

import torch
from torch import Tensor

from mmrec.kernels._tensors import (
    FULL_PRECISION,
    LOW_PRECISION,
    cast,
    check_input,
    require_finite,
)
from mmrec.kernels.kda.op import check_log_decay, linear_attention
from mmrec.kernels.scan.op import scan


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention: a matrix S per head, with a decay per key channel.

    ``S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ`` and ``o_t = scale S_tᵀ q_t``. Names, shapes and
    results are those of ``chunk_gla`` in flash-linear-attention. It computes in chunks of 16 steps,
    so a sequence that is cut at a multiple of 16 gives the same bits. Decays of any strength are
    safe: a product of decays that is too small becomes zero.

    For the backward pass one state in 64 steps is stored; without a gradient, none is.

    Args:
        q: (B, T, H, K) float32, float64, bfloat16 or float16, queries.
        k: like q, keys.
        v: (B, T, H, V) of the dtype of q, values.
        g: (B, T, H, K) of the dtype of q, or of float32 or lower, logarithms of the decays, <= 0.
        scale: factor of the outputs; K^-½ if None.
        initial_state: (N, H, K, V), S before the first step; zero if None. N is B, or the number of
            packed sequences. float32 if q is bfloat16 or float16, else of the dtype of q.
        output_final_state: return the final state, else None in its place.
        cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, B = 1: sequence n has the
            steps from cu_seqlens[n] up to cu_seqlens[n + 1]. None: each batch row is one sequence.
        check: also raise ValueError for NaN, infinity and g > 0; costs passes over the inputs.

    Returns:
        o: (B, T, H, V), of the dtype of q.
        final_state: (N, H, K, V), the last S of each sequence, or None.

        Both are differentiable once, in reverse mode. bfloat16 and float16 are computed in float32,
        and the final state is float32 then.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.
        RuntimeError: a second derivative, or one in forward mode, is asked for.

    Source: Yang, Wang, Shen, Panda, Kim 2023, "Gated Linear Attention Transformers with
    Hardware-Efficient Training" (arXiv:2312.06635), section 4.
    """
    return _per_channel(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, check)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``gla`` step by step, with g named gk: for decoding, where T is 1 or a few.

    Where a gradient is needed, it is ``gla`` itself. Both agree to rounding.
    """
    return _per_channel(
        q, k, v, gk, scale, initial_state, output_final_state, cu_seqlens, check, few_steps=True
    )


def _per_channel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None,
    state: Tensor | None,
    output_state: bool,
    cu_seqlens: Tensor | None,
    check: bool,
    few_steps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``gla``: g must have four axes."""
    if not isinstance(g, Tensor) or g.ndim != 4:
        got = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
        raise ValueError(f"g must have axes (B, T, H, K); got {got}")
    return linear_attention(
        q, k, v, g, None, scale, state, output_state, False, cu_seqlens, check, few_steps
    )


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``gla`` with one decay per head: of each step, of all steps, or none.

    Names, shapes and results are those of ``chunk_simple_gla`` in flash-linear-attention.

    Args:
        q: (B, T, H, K) float32, float64, bfloat16 or float16, queries.
        k: like q, keys.
        v: (B, T, H, V) of the dtype of q, values.
        g: (B, T, H) of the dtype of q, or of float32 or lower, logarithms of the decays, <= 0.
        g_gamma: like g but (H,), for all steps; at most one of the two. Without either nothing
            decays.
        scale: as ``gla``, as are the other arguments.
        initial_state: (N, H, K, V).
        output_final_state: return the final state, else None in its place.
        cu_seqlens: (N + 1,).
        check: also raise ValueError for NaN, infinity and log decays > 0.

    Returns:
        o (B, T, H, V) and the final state (N, H, K, V) or None, as ``gla``.

    Raises:
        ValueError: as ``gla``, or both g and g_gamma are given.
    """
    return _per_head(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens, check
    )


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``simple_gla`` step by step: for decoding, where T is 1 or a few.

    Where a gradient is needed, it is ``simple_gla`` itself. Both agree to rounding.
    """
    return _per_head(
        q,
        k,
        v,
        g,
        g_gamma,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        check,
        few_steps=True,
    )


def _per_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float | None,
    state: Tensor | None,
    output_state: bool,
    cu_seqlens: Tensor | None,
    check: bool,
    few_steps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``simple_gla``: the decays become (B, T, H), without a copy."""
    if g is not None and g_gamma is not None:
        raise ValueError("simple_gla takes g or g_gamma; got both")
    check_input("q", q, "B, T, H, K", cu_seqlens)
    batch, time, heads, _ = q.shape
    if g_gamma is not None:
        g = check_log_decay("g_gamma", g_gamma, (heads,), "H", q.dtype).expand(batch, time, heads)
    elif g is None:
        zero = torch.zeros(heads, dtype=torch.float32 if q.dtype in LOW_PRECISION else q.dtype)
        g = zero.expand(batch, time, heads)
    else:
        g = check_log_decay("g", g, (batch, time, heads), "B, T, H", q.dtype)
    return linear_attention(
        q, k, v, g, None, scale, state, output_state, False, cu_seqlens, check, few_steps
    )


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``simple_gla`` with RetNet's decays: ``1 - 2^(-5 - h)`` for head h.

    Arguments and results are those of ``simple_gla``, and of ``chunk_retention`` in
    flash-linear-attention.

    Source: Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language
    Models" (arXiv:2307.08621), section 2.
    """
    check_input("q", q, "B, T, H, K", cu_seqlens)
    exponents = -5 - torch.arange(q.shape[2], dtype=torch.float64)
    g_gamma = _head_decays((-(2**exponents)).log1p(), q)
    return simple_gla(
        q,
        k,
        v,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        check=check,
    )


def lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``simple_gla`` with the decays of lightning attention.

    The logarithm of the decay of head h is ``-8 h / H (1 - layer_idx / num_layers)``. Other
    arguments and the results are those of ``simple_gla``, and of ``chunk_lightning_attn`` in
    flash-linear-attention.

    Args:
        q: (B, T, H, K).
        k: (B, T, H, K).
        v: (B, T, H, V).
        layer_idx: number of the layer, from 0 on.
        num_layers: of the model.
        scale: as ``simple_gla``, as are the other arguments.
        initial_state: (N, H, K, V).
        output_final_state: return the final state, else None in its place.
        cu_seqlens: (N + 1,).
        check: values too.

    Raises:
        ValueError: as ``simple_gla``, or layer_idx is not from 0 up to num_layers - 1.

    Source: Qin et al. 2024, "Various Lengths, Constant Speed: Efficient Language Modeling with
    Lightning Attention" (arXiv:2405.17381).
    """
    check_input("q", q, "B, T, H, K", cu_seqlens)
    if not 0 <= layer_idx < num_layers:
        raise ValueError(
            f"layer_idx must be from 0 up to num_layers - 1 = {num_layers - 1}; got {layer_idx}"
        )
    slope = -(8 / q.shape[2] * (1 - layer_idx / num_layers)) if q.shape[2] else 0.0
    g_gamma = _head_decays(slope * torch.arange(q.shape[2], dtype=torch.float64), q)
    return simple_gla(
        q,
        k,
        v,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        check=check,
    )


def _head_decays(exact: Tensor, q: Tensor) -> Tensor:
    """Log decays (H,) in the dtype that q is computed in."""
    return cast(exact, torch.float32 if q.dtype in LOW_PRECISION else q.dtype)


def hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    check: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence of HGRN: ``h_t = exp(g_t) h_{t-1} + x_t`` for every channel.

    It is ``scan`` with decays as logarithms. Names, shapes and results are those of ``chunk_hgrn``
    and ``fused_recurrent_hgrn`` in flash-linear-attention.

    Args:
        x: (B, T, D) float32, float64, bfloat16 or float16, inputs.
        g: (B, T, D) of the dtype of x, or of float32 or lower, logarithms of the decays, <= 0.
        initial_state: (N, D), the state before the first step; zero if None. N is B, or the number
            of packed sequences. float32 if x is bfloat16 or float16, else of the dtype of x.
        output_final_state: return the final state, else None in its place.
        cu_seqlens: (N + 1,) int32 or int64, as ``scan``.
        check: also raise ValueError for NaN, infinity and g > 0.

    Returns:
        o: (B, T, D), all states, of the dtype of x.
        final_state: (N, D), the last state of each sequence, or None.

        Both are differentiable any number of times.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens is not as above.

    Source: Qin, Yang, Zhong 2023, "Hierarchically Gated Recurrent Neural Network for Sequence
    Modeling" (arXiv:2311.04823).
    """
    check_input("x", x, "B, T, D", cu_seqlens, (*FULL_PRECISION, *LOW_PRECISION))
    g = check_log_decay("g", g, tuple(x.shape), "B, T, D", x.dtype, check)
    if check:
        require_finite(x=x, initial_state=initial_state)
    h, final_state = scan(g.exp(), cast(x, g.dtype), initial_state, cu_seqlens=cu_seqlens)
    return cast(h, x.dtype), final_state if output_final_state else None
