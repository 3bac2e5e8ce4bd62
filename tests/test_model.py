"""The model: its size, causality, the three ways of running it, its loss, and its gradients."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmrec.config import MAX_DENSE_ROWS, PRESETS, ModelConfig, preset
from mmrec.model import Model, RowDropout, draw_candidates, log_spaced_decay_logits
from mmrec.optimizer import clipped_parameters, parameter_groups

SMALL = ModelConfig(
    width=16,
    depth=4,
    heads=2,
    vocab_size=40,
    layer_types="bsln",
    recurrent_blocks=2,
    ffn_multiplier=2.0,
)


def awake(config: ModelConfig) -> Model:
    """A model whose zero-initialised projections are not zero, so that every part matters."""
    model = Model(config).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return model


def test_tiny_has_the_promised_size() -> None:
    count = sum(p.numel() for p in Model(PRESETS["tiny"]).parameters())
    assert abs(count / 1.96e6 - 1) <= 0.005


def test_characters_have_longer_runs_in_no_larger_a_model() -> None:
    shape = dataclasses.replace(preset("tiny", "char"), vocab_size=66)
    assert (shape.max_ngram, preset("tiny").max_ngram) == (4, 3)
    assert sum(p.numel() for p in Model(shape).parameters()) <= 1.96e6
    x = torch.tensor([[1, 2, 3, 4, 5], [9, 2, 3, 4, 5]])
    model = Model(shape)
    with torch.no_grad():
        a, b = model.embed(x, model.initial_state(2).recent_tokens)
    assert [torch.equal(*pair) for pair in zip(a, b, strict=True)] == [False] * 4 + [True]


def test_presets_grow_and_reach_7b_without_memory() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in Model(c).parameters()) for c in PRESETS.values()]
    assert counts == sorted(counts)
    assert 6e9 < counts[-1] < 8e9
    shapes = [(c.width, c.depth) for c in PRESETS.values()]
    assert shapes == [(128, 4), (256, 6), (512, 8), (1024, 12), (2048, 16), (3072, 20), (4096, 24)]


@given(st.lists(st.integers(1, 29), max_size=4), st.sampled_from(["b", "s", "l", "n", "bsln"]))
def test_whole_equals_chunks(cuts: list[int], layers: str) -> None:
    model = awake(dataclasses.replace(SMALL, layer_types=layers))
    tokens = torch.randint(0, 40, (2, 30))
    with torch.no_grad():
        whole, last = model(tokens)
        state, pieces = None, []
        for lo, hi in zip([0, *sorted(set(cuts))], [*sorted(set(cuts)), 30], strict=True):
            logits, state = model(tokens[:, lo:hi], state)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    for one, other in zip(last.layers, state.layers, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@given(
    st.lists(st.booleans(), min_size=48, max_size=48),
    st.integers(1, 23),
    st.sampled_from(["b", "s", "l", "n", "bsln"]),
    st.integers(2, 5),
)
def test_texts_that_begin_inside_know_nothing_of_what_precedes(
    marks: list[bool], cut: int, layers: str, runs: int
) -> None:
    """Rows cut into texts, run whole and in two chunks, against each text alone."""
    shape = dataclasses.replace(SMALL, layer_types=layers, ngram_buckets=16, max_ngram=runs)
    model = awake(shape).double()
    tokens, starts = torch.randint(0, 40, (2, 24)), torch.tensor(marks).view(2, 24)
    with torch.no_grad():
        whole, last = model(tokens, document_starts=starts)
        first, state = model(tokens[:, :cut], document_starts=starts[:, :cut])
        second, after = model(tokens[:, cut:], state, document_starts=starts[:, cut:])
        for row in range(2):
            edges = sorted({0, 24, *starts[row].nonzero().flatten().tolist()})
            for lo, hi in itertools.pairwise(edges):
                alone, _ = model(tokens[row : row + 1, lo:hi])
                torch.testing.assert_close(whole[row, lo:hi], alone[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-10, atol=1e-10)
    assert torch.equal(last.recent_tokens, after.recent_tokens)
    for one, other in zip(last.layers, after.layers, strict=True):
        for a, b in zip(one, other, strict=True):
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_whole_equals_token_by_token_at_the_tiny_preset() -> None:
    model = Model(PRESETS["tiny"]).eval()
    for name, p in model.named_parameters():
        if name.endswith(("out_proj.weight", "down_proj.weight")):
            p.data.normal_(std=0.05)
    tokens = torch.randint(0, 5000, (1, 64))
    with torch.no_grad():
        whole, _ = model(tokens)
        state, pieces = None, []
        for t in range(64):
            logits, state = model(tokens[:, t : t + 1], state)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 19))
def test_is_causal(at: int) -> None:
    model = awake(SMALL)
    tokens = torch.randint(0, 40, (1, 20))
    other = tokens.clone()
    other[:, at:] = (other[:, at:] + 7) % 40
    with torch.no_grad():
        a, b = model(tokens)[0], model(other)[0]
    assert torch.equal(a[:, :at], b[:, :at])
    assert not torch.equal(a[:, at:], b[:, at:])


def test_loss_and_gradients_equal_plain_cross_entropy() -> None:
    model = awake(SMALL)
    x, y = torch.randint(0, 40, (3, 200)), torch.randint(0, 40, (3, 200))  # more than one chunk
    plain = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    want = torch.autograd.grad(plain, list(model.parameters()))
    loss, _ = model.loss(x, y)
    got = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, plain)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(x, y)[0], plain)


def test_a_sampled_softmax_of_all_tokens_is_the_plain_one() -> None:
    model = awake(SMALL)
    x, y = torch.randint(0, 40, (2, 9)), torch.randint(0, 9, (2, 9))
    parameters = list(model.parameters())
    want = model.loss(x, y)[0]
    got = model.loss(x, y, sampled_softmax=39)[0]
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_candidates_are_the_targets_and_stand_for_all_tokens() -> None:
    targets, generator = torch.tensor([7, 3, 7, 39, 0]), torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40, generator=generator)
    sums = []
    for _ in range(300):
        candidates, positions, log_counts = draw_candidates(targets, 40, 9, generator)
        assert len(candidates.unique()) == len(candidates) == 4 + 9
        assert torch.equal(candidates[positions], targets)
        assert log_counts[positions].tolist() == [0] * 5
        assert log_counts.exp().sum().item() == pytest.approx(40)
        sums.append((logits[candidates] + log_counts).exp().sum().item())
    exact = logits.exp().sum().item()
    error = torch.tensor(sums).std().item() / 300**0.5
    assert abs(sum(sums) / 300 - exact) < 3 * error < 0.1 * exact


def test_a_sampled_softmax_draws_from_its_generator() -> None:
    model = awake(SMALL)
    x, y = torch.randint(0, 40, (2, 9)), torch.randint(0, 9, (2, 9))
    losses = [
        model.loss(x, y, sampled_softmax=5, generator=torch.Generator().manual_seed(seed))[0].item()
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_row_dropout_takes_whole_rows() -> None:
    x, made = torch.ones(4, 200, 8), RowDropout(0.25)
    y = made(x, torch.Generator().manual_seed(1))
    assert set(y.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert bool((y == y[..., :1]).all())
    assert torch.equal(y, made(x, torch.Generator().manual_seed(1)))
    assert torch.equal(made.eval()(x, None), x)


def test_dropout_is_of_the_residual_branches_in_training_only() -> None:
    """With dropout a model differs from itself, by its generator; evaluation has none."""
    plain = awake(SMALL)
    model = Model(dataclasses.replace(SMALL, dropout=0.5))
    model.load_state_dict(plain.state_dict())
    x = torch.randint(0, 40, (2, 9))
    assert torch.equal(model.eval()(x)[0], plain(x)[0])
    model.train()
    seeds = (torch.Generator().manual_seed(n) for n in (1, 1, 2))
    first, again, other = (model.hidden_states(x, generator=g)[0] for g in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    model = Model(PRESETS["tiny"])
    loss, _ = model.loss(torch.randint(0, 5000, (2, 64)), torch.randint(0, 5000, (2, 64)))
    assert loss.item() == pytest.approx(math.log(5000), abs=0.1)


def test_bfloat16_products_stay_near_float32() -> None:
    model = awake(SMALL)
    x, y = torch.randint(0, 40, (2, 50)), torch.randint(0, 40, (2, 50))
    exact, _ = model.loss(x, y)
    model.set_precision("bfloat16")
    near, _ = model.loss(x, y)
    assert near.dtype == torch.float32
    assert near.item() != exact.item()
    assert near.item() == pytest.approx(exact.item(), rel=0.02)
    near.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_precision_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="must be 'float32' or 'bfloat16'; got 'float16'"):
        awake(SMALL).set_precision("float16")


def test_weight_decay_reaches_matrices_only() -> None:
    model = Model(SMALL)
    decayed, rest = parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    kinds = {names[id(p)].split(".")[-2] for p in decayed["params"] if p.ndim == 2}
    assert kinds == {"in_proj", "out_proj", "up_proj", "down_proj"}
    assert rest["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    model = Model(dataclasses.replace(SMALL, ngram_buckets=64))
    table = parameter_groups(model, 0.1, 0.7)[2]
    assert table["weight_decay"] == 0.7
    assert not table["rowwise"]
    assert [id(p) for p in table["params"]] == [id(model.ngram_embedding)]
    model = Model(dataclasses.replace(SMALL, ngram_buckets=MAX_DENSE_ROWS + 1))
    assert parameter_groups(model, 0.1, 0.7)[2]["rowwise"]


def test_time_constants_are_spread_over_the_horizon() -> None:
    tau = -1 / torch.sigmoid(log_spaced_decay_logits(5, 10_000).double()).log()
    torch.testing.assert_close(
        tau, torch.tensor([1.0, 10, 100, 1000, 10_000]).double(), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_sparse_gradients_hold_what_dense_ones_hold(dropout: float) -> None:
    rows = MAX_DENSE_ROWS + 1
    model = awake(dataclasses.replace(SMALL, ngram_buckets=rows, dropout=dropout)).train()
    x = torch.randint(0, 40, (3, 11))
    gradients = []
    for model.sparse_gradients in (False, True):
        generator = torch.Generator().manual_seed(1)
        loss, _ = model.loss(x[:, :-1], x[:, 1:], generator=generator)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    names = [name for name, _ in model.named_parameters()]
    for name, dense, sparse in zip(names, *gradients, strict=True):
        assert sparse.is_sparse == (name == "ngram_embedding")
        torch.testing.assert_close(sparse.to_dense(), dense, rtol=1e-5, atol=1e-7)
    table = gradients[1][names.index("ngram_embedding")]
    assert len(table._indices()[0]) == 3 * 10 * 2


def test_an_ngram_that_a_large_table_never_met_changes_nothing() -> None:
    shape = dataclasses.replace(SMALL, ngram_buckets=MAX_DENSE_ROWS + 1)
    assert not Model(shape).ngram_embedding.any()
    shape = dataclasses.replace(SMALL, ngram_buckets=MAX_DENSE_ROWS)
    assert Model(shape).ngram_embedding.std() > 0.01


@pytest.mark.parametrize("rows", [MAX_DENSE_ROWS, MAX_DENSE_ROWS + 1])
def test_the_gradient_of_a_large_table_is_not_clipped(rows: int) -> None:
    model = Model(dataclasses.replace(SMALL, ngram_buckets=rows))
    clipped = {id(p) for p in clipped_parameters(model)}
    rest = [name for name, p in model.named_parameters() if id(p) not in clipped]
    assert rest == (["ngram_embedding"] if rows > MAX_DENSE_ROWS else [])


def test_dropout_acts_in_training_only() -> None:
    model = awake(dataclasses.replace(SMALL, dropout=0.5))
    tokens = torch.randint(0, 40, (1, 10))
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


def test_a_single_tap_leaves_the_convolution_out() -> None:
    model = awake(dataclasses.replace(SMALL, conv_width=1))
    logits, state = model(torch.randint(0, 40, (1, 5)))
    assert logits.shape == (1, 5, 40)
    assert state.layers[0].conv_state.shape == (1, 0, 16)


@pytest.mark.parametrize("layers", ["n", "s", "l", "b"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, None, 1e-10),
        (torch.float16, None, 1e-2),
        (torch.bfloat16, None, 5e-2),
        (torch.float32, torch.bfloat16, 2e-2),
        (torch.float32, torch.float16, 5e-3),
        (torch.bfloat16, torch.bfloat16, 5e-2),
    ],
)
def test_dtypes_and_autocast(
    layers: str, dtype: torch.dtype, autocast: torch.dtype | None, tolerance: float
) -> None:
    """``model.half()`` and its like, and autocast, over two pieces of a text, with gradients."""
    model = awake(dataclasses.replace(SMALL, layer_types=layers, depth=2))
    exact = awake(dataclasses.replace(SMALL, layer_types=layers, depth=2)).double()
    model.to(dtype)
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 40, (2, 13))
    losses = []
    for each in (model, exact):
        enabled = each is model and autocast is not None
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=enabled):
            first, state = each.loss(tokens[:, :6], tokens[:, 1:7])
            second, _ = each.loss(tokens[:, 6:12], tokens[:, 7:13], state)
            logits, _ = each(tokens)
        (first + second).backward()
        losses.append((first.double(), second.double()))
    assert logits.dtype == torch.float64
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
    got, want = (
        torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (model, exact)
    )
    assert (got - want).norm() < 5 * tolerance * want.norm()
