"""The laws that every op obeys, written once. The tests of each op call them.

An ``op`` takes (*sequences, *shared, state) and returns (output, final state). ``sequences`` have
axes (B, T, …), ``shared`` are weights without these axes, and ``state`` has axis B first.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmrec.kernels._launch import parallel_threshold

Op = Callable[..., tuple[Tensor, Tensor]]


def gradients(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed, uneven function of both results with respect to every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, last = op(*leaves)
    weights = torch.linspace(-1, 2, max(out.numel(), 1), dtype=out.dtype)[: out.numel()]
    loss = (out.flatten() * weights).sum() + last.sin().sum()
    # at T = 0 a reference does not use some inputs: their gradient is zero
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
    op: Op, sequences: Sequence[Tensor], shared: Sequence[Tensor], state: Tensor, cuts: list[int]
) -> None:
    """A sequence cut into parts, with the state carried over, equals the uncut one bit for bit."""
    want, want_state = op(*sequences, *shared, state)
    edges = [0, *sorted(cuts), sequences[0].shape[1]]
    outputs = []
    for lo, hi in pairwise(edges):
        out, state = op(*(x[:, lo:hi] for x in sequences), *shared, state)
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, 1), want)
    assert torch.equal(state, want_state)


def is_causal(
    op: Op, sequences: Sequence[Tensor], shared: Sequence[Tensor], state: Tensor, at: int
) -> None:
    """Changing the inputs from step ``at`` on changes later outputs, and no earlier one."""
    before, _ = op(*sequences, *shared, state)
    changed = [torch.cat((x[:, :at], x[:, at:] * 0.5 + 0.1), 1) for x in sequences]
    after, _ = op(*changed, *shared, state)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at:], after[:, at:])


def reads_strides(
    op: Op, sequences: Sequence[Tensor], shared: Sequence[Tensor], state: Tensor
) -> None:
    """Slices of one wide tensor give the same results as contiguous copies."""
    flat = [x.flatten(2) for x in sequences]
    slices = torch.cat(flat, -1).split([x.shape[-1] for x in flat], -1)
    views = [y.unflatten(-1, x.shape[2:]) for y, x in zip(slices, sequences, strict=True)]
    assert not views[0].is_contiguous()
    for got, want in zip(op(*views, *shared, state), op(*sequences, *shared, state), strict=True):
        assert torch.equal(got, want)


def ignores_threads(op: Op, inputs: Sequence[Tensor]) -> None:
    """One, two and four threads, and a second run, give the same bits, forward and backward.

    Work of any size runs in parallel here. (conftest.py sets Numba's maximum to four threads.)
    """
    threads = torch.get_num_threads()
    results = []
    try:
        with parallel_threshold(0):
            for count in (1, 2, 4, 4):
                torch.set_num_threads(count)
                results.append([*op(*inputs), *gradients(op, inputs)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def packs(
    op: Op, sequences: Sequence[Tensor], shared: Sequence[Tensor], states: Tensor, cuts: list[int]
) -> None:
    """Sequences packed in one row give what each gives by itself: results, states, gradients.

    ``sequences`` (1, T, …) hold the N = len(cuts) + 1 sequences between the cuts; ``states`` is
    (N, …).
    """
    edges = [0, *sorted(cuts), sequences[0].shape[1]]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)

    def packed(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return op(*inputs, cu_seqlens=cu_seqlens)

    def separate(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *tensors, state = inputs
        rows, weights = tensors[: len(sequences)], tensors[len(sequences) :]
        results = [
            op(*(x[:, lo:hi] for x in rows), *weights, state[n : n + 1])
            for n, (lo, hi) in enumerate(pairwise(edges))
        ]
        outputs, final_states = zip(*results, strict=True)
        return torch.cat(outputs, 1), torch.cat(final_states)

    inputs = [*sequences, *shared, states]
    for got, want in zip(packed(*inputs), separate(*inputs), strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(gradients(packed, inputs), gradients(separate, inputs), strict=True):
        torch.testing.assert_close(got, want)


def low_precision(
    op: Op, sequences: Sequence[Tensor], shared: Sequence[Tensor], state: Tensor
) -> None:
    """bfloat16 and float16 inputs give outputs of their dtype, computed in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        inputs = [x.to(dtype) for x in sequences]
        weights = [x.to(dtype) for x in shared]
        out, final = op(*inputs, *weights, state)
        want, want_final = op(*(x.float() for x in inputs), *(x.float() for x in weights), state)
        assert out.dtype == dtype
        assert final.dtype == torch.float32
        assert torch.equal(out, want.to(dtype))
        assert torch.equal(final, want_final)
        for x, grad in zip(
            (*inputs, *weights), gradients(op, [*inputs, *weights, state]), strict=False
        ):
            assert grad.dtype == x.dtype
            assert torch.isfinite(grad).all()


def compiles(op: Op, inputs: Sequence[Tensor], backend: str = "aot_eager", **options: Any) -> None:
    """torch.compile takes the op without graph breaks, and gives the same results and gradients."""
    torch._dynamo.reset()

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        return op(*args, **options)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for got, want in zip(compiled(*inputs), call(*inputs), strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(gradients(compiled, inputs), gradients(call, inputs), strict=True):
        torch.testing.assert_close(got, want)


def survives_checkpointing(op: Op, inputs: Sequence[Tensor]) -> None:
    """Under torch.utils.checkpoint the recomputed gradients have the same bits."""

    def checkpointed(*args: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = checkpoint(op, *args, use_reentrant=False)
        return out

    for got, want in zip(gradients(checkpointed, inputs), gradients(op, inputs), strict=True):
        assert torch.equal(got, want)


def works_without_gradients(op: Op, inputs: Sequence[Tensor]) -> None:
    """no_grad and inference_mode give the same results, which require no gradient."""
    want = op(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            for got, expected in zip(op(*leaves), want, strict=True):
                assert not got.requires_grad
                assert torch.equal(got, expected)


class ResultSizes(TorchDispatchMode):
    """While it is entered, ``sizes`` records the number of elements of one result of an op."""

    def __init__(self, op: Any, result: int) -> None:
        super().__init__()
        self.op, self.result, self.sizes = op, result, list[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func is self.op:
            self.sizes.append(results[self.result].numel())
        return results


def saves_only_for_gradients(op: Op, library_op: Any, inputs: Sequence[Tensor]) -> int:
    """The third result of the library op, which backward needs, is empty without gradients.

    Returns its number of elements where a gradient can be asked for.
    """
    leaves = [x.clone().requires_grad_() for x in inputs]
    with ResultSizes(library_op, 2) as saved:
        op(*inputs)
        with torch.no_grad():
            op(*leaves)
        with torch.inference_mode():
            op(*leaves)
        op(*leaves)
    *without, size = saved.sizes
    assert without == [0, 0, 0]
    return size
