"""Growth: initialise a larger model so that it computes the same function and can learn more.

Axes: D width, H heads, P = D / H, F feed-forward width, V vocabulary size; D', H', … are those of
the grown model.

Let c = sqrt(D' / D). Old channels of the residual stream and of both memories carry c times their
old values, and new channels carry zero. Every root mean square then keeps its value, and so does
the epsilon beside it: a norm returns c times its old output, and whatever reads a norm is divided
by c. Zero channels change neither the length of keys and queries nor their products. New layers add
nothing, because their ``out_proj`` and ``down_proj`` are zero. A new hidden unit of the
feed-forward has random input weights and zero output weights. Whatever reads a channel that is
still zero has random weights, so that a gradient reaches the channel at once.

Growth that preserves the function is from Net2Net (Chen et al. 2016, arXiv:1511.05641), the
treatment of norms from LEMON (Wang et al. 2023, arXiv:2310.07999), and the method ``stack`` from
Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking". docs/guides/growing.md
derives the arithmetic.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, optim

from mmrec.checkpoint.checkpoint import (
    LoadedModel,
    open_moments,
    put_moments,
    save_checkpoint,
)
from mmrec.checkpoint.outputs import check_output
from mmrec.config import ModelConfig
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.model import Layer, Model, log_spaced_decay_logits
from mmrec.optimizer import build_optimizer
from mmrec.runtime.numeric import cdiv

METHODS = ("preserve", "stack", "random")
MEMORIES = {"n": {"h"}, "s": {"h", "w"}, "l": {"s"}, "b": {"h", "w", "s"}}
"""What a layer of each type has: the recurrence h, its weight W_g, the delta rule's state S."""

LEAST_EXPECTED = 3
"""Characters whose mean a new character starts from."""
CONTEXTS_AT_ONCE = 256


class ParameterMapping(NamedTuple):
    """Where the entries of an old parameter go in a new one: ``new[index] = old * scale``."""

    new: str
    """Name of the new parameter."""
    old: str
    """Name of the old parameter."""
    index: tuple[Tensor, ...]  # type: ignore[assignment]  # hides tuple.index
    scale: Tensor
    """Broadcasts against the old parameter. Gradients are divided by it."""


def place_layers(old: str, new: str) -> list[int] | None:
    """Place the layers of the source among those of the grown model.

    Args:
        old: types of the source's layers, one letter per layer.
        new: types of the grown model's layers.

    Returns:
        For each old layer the index of its new layer: in order, spread as evenly as possible. A new
        layer must have all memories of the old one. None if there is no such placing.
    """
    # best[i]: the cheapest placing of the first i old layers among the new layers so far
    best: list[tuple[float, list[int]] | None] = [(0.0, []), *[None] * len(old)]
    for j, new_type in enumerate(new):
        for i in reversed(range(len(old))):
            without, current = best[i], best[i + 1]
            if without is None or not MEMORIES[old[i]] <= MEMORIES[new_type]:
                continue
            cost = without[0] + abs((i + 0.5) * len(new) / len(old) - 0.5 - j)
            if current is None or cost < current[0]:
                best[i + 1] = cost, [*without[1], j]
    placing = best[-1]
    return None if placing is None else placing[1]


class GrowthPlan:
    """How each parameter of a model maps into a larger one, and its optimizer moments with it."""

    def __init__(
        self,
        old: ModelConfig,
        new: ModelConfig,
        method: str = "preserve",
        pieces: Sequence[list[int]] = (),
    ) -> None:
        """Make the plan from the two configurations alone; no weight is needed.

        Args:
            old: configuration of the source.
            new: configuration of the grown model.
            method: ``preserve`` keeps the function; ``stack`` fills new layers with copies of old
                ones, which changes it; ``random`` keeps nothing, for comparison.
            pieces: for each new token id (they follow the old ids) the old ids that it joins. Its
                embedding is their mean.

        Raises:
            InputError: the method is unknown, something would shrink, or the source does not fit
                into the new configuration.
        """
        if method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        self.old, self.new, self.method, self.pieces = old, new, method, pieces
        self.c = (new.width / old.width) ** 0.5
        self.source_layers: dict[int, int] = {}
        """Index of a new layer -> index of the old layer that it starts from."""
        self.mappings: list[ParameterMapping] = []
        if new.vocab_size != old.vocab_size + len(pieces):
            raise InputError(
                "a grown model keeps the tokenizer of its source, so vocab_size must be "
                f"{old.vocab_size + len(pieces)}; got {new.vocab_size}"
            )
        if method == "random":
            return
        _check_sizes(old, new)
        old_types, new_types = old.resolved_layer_types, new.resolved_layer_types
        placing = place_layers(old_types, new_types)
        if placing is None:
            raise InputError(
                "the grown layers must hold the source's in their order, each with its memories; "
                f"the source's are {old_types!r}, the grown ones {new_types!r}"
            )
        self.source_layers = {j: i for i, j in enumerate(placing)}
        if method == "stack":
            self._copy_layers()
        self._map_parameters()

    def _copy_layers(self) -> None:
        """Give each further new layer the nearest old layer before it whose memories it has."""
        for j, new_type in enumerate(self.new.resolved_layer_types):
            fitting = [
                i
                for i, k in enumerate(self.old.resolved_layer_types)
                if MEMORIES[k] <= MEMORIES[new_type]
            ]
            if j not in self.source_layers and fitting:
                before = max((at for at in self.source_layers if at < j), default=0)
                nearest = self.source_layers.get(before, 0)
                self.source_layers[j] = max(
                    (i for i in fitting if i <= nearest), default=fitting[0]
                )

    def _map(
        self, new: str, old: str, index: tuple[Tensor, ...], scale: float | Tensor = 1.0
    ) -> None:
        self.mappings.append(ParameterMapping(new, old, index, torch.as_tensor(scale)))

    def _map_parameters(self) -> None:
        old, new, c = self.old, self.new, self.c
        channels = torch.arange(old.width)
        self._map("embedding", "embedding", (torch.arange(old.vocab_size)[:, None], channels), c)
        if old.ngram_buckets:  # copies, as many as fit: (x mod k n) mod n = x mod n
            rows = torch.arange(new.ngram_buckets).view(-1, old.ngram_buckets, 1)
            self._map("ngram_embedding", "ngram_embedding", (rows, channels), c)
        # the logits read the norm through the tied embedding, which is c times its old self
        self._map("norm.weight", "norm.weight", (channels,), c**-2)
        for j, i in sorted(self.source_layers.items()):
            self._map_layer(
                f"layers.{j}.",
                f"layers.{i}.",
                old.resolved_layer_types[i],
                new.resolved_layer_types[j],
            )

    def _map_layer(self, new_prefix: str, old_prefix: str, old_type: str, new_type: str) -> None:
        old, new, c = self.old, self.new, self.c
        channels, hidden = torch.arange(old.width), torch.arange(old.ffn_width)
        inner = self.memory_channels(old_type)

        def add(name: str, index: tuple[Tensor, ...], scale: float | Tensor = 1.0) -> None:
            self._map(new_prefix + name, old_prefix + name, index, scale)

        add(
            "conv_weight",
            (torch.arange(new.conv_width - old.conv_width, new.conv_width)[:, None], channels),
        )
        offsets, rows, scales = _projection_offsets(new_type, new), [], []
        for segment in _projection_offsets(old_type, old):
            at = torch.arange(old.heads) if segment in "ab" else inner
            rows.append(offsets[segment] + at)
            # z and v carry c times their old values, as their inputs do; all others keep theirs
            scales.append(torch.full((len(at), 1), 1.0 if segment in "zv" else 1 / c))
        add("in_proj.weight", (torch.cat(rows)[:, None], channels), torch.cat(scales))
        if "h" in MEMORIES[old_type]:
            add("forget_bias", (inner,))
        if "w" in MEMORIES[old_type]:
            size = new.width // new.recurrent_blocks
            at = inner.view(old.recurrent_blocks, -1)
            index = at[:, :1, None] // size, at[:, :, None] % size, at[:, None, :] % size
            add("recurrent_weight", index, 1 / c)
            add("recurrence_norm.weight", (inner,))
        if "s" in MEMORIES[old_type]:
            add("delta_decay_bias", (torch.arange(old.heads),))
            add("delta_norm.weight", (inner,))
        add(
            "out_proj.weight", (channels[:, None], inner)
        )  # input and output are both c times larger
        add("ffn_norm.weight", (channels,))
        add("up_proj.weight", (hidden[:, None], channels), 1 / c)
        add("down_proj.weight", (channels[:, None], hidden), c)

    def memory_channels(self, old_type: str) -> Tensor:
        """Return where the channels of a layer's memories go, so that heads and blocks stay whole.

        Args:
            old_type: type of the old layer.

        Returns:
            Index (D,) of the new channel of each old one, int64.

        Raises:
            InputError: the new blocks of W_g cannot hold the old ones.
        """
        old, new = self.old, self.new
        places = torch.arange(old.width)
        old_block, new_block = old.width // old.recurrent_blocks, new.width // new.recurrent_blocks
        if "s" in MEMORIES[old_type]:
            places = places // old.head_width * new.head_width + places % old.head_width
        elif "w" in MEMORIES[old_type]:
            per_block = cdiv(
                old.recurrent_blocks, new.recurrent_blocks
            )  # old blocks in each new one
            block = places // old_block
            places = (
                block // per_block * new_block + block % per_block * old_block + places % old_block
            )
        if "w" in MEMORIES[old_type]:
            block = (places // new_block).view(old.recurrent_blocks, -1)
            if places.max() >= new.width or not (block == block[:, :1]).all():
                raise InputError(
                    f"a block of the recurrent weight must hold whole blocks of the source, which "
                    f"has {old.recurrent_blocks} of {old_block} in {old.heads} heads; "
                    f"got {new.recurrent_blocks} of {new_block}"
                )
        return places

    @torch.no_grad()
    def grow_weights(self, model: Model, source: Model) -> None:
        """Turn a freshly initialised model of the new configuration into the grown source.

        Args:
            model: changed in place; random numbers come from torch's global generator.
            source: a model of the old configuration; it is left as it is.
        """
        if self.method == "random":
            return
        new_weights, old_weights = dict(model.named_parameters()), dict(source.named_parameters())
        model.embedding.zero_()
        if self.new.ngram_buckets:
            model.ngram_embedding.zero_()
        for j, i in self.source_layers.items():
            layer = model.layers[j]
            assert isinstance(layer, Layer)
            self._prepare_layer(layer, self.old.resolved_layer_types[i])
        for mapping in self.mappings:
            value = old_weights[mapping.old] * mapping.scale
            weight = new_weights[mapping.new]
            if mapping.new.endswith("norm.weight"):
                weight.fill_(value.mean())  # a new channel gets the mean weight of the old ones
            weight[mapping.index] = value
        new_tokens = range(self.old.vocab_size, self.new.vocab_size)
        pieces_of = dict(zip(new_tokens, self.pieces, strict=True))
        for pieces, tokens in itertools.groupby(new_tokens, pieces_of.__getitem__):
            model.embedding[list(tokens)] = model.embedding[pieces].mean(0)

    def _prepare_layer(self, layer: Layer, old_type: str) -> None:
        """Initialise what is new in a layer that holds an old one: zero output, able to learn."""
        old, new = self.old, self.new
        inner = self.memory_channels(old_type)
        is_old = torch.zeros(new.width, dtype=torch.bool)
        is_old[inner] = True
        is_new = ~is_old
        offsets, old_memories = _projection_offsets(layer.layer_type, new), MEMORIES[old_type]
        zero_rows = {"z": is_new} if "h" in old_memories else {}
        if (
            "s" in old_memories
        ):  # new channels of an old head must not lengthen its keys and queries
            in_old_head = torch.arange(new.width) < old.heads * new.head_width
            in_old_head &= is_new
            zero_rows |= {"v": is_new, "q": in_old_head, "k": in_old_head}
        for segment, rows in zero_rows.items():
            layer.in_proj.weight[offsets[segment] + rows.nonzero(), : old.width] = 0
        count = int(is_new.sum())
        layer.out_proj.weight[:, is_new] = torch.randn(new.width, count) * new.width**-0.5
        if "h" in old_memories:
            layer.forget_bias[is_new] = _new_decay_logits(count, new.max_timescale)
        elif layer.recurrent_weight is not None:
            layer.recurrence_norm.weight.zero_()  # the old layer had no short-term memory
        if "s" in old_memories:
            new_heads = new.heads - old.heads
            layer.delta_decay_bias[old.heads :] = _new_decay_logits(new_heads, new.max_timescale)
        elif layer.has_delta_rule:
            layer.delta_norm.weight.zero_()  # the old layer had no long-term memory
        if layer.recurrent_weight is not None and "h" in old_memories:
            old_in_block = is_old.view(new.recurrent_blocks, -1)
            layer.recurrent_weight[old_in_block[:, :, None] & old_in_block[:, None, :]] = 0

    def grow_moments(
        self, model: Model, moments: Mapping[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Grow the optimizer moments of each parameter; new entries are zero.

        A weight that is s times its old self has a gradient of 1 / s, so first moments are divided
        by s and second moments by s².

        Args:
            model: a model of the new configuration.
            moments: by name of the old parameter, ``exp_avg`` and ``exp_avg_sq`` of AdamW or
                ``momentum`` of Muon, each of the parameter's shape. Those of RMSprop by row are
                left out: a row's first gradient sets its mean square.

        Returns:
            The same by name of the new parameter, in float32.
        """
        shapes = {name: p.shape for name, p in model.named_parameters()}
        result: dict[str, dict[str, Tensor]] = {}
        for mapping in self.mappings:
            grown = {}
            for moment, value in moments.get(mapping.old, {}).items():
                if moment == "mean_square":
                    continue
                grown[moment] = torch.zeros(shapes[mapping.new])
                power = 2 if moment == "exp_avg_sq" else 1
                grown[moment][mapping.index] = value / mapping.scale**power
            if grown:
                result[mapping.new] = grown
        return result


def added_token_pieces(source: LoadedModel, tokenizer: Tokenizer) -> list[list[int]]:
    """Return what the rows of characters and special tokens start from that a tokenizer has more.

    A special token of a chat starts from the end token: after both another one speaks.

    The row of a character is the mean of those of a few characters that the model expects least.
    Its logit is the mean of their logits, so by Jensen's inequality its probability is at most the
    mean p of their probabilities. n new characters raise the loss on old text by at most
    log(1 + n p).

    Args:
        source: the model.
        tokenizer: the model's own, or one that extends it.

    Returns:
        ``pieces`` as ``GrowthPlan`` takes them.
    """
    old_size, special = source.tokenizer.vocab_size, {*tokenizer.special_tokens.values()}
    new = range(old_size, tokenizer.vocab_size)
    least = [] if special.issuperset(new) else _least_expected_tokens(source)
    return [[source.tokenizer.eot] if token in special else least for token in new]


@torch.no_grad()
def _least_expected_tokens(source: LoadedModel) -> list[int]:
    """Tokens with the lowest probability, in the geometric mean over texts of one token."""
    model, eot = source.model, source.tokenizer.eot
    score = torch.zeros(model.config.vocab_size)
    for tokens in torch.arange(len(score)).split(CONTEXTS_AT_ONCE):
        texts = torch.stack((torch.full_like(tokens, eot), tokens), 1)
        score += model(texts)[0][:, -1].log_softmax(-1).sum(0)
    score[eot] = torch.inf  # as an input it begins a document, which no character does
    return score.argsort()[:LEAST_EXPECTED].tolist()


def initialize_from(
    model: Model,
    source: LoadedModel | Model,
    optimizer: optim.Optimizer | None = None,
    *,
    method: str = "preserve",
    pieces: Sequence[list[int]] = (),
) -> int:
    """Turn a freshly initialised model into the source, grown to the model's configuration.

    Args:
        model: changed in place; random numbers come from torch's global generator.
        source: a checkpoint, whose optimizer moments are grown too if it holds any; or a model in
            memory, which has none. It is left as it is.
        optimizer: the optimizer of ``model``, which is given the moments or loses those it has;
            None to grow the weights only.
        method: see ``GrowthPlan``.
        pieces: see ``GrowthPlan``.

    Returns:
        The number of optimizer steps that the moments have seen, 0 without moments. AdamW corrects
        its bias by that number, so a run has to add it to its own steps.

    Raises:
        InputError: see ``GrowthPlan``.
    """
    source_model = source if isinstance(source, Model) else source.model
    plan = GrowthPlan(source_model.config, model.config, method, pieces)
    plan.grow_weights(model, source_model)
    if optimizer is None:
        return 0
    moments, steps = dict[str, dict[str, Tensor]](), 0
    if not isinstance(source, Model):
        with open_moments(source.path, source_model) as (old_moments, steps):
            moments = plan.grow_moments(model, old_moments)
    if not moments:
        optimizer.state.clear()
        return 0
    adamw = {
        p
        for group in optimizer.param_groups
        if not (group["use_muon"] or group.get("rowwise"))
        for p in group["params"]
    }
    for name, p in model.named_parameters():  # AdamW counts steps, the same for all parameters
        if name not in moments and p in adamw:
            moments[name] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
    put_moments(model, optimizer, moments, steps)
    return steps


def grow_checkpoint(
    source: LoadedModel,
    config: ModelConfig,
    out: Path,
    *,
    preset: str,
    method: str = "preserve",
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    pieces: Sequence[list[int]] = (),
    force: bool = False,
) -> Model:
    """Grow a checkpoint and write the result, with its optimizer moments if the source has any.

    Args:
        source: the checkpoint.
        config: configuration of the grown model.
        out: the file to write.
        preset: name of the preset, stored in the file.
        method: see ``GrowthPlan``.
        seed: seed of the random numbers; torch's global generator is left as it is.
        tokenizer: the tokenizer with the new tokens; None for the source's.
        pieces: see ``GrowthPlan``.
        force: replace the file ``out`` if it exists and is not the source.

    Returns:
        The grown model.

    Raises:
        InputError: see ``GrowthPlan`` and ``check_output``.
        StorageError: the file cannot be written.
    """
    check_output(out, "checkpoint", option="out", inputs=[source.path], force=force)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(config)
        optimizer = build_optimizer(model)
        steps = initialize_from(model, source, optimizer, method=method, pieces=pieces)
    metadata = source.metadata | {
        "preset": preset,
        "val": None,
        "grown_from": str(source.path),
        "method": method,
    }
    has_moments = steps > 0
    save_checkpoint(
        out,
        model,
        tokenizer or source.tokenizer,
        source.step,
        metadata,
        optimizer=optimizer if has_moments else None,
        progress=(
            {"step": source.step, "optimizer_step_offset": steps - source.step}
            if has_moments
            else None
        ),
    )
    return model


def _projection_offsets(layer_type: str, config: ModelConfig) -> dict[str, int]:
    """First row of each segment of a layer's fused projection, by its letter (see mmrec.model)."""
    memories = MEMORIES[layer_type]
    segments = "zfg" * ("h" in memories) + "qkvab" * ("s" in memories) + "r"
    sizes = [config.heads if segment in "ab" else config.width for segment in segments]
    return {segment: sum(sizes[:i]) for i, segment in enumerate(segments)}


def _new_decay_logits(count: int, max_timescale: int) -> Tensor:
    """Decay logits (count,) of new channels or heads; a single one has the longest timescale."""
    return log_spaced_decay_logits(count + 1, max_timescale)[1:]


def _check_sizes(old: ModelConfig, new: ModelConfig) -> None:
    names = {
        "width": "width",
        "depth": "depth",
        "heads": "heads",
        "head_width": "width of a head",
        "ffn_width": "feed-forward width",
        "conv_width": "conv_width",
        "ngram_buckets": "ngram_buckets",
    }
    for attribute, name in names.items():
        least, size = getattr(old, attribute), getattr(new, attribute)
        if size < least:
            raise InputError(
                f"growth never shrinks: the {name} must be at least the source's "
                f"{least}; got {size}"
            )
    if old.ngram_buckets and new.max_ngram != old.max_ngram:
        raise InputError(
            f"max_ngram must be the source's {old.max_ngram}, since other n-grams would read the "
            f"rows of its table; got {new.max_ngram}"
        )
    if old.ngram_buckets and new.ngram_buckets % old.ngram_buckets:
        raise InputError(
            f"ngram_buckets must be a multiple of the source's {old.ngram_buckets}, since other "
            f"n-grams would share a row; got {new.ngram_buckets}"
        )
