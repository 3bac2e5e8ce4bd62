"""The optimizer: Muon for weight matrices, AdamW for all else."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmrec.runtime.distributed import ALONE, World
from mmrec.training.replicas import Lanes

# Quintic polynomial of an iteration that draws all singular values towards 1 (see orthogonalise).
A, B, C = 3.4445, -4.7750, 2.0315
AT_ONCE = 1 << 24  # elements of the matrices that are moved together: each takes 20 bytes meanwhile


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Nearest matrices with all singular values near 1 (0.7 to 1.2), x (N, rows, columns).

    Newton-Schulz iteration with the coefficients of Jordan et al., "Muon" (2024),
    kellerjordan.github.io/posts/muon, in bfloat16.
    """
    turned = x.shape[-2] > x.shape[-1]
    x = (x.mT if turned else x).bfloat16()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if turned else x).float()


class Muon(torch.optim.Optimizer):
    """Muon for groups with ``muon=True``, AdamW for the others; all rates follow ``peak``.

    Of several processes, each orthogonalises a share of the matrices.

    A matrix moves by its orthogonalised momentum: every direction by the same amount, however small
    its gradient. Source: Jordan et al. 2024, as above; Nesterov momentum and the factor
    sqrt(max(1, rows / columns)) are theirs.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        muon_lr: float,
        momentum: float = 0.95,
        lanes: Lanes | None = None,
        world: World = ALONE,
    ) -> None:
        """Groups hold ``params``, ``weight_decay`` and ``muon``; matrices may have more axes."""
        self.lanes, self.world = lanes or Lanes(1), world
        matrices = [g for g in groups if g["muon"]]
        self._adam = torch.optim.AdamW(
            [g for g in groups if not g["muon"]], lr=lr, betas=betas, fused=True
        )
        super().__init__(matrices, {"lr": muon_lr, "momentum": momentum})
        self.param_groups += self._adam.param_groups
        self._adam.state = self.state
        for group in self.param_groups:
            group["peak"] = group["lr"]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        tasks: list[Callable[[], object]] = [self._adam.step]
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"] if group["muon"] else []:
                if p.grad is not None:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    alike[p.shape[-2:]].append(p)
            # matrices of one shape in one task, large ones first
            for shape in sorted(alike, key=lambda shape: -shape.numel() * len(alike[shape])):
                most = max(1, AT_ONCE // shape.numel()) * self.world.size  # each moves a share
                tasks += [
                    partial(self._move, group, alike[shape][lo : lo + most])
                    for lo in range(0, len(alike[shape]), most)
                ]
        if self.world.size == 1:
            self.lanes.run(tasks)
        else:  # one after the other, in one order in all processes: they talk to each other
            for task in tasks:
                task()

    @torch.no_grad()
    def _move(self, group: dict[str, Any], params: list[Tensor]) -> None:
        rows, columns = params[0].shape[-2:]
        local, updates = self.world.local, []
        for p in params:
            assert p.grad is not None
            momentum, grad = local(self.state[p]["momentum"]), local(p.grad)
            momentum.lerp_(grad, 1 - group["momentum"])
            updates.append(grad.lerp(momentum, group["momentum"]))
        steps = self.world.apart(_directions, updates, [p.shape for p in params])
        rate = group["lr"] * max(1, rows / columns) ** 0.5
        for p, step in zip(params, steps, strict=True):
            local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-rate)


def _directions(updates: list[Tensor]) -> list[Tensor]:
    """Tensors (…, rows, columns) with each of their matrices orthogonalised, in one batch."""
    blocks = [u.view(-1, *u.shape[-2:]) for u in updates]
    steps = orthogonalise(torch.cat(blocks)).split([len(b) for b in blocks])
    return [step.view_as(u) for step, u in zip(steps, updates, strict=True)]
