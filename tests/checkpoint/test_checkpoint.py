"""Checkpoints: small, exact, and clear about every fault."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import pytest
import torch

from mmrec.checkpoint.checkpoint import (
    load_model,
    open_moments,
    put_moments,
    read_recurrent_state,
    restore_training_state,
    save_checkpoint,
)
from mmrec.checkpoint.hdf5 import seal, write_json
from mmrec.checkpoint.header import SCHEMA, read_metadata
from mmrec.config import PRESETS, OptimizerConfig
from mmrec.data.tokenizer import train_tokenizer
from mmrec.errors import DamagedError, InputError
from mmrec.model import Model
from mmrec.optimizer import MuonAdamW, build_optimizer
from tests.conftest import SMALL

INFO = {"preset": "tiny", "val": {"loss": 1.5}, "environment": {"threads": 2}}


def make_optimizer(model: Model) -> MuonAdamW:
    return build_optimizer(model, OptimizerConfig())


def train_steps(model: Model, optimizer: MuonAdamW, steps: int) -> None:
    for _ in range(steps):
        tokens = torch.randint(model.config.vocab_size, (2, 33))
        model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Model, MuonAdamW]:
    """A small model with an optimizer after two steps, and its checkpoint."""
    model = Model(SMALL)
    optimizer = make_optimizer(model)
    train_steps(model, optimizer, 2)
    path = tmp_path / "last.h5"
    state = model.initial_state(2)
    state.recent_tokens.fill_(7)
    for layer in state.layers:
        for x in layer:
            if x is not None:
                x.normal_()
    save_checkpoint(
        path,
        model,
        train_tokenizer("byte", []),
        2,
        INFO,
        optimizer=optimizer,
        progress={"seconds": 1.0, "optimizer_step_offset": 5},
        recurrent_state=state,
    )
    return path, model, optimizer


def test_tiny_with_optimizer_stays_within_its_size(tmp_path: Path) -> None:
    """Muon keeps one moment of a matrix, AdamW two of everything else."""
    model = Model(PRESETS["tiny"])
    optimizer = make_optimizer(model)
    train_steps(model, optimizer, 2)
    path = tmp_path / "tiny.h5"
    save_checkpoint(
        path,
        model,
        train_tokenizer("byte", []),
        2,
        {},
        optimizer=optimizer,
        progress={"seconds": 1.0},
    )
    assert path.stat().st_size <= 22.6e6


def test_the_training_state_is_restored_bit_for_bit(saved: tuple[Path, Model, MuonAdamW]) -> None:
    path, model, optimizer = saved
    rng = torch.get_rng_state()
    other = Model(SMALL)
    fresh = make_optimizer(other)
    progress = restore_training_state(path, other, fresh)
    assert progress == {"seconds": 1.0, "optimizer_step_offset": 5, "step": 2}
    assert torch.equal(torch.get_rng_state(), rng)
    moment_names = set()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        names = optimizer.state[a].keys() - {"step"}
        moment_names.add(tuple(sorted(names)))
        for name in names:
            assert torch.equal(optimizer.state[a][name], fresh.state[b][name])
        assert fresh.state[b]["step"] == 2 + 5
    assert moment_names == {("momentum",), ("exp_avg", "exp_avg_sq")}


def test_raw_weights_are_restored_beside_their_averages(tmp_path: Path) -> None:
    """The model of the file is the average. One parameter has none; a wrong shape is named."""
    path, model, raw = tmp_path / "last.h5", Model(SMALL), Model(SMALL)
    raw_weights = {n: p.detach() for n, p in raw.named_parameters() if n != "norm.weight"}
    save_checkpoint(
        path,
        model,
        train_tokenizer("byte", []),
        1,
        INFO,
        optimizer=make_optimizer(model),
        progress={},
        raw_weights=raw_weights,
    )
    loaded, restored = load_model(path).model, Model(SMALL)
    averages = {"of an earlier file": torch.ones(1)}
    restore_training_state(path, restored, make_optimizer(restored), averages=averages)
    assert averages.keys() == raw_weights.keys()
    for (name, p), average in zip(restored.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(average, dict(model.named_parameters())[name])
        assert torch.equal(p, raw_weights.get(name, average))
        assert torch.equal(averages.get(name, p), average)
    with h5py.File(path, "a") as file:
        del file["raw/embedding"]
        file["raw/embedding"] = [1]
    seal(path)
    with pytest.raises(DamagedError, match="raw/embedding"):
        restore_training_state(path, restored, make_optimizer(restored))


def test_the_recurrent_state_is_restored(saved: tuple[Path, Model, MuonAdamW]) -> None:
    path, model, _ = saved
    state = read_recurrent_state(path, model.initial_state(2))
    assert state is not None
    assert (state.recent_tokens == 7).all()
    assert all(x.std() > 0.5 for layer in state.layers for x in layer if x is not None)
    with pytest.raises(DamagedError):
        read_recurrent_state(path, model.initial_state(3))


def test_moments_are_read_one_at_a_time_and_put_elsewhere(
    saved: tuple[Path, Model, MuonAdamW],
) -> None:
    path, model, optimizer = saved
    other = make_optimizer(model)
    with open_moments(path, model) as (moments, steps):
        assert steps == 2 + 5
        assert len(moments) == len(list(model.parameters()))
        put_moments(model, other, moments, steps)
    for p in model.parameters():
        assert other.state[p]["step"] == 7
        for name in optimizer.state[p].keys() - {"step"}:
            assert torch.equal(other.state[p][name], optimizer.state[p][name])


def test_a_model_alone_has_no_training_state(tmp_path: Path) -> None:
    path, model = tmp_path / "best.h5", Model(SMALL)
    save_checkpoint(path, model, train_tokenizer("byte", []), 3, INFO)
    loaded, header = load_model(path), read_metadata(path)
    assert (loaded.step, loaded.metadata) == (header.step, header.metadata) == (3, INFO)
    assert header.model_config == loaded.model.config == SMALL
    assert not loaded.model.training
    assert all(p.requires_grad for p in loaded.model.parameters())
    for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with open_moments(path, model) as (moments, steps):
        assert (moments, steps) == ({}, 0)
    assert read_recurrent_state(path, model.initial_state(1)) is None
    with pytest.raises(InputError) as caught:
        restore_training_state(path, model, make_optimizer(model))
    assert caught.type is InputError


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: f.__delitem__("model/norm.weight"), "model/norm.weight"),
        (lambda f: f.__delitem__("tokenizer"), "tokenizer"),
        (lambda f: f.__delitem__("config"), "config"),
        (lambda f: f["config"].__setitem__(0, 0), "config"),
    ],
)
def test_what_is_missing_or_changed_is_named(
    saved: tuple[Path, Model, MuonAdamW], damage: Callable[[h5py.File], None], named: str
) -> None:
    path = saved[0]
    with h5py.File(path, "a") as file:
        damage(file)
    with pytest.raises(DamagedError, match="its bytes are not those that were written"):
        load_model(path)
    seal(path)  # as a forger would
    with pytest.raises(DamagedError, match=f"is not valid: {named}") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_weight_of_another_shape_is_named(saved: tuple[Path, Model, MuonAdamW]) -> None:
    path = saved[0]
    with h5py.File(path, "a") as file:
        del file["model/embedding"]
        file["model/embedding"] = [1]
    seal(path)
    with pytest.raises(DamagedError, match=r"model/embedding .*\(257, 32\); it is int64"):
        load_model(path)


@pytest.mark.parametrize(
    ("schema", "word"), [(SCHEMA - 1, "train it again"), (SCHEMA + 1, "upgrade")]
)
def test_another_schema_is_refused_in_one_line(
    saved: tuple[Path, Model, MuonAdamW], schema: int, word: str
) -> None:
    """The file is intact, so the error is no DamagedError."""
    path, model, optimizer = saved
    with h5py.File(path, "a") as file:
        file.attrs["schema"] = schema
    seal(path)
    for read in (
        load_model,
        read_metadata,
        lambda path: restore_training_state(path, model, optimizer),
    ):
        with pytest.raises(InputError, match=f"schema {schema}; .*{word}") as caught:
            read(path)
        assert caught.type is InputError
        assert "\n" not in str(caught.value)


def test_a_huge_model_that_is_not_stored_is_refused_at_once(
    saved: tuple[Path, Model, MuonAdamW],
) -> None:
    """Its configuration is trusted only as far as weights of that shape are stored."""
    path = saved[0]
    for key, value, message in [
        ("depth", 10**9, "1,000,000,000 layers; fewer weights are stored"),
        ("width", 2**20, r"\(257, 1048576\); it is float32 \(257, 32\)"),
        ("width", 2**62, "not valid: "),
        ("vocab_size", 10**12, r"\(1000000000000, 32\)"),
        ("layer_types", "s" * 9, "not valid"),
        ("colour", 1, "unknown setting 'colour'"),
    ]:
        with h5py.File(path, "a") as file:
            del file["config"]
            write_json(file, "config", asdict(SMALL) | {key: value})
        seal(path)
        with pytest.raises(DamagedError, match=message) as caught:
            load_model(path)
        assert str(path) in str(caught.value)


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "a.h5", Model(replace(SMALL, vocab_size=256))
    save_checkpoint(path, model, train_tokenizer("byte", []), 0, {})
    with pytest.raises(DamagedError, match="vocabularies"):
        load_model(path)
