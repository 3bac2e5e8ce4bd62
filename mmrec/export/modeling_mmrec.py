"""MM-Rec (multi-memory recurrence) for transformers.

``mmrec export --to transformers`` writes this file beside the weights. It needs torch and
transformers. Where mmrec is installed, its kernels compute the recurrences of CPU tensors;
elsewhere the functions below do, in plain torch.

Axes: B batch, T time, D width, H heads, P = D / H, V vocabulary, K convolution width.

One layer computes, of its input after an RMSNorm and a causal depthwise convolution, u:

    [z, f, g, q, k, v, a, b, r] = u W_in                                     in_proj
    γ_t = σ(f_t + forget_bias)
    h_t = (1 - γ_t) z_t σ(h_{t-1} W_g + g_t) + γ_t h_{t-1}                   types s, n, b
    α_t = σ(a_t + delta_decay_bias),  β_t = σ(b_t),  k̂ = k / |k|,  q̂ = q / |q|
    S_t = α_t S_{t-1} + k̂_t β_t (v_t - α_t S_{t-1}ᵀ k̂_t)ᵀ,  o_t = S_tᵀ q̂_t    types l, b
    x ← x + ((rms_norm(h) + rms_norm(o)) silu(r)) W_out                      out_proj
    x ← x + relu²(rms_norm(x) W_up) W_down                                   feed-forward

Type n has W_g = 0. The residual stream and all recurrences are in float32, whatever the dtype of
the weights is.

Sources: minGRU, Feng et al. 2024 (arXiv:2410.01201); gated delta rule, Yang et al. 2024
(arXiv:2412.06464, eq. 10); relu², So et al. 2021 (arXiv:2109.08668); hashed n-gram embeddings,
Svenstrup et al. 2017 (arXiv:1709.03933).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_mmrec import MMRecConfig

kernels: Any
try:
    from mmrec import kernels
except ImportError:
    kernels = None

EPSILON = 1e-6
"""Added to mean squares, and to |k|² and |q|²."""
NGRAM_HASH = (
    (1_000_003, 1),
    (998_244_353, 2_654_435_761),
    (1_299_709, 40_503),
    (15_485_863, 69_069),
)
"""Hash of an n-gram: key_n = token[-n] * multiplier + key_{n-1}, and its row of the table is
mix(key_n * mixer) % buckets. One (multiplier, mixer) pair per n, from n = 2 on."""

LayerState = tuple[Tensor, Tensor | None, Tensor | None]
"""conv_state (B, K - 1, D), hidden_state (B, D) and delta_state (B, H, P, P) of one layer."""


class MMRecCache:
    """What a model carries from one call to the next. Its size does not grow with the text.

    Attributes:
        recent_tokens: (B, max_ngram - 1) int64, the last tokens, the newest last; None before the
            first call.
        layers: the state of each layer.
        seen_tokens: T of all calls so far.
    """

    is_compileable = is_croppable = False

    def __init__(self) -> None:
        self.recent_tokens: Tensor | None = None
        self.layers: list[LayerState] = []
        self.seen_tokens = 0

    @property
    def is_linear(self) -> list[bool]:
        """Whether the states of the layers have a fixed size: they all do."""
        return [True] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that the state is made of."""
        return self.seen_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows of the batch in another order (B,), for beam search."""
        if self.recent_tokens is not None:
            self.recent_tokens = self.recent_tokens.index_select(0, beam_idx)
        self.layers = [
            tuple(None if x is None else x.index_select(0, beam_idx) for x in layer)  # type: ignore[misc]
            for layer in self.layers
        ]


@dataclass
class MMRecModelOutput(ModelOutput):
    """Result of ``MMRecModel``."""

    last_hidden_state: Tensor | None = None
    cache: MMRecCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MMRecCausalLMOutput(ModelOutput):
    """Result of ``MMRecForCausalLM``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: MMRecCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


# ---- the recurrences


def has_kernels(x: Tensor) -> bool:
    """Whether mmrec's kernels compute this tensor."""
    return kernels is not None and x.device.type == "cpu" and not torch.compiler.is_exporting()


def full_precision(x: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def normalise(x: Tensor) -> Tensor:
    """Divide x (…, D) by its root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


def rmsnorm_conv1d(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """``u_t = Σ_k weight_k n_{t-K+1+k}`` with n = x / rms(x), and the last K - 1 rows of n.

    x (B, T, D); weight (K, D); state (B, K - 1, D), the rows of n before the first step.
    """
    if has_kernels(x):
        result: tuple[Tensor, Tensor] = kernels.rmsnorm_conv1d(x, weight, state)
        return result
    padded, time = torch.cat((state, normalise(x)), 1), x.shape[1]
    products = [padded[:, k : k + time] * w for k, w in enumerate(weight)]
    return torch.stack(products).sum(0), padded[:, time:]


def linear_scan(decay: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
    """``h_t = decay_t h_{t-1} + inputs_t`` of (B, T, D) and h before the first step (B, D).

    In log2(T) steps, each of which joins every position with the one twice as far before it.
    """
    h = torch.cat((state[:, None], inputs), 1)
    decay = torch.cat((torch.ones_like(state)[:, None], decay), 1)
    distance = 1
    while distance < h.shape[1]:
        joined = h[:, distance:] + decay[:, distance:] * h[:, :-distance]
        h = torch.cat((h[:, :distance], joined), 1)
        decay = torch.cat((decay[:, :distance], decay[:, distance:] * decay[:, :-distance]), 1)
        distance *= 2
    return h[:, 1:]


def min_gru_mixer(projected: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The memory of a layer of type n: projected (B, T, 4 D) to (B, T, D) and the new h (B, D)."""
    if has_kernels(projected):
        result: tuple[Tensor, Tensor] = kernels.min_gru_mixer(projected, bias, state)
        return result
    z, f, g, r = projected.chunk(4, -1)
    gamma = torch.sigmoid(f + bias)
    h = linear_scan(gamma, (1 - gamma) * z * torch.sigmoid(g), state)
    return normalise(h) * F.silu(r), h[:, -1]


def gated_recurrence(
    z: Tensor, gate: Tensor, forget: Tensor, weight: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """h (B, T, D) of the types s and b, and the last of it (B, D).

    z, gate, forget (B, T, D); weight (G, D/G, D/G), the diagonal blocks of W_g; state (B, D).
    """
    if has_kernels(z):
        result: tuple[Tensor, Tensor] = kernels.gated_recurrence(z, gate, forget, weight, state)
        return result
    h, outputs = state, []
    for t in range(z.shape[1]):
        blocks = h.unflatten(-1, (len(weight), -1))  # (B, G, D/G)
        recurrent = torch.einsum("bgi,gij->bgj", blocks, weight).flatten(1)
        gamma = torch.sigmoid(forget[:, t])
        h = (1 - gamma) * z[:, t] * torch.sigmoid(recurrent + gate[:, t]) + gamma * h
        outputs.append(h)
    return torch.stack(outputs, 1), h


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """o (B, T, H, P) of the types l and b, and the last S.

    q, k, v (B, T, H, P); decay and beta (B, T, H), logits; state (B, H, P, P).
    """
    if has_kernels(q):
        result: tuple[Tensor, Tensor] = kernels.gated_delta_rule(
            q,
            k,
            v,
            decay,
            beta,
            scale=1.0,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            use_logsigmoid_in_kernel=True,
        )
        return result
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON) for x in (q, k))
    alpha, beta = torch.sigmoid(decay)[..., None], torch.sigmoid(beta)[..., None]
    s, outputs = state, []
    for t in range(q.shape[1]):
        s = alpha[:, t, :, :, None] * s
        error = beta[:, t] * (v[:, t] - torch.einsum("bhij,bhi->bhj", s, k[:, t]))
        s = s + k[:, t, :, :, None] * error[:, :, None, :]
        outputs.append(torch.einsum("bhij,bhi->bhj", s, q[:, t]))
    return torch.stack(outputs, 1), s


def relu_squared(x: Tensor) -> Tensor:
    """``max(x, 0)²``."""
    if has_kernels(x):
        result: Tensor = kernels.relu_squared(x)
        return result
    return F.relu(x).square()


# ---- the model


def log_spaced_decay_logits(count: int, max_timescale: int) -> Tensor:
    """Logits (count,) of decays whose time constants are spaced evenly in log time."""
    tau = torch.logspace(0, math.log10(max(max_timescale, 1)), count, dtype=torch.float64)
    return -torch.expm1(1 / tau).log().to(torch.get_default_dtype())


def make_linear(in_features: int, out_features: int, *, zero_init: bool = False) -> nn.Linear:
    """Matrix product without bias, from N(0, 1 / in_features) or zero."""
    linear = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(linear.weight, std=0.0 if zero_init else in_features**-0.5)
    return linear


class MMRecRMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, T, D)."""
        weight = full_precision(self.weight)
        if has_kernels(x):
            result: Tensor = kernels.rmsnorm_conv1d(x, weight[None])[0]
            return result
        return normalise(x) * weight


class MMRecLayer(GradientCheckpointingLayer):
    """One residual layer: its memories, then its feed-forward network."""

    def __init__(self, config: MMRecConfig, layer_type: str) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.layer_type, self.heads = layer_type, heads
        self.has_recurrence, self.has_delta_rule = layer_type in "sbn", layer_type in "lb"
        self.projection_sizes = [width] * 3 * self.has_recurrence  # z, f, g
        if self.has_delta_rule:
            self.projection_sizes += [width] * 3 + [heads] * 2  # q, k, v, a, b
        self.projection_sizes += [width]  # r
        identity = torch.zeros(config.conv_width, width)
        identity[-1] = 1
        self.conv_weight = nn.Parameter(identity)
        self.in_proj = make_linear(width, sum(self.projection_sizes))
        if self.has_recurrence:
            self.forget_bias = nn.Parameter(log_spaced_decay_logits(width, config.max_timescale))
        if layer_type in "sb":
            block = width // config.recurrent_blocks
            self.recurrent_weight = nn.Parameter(
                torch.randn(config.recurrent_blocks, block, block) * block**-0.5
            )
            self.recurrence_norm = MMRecRMSNorm(width)
        if self.has_delta_rule:
            logits = log_spaced_decay_logits(heads, config.max_timescale)
            self.delta_decay_bias = nn.Parameter(logits)
            self.delta_norm = MMRecRMSNorm(width)
        self.out_proj = make_linear(width, width, zero_init=True)
        self.ffn_norm = MMRecRMSNorm(width)
        ffn_width = int(width * config.ffn_multiplier)
        self.up_proj = make_linear(width, ffn_width)
        self.down_proj = make_linear(ffn_width, width, zero_init=True)
        self.dropout = nn.Dropout(config.dropout)

    def initial_state(self, x: Tensor) -> LayerState:
        """The state before the first token of x (B, T, D): zeros of its dtype."""
        (batch, _, width), conv_width = x.shape, self.conv_weight.shape[0]
        head_width = width // self.heads
        return (
            x.new_zeros(batch, conv_width - 1, width),
            x.new_zeros(batch, width) if self.has_recurrence else None,
            x.new_zeros(batch, self.heads, head_width, head_width) if self.has_delta_rule else None,
        )

    def mix_tokens(self, projected: Tensor, h: Any, s: Any) -> tuple[Tensor, Any, Any]:
        """Run the memories: projected (B, T, …) to (B, T, D), and the new h and S."""
        if self.layer_type == "n":
            y, h = min_gru_mixer(projected, full_precision(self.forget_bias), h)
            return y, h, s
        *parts, output_gate = projected.split(self.projection_sizes, dim=-1)
        y = torch.zeros_like(output_gate)
        if self.has_recurrence:
            z, f, g = parts[:3]
            f = f + full_precision(self.forget_bias)
            outputs, h = gated_recurrence(z, g, f, full_precision(self.recurrent_weight), h)
            y = y + self.recurrence_norm(outputs)
        if self.has_delta_rule:
            q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in parts[-5:-2])
            decay = parts[-2] + full_precision(self.delta_decay_bias)
            outputs, s = gated_delta_rule(q, k, v, decay, parts[-1], s)
            y = y + self.delta_norm(outputs.flatten(-2))
        return y * F.silu(output_gate), h, s

    def forward(self, x: Tensor, conv_state: Tensor, h: Any, s: Any) -> tuple[Any, ...]:
        """Apply the layer to x (B, T, D); return the new x and the new state."""
        dtype = self.ffn_norm.weight.dtype  # of the matrix products
        u, conv_state = rmsnorm_conv1d(x, full_precision(self.conv_weight), conv_state)
        y, h, s = self.mix_tokens(full_precision(self.in_proj(u.to(dtype))), h, s)
        x = x + self.dropout(full_precision(self.out_proj(y.to(dtype))))
        activations = relu_squared(self.up_proj(self.ffn_norm(x).to(dtype)))
        x = x + self.dropout(full_precision(self.down_proj(activations)))
        return x, conv_state, h, s


class MMRecPreTrainedModel(PreTrainedModel):
    """What the classes below have in common."""

    config_class = MMRecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MMRecLayer"]  # noqa: RUF012
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):  # layers begin as their constructors make them
            nn.init.normal_(module.weight, std=0.02)


class MMRecModel(MMRecPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: MMRecConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        if config.ngram_buckets:
            self.ngram_embedding = nn.Embedding(config.ngram_buckets, config.width)
        pattern = config.layer_pattern
        types = (pattern * math.ceil(config.depth / len(pattern)))[: config.depth]
        self.layers = nn.ModuleList(MMRecLayer(config, t) for t in types)
        self.norm = MMRecRMSNorm(config.width)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, tokens: Tensor, recent_tokens: Tensor) -> Tensor:
        """Sum of the embedding of each token and of the n-grams that end at it, (B, T, D).

        tokens (B, T); recent_tokens (B, max_ngram - 1), those before them, the newest last.
        """
        x = full_precision(self.embed_tokens(tokens))
        if not self.config.ngram_buckets:
            return x
        count, time = recent_tokens.shape[1], tokens.shape[1]
        joined, key = torch.cat((recent_tokens, tokens), 1), tokens
        probability = min(0.5, 2 * self.config.dropout) if self.training else 0.0
        for n in range(count):
            multiplier, mixer = NGRAM_HASH[n]
            begin = count - 1 - n
            key = joined[:, begin : begin + time] * multiplier + key
            mixed = key * mixer
            rows = self.ngram_embedding((mixed >> 7 ^ mixed) % self.config.ngram_buckets)
            # dropout zeroes whole rows
            keep = F.dropout(torch.ones_like(rows[..., :1], dtype=x.dtype), probability)
            x = x + keep * full_precision(rows)
        return x

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MMRecCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Run the model.

        Args:
            input_ids: (B, T), the tokens that follow those that the cache has seen.
            attention_mask: (B, T), or (B, seen tokens + T); 0 at padding. Padding on the left of a
                text leaves its numbers as they are without it, and so does padding on the right
                without a cache.
            cache: what an earlier call returned. It is changed.
            inputs_embeds: not supported, since n-grams are made of token ids.
            use_cache: return the state after the last token; by default as the configuration says,
                but not in training and not with padding on the right.
            output_hidden_states: return what each layer gets, and the last hidden state.
            return_dict: False returns a tuple.

        Returns:
            The last hidden state (B, T, D), the cache and the hidden states, as far as asked for.

        Raises:
            ValueError: an argument is not as above.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("input_ids must be given, and inputs_embeds must not")
        tokens = input_ids
        mask = None if attention_mask is None else attention_mask[:, -tokens.shape[1] :].long()
        if mask is not None and bool(mask.all()):
            mask = None
        is_right_padded = mask is not None and check_mask(mask)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not is_right_padded
        if use_cache and is_right_padded:
            raise ValueError(
                "attention_mask must have its zeros on the left where a cache is kept; got zeros "
                "on the right (tokenizer.padding_side = 'left')"
            )
        if mask is not None:
            tokens = tokens * mask
        state = MMRecCache() if cache is None else cache
        recent = state.recent_tokens
        if recent is None:
            recent = tokens.new_zeros(tokens.shape[0], self.config.max_ngram - 1)
        x = self.embed(tokens, recent)
        if mask is not None:
            # Of zeros a layer makes zeros, and its state stays as it is before a text.
            x = x * mask[..., None]
        layers, inputs = [], []
        for i, layer in enumerate(self.layers):
            inputs.append(x)
            before = state.layers[i] if state.layers else layer.initial_state(x)  # type: ignore[operator]
            x, *after = layer(x, *before)
            layers.append(tuple(after))
        x = self.norm(x)
        if use_cache:
            state.layers = layers
            state.recent_tokens = torch.cat((recent, tokens), 1)[:, tokens.shape[1] :]
            state.seen_tokens += tokens.shape[1]
        result = MMRecModelOutput(
            last_hidden_state=x,
            cache=state if use_cache else None,
            hidden_states=(*inputs, x) if output_hidden_states else None,
        )
        return result.to_tuple() if return_dict is False else result


def check_mask(mask: Tensor) -> bool:
    """Check that each row of a mask (B, T) is one text between paddings.

    Returns:
        Whether a row has padding on the right.
    """
    texts = mask[:, 0] + (mask[:, 1:] > mask[:, :-1]).sum(1)
    if bool((texts > 1).any()):
        raise ValueError(
            "attention_mask must have its zeros at the ends of a row; got zeros between ones"
        )
    return bool((mask[:, -1] == 0).any())


class MMRecForCausalLM(MMRecPreTrainedModel, GenerationMixin):
    """The language model: logits of the next token, by the embedding as weight."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MMRecConfig) -> None:
        super().__init__(config)
        self.model = MMRecModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MMRecCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> Any:
        """Run the model; the arguments that are not described here are those of ``MMRecModel``.

        Args:
            input_ids, attention_mask, cache, inputs_embeds, use_cache: see ``MMRecModel``.
            labels: (B, T), the tokens themselves; -100 where no loss is wanted. They are shifted
                here.
            output_hidden_states, return_dict: see ``MMRecModel``.
            logits_to_keep: compute the logits of so many last tokens only; 0 is all.
            options: what the loss function of transformers takes.

        Returns:
            The loss if there are labels, the logits (B, T, V) in float32, the cache and the hidden
            states.
        """
        result = self.model(
            input_ids,
            attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        hidden = result.last_hidden_state[:, -logits_to_keep:]
        logits = full_precision(self.lm_head(hidden.to(self.lm_head.weight.dtype)))
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **options)
        output = MMRecCausalLMOutput(
            loss=loss, logits=logits, cache=result.cache, hidden_states=result.hidden_states
        )
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first call of the model makes the cache

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: MMRecCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The arguments of the next call: the tokens (B, …) that the cache has not seen."""
        seen = 0 if cache is None else cache.seen_tokens
        if seen >= input_ids.shape[1]:
            raise ValueError(
                f"input_ids must hold the {seen} tokens that the cache has seen, and new ones; got "
                f"{input_ids.shape[1]}"
            )
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "cache": cache,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> dict[str, Any]:
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *arguments, **options
        )
        return updated if outputs.cache is None else updated | {"cache": outputs.cache}
