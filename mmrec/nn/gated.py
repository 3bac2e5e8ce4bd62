"""Recurrent modules with the interface of ``torch.nn.GRU``: (input, state) to (output, state).

As in ``torch.nn.GRU``, input and weights have one dtype: float32, float64, bfloat16 or float16.
Under ``torch.autocast`` the input may have another dtype than the weights, the projection runs in
autocast's dtype, and the output is in the wider of it and the input's. The recurrence and its
states are float32, also where input and output are bfloat16 or float16; they are float64 where
these are.

Axes: T time, B batch, I input size, D hidden size, H heads, P = D / H head width, N sequences (B,
or the packed sequences of one row). As in torch, sequences are (T, B, I), or (B, T, I) with
``batch_first``; a sequence without a batch axis is (T, I).
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mmrec.kernels import gated_delta_rule, gated_recurrence
from mmrec.model import log_spaced_decay_logits

MAX_TIMESCALE = 256
"""Longest time constant of a decay at initialisation, in steps."""


class _RecurrentModule(nn.Module):
    """Arguments of the constructor, and conversion of the interface's axes to (B, T, ...)."""

    input_size: int
    hidden_size: int
    num_layers: int
    num_heads: int

    def __init__(self, *, batch_first: bool, **sizes: int) -> None:
        """Keep the sizes as attributes.

        Raises:
            TypeError: a size is no whole number, or ``batch_first`` is no bool.
            ValueError: a size is below 1.
        """
        super().__init__()
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} must be a whole number (int); got {_shown(size)}")
            if size < 1:
                raise ValueError(f"{name} must be >= 1; got {size}")
            setattr(self, name, size)
        if not isinstance(batch_first, bool):
            raise TypeError(f"batch_first must be True or False; got {_shown(batch_first)}")
        self.batch_first = batch_first

    def _to_batch_first(self, x: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
        """The input as (B, T, I), and whether it has a batch axis.

        Args:
            x: the input.
            weight: a weight; x must have its dtype, except under autocast.
        """
        if not isinstance(x, Tensor):
            raise ValueError(f"input must be a tensor; got {type(x).__name__}")
        autocast_dtypes = (torch.float32, torch.bfloat16, torch.float16)
        is_cast = torch.is_autocast_enabled("cpu") and {x.dtype, weight.dtype} <= {*autocast_dtypes}
        if x.dtype != weight.dtype and not is_cast:
            raise ValueError(
                f"input must have the dtype of the weights, {weight.dtype}; got {x.dtype} (cast "
                "one of them, or use torch.autocast)"
            )
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            axes = "(B, T, I)" if self.batch_first else "(T, B, I)"
            raise ValueError(
                f"input must have shape {axes} or (T, I) with I = {self.input_size}; "
                f"got {tuple(x.shape)}"
            )
        if x.ndim == 2:
            return x[None], False
        return (x if self.batch_first else x.transpose(0, 1)), True

    def _from_batch_first(self, y: Tensor, batched: bool, dtype: torch.dtype) -> Tensor:
        """The output in the axes of the interface, for an input of this dtype."""
        if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
            dtype = torch.promote_types(dtype, torch.get_autocast_dtype("cpu"))
        y = y.to(dtype)
        if not batched:
            return y[0]
        return y if self.batch_first else y.transpose(0, 1)


def _shown(value: Any) -> str:
    """A value and its type, in one short line."""
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 40 else text[:39] + '…'} ({type(value).__name__})"


class GatedRecurrence(_RecurrentModule):
    """Layers of the gated recurrence, in place of ``torch.nn.GRU``.

    ``h_t = (1 - γ_t) z_t σ(h_{t-1} W + g_t) + γ_t h_{t-1}``, where z, g and the logits of γ are
    linear in the input; see ``mmrec.kernels.gated_recurrence``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        blocks: int = 1,
    ) -> None:
        """
        Args:
            input_size: I.
            hidden_size: D.
            num_layers: number of layers, each on the output of the one before.
            batch_first: sequences are (B, T, I), not (T, B, I).
            dropout: probability of dropout between layers, in [0, 1], as in torch.
            blocks: number of equal diagonal blocks of W; entries outside of them are zero.

        Raises:
            TypeError: an argument has another type.
            ValueError: a size is below 1, blocks does not divide hidden_size, or dropout is no
                probability.
        """
        super().__init__(
            batch_first=batch_first,
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            blocks=blocks,
        )
        if hidden_size % blocks:
            raise ValueError(f"blocks must divide hidden_size {hidden_size}; got {blocks}")
        if not isinstance(dropout, int | float) or isinstance(dropout, bool):
            raise TypeError(f"dropout must be a number in [0, 1]; got {_shown(dropout)}")
        if not (math.isfinite(dropout) and 0 <= dropout <= 1):
            raise ValueError(f"dropout must be a number in [0, 1]; got {dropout}")
        if dropout and num_layers == 1:
            warnings.warn(
                f"dropout {dropout} has no effect with one layer: it acts between layers",
                stacklevel=2,
            )
        self.dropout = nn.Dropout(dropout)
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.in_proj = nn.ModuleList(nn.Linear(size, 3 * hidden_size) for size in sizes)
        size = hidden_size // blocks
        weights = torch.randn(num_layers, blocks, size, size) * size**-0.5
        self.weight = nn.ParameterList(weights.unbind())
        for layer in self.in_proj:
            bias: Tensor = layer.bias  # type: ignore[assignment]
            bias.data[2 * hidden_size :] = log_spaced_decay_logits(hidden_size, MAX_TIMESCALE)

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, or (T, I).
            hx: (num_layers, N, D), or (num_layers, D) without a batch axis, the initial state; zero
                if None.
            cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, as in
                ``mmrec.kernels.scan``.

        Returns:
            output: like the input, with D in place of I.
            hx: the final state, (num_layers, N, D), or (num_layers, D) without a batch axis.

        Raises:
            ValueError: a shape or dtype is not as above.
        """
        x, batched = self._to_batch_first(input, self.weight[0])
        unbatched_state = not batched and cu_seqlens is None
        if hx is not None and (
            hx.ndim != (2 if unbatched_state else 3) or hx.shape[0] != self.num_layers
        ):
            axes = "(num_layers, D)" if unbatched_state else "(num_layers, N, D)"
            raise ValueError(f"hx must have shape {axes}; got {tuple(hx.shape)}")
        final_states = []
        for n, (in_proj, weight) in enumerate(zip(self.in_proj, self.weight, strict=True)):
            z, gate_logits, decay_logits = in_proj(self.dropout(x) if n else x).chunk(3, -1)
            initial_state = None if hx is None else hx[n][None] if unbatched_state else hx[n]
            x, final_state = gated_recurrence(
                z, gate_logits, decay_logits, weight, initial_state, cu_seqlens=cu_seqlens
            )
            final_states.append(final_state[0] if unbatched_state else final_state)
        return self._from_batch_first(x, batched, input.dtype), torch.stack(final_states)


class GatedDeltaRule(_RecurrentModule):
    """A layer of the gated delta rule. Its state is a matrix per head.

    Queries, keys, values and the logits of both gates are linear in the input; see
    ``mmrec.kernels.gated_delta_rule``.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_heads: int = 1, *, batch_first: bool = False
    ) -> None:
        """
        Args:
            input_size: I.
            hidden_size: D.
            num_heads: H.
            batch_first: sequences are (B, T, I), not (T, B, I).

        Raises:
            TypeError: an argument has another type.
            ValueError: a size is below 1, or num_heads does not divide hidden_size.
        """
        super().__init__(
            batch_first=batch_first,
            input_size=input_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
        )
        if hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size {hidden_size}; got {num_heads}")
        self.in_proj = nn.Linear(input_size, 3 * hidden_size + 2 * num_heads)
        decay_logits = log_spaced_decay_logits(num_heads, MAX_TIMESCALE)
        self.in_proj.bias.data[-2 * num_heads : -num_heads] = decay_logits

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, or (T, I).
            hx: (N, H, P, P), or (H, P, P) without a batch axis, the initial state; zero if None.
            cu_seqlens: (N + 1,) int32 or int64, packs N sequences in one row, as in
                ``mmrec.kernels.scan``.

        Returns:
            output: like the input, with D in place of I.
            hx: the final state, (N, H, P, P), or (H, P, P) without a batch axis.

        Raises:
            ValueError: a shape or dtype is not as above.
        """
        x, batched = self._to_batch_first(input, self.in_proj.weight)
        unbatched_state = not batched and cu_seqlens is None
        sizes = [self.hidden_size] * 3 + [self.num_heads] * 2
        *qkv, g_logits, beta_logits = self.in_proj(x).split(sizes, -1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in qkv)
        initial_state = hx[None] if unbatched_state and hx is not None else hx
        output, final_state = gated_delta_rule(
            q,
            k,
            v,
            g_logits,
            beta_logits,
            scale=1.0,
            initial_state=initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            cu_seqlens=cu_seqlens,
            use_logsigmoid_in_kernel=True,
        )
        assert final_state is not None
        output = self._from_batch_first(output.flatten(-2), batched, input.dtype)
        return output, final_state[0] if unbatched_state else final_state
