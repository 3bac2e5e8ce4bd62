"""Batches are a pure function of the position; lanes score every token exactly once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.config import InputError
from mmrec.data.batches import Batches, eval_lanes, spread_pieces


def test_an_epoch_is_a_partition_in_a_new_order() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    batches = Batches(tokens, batch=3, seq_len=10, seed=1)
    assert batches.steps_per_epoch == 33
    seen = []
    for epoch in range(2):
        starts = []
        for step in range(33):
            x, y = batches.get(epoch * 33 + step)
            assert x.shape == y.shape == (3, 10)
            assert torch.equal(x + 1, y)
            starts += x[:, 0].tolist()
        assert len({s % 10 for s in starts}) == 1
        assert len(set(starts)) == 99
        seen.append(starts)
    assert seen[0] != seen[1]


def test_a_position_gives_the_same_batch_whatever_came_before() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 500)
    one, other = (Batches(tokens, 2, 8, seed=3) for _ in range(2))
    for step in range(70):
        one.get(step)
    assert all(torch.equal(a, b) for a, b in zip(one.get(70), other.get(70), strict=True))
    different = Batches(tokens, 2, 8, seed=4).get(70)
    assert not torch.equal(one.get(70)[0], different[0])


def test_too_little_text() -> None:
    with pytest.raises(
        InputError, match=r"needs 4 windows of 8 tokens = 33; the training .* has 32"
    ):
        Batches(np.zeros(32, np.uint16), 4, 8, 0)
    assert Batches(np.zeros(33, np.uint16), 4, 8, 0).steps_per_epoch == 1


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 50))
def test_lanes_score_every_token_once(n: int, lanes: int, chunk: int) -> None:
    tokens = np.arange(1, n + 1)
    scored, context = [], {}
    for x, y, mask in eval_lanes(tokens, 0, lanes, chunk):
        scored += y[mask].tolist()
        context.update(zip(y[mask].tolist(), x[mask].tolist(), strict=True))
    assert sorted(scored) == tokens.tolist()
    assert all(before == target - 1 for target, before in context.items())


def test_pieces_reach_over_the_whole_split() -> None:
    tokens = np.arange(1000)
    made = spread_pieces(tokens, 80, 8).reshape(8, 10)
    assert made[0, 0] == 0
    assert made[-1, -1] == 999
    assert (np.diff(made, axis=1) == 1).all()
    assert len(set(made.ravel().tolist())) == 80
    assert np.array_equal(spread_pieces(tokens, 2000, 8), tokens)
    assert np.array_equal(spread_pieces(tokens, 5, 8), tokens[:5])
