"""Modules in the manner of ``torch.nn.GRU``: (input, state) to (output, state).

Axes: T time, B batch, I input size, D hidden size, H heads, P = D / H. As in torch, sequences are
(T, B, I) unless ``batch_first``, and one without a batch is (T, I).
"""

import torch
from torch import Tensor, nn

from mmrec.kernels import associative_memory, gated_recurrence
from mmrec.model import log_spaced_decay_logits

HORIZON = 256  # longest time constant, in steps, at initialisation


class _Recurrent(nn.Module):
    """What both share: the axes of the input, taken apart and put together again."""

    batch_first: bool
    input_size: int

    def _batch(self, x: Tensor) -> tuple[Tensor, bool]:
        """Input as (B, T, I), and whether it had a batch."""
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            axes = "(B, T, I)" if self.batch_first else "(T, B, I)"
            raise ValueError(
                f"input must have shape {axes} or (T, I) with I = {self.input_size}; "
                f"got {tuple(x.shape)}"
            )
        if x.ndim == 2:
            return x[None], False
        return (x if self.batch_first else x.transpose(0, 1)), True

    def _unbatch(self, y: Tensor, batched: bool) -> Tensor:
        if not batched:
            return y[0]
        return y if self.batch_first else y.transpose(0, 1)


class GatedRecurrence(_Recurrent):
    """Layers of the gated recurrence, where ``torch.nn.GRU`` would stand.

    ``h_t = (1 - γ_t) z_t σ(h_{t-1} W + g_t) + γ_t h_{t-1}``, with z, g and the logits of γ linear
    in the input; see ``mmrec.kernels.gated_recurrence``.
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
        """``blocks`` makes W block-diagonal; ``dropout`` acts between layers, as in torch.

        Raises ValueError if blocks does not divide the hidden size.
        """
        super().__init__()
        if blocks < 1 or hidden_size % blocks:
            raise ValueError(f"blocks must divide hidden_size {hidden_size}; got {blocks}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.in_proj = nn.ModuleList(nn.Linear(size, 3 * hidden_size) for size in sizes)
        size = hidden_size // blocks
        weights = torch.randn(num_layers, blocks, size, size) * size**-0.5
        self.weight = nn.ParameterList(weights.unbind())
        for layer in self.in_proj:
            bias: Tensor = layer.bias  # type: ignore[assignment]
            bias.data[2 * hidden_size :] = log_spaced_decay_logits(hidden_size, HORIZON)

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and final state.

        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, or (T, I).
            hx: (num_layers, N, D), or (num_layers, D) without a batch; zero if None. N is B, or
                the number of packed sequences.
            cu_seqlens: packed sequences of one row, as in ``mmrec.kernels.scan``.

        Returns:
            output, like the input with D for I, and the state (num_layers, N, D).

        Raises:
            ValueError: a shape or dtype is not as above.
        """
        x, batched = self._batch(input)
        plain = not batched and cu_seqlens is None
        if hx is not None and (hx.ndim != (2 if plain else 3) or hx.shape[0] != self.num_layers):
            axes = "(num_layers, D)" if plain else "(num_layers, N, D)"
            raise ValueError(f"hx must have shape {axes}; got {tuple(hx.shape)}")
        last = []
        for n, (project, weight) in enumerate(zip(self.in_proj, self.weight, strict=True)):
            z, gate, decay = project(self.dropout(x) if n else x).chunk(3, -1)
            start = None if hx is None else hx[n][None] if plain else hx[n]
            x, state = gated_recurrence(z, gate, decay, weight, start, cu_seqlens=cu_seqlens)
            last.append(state[0] if plain else state)
        return self._unbatch(x, batched), torch.stack(last)


class AssociativeMemory(_Recurrent):
    """A layer of associative memory: queries, keys, values and gates linear in the input.

    See ``mmrec.kernels.associative_memory``. Its state is a matrix a head.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_heads: int = 1, *, batch_first: bool = False
    ) -> None:
        """Raises ValueError if num_heads does not divide the hidden size."""
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size {hidden_size}; got {num_heads}")
        self.input_size, self.hidden_size, self.num_heads = input_size, hidden_size, num_heads
        self.batch_first = batch_first
        self.in_proj = nn.Linear(input_size, 3 * hidden_size + 2 * num_heads)
        self.in_proj.bias.data[-2 * num_heads : -num_heads] = log_spaced_decay_logits(
            num_heads, HORIZON
        )

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and final state.

        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, or (T, I).
            hx: (N, H, P, P), or (H, P, P) without a batch; zero if None.
            cu_seqlens: packed sequences of one row, as in ``mmrec.kernels.scan``.

        Returns:
            output, like the input with D for I, and the state, like hx.

        Raises:
            ValueError: a shape or dtype is not as above.
        """
        x, batched = self._batch(input)
        plain = not batched and cu_seqlens is None
        sizes = [self.hidden_size] * 3 + [self.num_heads] * 2
        *qkv, decay, write = self.in_proj(x).split(sizes, -1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in qkv)
        start = hx[None] if plain and hx is not None else hx
        o, state = associative_memory(q, k, v, decay, write, start, cu_seqlens=cu_seqlens)
        return self._unbatch(o.flatten(-2), batched), state[0] if plain else state
