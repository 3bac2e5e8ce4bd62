"""The measured rate of matrix products, and the decision that depends on it."""

import pytest
import torch

from mmrec.runtime.hardware import bfloat16_is_faster, matrix_product_rate


def test_the_rate_is_measured_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        assert matrix_product_rate(dtype, (64, 32, 16), repeats=2) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("advantage", "expected"), [(0.5, False), (1.3, False), (1.31, True)])
def test_bfloat16_must_be_clearly_faster(advantage: float, expected: bool) -> None:
    rates = {torch.float32: 1.0, torch.bfloat16: advantage}
    assert bfloat16_is_faster(rates.__getitem__) is expected
