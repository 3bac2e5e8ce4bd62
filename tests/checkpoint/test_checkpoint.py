"""Checkpoints: small enough, found where one looks, and clear about every fault."""

import re
from dataclasses import asdict
from pathlib import Path

import h5py
import pytest
import torch

from mmrec.checkpoint import checkpoint
from mmrec.checkpoint import manager as saved
from mmrec.checkpoint.hdf5 import seal, write_json
from mmrec.config import PRESETS
from mmrec.data.corpus import Corpus
from mmrec.data.tokenizer import train_tokenizer
from mmrec.errors import InputError
from mmrec.model import Model
from mmrec.optimizer import MuonAdamW, parameter_groups
from mmrec.training.trainer import Trainer, train
from tests.conftest import make_trainer


def make_optimizer(model: Model) -> MuonAdamW:
    return MuonAdamW(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), matrix_lr=0.02)


def test_tiny_with_optimizer_stays_within_its_size(tmp_path: Path) -> None:
    """After real steps; MuonAdamW keeps one moment of a matrix, AdamW two of all else."""
    model = Model(PRESETS["tiny"])
    optimizer = make_optimizer(model)
    for _ in range(2):
        model.loss(torch.randint(0, 5000, (2, 64)), torch.randint(0, 5000, (2, 64))).backward()
        optimizer.step()
    path = tmp_path / "tiny.h5"
    tokenizer = train_tokenizer("byte", [])
    checkpoint.save_checkpoint(path, model, tokenizer, 2, {}, optimizer, {"seconds": 1.0})
    assert path.stat().st_size <= 22.6e6
    other = Model(PRESETS["tiny"])
    fresh = make_optimizer(other)
    assert checkpoint.restore_training_state(path, other, fresh) == {"seconds": 1.0, "step": 2}
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
        saved.find_checkpoint(None)
    for number, name in enumerate(["runs/a/last.h5", "runs/a/best.h5", "runs/b/last.h5"]):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        import os

        os.utime(path, (number, number))
    assert saved.find_checkpoint(None) == Path("runs/b/last.h5")
    assert saved.find_checkpoint(Path("runs/a")) == Path("runs/a/best.h5")
    assert saved.find_checkpoint(Path("runs/b/last.h5")) == Path("runs/b/last.h5")
    Path("runs/c").mkdir()
    with pytest.raises(InputError, match="no checkpoint in runs/c"):
        saved.find_checkpoint(Path("runs/c"))
    Path("runs/c/step-20.h5").touch()
    Path("runs/c/step-100.h5").touch()
    assert saved.find_checkpoint(Path("runs/c")) == Path("runs/c/step-100.h5")


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


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_passed_over(corpus: Corpus, tmp_path: Path) -> None:
    """It is named, set aside, and the run goes on from the one before as if nothing had been."""
    first = make_trainer(corpus, tmp_path, keep=1)
    train(first)
    end = (tmp_path / "last.h5").read_bytes()
    assert [p.name for p in saved.list_checkpoints(tmp_path)] == ["step-10.h5", "last.h5"]
    flip(tmp_path / "last.h5")
    (tmp_path / "step-of-mine.h5").write_text("not a checkpoint")
    (tmp_path / "step-999.h5").write_bytes(end[:1000])
    names = [p.name for p in saved.list_checkpoints(tmp_path)]
    assert names == ["step-10.h5", "step-999.h5", "last.h5"]
    again = make_trainer(corpus, tmp_path, keep=1)
    train(again, resume=True)
    said = again.lines  # type: ignore[attr-defined]
    assert re.search(
        "last.h5 is damaged or truncated: its bytes are not .*; going back to", said[0]
    )
    assert re.search(r"step-999.h5 is damaged or truncated: it was [\d,]+ bytes long", said[1])
    assert re.search(r"resume  .*step-10.h5, step 10", said[2])
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    kept = {p.name for p in tmp_path.glob("*.h5*")}
    assert kept == {
        "best.h5",
        "last.h5",
        "last.h5.damaged",
        "step-10.h5",
        "step-999.h5.damaged",
        "step-of-mine.h5",
    }


def test_none_is_whole_or_one_is_newer(corpus: Corpus, tmp_path: Path) -> None:
    train(make_trainer(corpus, tmp_path))
    path = tmp_path / "last.h5"
    with h5py.File(path, "a") as file:
        file.attrs["schema"] = 99
    seal(path)
    with pytest.raises(InputError, match="newer mmrec"):  # whole: nothing may go back behind it
        train(make_trainer(corpus, tmp_path), resume=True)
    for found in tmp_path.glob("*.h5"):
        flip(found)
    with pytest.raises(InputError, match=r"no checkpoint of .* is whole: step-5.h5, .*last.h5"):
        train(make_trainer(corpus, tmp_path), resume=True)
    assert len(list(tmp_path.glob("*.h5"))) == 4  # nothing was set aside


def test_the_last_to_resume_from_is_never_trimmed(corpus: Corpus, tmp_path: Path) -> None:
    made = make_trainer(corpus, tmp_path, keep=0)
    there: list[list[str]] = []
    take = made.take_step

    def watched() -> tuple[float, float, float]:
        there.append(sorted(p.name for p in tmp_path.glob("step-*.h5")))
        return take()

    made.take_step = watched  # type: ignore[method-assign]
    train(made)
    assert there == [[]] * 5 + [["step-5.h5"]] * 5 + [["step-10.h5"]] * 2
    assert sorted(p.name for p in tmp_path.glob("*.h5")) == ["best.h5", "last.h5"]


def test_a_huge_model_that_is_not_stored_is_refused_at_once(trainer: Trainer) -> None:
    """Its configuration is believed only as far as weights of that shape are there."""
    trainer.save("last.h5", whole=True)
    path = trainer.folder / "last.h5"
    for key, value, message in [
        ("depth", 10**9, "its config says 1,000,000,000 layers; fewer weights are stored"),
        ("width", 2**20, r"must be float32 \(257, 1048576\); it is float32 \(257, 32\)"),
        ("width", 2**62, "not valid: "),
        ("vocab_size", 10**12, r"must be float32 \(1000000000000, 32\)"),
        ("layers", "s" * 9, "is not valid"),
        ("colour", 1, "unknown setting 'colour'"),
    ]:
        with h5py.File(path, "a") as file:
            stored = asdict(trainer.model.config) | {key: value}
            del file["config"]
            write_json(file, "config", stored)
        seal(path)
        with pytest.raises(InputError, match=message) as caught:
            checkpoint.load_model(path)
        assert str(path) in str(caught.value)
