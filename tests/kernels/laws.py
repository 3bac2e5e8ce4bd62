"""What every kernel promises, written once: each test of a kernel calls these.

An ``op`` takes (*sequences, *shared, state) and returns (output, final state); ``sequences`` have
axes (B, T, …), ``shared`` weights have none of them, ``state`` has B first.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmrec.kernels import _launch as module

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
    """One, two and four threads, and two runs, give the same bits, forward and backward.

    Work of any size is given to the threads here. (Numba has as many as conftest.py asks for.)
    """
    before, small = torch.get_num_threads(), module.SMALL_WORK
    results = []
    try:
        module.SMALL_WORK = 0
        for count in (1, 2, 4, 4):
            torch.set_num_threads(count)
            results.append([*op(*inputs), *gradients(op, inputs)])
    finally:
        module.SMALL_WORK = small
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def packs(
    op: Op, sequences: Sequence[Tensor], rest: Sequence[Tensor], states: Tensor, cuts: list[int]
) -> None:
    """Sequences packed into one row give what each gives alone: results, states, gradients.

    ``sequences`` (1, T, …), ``states`` (N, …) for the N = len(cuts) + 1 pieces between the cuts.
    """
    edges = [0, *sorted(cuts), sequences[0].shape[1]]
    cu = torch.tensor(edges, dtype=torch.int32)

    def packed(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return op(*inputs, cu_seqlens=cu)

    def apart(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *long, state = inputs
        long, shared = long[: len(sequences)], long[len(sequences) :]
        pieces = [
            op(*(x[:, lo:hi] for x in long), *shared, state[n : n + 1])
            for n, (lo, hi) in enumerate(pairwise(edges))
        ]
        return torch.cat([p[0] for p in pieces], 1), torch.cat([p[1] for p in pieces])

    inputs = [*sequences, *rest, states]
    for got, want in zip(packed(*inputs), apart(*inputs), strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(gradients(packed, inputs), gradients(apart, inputs), strict=True):
        torch.testing.assert_close(got, want)


def halves(op: Op, sequences: Sequence[Tensor], rest: Sequence[Tensor], state: Tensor) -> None:
    """bfloat16 and float16 in give the same type out, computed in float32, with a float32 state."""
    for dtype in (torch.bfloat16, torch.float16):
        small = [x.to(dtype) for x in sequences]
        shared = [x.to(dtype) for x in rest]
        out, last = op(*small, *shared, state)
        want, want_last = op(*(x.float() for x in small), *(x.float() for x in shared), state)
        assert out.dtype == dtype
        assert last.dtype == torch.float32
        assert torch.equal(out, want.to(dtype))
        assert torch.equal(last, want_last)
        for x, grad in zip(
            (*small, *shared), gradients(op, [*small, *shared, state]), strict=False
        ):
            assert grad.dtype == x.dtype
            assert torch.isfinite(grad).all()


def compiles(op: Op, inputs: Sequence[Tensor], backend: str = "aot_eager", **options: Any) -> None:
    """torch.compile takes the op whole, and gives the same results and gradients."""
    torch._dynamo.reset()

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        return op(*args, **options)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for got, want in zip(compiled(*inputs), call(*inputs), strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(gradients(compiled, inputs), gradients(call, inputs), strict=True):
        torch.testing.assert_close(got, want)


def survives_checkpointing(op: Op, inputs: Sequence[Tensor]) -> None:
    """Recomputed under torch.utils.checkpoint, the gradients are the same bits."""

    def again(*args: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = checkpoint(op, *args, use_reentrant=False)
        return out

    for got, want in zip(gradients(again, inputs), gradients(op, inputs), strict=True):
        assert torch.equal(got, want)


def works_without_gradients(op: Op, inputs: Sequence[Tensor]) -> None:
    """no_grad and inference_mode give the same results, and nothing that asks for gradients."""
    want = op(*inputs)
    ready = [x.clone().requires_grad_() for x in inputs]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            for got, expected in zip(op(*ready), want, strict=True):
                assert not got.requires_grad
                assert torch.equal(got, expected)
