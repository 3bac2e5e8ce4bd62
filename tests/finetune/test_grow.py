"""Growth: the same function, in a model in which everything can learn."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrec.config import PRESETS, ModelConfig, OptimizerConfig
from mmrec.errors import InputError
from mmrec.finetune.grow import GrowthPlan, initialize_from, place_layers
from mmrec.model import Model
from mmrec.optimizer import build_optimizer
from tests.conftest import ROOT

NO_DECAY = OptimizerConfig(weight_decay=0.0, ngram_weight_decay=0.0)
SLOW = replace(NO_DECAY, lr=1e-3, matrix_lr=1e-3)
TEXT = np.frombuffer(Path(__file__).read_bytes(), np.uint8)


def random_model(config: ModelConfig) -> Model:
    """A model none of whose weights is what it is initialised to."""
    model = Model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * max(float(p.std()) if p.numel() > 1 else 0, 0.03))
    return model


def grow(source: Model, config: ModelConfig, method: str = "preserve", seed: int = 0) -> Model:
    """The source, grown to a configuration, in evaluation mode."""
    torch.manual_seed(seed)
    model = Model(config)
    assert initialize_from(model, source, method=method) == 0
    return model.eval()


def tokens(count: int = 120, vocab: int = 257) -> torch.Tensor:
    return torch.from_numpy(TEXT[: 2 * count].astype(np.int64) % vocab).view(2, count)


def distance(a: Model, b: Model) -> float:
    x = tokens(vocab=a.config.vocab_size)
    with torch.no_grad():
        return float((a(x)[0] - b(x)[0]).abs().max())


@st.composite
def pairs(draw: st.DrawFn) -> tuple[ModelConfig, ModelConfig]:
    """A small shape and a larger one, by the rules."""

    def more(n: int, steps: int = 2) -> int:
        return n + draw(st.integers(0, steps))

    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([4, 6]))
    blocks = draw(st.sampled_from([1, heads]))
    types = draw(st.text("nslb", min_size=1, max_size=3))
    old = ModelConfig(
        heads * size,
        len(types),
        heads,
        257,
        types,
        blocks,
        ffn_multiplier=draw(st.sampled_from([1.0, 2.5])),
        conv_width=draw(st.integers(1, 3)),
        max_timescale=32,
        ngram_buckets=draw(st.sampled_from([0, 50])),
    )
    now = more(heads)
    width = now * more(size, 3)
    wider = {"n": "nsb", "s": "sb", "l": "lb", "b": "b"}
    layers = "".join(
        draw(st.text("nslb", max_size=1)) + draw(st.sampled_from(wider[t])) for t in types
    ) + draw(st.text("nslb", max_size=1))
    fewer = 1 if blocks == 1 or now != heads else draw(st.sampled_from([1, blocks]))
    new = ModelConfig(
        width,
        len(layers),
        now,
        257,
        layers,
        fewer,
        ffn_multiplier=old.ffn_multiplier + draw(st.sampled_from([0.0, 1.3])),
        conv_width=more(old.conv_width),
        max_timescale=64,
        ngram_buckets=old.ngram_buckets * draw(st.integers(1, 3)) or draw(st.sampled_from([0, 40])),
    )
    return old, new


@given(pairs())
def test_the_grown_model_computes_the_same(pair: tuple[ModelConfig, ModelConfig]) -> None:
    old, new = pair
    source = random_model(old)
    grown = grow(source, new)
    assert grown.config == new
    assert distance(source, grown) < 1e-4
    x = tokens(40)
    with torch.no_grad():  # and token by token, with carried state
        whole, state = source(x)[0], None
        for t in range(x.shape[1]):
            step, state = grown(x[:, t : t + 1], state)
            assert (step[:, 0] - whole[:, t]).abs().max() < 1e-4


@pytest.mark.parametrize("pair", ["tiny mini", "tiny small", "mini small"])
def test_presets_grow_into_each_other(pair: str) -> None:
    small, large = (replace(PRESETS[name], vocab_size=257) for name in pair.split())
    source = random_model(small)
    assert distance(source, grow(source, large)) < 1e-4


def test_every_preset_grows_into_every_larger_one() -> None:
    """What a growth needs is planned from shapes alone, so 7b costs nothing here."""
    shapes = [replace(p, vocab_size=257) for p in PRESETS.values()]
    for i, old in enumerate(shapes):
        for new in shapes[i:]:
            GrowthPlan(old, new)


def new_entries(plan: GrowthPlan, model: Model) -> dict[str, torch.Tensor]:
    """By name of a parameter, True where no old entry stands."""
    masks = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    for mapping in plan.mappings:
        masks[mapping.new][mapping.index] = False
    return masks


@pytest.mark.parametrize(
    ("types", "grown_types", "width", "heads"),
    [
        ("nslb", "nslb", 64, 4),
        ("nslb", "nslb", 48, 2),
        ("nslb", "nsslbb", 32, 2),
        ("nnll", "nsbb", 48, 3),
    ],
)
def test_all_that_is_new_learns_within_two_steps(
    types: str, grown_types: str, width: int, heads: int
) -> None:
    old = ModelConfig(32, 4, 2, 257, types, ffn_multiplier=2.0, ngram_buckets=64, max_timescale=32)
    new = replace(
        old,
        width=width,
        heads=heads,
        layer_types=grown_types,
        depth=len(grown_types),
        ffn_multiplier=2.5,
        ngram_buckets=128,
        conv_width=5,
    )
    source = random_model(old)
    model = grow(source, new).train()
    masks = new_entries(GrowthPlan(old, new), model)
    optimizer = build_optimizer(model, SLOW)
    x = tokens(101)
    reached = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(x[:, :-1], x[:, 1:])[0].backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            reached[name] |= p.grad != 0
        optimizer.step()
    for name, mask in masks.items():
        hit = reached[name]
        if name == "ngram_embedding":  # rows that the text never reads have no gradient
            mask, hit = mask.any(0), hit.any(0)
        if name.endswith(("in_proj.weight", "up_proj.weight", "down_proj.weight")):
            assert (hit | ~mask).float().mean() > 0.97, name  # a unit may be off for this text
        else:
            assert (hit | ~mask).all(), name


def test_a_grown_model_learns_more_than_its_source_could() -> None:
    """Trained on, it leaves the subspace of the source: new channels carry what helps."""
    old = ModelConfig(16, 2, 2, 257, "bs", ffn_multiplier=1.0, max_timescale=32)
    source = random_model(old)
    model = grow(source, replace(old, width=48, heads=3)).train()
    optimizer = build_optimizer(model, NO_DECAY)
    x, losses = tokens(101), []
    for _ in range(12):
        optimizer.zero_grad()
        loss, _ = model.loss(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    for layer in model.layers:
        hidden = layer.in_proj.weight[16:48, :16]  # type: ignore[union-attr, index]
        assert hidden.abs().max() > 1e-3


def test_moments_follow_their_weights() -> None:
    """A step with grown moments moves old entries as the source's own step would."""
    old = ModelConfig(16, 2, 2, 257, "nb", ffn_multiplier=2.0, ngram_buckets=30, max_timescale=32)
    new = replace(old, width=40, heads=5, depth=3, layer_types="nnb", ngram_buckets=60)
    source = random_model(old).train()
    plan = GrowthPlan(old, new)
    model = grow(source, new).train()
    x = tokens(61)
    for m in (source, model):
        m.loss(x[:, :-1], x[:, 1:])[0].backward()
    grads = {n: p.grad for n, p in source.named_parameters()}
    as_kept = {n: {"momentum": g, "exp_avg_sq": g**2} for n, g in grads.items() if g is not None}
    grown = plan.grow_moments(model, as_kept)
    for mapping in plan.mappings:
        p = dict(model.named_parameters())[mapping.new]
        assert p.grad is not None
        made = grown[mapping.new]
        if mapping.new == "ngram_embedding":  # copies share what the one row got
            whole = p.grad.view(2, 30, -1).sum(0)[:, :16]
            want = made["momentum"][:30, :16]
        else:
            whole, want = p.grad[mapping.index], made["momentum"][mapping.index]
        torch.testing.assert_close(whole, want, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(made["exp_avg_sq"], made["momentum"] ** 2)
        outside = torch.ones(p.shape, dtype=torch.bool)
        outside[mapping.index] = False
        assert not made["momentum"][outside].any()
    assert set(grown) == {m.new for m in plan.mappings}
    assert {n.split(".")[1] for n in grown if n.startswith("layers")} == {
        str(j) for j in plan.source_layers
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 16}, "width must be .* 32; got 16"),
        ({"depth": 1}, "depth must be .* 2; got 1"),
        ({"heads": 1}, "heads must be .* 2; got 1"),
        ({"heads": 4}, "width of a head must be .* 16; got 8"),
        ({"ffn_multiplier": 1.0}, "feed-forward width must be .* 64; got 32"),
        ({"conv_width": 2}, "conv_width must be .* 4; got 2"),
        ({"ngram_buckets": 0}, "ngram_buckets must be .* 50; got 0"),
        ({"max_ngram": 4}, "max_ngram must be .* 3, .*; got 4"),
        ({"ngram_buckets": 75}, "ngram_buckets must be a multiple .* 50.*; got 75"),
        ({"vocab_size": 300}, "vocab_size must be 257; got 300"),
        ({"layer_types": "nb"}, "'sb', the grown ones 'nb'"),
        ({"recurrent_blocks": 4}, "has 2 of 16.*; got 4 of 8"),
    ],
)
def test_what_cannot_be_kept_is_refused(change: dict[str, object], message: str) -> None:
    old = ModelConfig(32, 2, 2, 257, "sb", 2, ffn_multiplier=2.0, ngram_buckets=50)
    with pytest.raises(InputError, match=message):
        GrowthPlan(old, replace(old, **change))  # type: ignore[arg-type]


def test_layers_are_interleaved() -> None:
    assert place_layers("nnnl", "nnlnnl") == [0, 1, 3, 5]
    assert place_layers("nnnl", "nnnlnnnl") == [0, 2, 4, 7]
    assert place_layers("bb", "bbb") == [0, 2]
    assert place_layers("nl", "ln") is None
    assert place_layers("nl", "sb") == [0, 1]


def test_other_ways_are_other_functions() -> None:
    old = ModelConfig(16, 2, 2, 257, "nl", ffn_multiplier=2.0, max_timescale=32)
    new = replace(old, width=32, heads=4, depth=4)
    source = random_model(old)
    stacked, anew = grow(source, new, "stack"), grow(source, new, "random")
    assert distance(source, stacked) > 1e-2
    assert distance(source, anew) > 1e-2
    copied = [
        n
        for n, p in stacked.layers.named_parameters()
        if n.endswith("out_proj.weight") and p[:16].any()
    ]
    assert len(copied) == 4
    with pytest.raises(InputError, match="method must be one of preserve, stack, random; got 'x'"):
        grow(source, new, "x")


def test_new_tokens_are_the_mean_of_what_they_join() -> None:
    old = ModelConfig(16, 2, 2, 257, "nl", ffn_multiplier=2.0, max_timescale=32)
    new = replace(old, width=32, heads=4, vocab_size=259)
    source, grown = random_model(old), Model(new).eval()
    GrowthPlan(old, new, pieces=[[5, 7], [8, 8, 5]]).grow_weights(grown, source)
    x = tokens()
    with torch.no_grad():
        want, got = source(x)[0], grown(x)[0]
    assert (got[..., :257] - want).abs().max() < 1e-4
    torch.testing.assert_close(got[..., 257], got[..., [5, 7]].mean(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(got[..., 258], got[..., [8, 8, 5]].mean(-1), atol=1e-4, rtol=0)


def test_the_benchmark_counts_what_the_source_cost(text_file: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "growth.py"),
        str(text_file),
        "--steps",
        "8",
        "--seeds",
        "1",
        "--batch-size",
        "1",
        "--seq-len",
        "32",
        "--tokenizer",
        "byte",
        "--large",
        "tiny",  # growth to its own size: larger presets take minutes without bfloat16 instructions
        "--out",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads((tmp_path / "growth-modules.json").read_text())["rows"]
    assert [r["run"] for r in rows] == ["scratch", "source", "preserve", "stack"]
    scratch, source, grown, _ = rows
    assert grown["before"]["flops"] == source["flops"] > 0
    assert source["flops"] + grown["flops"] == pytest.approx(scratch["flops"], rel=0.1)
    assert (tmp_path / "growth-modules.png").stat().st_size > 10_000
    assert "| tiny, preserve |" in run.stdout
