"""A batch depends only on the seed and its number; evaluation scores every token exactly once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.data.dataloader import (
    MixtureLoader,
    WindowLoader,
    evaluation_streams,
    evenly_spaced_sample,
    make_loader,
)
from mmrec.errors import InputError


def test_an_epoch_visits_every_window_once_in_a_new_order() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    loader = WindowLoader(tokens, batch_size=3, seq_len=10, seed=1)
    assert loader.batches_per_epoch == 33
    epochs = []
    for epoch in range(2):
        starts = []
        for step in range(33):
            inputs, targets = loader.batch_at(epoch * 33 + step)
            assert inputs.shape == targets.shape == (3, 10)
            assert torch.equal(inputs + 1, targets)
            starts += inputs[:, 0].tolist()
        assert len({start % 10 for start in starts}) == 1
        assert len(set(starts)) == 99
        epochs.append(starts)
    assert epochs[0] != epochs[1]


def test_a_batch_does_not_depend_on_the_ones_before() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 500)
    one, other = (WindowLoader(tokens, 2, 8, seed=3) for _ in range(2))
    for number in range(70):
        one.batch_at(number)
    batches = zip(one.batch_at(70), other.batch_at(70), strict=True)
    assert all(torch.equal(a, b) for a, b in batches)
    different = WindowLoader(tokens, 2, 8, seed=4).batch_at(70)
    assert not torch.equal(one.batch_at(70)[0], different[0])


def test_carried_rows_continue_where_they_ended() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    loader = WindowLoader(tokens, batch_size=3, seq_len=10, seed=1, carry=True)
    for epoch in range(2):
        end = torch.empty(0)
        for step in range(33):
            inputs, _ = loader.batch_at(epoch * 33 + step)
            assert loader.starts_epoch(epoch * 33 + step) == (step == 0)
            if step:
                assert torch.equal(inputs[:, 0], end + 1)
            end = inputs[:, -1]


def test_too_little_text() -> None:
    with pytest.raises(InputError, match=r"4 windows of 8 tokens = 33; .* has 32"):
        WindowLoader(np.zeros(32, np.uint16), 4, 8, 0)
    assert WindowLoader(np.zeros(33, np.uint16), 4, 8, 0).batches_per_epoch == 1


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 50))
def test_evaluation_scores_every_token_once(n: int, streams: int, chunk_len: int) -> None:
    tokens = np.arange(1, n + 1)
    scored, context = [], {}
    for inputs, targets, mask in evaluation_streams(tokens, 0, streams, chunk_len):
        scored += targets[mask].tolist()
        context.update(zip(targets[mask].tolist(), inputs[mask].tolist(), strict=True))
    assert sorted(scored) == tokens.tolist()
    assert all(before == target - 1 for target, before in context.items())


def test_a_sample_is_spaced_over_the_whole_split() -> None:
    tokens = np.arange(1000)
    sample = evenly_spaced_sample(tokens, 80, 8).reshape(8, 10)
    assert sample[0, 0] == 0
    assert sample[-1, -1] == 999
    assert (np.diff(sample, axis=1) == 1).all()
    assert len(set(sample.ravel().tolist())) == 80
    assert np.array_equal(evenly_spaced_sample(tokens, 2000, 8), tokens)
    assert np.array_equal(evenly_spaced_sample(tokens, 5, 8), tokens[:5])


def test_a_mixture_keeps_its_shares_and_visits_every_window() -> None:
    streams = [np.arange(1000), np.arange(2000, 2400), np.arange(5000, 5100)]
    loader, other = (
        MixtureLoader(streams, (0.5, 0.3, 0.2), batch_size=4, seq_len=10, seed=2) for _ in range(2)
    )
    assert loader.batches_per_epoch == (99 + 39 + 9) // 4
    starts = torch.cat([loader.batch_at(step)[0][:, 0] for step in range(128)])  # 512 windows
    counts = [
        int(((starts >= low) & (starts < high)).sum())
        for low, high in ((0, 1000), (2000, 2400), (5000, 5100))
    ]
    assert counts == [256, 154, 102]
    first_epoch = starts[starts < 1000][:99].tolist()  # of the first stream
    assert len(set(first_epoch)) == 99
    assert torch.equal(other.batch_at(77)[0], loader.batch_at(77)[0])
    inputs, targets = loader.batch_at(100)
    assert torch.equal(inputs + 1, targets)


def test_mixtures_that_are_not_possible() -> None:
    tokens = np.arange(100)
    with pytest.raises(InputError, match=r"1/256 of their sum; got 1, 0\.001"):
        MixtureLoader([tokens, tokens], (1, 0.001), 1, 10, 0)
    with pytest.raises(InputError, match="99 windows of 10 tokens"):
        MixtureLoader([tokens, tokens], (1, 1), 99, 10, 0)
    with pytest.raises(InputError, match="carry"):
        make_loader(tokens, [(1.0, 0, 50), (1.0, 50, 100)], 1, 10, 0, carry=True)
