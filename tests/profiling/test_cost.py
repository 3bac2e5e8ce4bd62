"""What a configuration costs, compared with what torch counts and what autograd keeps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mmrec.config import PRESETS, ModelConfig, TrainConfig
from mmrec.model import Model, flops_per_token, parameter_counts
from mmrec.profiling.cost import estimate_cost
from mmrec.profiling.memory import StorageTracker, generation_memory, training_memory
from mmrec.training.replicas import replica_count


@pytest.mark.parametrize("name", ["tiny", "mini", "base", "7b"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """All but those of the delta rule, which is a kernel that torch does not see into."""
    config = PRESETS[name]
    delta_layers = sum(t == "l" for t in config.resolved_layer_types)
    delta_rule = delta_layers * config.heads * 8 * config.head_width**2
    estimate, counted = flops_per_token(config), []
    with FakeTensorMode():
        model, x = Model(config), torch.zeros(2, 64, dtype=torch.int64)
        for model.activation_checkpointing in (False, True):
            with FlopCounterMode(display=False) as counter:
                model.loss(x, x)[0].backward()
            counted.append(counter.get_total_flops() / x.numel())
    plain, checkpointed = counted
    assert plain == pytest.approx(estimate["training"] - 3 * delta_rule)
    upper = estimate["activation_checkpointing"] - 4 * delta_rule
    # torch stops the second forward pass of a layer once it has what backward needs
    assert 0.8 * upper < checkpointed < upper


@pytest.mark.parametrize("name", ["tiny", "7b"])
def test_every_parameter_is_counted_in_one_group(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        model = Model(config)
    counts = parameter_counts(config)
    total = sum(p.numel() for p in model.parameters())
    assert counts.pop("total") == total == sum(counts.values())
    assert counts["embedding"] == model.embedding.numel()
    assert counts["n-gram embedding"] == model.ngram_embedding.numel()
    assert counts["norms and biases"] < 0.01 * total


@pytest.mark.parametrize("name", ["tiny", "mini", "small"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(name: str, precision: str) -> None:
    """In a forward pass with real numbers, by storage, without the weights themselves."""
    config = replace(PRESETS[name], vocab_size=500, ngram_buckets=64)
    model, x = Model(config), torch.randint(500, (4, 256))
    model.set_precision(precision)
    for model.activation_checkpointing in (False, True):
        saved: dict[int, Tensor] = {}
        with saved_tensors_hooks(lambda t, s=saved: s.setdefault(t.data_ptr(), t), lambda t: t):
            loss, state = model.loss(x, x)
        del state
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved.values()
        }
        real = sum(size for address, size in sizes.items() if address not in weights)
        with FakeTensorMode():
            fake, tokens = Model(config), torch.zeros(4, 256, dtype=torch.int64)
            fake.set_precision(precision)
            fake.activation_checkpointing = model.activation_checkpointing
            with StorageTracker() as tracker:
                counted, state = fake.loss(tokens, tokens)
                del state
        # with checkpointing, no hook sees the states at the start of each layer
        upper = 1.1 if model.activation_checkpointing else 1.01
        assert 0.99 * real < tracker.current < upper * real
        del loss, counted


def test_a_tracker_counts_living_storages_once() -> None:
    with StorageTracker() as tracker:
        a = torch.zeros(1000)
        b = a.view(10, 100)[1:]
        c = b + 1
        b += 1
        del a, b
    assert tracker.current == 4 * 900
    assert tracker.peak == 4 * 1900
    with StorageTracker() as tracker:
        c.mul_(2)
    assert tracker.current == tracker.peak == 0
    assert c.numel() == 900


def test_seven_billion_parameters_are_counted_without_memory() -> None:
    before = torch.get_default_dtype()
    parts = training_memory(PRESETS["7b"], TrainConfig.from_flat({"precision": "bfloat16"}))
    total = parameter_counts(PRESETS["7b"])["total"]
    assert parts["weights"] == 4 * total
    assert 4 * total <= parts["moments"] <= 8 * total
    assert sum(generation_memory(PRESETS["7b"]).values()) > 4 * total
    assert torch.get_default_dtype() == before


def test_a_large_table_costs_its_weights_only() -> None:
    """Its gradients and moments are those of the rows that a batch reads."""
    settings = TrainConfig.from_flat({"batch_size": 4, "seq_len": 16, "precision": "float32"})
    small, large = (
        training_memory(replace(PRESETS["tiny"], ngram_buckets=rows), settings)
        for rows in (1, 1 << 20)
    )
    rows = (1 << 20) - 1
    assert large["weights"] - small["weights"] == 4 * 128 * rows
    assert large["moments"] - small["moments"] == pytest.approx(4 * rows, rel=0.01)
    assert large["gradients"] - small["gradients"] < 1e6


def test_replicas_accumulation_and_length_count() -> None:
    config = ModelConfig(64, 2, 2, 300, "nl")
    base = TrainConfig.from_flat({"batch_size": 4, "seq_len": 64, "precision": "float32"})
    plain = training_memory(config, base)
    accumulated = training_memory(config, base.replace(gradient_accumulation_steps=2))
    assert accumulated["gradients"] == plain["gradients"] + plain["weights"]
    averaged = training_memory(config, base.replace(ema_decay=0.99))
    assert averaged == plain | {"average": plain["weights"]}
    longer = training_memory(config, base.replace(seq_len=128))
    assert longer["activations"] == pytest.approx(2 * plain["activations"], rel=0.1)
    checkpointed = training_memory(config, base.replace(activation_checkpointing=True))
    assert checkpointed["activations"] < plain["activations"] / 2
    with torch.device("meta"):
        assert replica_count(Model(PRESETS["base"]), 16) == 1


def test_a_cost_adds_up() -> None:
    config = ModelConfig(64, 2, 2, 300, "nl")
    cost = estimate_cost(config, TrainConfig.from_flat({"batch_size": 2, "seq_len": 32}))
    assert cost["parameters"]["total"] == sum(p.numel() for p in Model(config).parameters())
    for parts in cost["bytes"].values():
        assert parts["total"] == sum(parts.values()) / 2
    assert 0 < cost["seconds_per_million_tokens"] < 1e4
