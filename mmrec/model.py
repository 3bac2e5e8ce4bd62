"""MM-Rec, the whole model: a residual stack of layers with a short- and a long-term memory.

Axes: B batch, T time, D width, H heads, P = D / H, F feed-forward width, V vocabulary.

One layer, with σ the sigmoid and u the input after norm and a short causal convolution:

    [z, f, g, q, k, v, a, b, r] = u W_in                               one fused projection
    h_t = (1 - γ_t) z_t σ(h_{t-1} W_g + g_t) + γ_t h_{t-1},  γ = σ(f + b_γ)       short-term
    S_t = α_t S_{t-1} + k̂_t β_t (v_t - α_t S_{t-1}ᵀ k̂_t)ᵀ,  o_t = S_tᵀ q̂_t,
                                                  α = σ(a + b_α), β = σ(b)        long-term
    x ← x + ((rms_norm(h) + rms_norm(o)) silu(r)) W_out
    x ← x + relu²(rms_norm(x) W_1) W_2

A layer of the kind ``n`` has the short-term memory with W_g = 0, a linear scan, and no other: all
between its products is one op, ``min_gru_mixer``. x starts as the sum of the embeddings of a token
and of the runs of two and three tokens (of characters four, too) that it ends.

The state of a layer does not grow with the text, and a text may be run whole, in chunks with
carried state, or token by token: the numbers are the same.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.config import ModelConfig
from mmrec.kernels import (
    fused_linear_cross_entropy,
    gated_delta_rule,
    gated_recurrence,
    min_gru_mixer,
    relu_squared,
    rmsnorm_conv1d,
)
from mmrec.packing import Packing, newest, previous
from mmrec.recompute import recompute

RUNS = (  # factors of the hash of pairs, triples and longer runs: of the token before, of the sum
    (1_000_003, 1),
    (998_244_353, 2_654_435_761),
    (1_299_709, 40_503),
    (15_485_863, 69_069),
)


class LayerState(NamedTuple):
    """What one layer remembers between calls."""

    taps: Tensor
    """(B, conv - 1, D), the last inputs of the convolution."""
    h: Tensor | None
    """(B, D), short-term memory, if the layer has one."""
    s: Tensor | None
    """(B, H, P, P), long-term memory, if the layer has one."""


class State(NamedTuple):
    """What the model remembers between calls."""

    recent: Tensor
    """(B, runs - 1) int64, the last tokens."""
    layers: list[LayerState]


class Linear(nn.Module):
    """Matrix product without bias, in float32 or, where asked, in bfloat16."""

    def __init__(self, inputs: int, outputs: int, *, zero: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, inputs) to (…, outputs), in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, *, half: bool = False) -> Tensor:
        return rmsnorm_conv1d(x, self.weight[None], output_bf16=half)[0]


class Dropout(nn.Module):
    """Set a share of the elements to zero in training, and scale up the rest.

    torch's own draws from the one global generator, which lanes that run side by side would reach
    in no fixed order.
    """

    def __init__(self, share: float, *, rows: bool = False) -> None:
        """``rows``: whole vectors at once."""
        super().__init__()
        self.share, self.rows = share, rows

    def forward(self, x: Tensor, dice: torch.Generator | None) -> Tensor:
        if not self.training or self.share == 0:
            return x
        keep = 1 - self.share
        mask = x.new_empty((*x.shape[:-1], 1) if self.rows else x.shape)
        return x * mask.bernoulli_(keep, generator=dice).div_(keep)


def spread_decays(count: int, horizon: int) -> Tensor:
    """Logits (count,) of decays exp(-1/τ), τ spread evenly in log time from 1 to the horizon."""
    tau = torch.logspace(0, math.log10(max(horizon, 1)), count, dtype=torch.float64)
    return -torch.expm1(1 / tau).log().float()  # logit(exp(-1/τ)) = -log(exp(1/τ) - 1)


class Layer(nn.Module):
    """One residual layer: the memories, then the feed-forward."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.kind, self.heads = kind, heads
        self.short, self.long = kind in "sbn", kind in "lb"
        self.parts = [width] * 3 * self.short  # z, f, g
        if self.long:
            self.parts += [width] * 3 + [heads] * 2  # q, k, v, a, b
        self.parts += [width]  # r
        self.taps = nn.Parameter(torch.zeros(config.conv, width))
        nn.init.ones_(self.taps.data[-1])  # at first the convolution passes its input through
        self.project = Linear(width, sum(self.parts))
        if self.short:
            self.decay_bias = nn.Parameter(spread_decays(width, config.horizon))
        self.recurrent = None
        if kind in "sb":
            size = width // config.blocks
            self.recurrent = nn.Parameter(torch.empty(config.blocks, size, size))
            nn.init.normal_(self.recurrent, std=size**-0.5)
            self.short_norm = RMSNorm(width)
        if self.long:
            self.memory_bias = nn.Parameter(spread_decays(heads, config.horizon))
            self.long_norm = RMSNorm(width)
        self.merge = Linear(width, width, zero=True)
        self.ffn_norm = RMSNorm(width)
        self.ffn_in = Linear(width, config.hidden)
        self.ffn_out = Linear(config.hidden, width, zero=True)
        self.dropout = Dropout(config.dropout)

    def start(self, batch: int) -> LayerState:
        """The state before any token."""
        taps, width = self.taps.shape
        size = width // self.heads
        # plain tensors, also where the taps are sharded
        zeros = functools.partial(torch.zeros, dtype=self.taps.dtype, device=self.taps.device)
        return LayerState(
            zeros(batch, taps - 1, width),
            zeros(batch, width) if self.short else None,
            zeros(batch, self.heads, size, size) if self.long else None,
        )

    def remember(
        self, p: Tensor, state: LayerState, cu: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """Both memories: projections p (B, T, …) to their gated outputs (B, T, D)."""
        h_last, s_last, mixed = state.h, state.s, []
        *parts, r = (p.float() if p.dtype == torch.bfloat16 else p).split(self.parts, dim=-1)
        if self.short:
            z, f, g = parts[:3]
            decay = f + self.decay_bias
            h, h_last = gated_recurrence(z, g, decay, self.recurrent, state.h, cu_seqlens=cu)
            mixed.append(self.short_norm(h))
        if self.long:
            q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in parts[-5:-2])
            a, b = parts[-2:]
            a = a + self.memory_bias
            o, s_last = gated_delta_rule(q, k, v, a, b, state.s, cu_seqlens=cu)
            mixed.append(self.long_norm(o.flatten(-2)))
        y = mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1]
        return (y * F.silu(r)).to(p.dtype), LayerState(state.taps, h_last, s_last)

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        *,
        half: bool,
        dice: torch.Generator | None = None,
        cu: Tensor | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Map x (B, T, D) and the state to the new x and the new state; dropout draws from dice.

        ``cu`` (N + 1,) packs N sequences in one row; the state is then that of each of them.
        """
        u, taps = rmsnorm_conv1d(x, self.taps, state.taps, output_bf16=half, cu_seqlens=cu)
        p = self.project(u)
        if self.kind == "n":
            y, h = min_gru_mixer(p, self.decay_bias, state.h, cu_seqlens=cu)
            state = state._replace(h=h)
        else:
            y, state = self.remember(p, state, cu)
        x = x + self.dropout(self.merge(y), dice)
        hidden = relu_squared(self.ffn_in(self.ffn_norm(x, half=half)))
        x = x + self.dropout(self.ffn_out(hidden), dice)
        return x, state._replace(taps=taps)


class Model(nn.Module):
    """The language model: embedding, layers, norm, and logits tied to the embedding."""

    def __init__(
        self, config: ModelConfig, each: Callable[[nn.Module], nn.Module] = lambda layer: layer
    ) -> None:
        """``each`` is given every layer as it is made, before the next one takes memory."""
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        nn.init.normal_(self.embedding, std=0.02)
        if config.ngrams:
            self.ngrams = nn.Parameter(torch.empty(config.ngrams, config.width))
            nn.init.normal_(self.ngrams, std=0.02)
            # twice as often as the rest: they are what learns a text by heart
            self.row_dropout = Dropout(min(0.5, 2 * config.dropout), rows=True)
        self.layers = nn.ModuleList(each(Layer(config, kind)) for kind in config.kinds)
        self.norm = RMSNorm(config.width)
        self.reduced = False  # bfloat16 products
        self.recompute = False  # layers, in backward: only what goes into them is kept

    def set_precision(self, precision: str) -> None:
        """Run matrix products in ``float32`` or ``bfloat16``; all else stays float32."""
        self.reduced = precision == "bfloat16"

    def parameter_groups(
        self, weight_decay: float, table_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Optimizer groups: the layers' matrices, which Muon moves; all else, undecayed; and the
        table of pairs and triples, which would learn the training text by heart."""
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, p in self.layers.named_parameters():
            vector = p.ndim < 2 or name.endswith(("taps", "down", "up"))  # factors: see mmrec.lora
            (others if vector else matrices).append(p)
        rest = dict(self.named_parameters())
        table = [rest.pop("ngrams")] if self.config.ngrams else []
        others += [p for name, p in rest.items() if not name.startswith("layers.")]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": weight_decay, "muon": True},
            {"params": others, "weight_decay": 0.0, "muon": False},
        ]
        if table:
            groups.append({"params": table, "weight_decay": table_decay, "muon": False})
        return groups

    def start(self, batch: int) -> State:
        """The state of every layer before any token."""
        back = self.config.runs - 1
        recent = torch.zeros(batch, back, dtype=torch.int64, device=self.embedding.device)
        return State(recent, [layer.start(batch) for layer in self.layers])  # type: ignore[operator]

    def embed(
        self,
        tokens: Tensor,
        recent: Tensor,
        starts: Tensor | None = None,
        dice: torch.Generator | None = None,
    ) -> Tensor:
        """Sum of the embeddings of each token (B, T) and of the runs of tokens that it ends.

        Pairs, triples and longer runs share one table by a hash (Svenstrup et al. 2017,
        arXiv:1709.03933).
        """
        x = F.embedding(tokens, self.embedding)
        if self.config.ngrams:
            run, earlier = tokens, previous(tokens, recent, starts)
            for before, (factor, spread) in zip(earlier, RUNS, strict=False):
                run = before * factor + run
                number = run * spread
                row = F.embedding((number >> 7 ^ number) % self.config.ngrams, self.ngrams)
                x = x + self.row_dropout(row, dice)
        return x

    def hidden_states(
        self,
        tokens: Tensor,
        state: State | None = None,
        dice: torch.Generator | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Final hidden states (B, T, D), normalised, for tokens (B, T) int64, and the new state.

        ``starts`` (B, T) bool: where it is set, a text begins that knows nothing of what precedes.
        """
        state = self.start(tokens.shape[0]) if state is None else state
        x = self.embed(tokens, state.recent, starts, dice)
        pack = None if starts is None else Packing.of(starts)
        if pack:
            x = x.flatten(0, 1)[None]
        after = []
        for layer, before in zip(self.layers, state.layers, strict=True):
            if pack:
                before = LayerState(*map(pack.spread, before))  # type: ignore[arg-type]
            run = functools.partial(recompute, layer) if self.recompute else layer
            x, last = run(x, before, half=self.reduced, dice=dice, cu=pack and pack.cu_seqlens)
            if pack:
                last = LayerState(*map(pack.gather, last))  # type: ignore[arg-type]
            after.append(last)
        if pack:
            x = x.view(*tokens.shape, -1)
        return self.norm(x), State(newest(tokens, state.recent, starts), after)

    def head(self, x: Tensor) -> Tensor:
        """Logits (…, V) for hidden states (…, D)."""
        return F.linear(x, self.embedding)

    def forward(
        self, tokens: Tensor, state: State | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits (B, T, V) for tokens (B, T) int64, and the state to go on from.

        ``state=None`` starts a text, and so does every True of ``starts`` (B, T). Logits at t
        depend on tokens of the same text up to t only.
        """
        x, after = self.hidden_states(tokens, state, starts=starts)
        return self.head(x), after

    def loss(self, tokens: Tensor, targets: Tensor, dice: torch.Generator | None = None) -> Tensor:
        """Mean cross-entropy in nats a token of targets (B, T) given tokens (B, T), both int64.

        Dropout draws from ``dice``, or from torch's global generator.
        """
        return self.loss_and_state(tokens, targets, dice)[0]

    def loss_and_state(
        self,
        tokens: Tensor,
        targets: Tensor,
        dice: torch.Generator | None = None,
        state: State | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The loss, and the state to go on from."""
        x, after = self.hidden_states(tokens, state, dice, starts)
        loss = fused_linear_cross_entropy(
            x.flatten(0, 1), self.embedding, targets.flatten(), bf16=self.reduced
        )
        return loss, after
