"""LoRA: weight matrices stay frozen, and low-rank products beside them are learnt.

W x becomes W x + (α / r) B A x. A has shape (r, inputs) and is drawn at random. B has shape
(outputs, r) and is zero, so that nothing changes at first. The factors are named as in peft.

Source: Hu et al. 2021, "LoRA" (arXiv:2106.09685, section 4.1).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.errors import InputError
from mmrec.model import Linear, Model


class LoRALinear(Linear):
    """A linear layer with a frozen weight and two trainable factors."""

    def __init__(self, linear: Linear, rank: int, alpha: float) -> None:
        """Take over the weight of a linear layer.

        Args:
            linear: The layer. Its weight has shape (outputs, inputs).
            rank: The rank r of the product of the factors.
            alpha: The product counts ``alpha / rank``.
        """
        nn.Module.__init__(self)
        self.weight, self.rank, self.alpha = linear.weight, rank, alpha
        outputs, inputs = linear.weight.shape
        self.lora_A = nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    @property
    def scale(self) -> float:
        """The factor ``alpha / rank``."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, inputs) to (…, outputs), in the dtype of x."""
        low_rank = F.linear(x, self.lora_A.to(x.dtype))
        return super().forward(x) + F.linear(low_rank, (self.lora_B * self.scale).to(x.dtype))

    def merged_weight(self) -> Tensor:
        """Return the weight (outputs, inputs) of a linear layer that computes the same."""
        product = self.lora_B.detach() @ self.lora_A.detach()
        return self.weight.detach() + self.scale * product


def apply_lora(model: Model, rank: int, alpha: float) -> None:
    """Freeze a model and give every linear layer of its layers trainable factors, in place.

    Args:
        model: The model. The factors are drawn from torch's global generator.
        rank: The rank of the factors, 1 to the width of the model.
        alpha: The product of the factors counts ``alpha / rank``.

    Raises:
        InputError: The rank is no whole number in range, or alpha is not finite and positive.
    """
    width = model.config.width
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= width:
        raise InputError(f"lora_rank must lie in 1 to {width}, the width of the model; got {rank}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"lora_alpha must be finite and > 0; got {alpha}")
    model.requires_grad_(False)
    for layer in model.layers:
        for name, child in list(layer.named_children()):
            if isinstance(child, Linear):
                setattr(layer, name, LoRALinear(child, rank, alpha))


def lora_settings(model: nn.Module) -> dict[str, float] | None:
    """Return the ``rank`` and ``alpha`` that ``apply_lora`` was given; None without LoRA."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            return {"rank": module.rank, "alpha": module.alpha}
    return None


def merge_lora(model: nn.Module) -> None:
    """Replace every LoRALinear of a model by a Linear with the merged weight, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                outputs, inputs = child.weight.shape
                with torch.device("meta"):  # without drawing a weight that is not used
                    linear = Linear(inputs, outputs)
                linear.weight = nn.Parameter(child.merged_weight())
                setattr(parent, name, linear)


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that the model would have after ``merge_lora``.

    Yields:
        Name and detached value of one parameter after another. A merged weight is computed when
        its turn comes, so that only one exists at a time.
    """
    lora = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    for name, parameter in model.named_parameters():
        module, _, attribute = name.rpartition(".")
        if module not in lora:
            yield name, parameter.detach()
        elif attribute == "weight":
            yield name, lora[module].merged_weight()
