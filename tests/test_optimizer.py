"""The optimizer: directions of equal size, torch's own Muon as a witness, which rule moves what."""

import pytest
import torch
from torch import nn

from mmrec.optimizer import MuonAdamW, newton_schulz


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 16), (2, 16, 96)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    out = newton_schulz(u * torch.linspace(0.02, 1, s.shape[-1]) @ vh)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.4
    assert values.max() < 1.3
    nearest = torch.einsum("nij,nij->n", out, u @ vh) / out.flatten(1).norm(dim=1)
    assert (nearest / s.shape[-1] ** 0.5 > 0.97).all()


def run(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: int) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_agrees_with_torch(shape: tuple[int, int]) -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "weight_decay": 0.1, "use_muon": True}
    rest = {"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.0, "use_muon": False}
    run(MuonAdamW([group, rest], lr=1.0, betas=(0.9, 0.95), matrix_lr=0.02), ours, 3)
    run(muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95), theirs, 3)
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved  # bfloat16 products in another order


def test_blocks_move_as_matrices_of_their_own_and_the_rest_by_adamw() -> None:
    blocks, bias = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(5))
    single, twin = nn.Parameter(blocks[1].detach().clone()), nn.Parameter(bias.detach().clone())
    muon = {"weight_decay": 0.0, "use_muon": True}
    groups = [
        {"params": [blocks, single], **muon},
        {"params": [bias], "weight_decay": 0.0, "use_muon": False},
    ]
    optimizer = MuonAdamW(groups, lr=0.1, betas=(0.9, 0.95), matrix_lr=0.02)
    adam = torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        blocks.grad, bias.grad = torch.randn_like(blocks), torch.randn_like(bias)
        single.grad, twin.grad = blocks.grad[1].clone(), bias.grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(blocks[1], single, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(bias, twin)


def test_parameters_without_gradient_stay() -> None:
    still = nn.Parameter(torch.ones(4, 4))
    other = nn.Parameter(torch.ones(1))
    groups = [
        {"params": [still], "weight_decay": 0.1, "use_muon": True},
        {"params": [other], "weight_decay": 0.0, "use_muon": False},
    ]
    MuonAdamW(groups, lr=0.1, betas=(0.9, 0.95), matrix_lr=0.02).step()
    assert torch.equal(still, torch.ones(4, 4))
