"""What every kernel promises, written once: each test of a kernel calls these.

An ``op`` takes (*sequences, *shared, state) and returns (output, final state); ``sequences`` have
axes (B, T, …), ``shared`` weights have none of them, ``state`` has B first.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Op = Callable[..., tuple[Tensor, Tensor]]


def gradients(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed, uneven function of both results with respect to every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, last = op(*leaves)
    weights = torch.linspace(-1, 2, max(out.numel(), 1), dtype=out.dtype)[: out.numel()]
    loss = (out.flatten() * weights).sum() + last.sin().sum()
    # at T = 0 a reference does not touch some inputs: their gradient is zero
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def agrees(op: Op, reference: Op, inputs: Sequence[Tensor], tolerance: float) -> None:
    """Same results and gradients as the reference computed in float64."""
    exact = [x.double() for x in inputs]
    for got, want in zip(op(*inputs), reference(*exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    pairs = zip(gradients(op, inputs), gradients(reference, exact), strict=True)
    for got, want in pairs:
        scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
        torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=4 * tolerance)


def splits(
    op: Op, sequences: Sequence[Tensor], rest: Sequence[Tensor], state: Tensor, cuts: list[int]
) -> None:
    """The sequence in pieces with carried state equals the whole, bit for bit."""
    whole, last = op(*sequences, *rest, state)
    edges = [0, *sorted(cuts), sequences[0].shape[1]]
    pieces = []
    for lo, hi in pairwise(edges):
        out, state = op(*(x[:, lo:hi] for x in sequences), *rest, state)
        pieces.append(out)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(state, last)


def is_causal(
    op: Op, sequences: Sequence[Tensor], rest: Sequence[Tensor], state: Tensor, at: int
) -> None:
    """Changing inputs from ``at`` on leaves every earlier output as it was, and changes a later."""
    before, _ = op(*sequences, *rest, state)
    changed = [torch.cat((x[:, :at], x[:, at:] * 0.5 + 0.1), 1) for x in sequences]
    after, _ = op(*changed, *rest, state)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at:], after[:, at:])


def reads_strides(
    op: Op, sequences: Sequence[Tensor], rest: Sequence[Tensor], state: Tensor
) -> None:
    """Slices of one wide tensor give what contiguous copies give, results and gradients."""
    flat = [x.flatten(2) for x in sequences]
    wide = torch.cat(flat, -1)
    parts = wide.split([x.shape[-1] for x in flat], -1)
    views = [p.unflatten(-1, x.shape[2:]) for p, x in zip(parts, sequences, strict=True)]
    assert not views[0].is_contiguous()
    for got, want in zip(op(*views, *rest, state), op(*sequences, *rest, state), strict=True):
        assert torch.equal(got, want)


def ignores_threads(op: Op, inputs: Sequence[Tensor]) -> None:
    """One thread and two give the same bits, forward and backward."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([*op(*inputs), *gradients(op, inputs)])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
