"""Batches are a pure function of the position; lanes score every token exactly once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.data.dataloader import Batches, Mixture, deal, eval_lanes, spread_pieces
from mmrec.errors import InputError


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


def test_rows_go_on_where_they_ended() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    batches = Batches(tokens, batch=3, seq_len=10, seed=1, carry=True)
    for epoch in range(2):
        end = torch.empty(0)
        for at in range(33):
            x, _ = batches.get(epoch * 33 + at)
            assert batches.begins(epoch * 33 + at) == (at == 0)
            if at:
                assert torch.equal(x[:, 0], end + 1)
            end = x[:, -1]


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


def test_a_mixture_keeps_its_shares_and_passes_over_every_window() -> None:
    streams = [np.arange(1000), np.arange(2000, 2400), np.arange(5000, 5100)]
    made, other = (Mixture(streams, (0.5, 0.3, 0.2), batch=4, seq_len=10, seed=2) for _ in range(2))
    assert made.steps_per_epoch == (99 + 39 + 9) // 4
    starts = torch.cat([made.get(step)[0][:, 0] for step in range(128)])  # two blocks
    counts = [
        int(((starts >= lo) & (starts < hi)).sum())
        for lo, hi in ((0, 1000), (2000, 2400), (5000, 5100))
    ]
    assert counts == [256, 154, 102]
    first = starts[starts < 1000][:99].tolist()
    assert len(set(first)) == 99  # an epoch of its own
    assert torch.equal(other.get(77)[0], made.get(77)[0])
    x, y = made.get(100)
    assert torch.equal(x + 1, y)


def test_mixtures_that_cannot_be_dealt() -> None:
    one = np.arange(100)
    with pytest.raises(InputError, match="at least 1/256 of their sum; got 1, 0.001"):
        Mixture([one, one], (1, 0.001), 1, 10, 0)
    with pytest.raises(InputError, match="one batch needs 99 windows of 10 tokens"):
        Mixture([one, one], (1, 1), 99, 10, 0)
    with pytest.raises(InputError, match="carry must have one source"):
        deal(one, [(1.0, 0, 50), (1.0, 50, 100)], 1, 10, 0, carry=True)
