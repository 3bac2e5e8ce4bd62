"""mmrec's ops under the names and signatures that transformers' models call.

A model of transformers calls a function of its own module, and the name that the function has on
Hugging Face's hub says which op it is: ``OPS`` has ours by that name. Each takes the parameters of
transformers' function, in its order. It returns NotImplemented for a case that mmrec has no kernel
for; the function of transformers computes that one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmrec import kernels

MAX_WIDTH = 256
"""Widest head of the delta rules."""


def is_packed(options: dict[str, Any]) -> bool:
    """Whether a call has several sequences per row, by what the model hands on."""
    names = ("seq_idx", "cu_seqlens", "cu_seq_lens_q")
    return any(options.get(name) is not None for name in names)


def _bounds(options: dict[str, Any]) -> Tensor | None:
    """First steps of packed sequences, then the length of the row; None if there are none."""
    bounds = options.get("cu_seqlens")
    return options.get("cu_seq_lens_q") if bounds is None else bounds


def _cu_seqlens(options: dict[str, Any]) -> Tensor | None:
    """Bounds of packed sequences, from ``seq_idx`` if the model hands on only that one."""
    seq_idx = options.get("seq_idx")
    if _bounds(options) is not None or seq_idx is None:
        return _bounds(options)
    if seq_idx.shape[0] != 1:
        raise ValueError(
            f"seq_idx must have one row for the delta rules; got shape {tuple(seq_idx.shape)}"
        )
    row = seq_idx[0]
    starts = torch.nonzero(row[1:] != row[:-1]).flatten() + 1
    return torch.cat((starts.new_zeros(1), starts, starts.new_full((1,), len(row))))


def _seq_idx(options: dict[str, Any]) -> Tensor | None:
    """Number of each step's sequence (1, T), from bounds if the model hands on only those."""
    seq_idx, bounds = options.get("seq_idx"), _bounds(options)
    if seq_idx is not None or bounds is None:
        return seq_idx
    numbers = torch.arange(len(bounds) - 1, dtype=torch.int32)
    return torch.repeat_interleave(numbers, torch.diff(bounds))[None]


def _delta_rule(
    name: str,
    inputs: tuple[Tensor, ...],
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    options: dict[str, Any],
) -> Any:
    """A delta rule of ``mmrec.kernels``, for heads that are not too wide for it."""
    _, key, value, _, _ = inputs
    if max(key.shape[-1], value.shape[-1]) > MAX_WIDTH:
        return NotImplemented
    return getattr(kernels, name)(
        *inputs,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=_cu_seqlens(options),
    )


def _chunked(name: str) -> Callable[..., Any]:
    """A delta rule for many steps; the chunks of the kernel have their own size."""

    def op(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **options: Any,
    ) -> Any:
        inputs = (query, key, value, g, beta)
        choices = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
        return _delta_rule(name, inputs, *choices, options)

    return op


def _recurrent(name: str) -> Callable[..., Any]:
    """A delta rule for few steps."""

    def op(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **options: Any,
    ) -> Any:
        inputs = (query, key, value, g, beta)
        choices = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
        return _delta_rule(name, inputs, *choices, options)

    return op


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **options: Any,
) -> Any:
    """The causal depthwise convolution of (B, D, T)."""
    if activation not in (None, "silu", "swish"):
        return NotImplemented
    return kernels.causal_conv1d_fn(
        hidden_states, weight, bias, seq_idx=_seq_idx(options), activation=activation
    )


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """The causal depthwise convolution of new steps; ``conv_state`` takes them in."""
    if activation not in (None, "silu", "swish"):
        return NotImplemented
    return kernels.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)


def selective_scan_fn(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **options: Any,
) -> Any:
    """Mamba's selective scan; the two choices among torch's ways of computing it do not apply."""
    return kernels.selective_scan_fn(
        hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
    )


def selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **options: Any,
) -> Any:
    """One step of Mamba or Mamba 2; ``state`` takes it in."""
    return kernels.selective_state_update(
        state, hidden_states, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus
    )


def mamba_chunk_scan_combined(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **options: Any,
) -> Any:
    """The scan of Mamba 2."""
    return kernels.mamba_chunk_scan_combined(
        hidden_states,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=options.get("z"),
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=_seq_idx(options),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )


def _compose(*arguments: Any, **options: Any) -> None:
    """Tell a model to call convolution, scan and products one by one, as without a GPU's kernels.

    The fused functions do not mask padding between convolution and scan, so their numbers differ
    for padded rows. Transformers' own functions return None for the same purpose, but refuse packed
    sequences first.
    """


OPS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "chunk_gated_delta_rule": _chunked("gated_delta_rule"),
    "chunk_kda": _chunked("kda"),
    "fused_recurrent_gated_delta_rule": _recurrent("fused_recurrent_gated_delta_rule"),
    "fused_recurrent_kda": _recurrent("fused_recurrent_kda"),
    "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
    "mamba_inner_fn": _compose,
    "mamba_split_conv1d_scan_combined": _compose,
    "selective_scan_fn": selective_scan_fn,
    "selective_state_update": selective_state_update,
}
"""Ours by the name on the hub."""
