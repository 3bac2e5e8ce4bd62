"""The optimizer: directions of equal size, torch's own Muon as a witness, which rule moves what."""

import pytest
import torch
from torch import nn

from mmrec.kernels.rowwise_rmsprop.reference import rowwise_rmsprop_
from mmrec.optimizer import MuonAdamW, newton_schulz

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 16), (2, 16, 96)])
def test_singular_values_come_near_one(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    out = newton_schulz(u * torch.linspace(0.02, 1, s.shape[-1]) @ vh, dtype=dtype)
    assert out.dtype == torch.float32
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.4
    assert values.max() < 1.3
    nearest = torch.einsum("nij,nij->n", out, u @ vh) / out.flatten(1).norm(dim=1)
    assert (nearest / s.shape[-1] ** 0.5 > 0.97).all()


def test_the_dtype_is_that_of_the_iteration() -> None:
    """bfloat16 rounds to multiples of 2^-8 of each element; float32 follows the polynomial."""
    x = torch.randn(1, 16, 48)
    exact = x.double() / x.double().norm()
    for _ in range(5):
        gram = exact @ exact.mT
        exact = 3.4445 * exact + (-4.7750 * gram + 2.0315 * gram @ gram) @ exact
    errors = [float((newton_schulz(x, dtype=d) - exact).abs().max()) for d in DTYPES]
    assert errors[1] < 1e-4 < 2e-3 < errors[0]
    low = newton_schulz(x, dtype=torch.bfloat16)
    assert torch.equal(low, low.bfloat16().float())


@pytest.mark.parametrize(
    ("instructions", "dtype"), [("", torch.float32), ("AVX-512 BF16", torch.bfloat16)]
)
def test_the_processor_decides_the_dtype(
    instructions: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrec.optimizer.bfloat16_instructions", lambda: instructions)
    p, q = nn.Parameter(torch.zeros(8, 24)), nn.Parameter(torch.zeros(8, 24))
    rest = {"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.0, "use_muon": False}
    rates = {"lr": 1.0, "betas": (0.9, 0.95), "matrix_lr": 1.0}
    for x, options in ((p, {}), (q, {"newton_schulz_dtype": dtype})):
        group = {"params": [x], "weight_decay": 0.0, "use_muon": True}
        optimizer = MuonAdamW([group, rest], **rates, **options)  # type: ignore[arg-type]
        assert optimizer.newton_schulz_dtype == dtype
        torch.manual_seed(1)
        x.grad = torch.randn_like(x)
        optimizer.step()
    assert torch.equal(p, q)
    assert torch.equal(p, p.bfloat16().float()) == (dtype == torch.bfloat16)


def run(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: int) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_agrees_with_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "weight_decay": 0.1, "use_muon": True}
    rest = {"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.0, "use_muon": False}
    optimizer = MuonAdamW(
        [group, rest], lr=1.0, betas=(0.9, 0.95), matrix_lr=0.02, newton_schulz_dtype=dtype
    )
    run(optimizer, ours, 3)
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


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_table_moves_by_rows_whether_its_gradient_is_sparse_or_dense(is_sparse: bool) -> None:
    table, other = nn.Parameter(torch.randn(30, 8)), nn.Parameter(torch.ones(1))
    groups = [
        {"params": [nn.Parameter(torch.ones(4, 4))], "weight_decay": 0.0, "use_muon": True},
        {"params": [other], "weight_decay": 0.0, "use_muon": False},
        {"params": [table], "weight_decay": 0.5, "use_muon": False, "rowwise": True},
    ]
    optimizer = MuonAdamW(groups, lr=0.1, betas=(0.9, 0.95), matrix_lr=0.02)
    want, mean_square = table.detach().double(), torch.zeros(30).double()
    for factor in (1.0, 0.5):
        optimizer.scale_lr(factor)
        indices, values = torch.randint(30, (12,)), torch.randn(12, 8)
        gradient = torch.sparse_coo_tensor(
            indices[None], values, table.shape, check_invariants=False
        )
        table.grad = gradient if is_sparse else gradient.to_dense()
        optimizer.step()
        rowwise_rmsprop_(want, mean_square, indices, values.double(), 0.1 * factor, 0.99, 0.5)
    torch.testing.assert_close(table.double(), want, rtol=1e-5, atol=1e-5)
    state = optimizer.state[table]
    assert list(state) == ["mean_square"]
    torch.testing.assert_close(state["mean_square"][:, 0].double(), mean_square)


def test_moments_of_adamw_become_mean_squares() -> None:
    """A run of mmrec 0.11 goes on: its rows keep the size of their gradients."""
    table = nn.Parameter(torch.zeros(3, 4))
    groups = [
        {"params": [nn.Parameter(torch.ones(4, 4))], "weight_decay": 0.0, "use_muon": True},
        {"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.0, "use_muon": False},
        {"params": [table], "weight_decay": 0.0, "use_muon": False, "rowwise": True},
    ]
    optimizer = MuonAdamW(groups, lr=0.1, betas=(0.9, 0.95), matrix_lr=0.02)
    squares = torch.tensor([[1.0, 3, 2, 2], [0, 0, 0, 0], [4, 4, 4, 4]])
    optimizer.state[table] = {
        "step": torch.tensor(5.0),
        "exp_avg": torch.ones(3, 4),
        "exp_avg_sq": squares,
    }
    table.grad = torch.full((3, 4), 2.0)
    optimizer.step()
    want = torch.tensor([[0.99 * 2 + 0.01 * 4], [4], [4]])
    torch.testing.assert_close(optimizer.state[table]["mean_square"], want)
    torch.testing.assert_close(table, -0.2 / want.sqrt().expand(3, 4))


def test_parameters_without_gradient_stay() -> None:
    still = nn.Parameter(torch.ones(4, 4))
    other = nn.Parameter(torch.ones(1))
    groups = [
        {"params": [still], "weight_decay": 0.1, "use_muon": True},
        {"params": [other], "weight_decay": 0.0, "use_muon": False},
    ]
    MuonAdamW(groups, lr=0.1, betas=(0.9, 0.95), matrix_lr=0.02).step()
    assert torch.equal(still, torch.ones(4, 4))
