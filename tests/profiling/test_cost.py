"""What a preset costs, held against what torch counts and what autograd keeps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mmrec.config import PRESETS, ModelConfig, TrainConfig
from mmrec.model import Model
from mmrec.profiling.cost import flops_per_token, parameters
from mmrec.profiling.memory import Ledger, generation, training
from mmrec.training.replicas import count_lanes


@pytest.mark.parametrize("name", ["tiny", "mini", "base", "7b"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """All but the long-term memory's own, which is a kernel that torch does not see into."""
    config = PRESETS[name]
    long = (
        sum(k == "l" for k in config.resolved_layer_types) * config.heads * 8 * config.head_width**2
    )
    told, found = flops_per_token(config), []
    with FakeTensorMode():
        model, x = Model(config), torch.zeros(2, 64, dtype=torch.int64)
        for model.activation_checkpointing in (False, True):
            with FlopCounterMode(display=False) as counter:
                model.loss(x, x).backward()
            found.append(counter.get_total_flops() / x.numel())
    assert found[0] == pytest.approx(told["training"] - 3 * long)
    assert found[1] == pytest.approx(told["recompute"] - 4 * long, rel=0.2)
    assert found[1] < told["recompute"] - 4 * long  # what nothing comes after is left out


@pytest.mark.parametrize("name", ["tiny", "mini", "small"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(name: str, precision: str) -> None:
    """In a forward pass with real numbers, by storage, besides the weights themselves."""
    config = replace(PRESETS[name], vocab_size=500, ngram_buckets=64)
    model, x = Model(config), torch.randint(500, (4, 256))
    model.set_precision(precision)
    for model.activation_checkpointing in (False, True):
        sizes: dict[int, Tensor] = {}
        with saved_tensors_hooks(lambda t, s=sizes: s.setdefault(t.data_ptr(), t), lambda t: t):
            loss = model.loss(x, x)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in sizes.values()
        }
        real = sum(n for at, n in kept.items() if at not in own)
        with FakeTensorMode():
            fake, tokens = Model(config), torch.zeros(4, 256, dtype=torch.int64)
            fake.set_precision(precision)
            fake.recompute = model.activation_checkpointing
            with Ledger() as ledger:
                counted = fake.loss(tokens, tokens)
        # with recompute, states at the start of each layer are held, too, where no hook sees them
        assert 0.99 * real < ledger.now < (1.1 if model.activation_checkpointing else 1.01) * real
        del loss, counted


def test_a_ledger_counts_the_living_once() -> None:
    with Ledger() as ledger:
        a = torch.zeros(1000)
        b = a.view(10, 100)[1:]
        c = b + 1
        b += 1
        del a, b
    assert ledger.now == 4 * 900
    assert ledger.peak == 4 * 1900
    with Ledger() as ledger:
        c.mul_(2)
    assert ledger.now == ledger.peak == 0
    assert c.numel() == 900


def test_seven_billion_parameters_are_counted_without_memory() -> None:
    before = torch.get_default_dtype()
    parts = training(PRESETS["7b"], TrainConfig(precision="bfloat16"))
    total = parameters(PRESETS["7b"])["total"]
    assert parts["weights"] == 4 * total
    assert 4 * total <= parts["moments"] <= 8 * total
    assert sum(generation(PRESETS["7b"]).values()) > 4 * total
    assert torch.get_default_dtype() == before


def test_lanes_accumulation_and_length_count() -> None:
    config = ModelConfig(64, 2, 2, 300, "nl")
    base = TrainConfig(batch=4, seq_len=64, precision="float32")
    plain, twice = training(config, base), training(config, replace(base, accumulate=2))
    assert twice["gradients"] == plain["gradients"] + plain["weights"]
    longer = training(config, replace(base, seq_len=128))
    assert longer["activations"] == pytest.approx(2 * plain["activations"], rel=0.1)
    again = training(config, replace(base, recompute=True))
    assert again["activations"] < plain["activations"] / 2
    with torch.device("meta"):
        assert count_lanes(Model(PRESETS["base"]), 16) == 1
