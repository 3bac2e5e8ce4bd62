"""Squared ReLU, and the bfloat16 that kernels read and write as bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.kernels import relu_squared
from mmrec.kernels._bf16 import from_bf16, to_bf16
from mmrec.kernels.relu_squared import kernel, reference

EDGES = torch.tensor([0.0, -0.0, 1.5, -2.5, torch.inf, -torch.inf, torch.nan, 1e-30])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 100, kernel.BLOCK + 3])
def test_agrees_with_reference(count: int, dtype: torch.dtype) -> None:
    x = torch.cat((torch.randn(count), EDGES)).to(dtype).requires_grad_()
    y = relu_squared(x)
    assert torch.equal(y.nan_to_num(7), reference.relu_squared(x).nan_to_num(7))
    dy = torch.randn_like(x)
    (got,) = torch.autograd.grad(y, x, dy)
    (want,) = torch.autograd.grad(reference.relu_squared(x.double()), x, dy.double())
    finite = x.isfinite()
    torch.testing.assert_close(got[finite], want[finite])


def test_gradcheck_and_op() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu_squared, [x])
    torch.library.opcheck(torch.ops.mmrec.relu_squared.default, (x,))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="x must be float32, float64, bfloat16 or float16"):
        relu_squared(torch.ones(2, dtype=torch.int64))


@given(st.floats(width=32))
def test_bfloat16_bits_round_as_torch_rounds(x: float) -> None:
    array = np.empty(1, np.uint16)
    array[0] = to_bf16(np.float32(x), array)
    want = torch.tensor([x]).bfloat16()
    got = torch.from_numpy(array).view(torch.bfloat16)
    assert torch.equal(got.float().nan_to_num(7), want.float().nan_to_num(7))
    back = from_bf16(array[0])
    assert back == want.item() or np.isnan(back)
