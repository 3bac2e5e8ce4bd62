"""LoRA: nothing changes at first, only factors learn, merging is exact, a resume is exact."""

import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch

from mmrec.checkpoint.checkpoint import load_model, open_moments, save_checkpoint
from mmrec.checkpoint.hdf5 import seal, write_json
from mmrec.config import OptimizerConfig, TrainConfig
from mmrec.data.corpus import Corpus
from mmrec.data.tokenizer import train_tokenizer
from mmrec.errors import DamagedError, InputError
from mmrec.finetune.grow import grow_checkpoint
from mmrec.lora import LoRALinear, apply_lora, lora_settings, merge_lora, merged_parameters
from mmrec.model import Model
from mmrec.optimizer import build_optimizer
from mmrec.training.setup import initialize_trainer
from mmrec.training.trainer import Trainer
from tests.conftest import SMALL, make_trainer

FACTORS = (".lora_A", ".lora_B")


def tuned_model() -> Model:
    """A model with trained-looking weights and factors."""
    model = Model(SMALL).eval()
    apply_lora(model, 4, 8.0)
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05
    return model


def dataset_names(path: Path, group: str) -> list[str]:
    names: list[str] = []
    with h5py.File(path) as file:
        if group in file:
            file[group].visititems(
                lambda name, x: names.append(name) if isinstance(x, h5py.Dataset) else None
            )
    return names


def test_fresh_factors_change_nothing_and_both_learn() -> None:
    model = Model(SMALL).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05
    tokens = torch.randint(257, (2, 40))
    expected = model(tokens)[0]
    apply_lora(model, 4, 8.0)
    assert torch.equal(model(tokens)[0], expected)
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith(FACTORS) for n in factors)
    assert len(factors) == 2 * 4 * SMALL.depth
    shapes = {n: tuple(p.shape) for n, p in factors.items()}
    assert shapes["layers.0.out_proj.lora_A"] == (4, SMALL.width)
    assert shapes["layers.0.out_proj.lora_B"] == (SMALL.width, 4)
    for _ in range(2):
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        grads = torch.autograd.grad(loss, list(factors.values()))
        for p, g in zip(factors.values(), grads, strict=True):
            p.data -= g
    assert all(g.abs().max() > 0 for g in grads)


def test_merging_gives_a_plain_model_with_the_same_output() -> None:
    model = tuned_model()
    assert lora_settings(model) == {"rank": 4, "alpha": 8.0}
    tokens = torch.randint(257, (2, 40))
    expected = model(tokens)[0]
    layer = model.layers[0].in_proj
    assert isinstance(layer, LoRALinear)
    weight = layer.weight + 2.0 * (layer.lora_B @ layer.lora_A)
    exported = {name: value.clone() for name, value in merged_parameters(model)}
    before = torch.get_rng_state()
    merge_lora(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert lora_settings(model) is None
    merged = dict(model.named_parameters())
    assert merged.keys() == exported.keys() == dict(Model(SMALL).named_parameters()).keys()
    assert all(torch.equal(merged[name], exported[name]) for name in merged)
    assert torch.equal(merged["layers.0.in_proj.weight"], weight)
    torch.testing.assert_close(model(tokens)[0], expected, rtol=0, atol=1e-5)


def test_checkpoints_hold_merged_weights_or_factors(tmp_path: Path) -> None:
    """Without an optimizer the file is one of a plain model. Both files load as the same model."""
    model, tokenizer = tuned_model(), train_tokenizer("byte", [])
    optimizer = build_optimizer(model, OptimizerConfig())
    tokens = torch.randint(257, (2, 40))
    model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    optimizer.step()
    best, last = tmp_path / "best.h5", tmp_path / "last.h5"
    save_checkpoint(best, model, tokenizer, 1, {})
    save_checkpoint(last, model, tokenizer, 1, {}, optimizer=optimizer, progress={})
    assert not any(n.endswith(FACTORS) for n in dataset_names(best, "model"))
    moments = dataset_names(last, "optimizer")
    assert moments
    assert all(n.endswith(FACTORS) for n in moments)
    merge_lora(model)
    for path in (best, last):
        loaded = load_model(path).model
        assert lora_settings(loaded) is None
        assert all(p.requires_grad for p in loaded.parameters())
        for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
            assert torch.equal(p, q), name
        with open_moments(path, loaded) as (stored, _):
            assert not stored  # the factors' moments are of no use for the merged weights


@pytest.mark.parametrize(
    "stored",
    [{}, {"rank": 10**9, "alpha": 1.0}, {"rank": 4, "alpha": float("nan")}, {"rank": 2, "alpha": 8}]
    + [{"rank": rank, "alpha": 8.0} for rank in (0, -1, 4.0, True, "4")],
)
def test_forged_settings_are_refused(tmp_path: Path, stored: dict[str, object]) -> None:
    model, path = tuned_model(), tmp_path / "a.h5"
    optimizer = build_optimizer(model, OptimizerConfig())
    tokenizer = train_tokenizer("byte", [])
    save_checkpoint(path, model, tokenizer, 1, {}, optimizer=optimizer, progress={})
    with h5py.File(path, "a") as file:
        del file["lora"]
        write_json(file, "lora", stored)
    seal(path)
    with pytest.raises(DamagedError):
        load_model(path)


def test_wrong_ranks_are_refused() -> None:
    for rank in (0, 33, 2.0, True):
        with pytest.raises(InputError, match=f"1 to 32, .*; got {rank}"):
            apply_lora(Model(SMALL), rank, 16.0)  # type: ignore[arg-type]
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=f"lora_alpha must be finite and > 0; got {alpha}"):
            apply_lora(Model(SMALL), 2, alpha)
    with pytest.raises(InputError, match="lora_alpha"):
        TrainConfig.from_flat({"lora_alpha": 0.0})
    with pytest.raises(InputError, match="lora"):
        TrainConfig.from_flat({"lora_rank": 4})


@pytest.fixture(scope="module")
def source(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best model of a run of 12 steps."""
    folder = tmp_path_factory.mktemp("source") / "run"
    make_trainer(corpus, folder).fit()
    return folder / "best.h5"


def lora_trainer(corpus: Corpus, folder: Path, source: Path, **settings: object) -> Trainer:
    """A trainer of the factors of a model."""
    trainer = make_trainer(
        corpus, folder, initialize_from=str(source), lora_rank=4, lr=2e-2, **settings
    )
    initialize_trainer(trainer, load_model(source))
    return trainer


def test_a_run_changes_factors_only_and_its_model_grows(
    corpus: Corpus, source: Path, tmp_path: Path
) -> None:
    trainer = lora_trainer(corpus, tmp_path / "run", source)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert trainer.fit()["best_step"] == 12
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.endswith(FACTORS)}
    tokens = torch.randint(257, (1, 60))
    with torch.no_grad():
        expected = trainer.model.eval()(tokens)[0]
        for name in ("best.h5", "last.h5"):
            tuned = load_model(tmp_path / "run" / name)
            torch.testing.assert_close(tuned.model(tokens)[0], expected, rtol=0, atol=1e-5)
            grow_checkpoint(
                tuned,
                replace(SMALL, width=48),
                tmp_path / "grown.h5",
                preset="g",
                method="preserve",
                seed=0,
                force=name == "last.h5",
            )
            grown = load_model(tmp_path / "grown.h5").model
            torch.testing.assert_close(grown(tokens)[0], tuned.model(tokens)[0], rtol=0, atol=1e-4)


def test_a_cut_run_continues_bit_for_bit(corpus: Corpus, source: Path, tmp_path: Path) -> None:
    uninterrupted = lora_trainer(corpus, tmp_path / "whole", source, keep_checkpoints=3)
    uninterrupted.fit()
    (tmp_path / "cut").mkdir()
    for name in ("step-5.h5", "config.toml"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "cut")
    resumed = make_trainer(
        corpus, tmp_path / "cut", initialize_from=str(source), lora_rank=4, lr=2e-2
    )
    resumed.fit(resume=True)
    pairs = zip(uninterrupted.model.named_parameters(), resumed.model.parameters(), strict=True)
    for (name, p), q in pairs:
        assert torch.equal(p, q), name
