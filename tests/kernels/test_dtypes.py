"""Every op in every dtype, with and without autocast, against its reference in float64."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec import kernels
from mmrec.kernels.cumprod import reference as cumprod_reference
from mmrec.kernels.fused_linear_cross_entropy import reference as loss_reference
from mmrec.kernels.gated_delta_rule import reference as delta_rule_reference
from mmrec.kernels.gated_recurrence import reference as recurrence_reference
from mmrec.kernels.gru import reference as gru_reference
from mmrec.kernels.kda import reference as kda_reference
from mmrec.kernels.lstm import reference as lstm_reference
from mmrec.kernels.min_gru_mixer import reference as mixer_reference
from mmrec.kernels.relu_squared import reference as relu_reference
from mmrec.kernels.rmsnorm_conv1d import reference as norm_reference
from mmrec.kernels.scan import reference as scan_reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {F64: 1e-10, F32: 2e-5, F16: 6e-3, BF16: 4e-2}
"""Largest error of a result or gradient, as a share of the largest value."""
DELTA_RULE_OPTIONS = {
    "use_qk_l2norm_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "use_logsigmoid_in_kernel": True,
}
TARGETS = torch.tensor([0, 3, 2, 3, 1, 0])


class Case(NamedTuple):
    """An op with the shapes of its arguments."""

    op: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    follows_first: bool = False
    """The output has the dtype of the first argument, whatever the weights have."""


CASES = {
    "scan": Case(kernels.scan, scan_reference.scan, [(2, 5, 3), (2, 5, 3), (2, 3)]),
    "cumprod": Case(kernels.cumprod, cumprod_reference.cumprod, [(2, 5, 3), (2, 3)]),
    "log_cumprod": Case(kernels.log_cumprod, cumprod_reference.log_cumprod, [(2, 5, 3), (2, 3)]),
    "gated_recurrence": Case(
        kernels.gated_recurrence,
        recurrence_reference.gated_recurrence,
        [*[(2, 5, 4)] * 3, (2, 2, 2), (2, 4)],
    ),
    "gru": Case(kernels.gru, gru_reference.gru, [(2, 5, 12), (12, 4), (12,), (2, 4)]),
    "lstm": Case(
        lambda p, w, h: kernels.lstm(p, w, h, h)[:1],
        lambda p, w, h: lstm_reference.lstm(p, w, h, h)[:1],
        [(2, 5, 16), (16, 4), (2, 4)],
    ),
    "gated_delta_rule": Case(
        lambda *x: kernels.gated_delta_rule(*x[:5], None, x[5], True, **DELTA_RULE_OPTIONS),
        lambda *x: delta_rule_reference.gated_delta_rule(*x[:5], None, x[5], **DELTA_RULE_OPTIONS),
        [*[(2, 5, 2, 4)] * 3, *[(2, 5, 2)] * 2, (2, 2, 4, 4)],
    ),
    "kda": Case(
        lambda *x: kernels.kda(*x[:5], None, x[5], True, True),
        lambda *x: kda_reference.kda(*x, use_qk_l2norm_in_kernel=True),
        [*[(2, 5, 2, 4)] * 4, (2, 5, 2), (2, 2, 4, 4)],
    ),
    "min_gru_mixer": Case(
        kernels.min_gru_mixer, mixer_reference.min_gru_mixer, [(2, 5, 16), (4,), (2, 4)], True
    ),
    "rmsnorm_conv1d": Case(
        kernels.rmsnorm_conv1d, norm_reference.rmsnorm_conv1d, [(2, 5, 4), (3, 4), (2, 2, 4)], True
    ),
    "relu_squared": Case(
        lambda x: (kernels.relu_squared(x),), lambda x: (relu_reference.relu_squared(x),), [(7, 3)]
    ),
    "dropout_add": Case(
        lambda r, x: (kernels.dropout_add(x, r, 0.0),),
        lambda r, x: (r + x,),
        [(7, 3), (7, 3)],
        True,
    ),
    "fused_linear_cross_entropy": Case(
        lambda h, w: (kernels.fused_linear_cross_entropy(h, w, TARGETS),),
        lambda h, w: (loss_reference.fused_linear_cross_entropy(h, w, TARGETS),),
        [(6, 8), (4, 8)],
    ),
}
STATELESS = ("relu_squared", "dropout_add", "fused_linear_cross_entropy")


def make_inputs(name: str, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Arguments of these dtypes; the last one is repeated. The state is never below float32."""
    shapes, inputs = CASES[name].shapes, []
    for n, shape in enumerate(shapes):
        dtype = dtypes[min(n, len(dtypes) - 1)]
        if n == len(shapes) - 1 and name not in STATELESS:
            dtype = F64 if F64 in dtypes else F32
        x = torch.rand(shape) + 0.2 if "cumprod" in name else torch.randn(shape)
        inputs.append(x.to(dtype).requires_grad_())
    return inputs


def results(op: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results, then the gradients of all arguments."""
    outputs = list(op(*inputs))
    loss = sum((x.double() * torch.linspace(0.5, 1, x.numel()).view_as(x)).sum() for x in outputs)
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def check(name: str, inputs: list[Tensor], got: list[Tensor], tolerance: float) -> None:
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = results(CASES[name].reference, exact)
    for actual, expected in zip(got, want, strict=True):
        assert torch.isfinite(actual).all()
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance
    for gradient, x in zip(got[-len(inputs) :], inputs, strict=True):
        assert gradient.dtype == x.dtype


@pytest.mark.parametrize("autocast", [None, BF16, F16])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_one_dtype(name: str, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """The output has the dtype of the inputs, as after torch's own ops of several inputs."""
    inputs = make_inputs(name, [dtype])
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        got = results(CASES[name].op, inputs)
    assert got[0].dtype == dtype
    tolerance = TOLERANCE[dtype]
    if name == "fused_linear_cross_entropy" and autocast and dtype != F64:  # it has a product
        tolerance = max(tolerance, TOLERANCE[autocast])
    check(name, inputs, got, tolerance)


MIXED = [name for name, case in CASES.items() if len(case.shapes) > 1 and "cumprod" not in name]


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (F16, F32), (BF16, F16)])
def test_mixed_dtypes(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Autocast takes the widest, as for torch.cat; without it they are refused, as by nn.GRU.

    Norm weights and biases may always be in another dtype, as for torch.nn.functional.rms_norm.
    """
    case, inputs = CASES[name], make_inputs(name, dtypes)
    with torch.autocast("cpu", BF16):
        got = results(case.op, inputs)
    assert got[0].dtype == (dtypes[0] if case.follows_first else F32)
    check(name, inputs, got, TOLERANCE[BF16])
    if case.follows_first:
        check(name, inputs, results(case.op, inputs), TOLERANCE[BF16])
    else:
        with pytest.raises(ValueError, match="must have dtype"):
            case.op(*inputs)


# dynamo itself makes one to trace a torch.autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_compiled_under_autocast(name: str) -> None:
    """torch.compile follows autocast, and recompiles where it ends."""
    torch._dynamo.reset()
    case = CASES[name]
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(name, [BF16, F32] if name in MIXED else [BF16])
    with torch.autocast("cpu", BF16):
        for got, want in zip(results(compiled, inputs), results(case.op, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    inputs = make_inputs(name, [F32])
    for got, want in zip(results(compiled, inputs), results(case.op, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_the_loss_under_autocast_is_that_of_torch() -> None:
    """Products in autocast's bfloat16, the loss in float32."""
    hidden, weight = make_inputs("fused_linear_cross_entropy", [F32])
    with torch.autocast("cpu", BF16):
        got = kernels.fused_linear_cross_entropy(hidden, weight, TARGETS)
        want = F.cross_entropy(F.linear(hidden, weight), TARGETS)
    assert got.dtype == want.dtype == F32
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
    assert torch.equal(got, kernels.fused_linear_cross_entropy(hidden, weight, TARGETS, bf16=True))
