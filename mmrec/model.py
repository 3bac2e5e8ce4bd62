"""MM-Rec (multi-memory recurrence), the whole model: read this file from top to bottom.

Axes: B batch, T time, D width, H heads, P = D / H, F feed-forward width, V vocabulary,
N packed sequences, K convolution width.

The model is a residual stack of layers. Let σ be the sigmoid and u the layer's input after an
RMSNorm and a causal depthwise convolution of width K. One layer computes

    [z, f, g, q, k, v, a, b, r] = u W_in                                     in_proj
    γ_t = σ(f_t + forget_bias)
    h_t = (1 - γ_t) z_t σ(h_{t-1} W_g + g_t) + γ_t h_{t-1}                   gated recurrence
    α_t = σ(a_t + delta_decay_bias),  β_t = σ(b_t),  k̂ = k / |k|,  q̂ = q / |q|
    S_t = α_t S_{t-1} + k̂_t β_t (v_t - α_t S_{t-1}ᵀ k̂_t)ᵀ                   gated delta rule
    o_t = S_tᵀ q̂_t
    x ← x + ((rms_norm(h) + rms_norm(o)) silu(r)) W_out                      out_proj
    x ← x + relu²(rms_norm(x) W_up) W_down                                   feed-forward

A layer type is one letter, which selects the memories of the layer:

    n   the gated recurrence with W_g = 0, which is a minGRU: ``kernels.min_gru_mixer``
    s   the gated recurrence with its full recurrent weight W_g
    l   the gated delta rule
    b   both the gated recurrence and the gated delta rule

The input x of the first layer is the sum of the token embedding and of n-gram embeddings: one row
of a hashed table for each n-gram (n = 2 … ``max_ngram``) that ends at the token.

The state of a layer has a fixed size. A text can be run whole, in chunks with carried state, or
token by token: the numbers are the same.

Sources: minGRU, Feng et al. 2024 (arXiv:2410.01201); gated delta rule, Yang et al. 2024
(arXiv:2412.06464, eq. 10); relu², So et al. 2021 (arXiv:2109.08668); hashed n-gram embeddings,
Svenstrup et al. 2017 (arXiv:1709.03933).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmrec.config import NGRAM_HASH, ModelConfig
from mmrec.kernels import (
    dropout_add,
    fused_linear_cross_entropy,
    gated_delta_rule,
    gated_recurrence,
    min_gru_mixer,
    relu_squared,
    rmsnorm_conv1d,
)

Result = TypeVar("Result")


class LayerState(NamedTuple):
    """What one layer carries from one call to the next."""

    conv_state: Tensor
    """(B, K - 1, D), the last normalised inputs of the convolution."""
    hidden_state: Tensor | None
    """(B, D), h of the gated recurrence; None if the layer has none."""
    delta_state: Tensor | None
    """(B, H, P, P), S of the gated delta rule; None if the layer has none."""


class State(NamedTuple):
    """What the model carries from one call to the next."""

    recent_tokens: Tensor
    """(B, max_ngram - 1) int64, the last tokens, the newest last."""
    layers: list[LayerState]
    """One state per layer."""


class Linear(nn.Module):
    """Matrix product without bias, in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, *, zero_init: bool = False) -> None:
        """Draw the weight from N(0, 1 / in_features), or set it to zero if ``zero_init``."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        if zero_init:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…, in_features) to (…, out_features)."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale each channel.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467, eq. 4).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, *, bf16: bool = False) -> Tensor:
        """Normalise x (B, T, D); the output is bfloat16 if ``bf16``, else of x's dtype."""
        return rmsnorm_conv1d(x, self.weight[None], output_bf16=bf16)[0]


class RowDropout(nn.Module):
    """Zero a share of the rows in training, and scale the others by 1 / (1 - p).

    ``torch.nn.Dropout`` draws from the global generator. Replicas that run side by side in threads
    would reach it in no fixed order, so this one takes the generator as an argument.
    """

    def __init__(self, p: float) -> None:
        """Zero a row with probability ``p``."""
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return x (…, D) with dropout in training mode, unchanged in evaluation mode."""
        if not self.training or self.p == 0:
            return x
        keep_probability = 1 - self.p
        mask = x.new_empty((*x.shape[:-1], 1))
        return x * mask.bernoulli_(keep_probability, generator=generator).div_(keep_probability)


def log_spaced_decay_logits(count: int, max_timescale: int) -> Tensor:
    """Logits of decay rates whose time constants are spaced evenly in log time.

    Args:
        count: number of decays.
        max_timescale: the longest time constant τ, in tokens; the shortest is 1.

    Returns:
        (count,) float32, ``logit(exp(-1 / τ))``.
    """
    tau = torch.logspace(0, math.log10(max(max_timescale, 1)), count, dtype=torch.float64)
    return -torch.expm1(1 / tau).log().float()  # logit(exp(-1/τ)) = -log(exp(1/τ) - 1)


DELTA_RULE_OPTIONS: dict[str, Any] = {
    "scale": 1.0,
    "use_qk_l2norm_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "use_logsigmoid_in_kernel": True,
}
"""How layers call gated_delta_rule: queries and keys of norm 1, and logits as gates."""


class Layer(nn.Module):
    """One residual layer: its memories, then its feed-forward network."""

    def __init__(self, config: ModelConfig, layer_type: str) -> None:
        """Make a layer of a type: one of the letters ``n``, ``s``, ``l``, ``b``."""
        super().__init__()
        width, heads = config.width, config.heads
        self.layer_type, self.heads = layer_type, heads
        self.has_recurrence, self.has_delta_rule = layer_type in "sbn", layer_type in "lb"
        self.projection_sizes = [width] * 3 * self.has_recurrence  # z, f, g
        if self.has_delta_rule:
            self.projection_sizes += [width] * 3 + [heads] * 2  # q, k, v, a, b
        self.projection_sizes += [width]  # r
        self.conv_weight = nn.Parameter(torch.zeros(config.conv_width, width))
        nn.init.ones_(self.conv_weight.data[-1])  # initially the convolution is the identity
        self.in_proj = Linear(width, sum(self.projection_sizes))
        if self.has_recurrence:
            self.forget_bias = nn.Parameter(log_spaced_decay_logits(width, config.max_timescale))
        self.recurrent_weight = None
        if layer_type in "sb":
            block = width // config.recurrent_blocks
            weight = torch.empty(config.recurrent_blocks, block, block)
            self.recurrent_weight = nn.Parameter(weight)
            nn.init.normal_(self.recurrent_weight, std=block**-0.5)
            self.recurrence_norm = RMSNorm(width)
        if self.has_delta_rule:
            logits = log_spaced_decay_logits(heads, config.max_timescale)
            self.delta_decay_bias = nn.Parameter(logits)
            self.delta_norm = RMSNorm(width)
        self.out_proj = Linear(width, width, zero_init=True)
        self.ffn_norm = RMSNorm(width)
        self.up_proj = Linear(width, config.ffn_width)
        self.down_proj = Linear(config.ffn_width, width, zero_init=True)
        self.dropout = config.dropout

    def initial_state(self, batch_size: int) -> LayerState:
        """The state before the first token: all zeros."""
        conv_width, width = self.conv_weight.shape
        head_width = width // self.heads
        # plain tensors, also where the parameters are sharded over processes
        zeros = functools.partial(
            torch.zeros, dtype=self.conv_weight.dtype, device=self.conv_weight.device
        )
        return LayerState(
            zeros(batch_size, conv_width - 1, width),
            zeros(batch_size, width) if self.has_recurrence else None,
            zeros(batch_size, self.heads, head_width, head_width) if self.has_delta_rule else None,
        )

    def mix_tokens(
        self, projected: Tensor, state: LayerState, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """Run the memories of a layer of type ``s``, ``l`` or ``b``.

        Args:
            projected: (B, T, sum of projection_sizes), the output of ``in_proj``.
            state: the layer's state before the first step.
            cu_seqlens: (N + 1,), bounds of packed sequences, or None.

        Returns:
            The gated outputs of the memories (B, T, D), of projected's dtype, and the new state.
        """
        hidden_state, delta_state, outputs = state.hidden_state, state.delta_state, []
        full_precision = projected if projected.dtype == torch.float64 else projected.float()
        *parts, output_gate = full_precision.split(self.projection_sizes, dim=-1)
        if self.has_recurrence:
            candidate, forget, gate = parts[:3]
            h, hidden_state = gated_recurrence(
                candidate,
                gate,
                forget + self.forget_bias,
                None if self.recurrent_weight is None else self.recurrent_weight.to(forget.dtype),
                state.hidden_state,
                cu_seqlens=cu_seqlens,
            )
            outputs.append(self.recurrence_norm(h))
        if self.has_delta_rule:
            q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in parts[-5:-2])
            decay, beta = parts[-2:]
            o, delta_state = gated_delta_rule(
                q,
                k,
                v,
                decay + self.delta_decay_bias,
                beta,
                initial_state=state.delta_state,
                output_final_state=True,
                cu_seqlens=cu_seqlens,
                **DELTA_RULE_OPTIONS,
            )
            outputs.append(self.delta_norm(o.flatten(-2)))
        y = outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
        y = (y * F.silu(output_gate)).to(projected.dtype)
        return y, LayerState(state.conv_state, hidden_state, delta_state)

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        *,
        bf16: bool,
        generator: torch.Generator | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Apply the layer.

        Args:
            x: (B, T, D), the residual stream.
            state: the state before the first step; with ``cu_seqlens`` that of each sequence.
            bf16: run the matrix products in bfloat16.
            generator: what dropout draws from; None for torch's global generator.
            cu_seqlens: (N + 1,), bounds of N sequences packed in one row, or None.

        Returns:
            The new residual stream (B, T, D) and the new state.
        """
        u, conv_state = rmsnorm_conv1d(
            x, self.conv_weight, state.conv_state, output_bf16=bf16, cu_seqlens=cu_seqlens
        )
        projected = self.in_proj(u)
        if self.layer_type == "n":
            y, hidden_state = min_gru_mixer(
                projected, self.forget_bias, state.hidden_state, cu_seqlens=cu_seqlens
            )
            state = state._replace(hidden_state=hidden_state)
        else:
            y, state = self.mix_tokens(projected, state, cu_seqlens)
        dropout = (self.dropout, self.training)
        x = dropout_add(self.out_proj(y), x, *dropout, generator=generator)
        activations = relu_squared(self.up_proj(self.ffn_norm(x, bf16=bf16)))
        x = dropout_add(self.down_proj(activations), x, *dropout, generator=generator)
        return x, state._replace(conv_state=conv_state)


class Model(nn.Module):
    """The language model: embedding, layers, final norm, and logits tied to the embedding."""

    def __init__(
        self,
        config: ModelConfig,
        wrap_layer: Callable[[nn.Module], nn.Module] = lambda layer: layer,
    ) -> None:
        """Initialise the weights from torch's global generator.

        Args:
            config: the shape.
            wrap_layer: called with each layer as soon as it exists, before the next one takes
                memory. Fully sharded training (FSDP) shards it here.
        """
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        nn.init.normal_(self.embedding, std=0.02)
        if config.ngram_buckets:
            self.ngram_embedding = nn.Parameter(torch.zeros(config.ngram_buckets, config.width))
            # in a large table an n-gram that training never meets must change nothing
            if not config.has_large_ngram_table:
                nn.init.normal_(self.ngram_embedding, std=0.02)
            # twice the rate of the other dropouts: these rows are what overfits first
            self.ngram_dropout = RowDropout(min(0.5, 2 * config.dropout))
        layer_types = config.resolved_layer_types
        self.layers = nn.ModuleList(wrap_layer(Layer(config, t)) for t in layer_types)
        self.norm = RMSNorm(config.width)
        self.bf16 = False
        """Whether matrix products run in bfloat16. Recurrences always run in float32."""
        self.activation_checkpointing = False
        """Whether backward recomputes each layer from its input instead of keeping activations."""
        self.sparse_gradients = False
        """Whether the gradient of a large n-gram embedding is a sparse tensor, as with ``sparse``
        of ``torch.nn.Embedding``: the rows that were read, and no others. ``MuonAdamW`` takes it.
        """

    def set_precision(self, precision: str) -> None:
        """Run matrix products in ``float32`` or ``bfloat16``; everything else stays float32.

        Raises:
            ValueError: the precision is neither.
        """
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16'; got {precision!r}")
        self.bf16 = precision == "bfloat16"

    def initial_state(self, batch_size: int) -> State:
        """The state before the first token of ``batch_size`` texts."""
        context = self.config.max_ngram - 1
        device = self.embedding.device
        recent_tokens = torch.zeros(batch_size, context, dtype=torch.int64, device=device)
        layers = [layer.initial_state(batch_size) for layer in self.layers]  # type: ignore[operator]
        return State(recent_tokens, layers)

    def embed(
        self,
        tokens: Tensor,
        recent_tokens: Tensor,
        document_starts: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sum of the embedding of each token and of the n-grams that end at it.

        Args:
            tokens: (B, T) int64.
            recent_tokens: (B, max_ngram - 1) int64, the tokens before them.
            document_starts: (B, T) bool, see ``hidden_states``.
            generator: what dropout draws from; None for torch's global generator.

        Returns:
            (B, T, D) float32.
        """
        x = F.embedding(tokens, self.embedding)
        if self.config.ngram_buckets:
            previous = previous_tokens(tokens, recent_tokens, document_starts)
            buckets = ngram_rows(tokens, previous, self.config.ngram_buckets)
            is_sparse = self.sparse_gradients and self.config.has_large_ngram_table
            rows = F.embedding(buckets, self.ngram_embedding, sparse=is_sparse)
            for row in self.ngram_dropout(rows, generator).unbind():
                x = x + row
        return x

    def hidden_states(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        document_starts: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, State]:
        """Hidden states after the final norm.

        Args:
            tokens: (B, T) int64.
            state: what an earlier call returned; None begins a text in every row.
            document_starts: (B, T) bool. Where it is True a document begins that must not see
                what precedes it.
            generator: what dropout draws from; None for torch's global generator.

        Returns:
            (B, T, D) float32, and the state after the last token. Position t depends only on
            tokens of its own document up to t.
        """
        state = self.initial_state(tokens.shape[0]) if state is None else state
        x = self.embed(tokens, state.recent_tokens, document_starts, generator)
        packing = None
        if document_starts is not None:
            packing = Packing.from_document_starts(document_starts)
            x = x.flatten(0, 1)[None]
        new_layer_states = []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            if packing:
                layer_state = LayerState(*map(packing.rows_to_sequences, layer_state))  # type: ignore[arg-type]
            call = (
                functools.partial(call_checkpointed, layer)
                if self.activation_checkpointing
                else layer
            )
            x, new_state = call(
                x,
                layer_state,
                bf16=self.bf16,
                generator=generator,
                cu_seqlens=packing and packing.cu_seqlens,
            )
            if packing:
                new_state = LayerState(*map(packing.sequences_to_rows, new_state))  # type: ignore[arg-type]
            new_layer_states.append(new_state)
        if packing:
            x = x.view(*tokens.shape, -1)
        recent_tokens = last_tokens(tokens, state.recent_tokens, document_starts)
        return self.norm(x), State(recent_tokens, new_layer_states)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of hidden states (…, D), with the embedding as weight."""
        return F.linear(hidden, self.embedding)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits (B, T, V) for tokens (B, T) int64, and the state after the last token.

        The arguments are those of ``hidden_states``.
        """
        hidden, state = self.hidden_states(tokens, state, document_starts=document_starts)
        return self.lm_head(hidden), state

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: State | None = None,
        *,
        document_starts: Tensor | None = None,
        generator: torch.Generator | None = None,
        some_ignored: bool = False,
        sampled_softmax: int = 0,
    ) -> tuple[Tensor, State]:
        """Mean cross-entropy of the targets, and the state after the last token.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, the token that follows each of them.
            state, document_starts, generator: see ``hidden_states``.
            some_ignored: whether targets may be negative, which do not count.
            sampled_softmax: the number of tokens that are drawn to stand for all tokens that are no
                target here; see ``draw_candidates``. 0 compares with the whole vocabulary.

        Returns:
            The loss, a scalar in nats per token that counts, and the new state. It is 0 if none
            counts.
        """
        hidden, state = self.hidden_states(
            tokens, state, document_starts=document_starts, generator=generator
        )
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if some_ignored:
            counts = targets >= 0
            hidden, targets = hidden[counts], targets[counts]
            if not len(targets):  # the gradient of every parameter exists, and is zero
                return hidden.sum() + 0 * self.embedding.sum(), state
        weight: Tensor = self.embedding
        log_counts: Tensor | None = None
        if sampled_softmax:
            candidates, targets, log_counts = draw_candidates(
                targets, self.config.vocab_size, sampled_softmax, generator
            )
            weight = F.embedding(candidates, self.embedding)
        loss = fused_linear_cross_entropy(hidden, weight, targets, log_counts, bf16=self.bf16)
        return loss, state


class Packing(NamedTuple):
    """How the documents of a batch lie end to end in one row of B T tokens.

    A sequence begins at every document start and at every row of the batch.
    """

    cu_seqlens: Tensor
    """(N + 1,) int64, the bounds of the N sequences, as the kernels take them."""
    first_sequence: Tensor
    """(B,) int64, the sequence that each row begins with."""
    last_sequence: Tensor
    """(B,) int64, the sequence that each row ends with."""
    continues: Tensor
    """(B,) bool, whether a row begins in the middle of a document."""

    @classmethod
    def from_document_starts(cls, document_starts: Tensor) -> "Packing":
        """Find the sequences of a batch from document_starts (B, T) bool."""
        rows, time = document_starts.shape
        sequence_starts = document_starts.clone()
        sequence_starts[:, 0] = True
        counts = sequence_starts.sum(1).cumsum(0)
        edges = sequence_starts.flatten().nonzero().flatten()
        cu_seqlens = torch.cat((edges, edges.new_tensor([rows * time])))
        first_sequence = torch.cat((counts.new_zeros(1), counts[:-1]))
        return cls(cu_seqlens, first_sequence, counts - 1, ~document_starts[:, 0])

    def rows_to_sequences(self, state: Tensor | None) -> Tensor | None:
        """States of rows (B, …) to states of sequences (N, …); a new document starts from zero."""
        if state is None:
            return None
        states = state.new_zeros(len(self.cu_seqlens) - 1, *state.shape[1:])
        continues = self.continues.view(-1, *[1] * (state.ndim - 1))
        return states.index_copy(0, self.first_sequence, state * continues)

    def sequences_to_rows(self, state: Tensor | None) -> Tensor | None:
        """States of sequences (N, …) to the state that each row ends with (B, …)."""
        return None if state is None else state.index_select(0, self.last_sequence)


def ngram_rows(tokens: Tensor, previous: list[Tensor], rows: int) -> Tensor:
    """The row of the n-gram embedding for each n-gram that ends at each token.

    Args:
        tokens: (B, T) int64.
        previous: R tensors (B, T) int64, see ``previous_tokens``.
        rows: of the embedding.

    Returns:
        (R, B, T) int64, for n = 2 … R + 1.
    """
    key, found = tokens, []
    for earlier, (multiplier, mixer) in zip(previous, NGRAM_HASH, strict=False):
        key = earlier * multiplier + key
        mixed = key * mixer
        found.append((mixed >> 7 ^ mixed) % rows)
    return torch.stack(found)


def previous_tokens(
    tokens: Tensor, recent_tokens: Tensor, document_starts: Tensor | None
) -> list[Tensor]:
    """The tokens 1, 2, …, R places before each token.

    Args:
        tokens: (B, T) int64.
        recent_tokens: (B, R) int64, the R tokens before them, the newest last.
        document_starts: (B, T) bool or None.

    Returns:
        R tensors (B, T) int64; 0 stands where the place lies in another document.
    """
    count, time = recent_tokens.shape[1], tokens.shape[1]
    joined, previous = torch.cat((recent_tokens, tokens), 1), []
    start_nearby = document_starts  # whether a document begins at a place or up to k - 1 before it
    for k in range(1, count + 1):
        earlier = joined[:, count - k : count - k + time]
        if start_nearby is not None and document_starts is not None:
            earlier = earlier.masked_fill(start_nearby, 0)
            start_nearby = start_nearby.clone()
            start_nearby[:, k:] |= document_starts[:, : time - k]
        previous.append(earlier)
    return previous


def last_tokens(tokens: Tensor, recent_tokens: Tensor, document_starts: Tensor | None) -> Tensor:
    """The last R of recent_tokens (B, R) followed by tokens (B, T); 0 for another document's."""
    count, time = recent_tokens.shape[1], tokens.shape[1]
    recent = torch.cat((recent_tokens, tokens), 1)[:, time:].clone()
    if document_starts is not None:
        for k in range(1, count):
            document_began = document_starts[:, max(0, time - k) :].any(1)
            recent[:, count - 1 - k].masked_fill_(document_began, 0)
    return recent


def draw_candidates(
    targets: Tensor, vocab_size: int, count: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the tokens that a sampled softmax compares with.

    A softmax divides by a sum over the vocabulary. In it every target stands for itself. ``count``
    of the other tokens are drawn, and each of them stands for equally many of the others: its logit
    grows by the logarithm of that number. So the sum has the right mean.

    Args:
        targets: (R,) int64, the targets of all rows.
        vocab_size: V.
        count: tokens to draw, at most; without replacement, each with equal probability.
        generator: what draws; None for torch's global generator.

    Returns:
        candidates: (C,) int64, the targets and then the drawn tokens, each once.
        positions: (R,) int64, where the target of each row stands among them.
        log_counts: (C,) float32, the logarithms of the numbers of tokens that they stand for.

    Source: Jean et al. 2015 (arXiv:1412.2007, section 3).
    """
    found, positions = targets.unique(return_inverse=True)
    is_other = torch.ones(vocab_size, dtype=torch.bool)
    is_other[found] = False
    others = is_other.nonzero().flatten()
    drawn = others[torch.randperm(len(others), generator=generator)[:count]]
    log_counts = torch.zeros(len(found) + len(drawn))
    if len(drawn):
        log_counts[len(found) :] = math.log(len(others) / len(drawn))
    return torch.cat((found, drawn)), positions, log_counts


def call_checkpointed(
    layer: Callable[..., Result],
    *inputs: Any,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Result:
    """Call a layer with activation checkpointing: backward keeps its inputs and calls it again.

    The second call sees the generator as it was before the first one, so results and gradients are
    those of the plain call, bit for bit. Without a generator the global one is restored in the
    same way; then no two threads may do this at once.

    Args:
        layer: what is called as ``layer(*inputs, generator=generator, **settings)``.
        inputs: tensors, or tuples of tensors.
        generator: what dropout draws from.
        settings: further keyword arguments of the layer.

    Source: Chen et al. 2016 (arXiv:1604.06174, section 3), through ``torch.utils.checkpoint``.
    """
    state_before: Tensor | None = None

    def call_layer(*inputs: Any) -> Result:
        nonlocal state_before
        if generator is None:
            return layer(*inputs, generator=None, **settings)
        state_now = generator.get_state()
        if state_before is None:
            state_before = state_now
            return layer(*inputs, generator=generator, **settings)
        try:
            generator.set_state(state_before)
            return layer(*inputs, generator=generator, **settings)
        finally:
            generator.set_state(state_now)

    result: Result = checkpoint(
        call_layer, *inputs, use_reentrant=False, preserve_rng_state=generator is None
    )
    return result


PARAMETER_GROUPS = {
    "embedding": ("embedding",),
    "n-gram embedding": ("ngram_embedding",),
    "projections": ("in_proj.weight", "out_proj.weight"),
    "recurrent weights": ("recurrent_weight",),
    "feed-forward": ("up_proj.weight", "down_proj.weight"),
    "convolutions": ("conv_weight",),
}
"""Groups of parameters by the last part of their names; ``norms and biases`` are the others."""


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of a model without allocating it.

    Returns:
        The number of parameters in each of PARAMETER_GROUPS, in "norms and biases", and in "total".
    """
    with torch.device("meta"):
        model = Model(config)
    counts = dict.fromkeys([*PARAMETER_GROUPS, "norms and biases"], 0)
    for name, p in model.named_parameters():
        group = next(
            (
                group
                for group, suffixes in PARAMETER_GROUPS.items()
                if any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
            ),
            "norms and biases",
        )
        counts[group] += p.numel()
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: ModelConfig) -> dict[str, int]:
    """Count the floating-point operations of the matrix products per token.

    A multiply and an add are two operations: twice the parameters that a token meets in a product,
    and 8 P² per head of the gated delta rule. Backward takes twice the operations of forward.

    Returns:
        Operations of a "forward" pass; of "training"; and of training with
        "activation_checkpointing", which runs the layers forward once more.
    """
    counts = parameter_counts(config)
    weights = counts["projections"] + counts["recurrent weights"] + counts["feed-forward"]
    delta_layers = sum(t in "lb" for t in config.resolved_layer_types)
    layers = 2 * weights + delta_layers * config.heads * 8 * config.head_width**2
    forward = layers + 2 * counts["embedding"]
    return {
        "forward": forward,
        "training": 3 * forward,
        "activation_checkpointing": 3 * forward + layers,
    }
