"""Freeze parameters, so that fine-tuning keeps their values."""

import re

from mmrec.errors import InputError
from mmrec.model import Model

FEED_FORWARD = ("ffn_norm", "up_proj", "down_proj")
"""Modules of a layer that do not belong to its memory."""


def freeze_parameters(model: Model, spec: str) -> None:
    """Freeze the named parameters of a model: they get no gradient from now on.

    Args:
        model: changed in place.
        spec: words joined by commas. ``embeddings`` are the token and n-gram embeddings,
            ``memory`` is all of every layer except its feed-forward, ``layers:0-2`` are whole
            layers by index. Empty freezes nothing.

    Raises:
        InputError: a word is unknown, a layer does not exist, or nothing would be left to learn.
    """
    for word in filter(None, spec.split(",")):
        layers = re.fullmatch(r"layers:(\d{1,9})(?:-(\d{1,9}))?", word)
        if layers:
            first, last = int(layers[1]), int(layers[2] or layers[1])
            if not first <= last < model.config.depth:
                raise InputError(
                    f"freeze must name layers from 0 to {model.config.depth - 1}, the smaller "
                    f"index first; got {word!r}"
                )
            prefixes = tuple(f"layers.{i}." for i in range(first, last + 1))
            names = [n for n, _ in model.named_parameters() if n.startswith(prefixes)]
        elif word == "embeddings":
            names = ["embedding", "ngram_embedding"]
        elif word == "memory":
            names = [
                name
                for name, _ in model.layers.named_parameters(prefix="layers")
                if name.split(".")[2] not in FEED_FORWARD
            ]
        else:
            raise InputError(
                "freeze must be words out of embeddings, memory, layers:0-2, joined "
                f"by commas; got {word!r}"
            )
        for name, p in model.named_parameters():
            if name in names:
                p.requires_grad_(False)
    if not any(p.requires_grad for n, p in model.named_parameters() if n != "norm.weight"):
        raise InputError(f"freeze must leave something to learn; got {spec!r}")
