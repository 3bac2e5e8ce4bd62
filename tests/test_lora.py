"""LoRA: nothing changes at first, factors alone learn, merged is the same, a resume is exact."""

import shutil
from pathlib import Path

import h5py
import pytest
import torch

from mmrec.checkpoint.checkpoint import load_model
from mmrec.config import TrainConfig
from mmrec.data.corpus import Corpus
from mmrec.errors import InputError
from mmrec.finetune.grow import grow_checkpoint
from mmrec.lora import FACTORS, LowRank, attach
from mmrec.model import Model
from mmrec.training.trainer import Trainer, train
from tests.conftest import SMALL, make_trainer


@pytest.fixture(scope="module")
def source(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best model of a run of 12 steps."""
    folder = tmp_path_factory.mktemp("source") / "run"
    train(make_trainer(corpus, folder))
    return folder / "best.h5"


def lora_trainer(corpus: Corpus, folder: Path, source: Path, **settings: object) -> Trainer:
    made = make_trainer(corpus, folder, grow_from=str(source), lora=4, lr=2e-2, **settings)
    made.start_from(load_model(source))
    return made


def test_fresh_factors_change_nothing_and_both_learn() -> None:
    plain = Model(SMALL).eval()
    for p in plain.parameters():
        p.data += torch.randn_like(p) * 0.05
    x = torch.randint(257, (2, 40))
    want = plain(x)[0]
    attach(plain, 4, 8.0)
    assert torch.equal(plain(x)[0], want)
    factors = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in factors} == {"down", "up"}
    assert len(factors) == 2 * 4 * SMALL.depth
    for _ in range(2):
        loss = plain.loss(x[:, :-1], x[:, 1:])
        grads = torch.autograd.grad(loss, list(factors.values()))
        for p, g in zip(factors.values(), grads, strict=True):
            p.data -= g
    assert all(g.abs().max() > 0 for g in grads)


def test_only_factors_learn_and_the_file_is_an_ordinary_one(
    corpus: Corpus, source: Path, tmp_path: Path
) -> None:
    """best.h5 holds merged weights; last.h5 holds base, factors and the moments of factors only."""
    trainer = lora_trainer(corpus, tmp_path / "run", source)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    made = train(trainer)
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, base[n])}
    assert moved == {n for n in base if n.endswith(FACTORS)}
    assert made["best_step"] == 12
    assert any("of which" in line for line in trainer.lines)  # type: ignore[attr-defined]
    x = torch.randint(257, (2, 60))
    trainer.model.eval()
    with torch.no_grad():
        want = trainer.model(x)[0]
        for name in ("best.h5", "last.h5"):
            loaded = load_model(tmp_path / "run" / name)
            assert not any(isinstance(m, LowRank) for m in loaded.model.modules())
            torch.testing.assert_close(loaded.model(x)[0], want, rtol=0, atol=1e-5)
    names: list[str] = []
    with h5py.File(tmp_path / "run/last.h5") as file:
        file["optimizer"].visititems(
            lambda n, x: names.append(n) if isinstance(x, h5py.Dataset) else None
        )
    assert names
    assert all(n.endswith(FACTORS) for n in names)
    with h5py.File(tmp_path / "run/best.h5") as file:
        names = []
        file["model"].visit(names.append)
    assert not [n for n in names if n.endswith(("down", "up"))]


def test_a_tuned_model_grows(corpus: Corpus, source: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    train(lora_trainer(corpus, tmp_path / "run", source))
    for name in ("best.h5", "last.h5"):
        tuned, wider = load_model(tmp_path / "run" / name), replace(SMALL, width=48)
        grow_checkpoint(tuned, wider, tmp_path / "g.h5", name="g", method="preserve", seed=0)
        x = torch.randint(257, (1, 60))
        with torch.no_grad():
            torch.testing.assert_close(
                load_model(tmp_path / "g.h5").model(x)[0], tuned.model(x)[0], rtol=0, atol=1e-4
            )


def test_a_cut_run_goes_on_bit_for_bit(corpus: Corpus, source: Path, tmp_path: Path) -> None:
    whole = lora_trainer(corpus, tmp_path / "whole", source, keep=3)
    train(whole)
    cut = tmp_path / "cut"
    cut.mkdir()
    for name in ("step-5.h5", "config.toml"):
        shutil.copy(tmp_path / "whole" / name, cut)
    again = make_trainer(corpus, cut, grow_from=str(source), lora=4, lr=2e-2)
    train(again, resume=True)
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_wrong_ranks_are_refused() -> None:
    for rank in (0, 33):
        with pytest.raises(InputError, match=f"lora must lie in 1 to 32, .*; got {rank}"):
            attach(Model(SMALL), rank, 16.0)
    with pytest.raises(InputError, match="lora_alpha must be finite and > 0"):
        TrainConfig(lora_alpha=0.0)
    with pytest.raises(InputError, match="lora needs grow_from"):
        TrainConfig(lora=4)
