"""Growth: a larger model that computes what a smaller one does, and can learn more.

Axes: D width, H heads, P = D / H, F feed-forward width; D', H', … are the grown model's.

Let c = sqrt(D' / D). Old channels of the residual stream and of both memories carry c times what
they carried, new ones carry zero, so that every root mean square is what it was, its epsilon
included, and a norm gives c times what it gave; what reads a norm is divided by c. Zero channels
change neither the length of keys and queries nor their products. New layers add nothing: their
``merge`` and ``down_proj`` are zero. A new hidden unit of the feed-forward reads at random and writes
zero. What reads a channel that is still zero reads at random, so a gradient reaches it at once.

Growth that preserves the function is Net2Net's (Chen et al. 2016, arXiv:1511.05641), its care for
norms LEMON's (Wang et al. 2023, arXiv:2310.07999); ``stack`` is Gong et al. 2019, "Efficient
Training of BERT by Progressively Stacking". The arithmetic is in docs/growth.md.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.config import ModelConfig
from mmrec.errors import InputError
from mmrec.model import Layer, Model, log_spaced_decay_logits

HOW = ("preserve", "stack", "random")
# What a layer of each kind has: short-term memory, its weight W_g, long-term memory.
MEMORIES = {"n": {"h"}, "s": {"h", "w"}, "l": {"s"}, "b": {"h", "w", "s"}}


class Move(NamedTuple):
    """Where the entries of an old parameter stand in a new one: ``new[places] = old * scale``."""

    new: str
    old: str
    places: tuple[Tensor, ...]
    scale: Tensor
    """Broadcasts against the old parameter. Gradients are divided by it."""


def place_layers(old: str, new: str) -> list[int] | None:
    """Places of old layers (a letter a kind) among new ones: in order, spread as evenly as can be.

    An old layer may stand where the new one has all of its memories and more. None if there is no
    such placing.
    """
    best: list[tuple[float, list[int]] | None] = [(0.0, []), *[None] * len(old)]
    for j, kind in enumerate(new):
        for i in reversed(range(len(old))):
            before, after = best[i], best[i + 1]
            if before is None or not MEMORIES[old[i]] <= MEMORIES[kind]:
                continue
            cost = before[0] + abs((i + 0.5) * len(new) / len(old) - 0.5 - j)
            if after is None or cost < after[0]:
                best[i + 1] = cost, [*before[1], j]
    placed = best[-1]
    return None if placed is None else placed[1]


class Growth:
    """The way from one shape to a larger one, for weights and for what optimizers keep of them."""

    def __init__(
        self,
        old: ModelConfig,
        new: ModelConfig,
        how: str = "preserve",
        pieces: Sequence[list[int]] = (),
    ) -> None:
        """Plan it from the two shapes alone.

        Args:
            old: the source's shape.
            new: the shape wanted.
            how: ``preserve``; ``stack`` fills new layers with copies of old ones, which changes the
                function; ``random`` keeps nothing, for comparison.
            pieces: for each new token, which come after the old ones, the old tokens that it joins.
                Its embedding is their mean.

        Raises:
            InputError: something would shrink, or cannot be kept as it is in the new shape.
        """
        if how not in HOW:
            raise InputError(f"how must be one of {', '.join(HOW)}; got {how!r}")
        self.old, self.new, self.how, self.pieces = old, new, how, pieces
        self.c = (new.width / old.width) ** 0.5
        self.layers: dict[int, int] = {}
        """Old layer by new one."""
        self.moves: list[Move] = []
        if new.vocab_size != old.vocab_size + len(pieces):
            raise InputError(
                "a grown model keeps the tokenizer of its source, so vocab_size must be "
                f"{old.vocab_size + len(pieces)}; got {new.vocab_size}"
            )
        if how == "random":
            return
        _check_sizes(old, new)
        placed = place_layers(old.resolved_layer_types, new.resolved_layer_types)
        if placed is None:
            raise InputError(
                "the grown layers must hold the source's in their order, each with its memories; "
                f"the source's are {old.resolved_layer_types!r}, the grown ones {new.resolved_layer_types!r}"
            )
        self.layers = {j: i for i, j in enumerate(placed)}
        if how == "stack":
            for j, kind in enumerate(new.resolved_layer_types):
                alike = [
                    i
                    for i, k in enumerate(old.resolved_layer_types)
                    if MEMORIES[k] <= MEMORIES[kind]
                ]
                if j not in self.layers and alike:  # the one that stands before it, if there is one
                    before = max((at for at in self.layers if at < j), default=0)
                    copied = self.layers.get(before, 0)
                    self.layers[j] = max((i for i in alike if i <= copied), default=alike[0])
        self._plan()

    def _move(self, name: str, index: tuple[Tensor, ...], scale: float | Tensor = 1.0) -> None:
        self.moves.append(Move(name, name, index, torch.as_tensor(scale)))

    def _plan(self) -> None:
        old, new, c = self.old, self.new, self.c
        channels = torch.arange(old.width)
        self._move("embedding", (torch.arange(old.vocab_size)[:, None], channels), c)
        if old.ngram_buckets:  # as many copies as fit: (x mod k n) mod n = x mod n
            rows = torch.arange(new.ngram_buckets).view(-1, old.ngram_buckets, 1)
            self._move("ngram_embedding", (rows, channels), c)
        self._move("norm.weight", (channels,), c**-2)  # the tied embedding is c times its old self
        for j, i in sorted(self.layers.items()):
            self._plan_layer(
                f"layers.{j}.",
                f"layers.{i}.",
                old.resolved_layer_types[i],
                new.resolved_layer_types[j],
            )

    def _plan_layer(self, to: str, origin: str, was: str, now: str) -> None:
        old, new, c = self.old, self.new, self.c
        channels, hidden = torch.arange(old.width), torch.arange(old.ffn_width)
        inner = self.inner(was)

        def move(name: str, index: tuple[Tensor, ...], scale: float | Tensor = 1.0) -> None:
            self.moves.append(Move(to + name, origin + name, index, torch.as_tensor(scale)))

        move(
            "conv_weight",
            (torch.arange(new.conv_width - old.conv_width, new.conv_width)[:, None], channels),
        )
        starts, rows, scales = _starts(now, new), [], []
        for part in _starts(was, old):
            at = torch.arange(old.heads) if part in "ab" else inner
            rows.append(starts[part] + at)
            # values carry c times their old selves, and their inputs do, too
            scales.append(torch.full((len(at), 1), 1.0 if part in "zv" else 1 / c))
        move("in_proj.weight", (torch.cat(rows)[:, None], channels), torch.cat(scales))
        if "h" in MEMORIES[was]:
            move("forget_bias", (inner,))
        if "w" in MEMORIES[was]:
            size = new.width // new.recurrent_blocks
            at = inner.view(old.recurrent_blocks, -1)
            index = at[:, :1, None] // size, at[:, :, None] % size, at[:, None, :] % size
            move("recurrent_weight", index, 1 / c)
            move("recurrence_norm.weight", (inner,))
        if "s" in MEMORIES[was]:
            move("delta_decay_bias", (torch.arange(old.heads),))
            move("delta_norm.weight", (inner,))
        move("out_proj.weight", (channels[:, None], inner))  # reads c times, writes c times as much
        move("ffn_norm.weight", (channels,))
        move("up_proj.weight", (hidden[:, None], channels), 1 / c)
        move("down_proj.weight", (channels[:, None], hidden), c)

    def inner(self, kind: str) -> Tensor:
        """New places (D,) of the channels of a layer's memories, which keep heads and blocks whole.

        Raises InputError if the new blocks of W_g cannot hold the old ones.
        """
        old, new = self.old, self.new
        places = torch.arange(old.width)
        size, room = old.width // old.recurrent_blocks, new.width // new.recurrent_blocks
        if "s" in MEMORIES[kind]:
            places = places // old.head_width * new.head_width + places % old.head_width
        elif "w" in MEMORIES[kind]:
            each = -(-old.recurrent_blocks // new.recurrent_blocks)  # old blocks in a new one
            block = places // size
            places = block // each * room + block % each * size + places % size
        if "w" in MEMORIES[kind]:
            block = (places // room).view(old.recurrent_blocks, -1)
            if places.max() >= new.width or not (block == block[:, :1]).all():
                raise InputError(
                    f"a block of the recurrent weight must hold whole blocks of the source, which "
                    f"has {old.recurrent_blocks} of {size} in {old.heads} heads; got {new.recurrent_blocks} of {room}"
                )
        return places

    @torch.no_grad()
    def fill(self, model: Model, source: Model) -> None:
        """Turn a model of the new shape, just initialised, into the grown source.

        Random numbers come from torch's global generator.
        """
        if self.how == "random":
            return
        weights, given = dict(model.named_parameters()), dict(source.named_parameters())
        model.embedding.zero_()
        if self.new.ngram_buckets:
            model.ngram_embedding.zero_()
        for j, i in self.layers.items():
            layer = model.layers[j]
            assert isinstance(layer, Layer)
            self._open(layer, self.old.resolved_layer_types[i])
        for move in self.moves:
            value, into = given[move.old] * move.scale, weights[move.new]
            if move.new.endswith("norm.weight"):
                into.fill_(value.mean())  # a new channel counts as much as an old one
            into[move.places] = value
        for token, pieces in enumerate(self.pieces, self.old.vocab_size):
            model.embedding[token] = model.embedding[pieces].mean(0)

    def _open(self, layer: Layer, was: str) -> None:
        """Prepare what is new in a layer that holds an old one: silent, and ready to learn."""
        old, new = self.old, self.new
        inner = self.inner(was)
        kept = torch.zeros(new.width, dtype=torch.bool)
        kept[inner] = True
        fresh = ~kept
        starts, had = _starts(layer.layer_type, new), MEMORIES[was]
        silent = {"z": fresh} if "h" in had else {}
        if "s" in had:  # new channels of an old head lengthen neither its keys nor its queries
            in_old_head = torch.arange(new.width) < old.heads * new.head_width
            silent |= {"v": fresh, "q": fresh & in_old_head, "k": fresh & in_old_head}
        for part, rows in silent.items():
            layer.in_proj.weight[starts[part] + rows.nonzero(), : old.width] = 0
        layer.out_proj.weight[:, fresh] = torch.randn(new.width, int(fresh.sum())) * new.width**-0.5
        if "h" in had:
            layer.forget_bias[fresh] = _spread(int(fresh.sum()), new.max_timescale)
        elif layer.recurrent_weight is not None:
            layer.recurrence_norm.weight.zero_()  # a memory that the layer did not have
        if "s" in had:
            layer.delta_decay_bias[old.heads :] = _spread(new.heads - old.heads, new.max_timescale)
        elif layer.has_delta_rule:
            layer.delta_norm.weight.zero_()
        if layer.recurrent_weight is not None and "h" in had:
            of_block = kept.view(new.recurrent_blocks, -1)
            layer.recurrent_weight[of_block[:, :, None] & of_block[:, None, :]] = 0

    def moments(
        self, model: Model, kept: Mapping[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Grow what an optimizer keeps of each parameter: zero for new entries.

        Args:
            model: of the new shape.
            kept: by name of the old parameter, ``exp_avg`` and ``exp_avg_sq`` of AdamW or
                ``momentum`` of MuonAdamW, each of the parameter's shape.

        Returns:
            The same by name of the new parameter. A weight that is now s times its old self has a
            gradient of 1 / s, and 1 / s² where gradients are kept squared.
        """
        shapes, made = {n: p.shape for n, p in model.named_parameters()}, {}
        for move in self.moves:
            grown = {}
            for kind, value in kept.get(move.old, {}).items():
                grown[kind] = torch.zeros(shapes[move.new])
                power = 2 if kind == "exp_avg_sq" else 1
                grown[kind][move.places] = value / move.scale**power
            if grown:
                made[move.new] = grown
        return made


def grow(source: Model, config: ModelConfig, how: str = "preserve", seed: int = 0) -> Model:
    """A model of the given shape, in evaluation mode, that computes what the source does.

    Args:
        source: left as it is.
        config: the shape wanted.
        how: see ``Growth``.
        seed: of what is drawn at random; torch's global generator is left as it is.

    Raises:
        InputError: see ``Growth``.
    """
    growth = Growth(source.config, config, how)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(config)
        growth.fill(model, source)
    return model.eval()


def _starts(kind: str, config: ModelConfig) -> dict[str, int]:
    """First row of each part of a layer's fused projection, by its letter."""
    parts = "zfg" * ("h" in MEMORIES[kind]) + "qkvab" * ("s" in MEMORIES[kind]) + "r"
    sizes = [config.heads if part in "ab" else config.width for part in parts]
    return {part: sum(sizes[:i]) for i, part in enumerate(parts)}


def _spread(count: int, horizon: int) -> Tensor:
    """Logits (count,) of new decays: like ``log_spaced_decay_logits``, but a single one is the longest."""
    return log_spaced_decay_logits(count + 1, horizon)[1:]


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
    for name, words in names.items():
        least, got = getattr(old, name), getattr(new, name)
        if got < least:
            raise InputError(
                f"growth never shrinks: the {words} must be at least the source's "
                f"{least}; got {got}"
            )
    if old.ngram_buckets and new.max_ngram != old.max_ngram:
        raise InputError(
            f"runs must be the source's {old.max_ngram}, or the table would say other "
            f"things; got {new.max_ngram}"
        )
    if old.ngram_buckets and new.ngram_buckets % old.ngram_buckets:
        raise InputError(
            f"ngrams must be a multiple of the source's {old.ngram_buckets}, or pairs would share other "
            f"rows than they learnt; got {new.ngram_buckets}"
        )
