"""Checkpoints: small enough, found where one looks, and clear about every fault."""

from pathlib import Path

import h5py
import pytest
import torch

from mmrec import checkpoint
from mmrec.config import PRESETS, InputError
from mmrec.data.tokenizer import train_tokenizer
from mmrec.model import Model
from mmrec.optimizer import Muon
from mmrec.storage import seal
from mmrec.train import Trainer, train


def make_optimizer(model: Model) -> Muon:
    return Muon(model.parameter_groups(0.1), lr=1e-3, betas=(0.9, 0.95), muon_lr=0.02)


def test_tiny_with_optimizer_stays_within_its_size(tmp_path: Path) -> None:
    """After real steps; Muon keeps one moment of a matrix, AdamW two of all else."""
    model = Model(PRESETS["tiny"])
    optimizer = make_optimizer(model)
    for _ in range(2):
        model.loss(torch.randint(0, 5000, (2, 64)), torch.randint(0, 5000, (2, 64))).backward()
        optimizer.step()
    path = tmp_path / "tiny.h5"
    tokenizer = train_tokenizer("byte", [])
    checkpoint.save(path, model, tokenizer, 2, {}, optimizer, {"seconds": 1.0})
    assert path.stat().st_size <= 22.6e6
    other = Model(PRESETS["tiny"])
    fresh = make_optimizer(other)
    assert checkpoint.restore(path, other, fresh) == {"seconds": 1.0, "step": 2}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        kept = optimizer.state[a].keys() - {"step"}
        assert kept in ({"momentum"}, {"exp_avg", "exp_avg_sq"})
        for moment in kept:
            assert torch.equal(optimizer.state[a][moment], fresh.state[b][moment])


def test_the_best_of_the_newest_run_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="train one first with 'mmrec train tiny'"):
        checkpoint.find_checkpoint(None)
    for number, name in enumerate(["runs/a/last.h5", "runs/a/best.h5", "runs/b/last.h5"]):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        import os

        os.utime(path, (number, number))
    assert checkpoint.find_checkpoint(None) == Path("runs/b/last.h5")
    assert checkpoint.find_checkpoint(Path("runs/a")) == Path("runs/a/best.h5")
    assert checkpoint.find_checkpoint(Path("runs/b/last.h5")) == Path("runs/b/last.h5")
    Path("runs/c").mkdir()
    with pytest.raises(InputError, match="no checkpoint in runs/c"):
        checkpoint.find_checkpoint(Path("runs/c"))
    Path("runs/c/step-20.h5").touch()
    Path("runs/c/step-100.h5").touch()
    assert checkpoint.find_checkpoint(Path("runs/c")) == Path("runs/c/step-100.h5")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.__delitem__("model/norm.weight"), "not valid: model/norm.weight is missing"),
        (lambda f: f.__delitem__("tokenizer"), "not valid: tokenizer is missing"),
        (lambda f: f.__delitem__("config"), "not valid: config is missing"),
        (lambda f: f["config"].__setitem__(0, 0), "config is not what was stored"),
    ],
)
def test_a_checkpoint_with_something_missing(
    trainer: Trainer, damage: object, message: str
) -> None:
    train(trainer)
    path = trainer.folder / "last.h5"
    with h5py.File(path, "a") as file:
        damage(file)  # type: ignore[operator]
    with pytest.raises(InputError, match="its bytes are not those that were written"):
        checkpoint.load_model(path)
    seal(path)  # as one who forges a file would
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load_model(path)
    assert "\n" not in str(caught.value)


def test_a_weight_of_another_shape_is_named(trainer: Trainer) -> None:
    trainer.save("last.h5", whole=True)
    path = trainer.folder / "last.h5"
    with h5py.File(path, "a") as file:
        del file["model/embedding"]
        file["model/embedding"] = [1]
    seal(path)
    with pytest.raises(
        InputError, match=r"model/embedding must be float32 \(257, 32\); it is int64"
    ):
        checkpoint.load_model(path)
