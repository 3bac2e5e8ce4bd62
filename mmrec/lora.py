"""LoRA: a large matrix stays as it is, and a product of two thin ones is learnt beside it.

Hu et al. 2021, "LoRA" (arXiv:2106.09685, section 4.1): W x becomes W x + (α / r) B A x, with A (r,
inputs) at random and B (outputs, r) zero, so that at first nothing changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.errors import InputError
from mmrec.model import Layer, Linear, Model

FACTORS = (".down", ".up")


class LowRank(Linear):
    """A frozen matrix, and the two factors that are learnt."""

    def __init__(self, frozen: Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.weight, self.scale = frozen.weight, scale
        outputs, inputs = frozen.weight.shape
        self.down = nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, inputs) to (…, outputs), in the dtype of x."""
        thin = F.linear(x, self.down.to(x.dtype))
        return super().forward(x) + F.linear(thin, (self.up * self.scale).to(x.dtype))


def attach(model: Model, rank: int, alpha: float) -> None:
    """Freeze a model, and give every projection of its layers factors of a rank; in place.

    Raises InputError if the rank is larger than the width.
    """
    width = model.config.width
    if not 1 <= rank <= width:
        raise InputError(f"lora must lie in 1 to {width}, the width of the model; got {rank}")
    model.requires_grad_(False)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for name in ("in_proj", "out_proj", "up_proj", "down_proj"):
            setattr(layer, name, LowRank(getattr(layer, name), rank, alpha / rank))


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The one matrix (outputs, inputs) that does what a frozen one and its factors do."""
    return weight + scale * (up @ down)
