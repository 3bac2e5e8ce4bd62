"""MM-Rec, the whole model: a residual stack of layers with a short- and a long-term memory.

Axes: B batch, T time, D width, H heads, P = D / H, F feed-forward width, V vocabulary.

One layer, with σ the sigmoid and u the input after norm and a short causal convolution:

    [z, f, g, r, q, k, v, a, b] = u W_in                               one fused projection
    h_t = (1 - γ_t) z_t σ(h_{t-1} W_g + g_t) + γ_t h_{t-1},  γ = σ(f + b_γ)       short-term
    S_t = α_t S_{t-1} + k̂_t β_t (v_t - α_t S_{t-1}ᵀ k̂_t)ᵀ,  o_t = S_tᵀ q̂_t,
                                                  α = σ(a + b_α), β = σ(b)        long-term
    x ← x + ((rms_norm(h) + rms_norm(o)) silu(r)) W_out
    x ← x + relu²(rms_norm(x) W_1) W_2

The state of a layer does not grow with the text, and a text may be run whole, in chunks with
carried state, or token by token: the numbers are the same.
"""

import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.config import ModelConfig
from mmrec.kernels import associative_memory, gated_recurrence

LOSS_ROWS = 512  # tokens whose logits are alive at once in the loss


class LayerState(NamedTuple):
    """What one layer remembers between calls."""

    taps: Tensor
    """(B, conv - 1, D), the last inputs of the convolution."""
    h: Tensor | None
    """(B, D), short-term memory, if the layer has one."""
    s: Tensor | None
    """(B, H, P, P), long-term memory, if the layer has one."""


State = list[LayerState]


class Linear(nn.Module):
    """Matrix product without bias, in float32 or, where asked, in bfloat16 inside."""

    def __init__(self, inputs: int, outputs: int, *, zero: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.reduced = False  # bfloat16 products
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: Tensor, *, keep: bool = False) -> Tensor:
        """x (…, inputs) to (…, outputs); ``keep`` leaves a bfloat16 product as it is."""
        if not self.reduced:
            return F.linear(x, self.weight)
        y = F.linear(x.bfloat16(), self.weight.bfloat16())
        return y if keep else y.float()


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class _ReluSquared(torch.autograd.Function):
    """relu(x)², keeping one tensor for backward where relu and square would keep two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = x.relu()
        ctx.save_for_backward(kept)
        return kept * kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(2)


def spread_decays(count: int, horizon: int) -> Tensor:
    """Logits (count,) of decays exp(-1/τ), τ spread evenly in log time from 1 to the horizon."""
    tau = torch.logspace(0, math.log10(max(horizon, 1)), count, dtype=torch.float64)
    return -torch.expm1(1 / tau).log().float()  # logit(exp(-1/τ)) = -log(exp(1/τ) - 1)


class Layer(nn.Module):
    """One residual layer: the memories, then the feed-forward."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.short, self.long, self.heads = kind in "sbn", kind in "lb", heads
        self.parts = [width]  # r
        if self.short:
            self.parts += [width] * 3  # z, f, g
        if self.long:
            self.parts += [width] * 3 + [heads] * 2  # q, k, v, a, b
        self.norm = RMSNorm(width)
        self.taps = nn.Parameter(torch.zeros(config.conv, width))
        nn.init.ones_(self.taps.data[-1])  # at first the convolution passes its input through
        self.project = Linear(width, sum(self.parts))
        if self.short:
            self.decay_bias = nn.Parameter(spread_decays(width, config.horizon))
            self.short_norm = RMSNorm(width)
        if kind in "sb":
            size = width // config.blocks
            self.recurrent = nn.Parameter(torch.empty(config.blocks, size, size))
            nn.init.normal_(self.recurrent, std=size**-0.5)
        else:
            self.register_parameter("recurrent", None)
        if self.long:
            self.memory_bias = nn.Parameter(spread_decays(heads, config.horizon))
            self.long_norm = RMSNorm(width)
        self.merge = Linear(width, width, zero=True)
        self.ffn_norm = RMSNorm(width)
        self.ffn_in = Linear(width, config.hidden)
        self.ffn_out = Linear(config.hidden, width, zero=True)
        self.dropout = nn.Dropout(config.dropout)

    def start(self, batch: int) -> LayerState:
        """The state before any token."""
        width = self.taps.shape[1]
        size = width // self.heads
        return LayerState(
            self.taps.new_zeros(batch, self.taps.shape[0] - 1, width),
            self.taps.new_zeros(batch, width) if self.short else None,
            self.taps.new_zeros(batch, self.heads, size, size) if self.long else None,
        )

    def _convolve(self, u: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        taps, time = self.taps.shape[0], u.shape[1]
        if taps == 1:
            return u * self.taps[0], before
        padded = torch.cat((before, u), 1)  # (B, conv - 1 + T, D)
        out = padded[:, :time] * self.taps[0]
        for i in range(1, taps):
            out = torch.addcmul(out, padded[:, i : i + time], self.taps[i])
        return out, padded[:, time:]

    def forward(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """Map x (B, T, D) and the state to the new x and the new state."""
        u, taps = self._convolve(self.norm(x), state.taps)
        r, *parts = self.project(u).split(self.parts, dim=-1)
        h_last, s_last, mixed = state.h, state.s, []
        if self.short:
            z, f, g = parts[:3]
            h, h_last = gated_recurrence(z, g, f + self.decay_bias, self.recurrent, state.h)
            mixed.append(self.short_norm(h))
        if self.long:
            q, k, v = (p.unflatten(-1, (self.heads, -1)) for p in parts[-5:-2])
            a, b = parts[-2:]
            o, s_last = associative_memory(q, k, v, a + self.memory_bias, b, state.s)
            mixed.append(self.long_norm(o.flatten(-2)))
        y = mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1]
        x = x + self.dropout(self.merge(y * F.silu(r)))
        hidden = _ReluSquared.apply(self.ffn_in(self.ffn_norm(x), keep=True))
        x = x + self.dropout(self.ffn_out(hidden))
        return x, LayerState(taps, h_last, s_last)


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x Eᵀ against targets, a few hundred tokens at a time.

    Logits are as large as V numbers a token; computing each chunk's gradient while its logits are
    still in cache means they are never stored, and never read back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, half: bool) -> Tensor:
        dtype = torch.bfloat16 if half else x.dtype
        need = any(ctx.needs_input_grad)
        e = weight.to(dtype)
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float64)
        for lo in range(0, x.shape[0], LOSS_ROWS):
            rows, y = x[lo : lo + LOSS_ROWS].to(dtype), targets[lo : lo + LOSS_ROWS, None]
            logits = F.linear(rows, e).to(x.dtype)
            top, right = logits.amax(-1, keepdim=True), logits.gather(1, y)
            total_exp = logits.sub_(top).exp_().sum(-1, keepdim=True)
            total += (total_exp.log() + top - right).sum(dtype=torch.float64)
            if need:  # softmax minus one-hot, the two parts apart: fewer passes over the logits
                share = total_exp.reciprocal()
                powers = logits.to(dtype)
                dx[lo : lo + LOSS_ROWS] = (powers @ e) * share - weight[y[:, 0]]
                dweight += powers.T @ (rows * share).to(dtype)
                dweight.index_add_(0, y[:, 0], x[lo : lo + LOSS_ROWS], alpha=-1)
        ctx.save_for_backward(dx, dweight)
        return (total / x.shape[0]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        scale = grad / dx.shape[0]
        return dx * scale, dweight * scale, None, None


class Model(nn.Module):
    """The language model: embedding, layers, norm, and logits tied to the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        nn.init.normal_(self.embedding, std=0.02)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.kinds)
        self.norm = RMSNorm(config.width)
        self.reduced = False  # bfloat16 products

    def set_precision(self, precision: str) -> None:
        """Run matrix products in ``float32`` or ``bfloat16``; all else stays float32."""
        self.reduced = precision == "bfloat16"
        for module in self.modules():
            if isinstance(module, Linear):
                module.reduced = self.reduced

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: weight decay on matrices only (not norms, biases, embedding)."""
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, p in self.named_parameters():
            plain = p.ndim < 2 or name.endswith("taps") or name == "embedding"
            (others if plain else matrices).append(p)
        return [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def start(self, batch: int) -> State:
        """The state of every layer before any token."""
        return [layer.start(batch) for layer in self.layers]  # type: ignore[operator]

    def hidden_states(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Final hidden states (B, T, D), normalised, for tokens (B, T) int64, and the new state."""
        state = self.start(tokens.shape[0]) if state is None else state
        x = F.embedding(tokens, self.embedding)
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, last = layer(x, before)
            after.append(last)
        return self.norm(x), after

    def head(self, x: Tensor) -> Tensor:
        """Logits (…, V) for hidden states (…, D)."""
        return F.linear(x, self.embedding)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) for tokens (B, T) int64, and the state to go on from.

        ``state=None`` starts a text. Logits at t depend on tokens up to t only.
        """
        x, after = self.hidden_states(tokens, state)
        return self.head(x), after

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token of targets (B, T) given tokens (B, T), both int64."""
        x, _ = self.hidden_states(tokens)
        return _HeadLoss.apply(x.flatten(0, 1), self.embedding, targets.flatten(), self.reduced)


def probe_bfloat16() -> bool:
    """Whether this processor multiplies matrices clearly faster in bfloat16 than in float32."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.randn(1024, 512).to(dtype), torch.randn(512, 512).to(dtype)
        a @ b
        best = math.inf
        for _ in range(5):
            begin = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - begin)
        return best

    # The casts to and from bfloat16 cost memory traffic, so a small advantage is none.
    return seconds(torch.bfloat16) * 1.3 < seconds(torch.float32)
