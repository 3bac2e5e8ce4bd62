"""Which checkpoints a run folder has, which one is used, and what happens to damaged ones."""

import os
import shutil
from pathlib import Path

import h5py
import pytest
import torch

from mmrec.checkpoint import manager
from mmrec.checkpoint.checkpoint import load_model, save_checkpoint
from mmrec.checkpoint.hdf5 import seal
from mmrec.data.corpus import Corpus
from mmrec.data.tokenizer import train_tokenizer
from mmrec.errors import DamagedError, InputError
from mmrec.model import Model
from tests.conftest import SMALL, make_trainer


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 5, 10 and, in last.h5, 12."""
    model = Model(SMALL)
    for name, step in (("step-5", 5), ("step-10", 10), ("last", 12)):
        save_checkpoint(tmp_path / f"{name}.h5", model, train_tokenizer("byte", []), step, {})
    return tmp_path


def test_the_best_of_the_newest_run_is_found(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(InputError, match="no trained model"):
        manager.find_checkpoint(None, runs)
    for number, name in enumerate(["a/last.h5", "a/best.h5", "b/last.h5"]):
        path = runs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (number, number))
    assert manager.find_checkpoint(None, runs) == runs / "b/last.h5"
    assert manager.find_checkpoint(runs / "a") == runs / "a/best.h5"
    assert manager.find_checkpoint(runs / "b/last.h5") == runs / "b/last.h5"
    (runs / "grown").mkdir()  # as with mmrec grow --out runs/grown/x.h5
    (runs / "grown/x.h5").touch()
    assert manager.find_checkpoint(None, runs) == runs / "b/last.h5"
    with pytest.raises(InputError, match=r"no checkpoint in .*; it holds x.h5, which must be"):
        manager.find_checkpoint(runs / "grown")
    (runs / "c").mkdir()
    with pytest.raises(InputError, match="no checkpoint in .*c"):
        manager.find_checkpoint(runs / "c")
    (runs / "c/step-20.h5").touch()
    (runs / "c/step-100.h5").touch()
    assert manager.find_checkpoint(runs / "c") == runs / "c/step-100.h5"


@pytest.mark.parametrize("chain", ["chain", "deep/chain"])
def test_the_stages_of_a_chain_are_runs(tmp_path: Path, chain: str) -> None:
    """The newest one is the newest run, and the folder of the chain stands for its last one."""
    runs = tmp_path / "runs"
    files = ["old/best.h5", f"{chain}/1-tiny/best.h5", f"{chain}/2-tiny/last.h5"]
    for number, name in enumerate(files):
        path = runs / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (number, number))
    (runs / chain / "10-mini").mkdir()  # not begun yet
    assert manager.newest_run(runs) == runs / chain / "2-tiny"
    assert manager.find_checkpoint(None, runs) == runs / chain / "2-tiny/last.h5"
    with pytest.raises(InputError, match="no checkpoint in"):
        manager.find_checkpoint(runs / chain)
    (runs / chain / manager.CHAIN_FILE).write_text("{}")
    assert manager.find_checkpoint(runs / chain) == runs / chain / "2-tiny/last.h5"
    (runs / chain / "10-mini/step-0.h5").touch()
    assert manager.find_checkpoint(runs / chain) == runs / chain / "10-mini/step-0.h5"


def test_checkpoints_are_listed_by_step_and_pruned(run: Path) -> None:
    (run / "step-of-mine.h5").write_text("not a checkpoint")
    (run / "step-999.h5").write_text("not a checkpoint either")
    names = [p.name for p in manager.list_checkpoints(run)]
    assert names == ["step-5.h5", "step-10.h5", "last.h5", "step-999.h5"]
    flip_a_bit(run / "last.h5")  # its step cannot be read any more
    assert manager.list_checkpoints(run)[-1].name == "last.h5"
    manager.prune_checkpoints(run, 1)
    assert [p.name for p in manager.list_checkpoints(run)] == ["step-999.h5", "last.h5"]
    manager.prune_checkpoints(run, 0)
    assert sorted(p.name for p in run.iterdir()) == ["last.h5", "step-of-mine.h5"]


def test_damaged_checkpoints_are_passed_over_and_set_aside(run: Path) -> None:
    flip_a_bit(run / "last.h5")
    (run / "step-999.h5").write_bytes((run / "last.h5").read_bytes()[:1000])
    lines: list[str] = []
    path, info = manager.load_latest(run, lambda path: load_model(path).metadata, lines.append)
    assert (path.name, info) == ("step-10.h5", {})
    assert ["last.h5" in lines[0], "step-999.h5" in lines[1], len(lines)] == [True, True, 2]
    assert sorted(p.name for p in run.iterdir()) == [
        "last.h5.damaged",
        "step-10.h5",
        "step-5.h5",
        "step-999.h5.damaged",
    ]
    assert manager.run_tokenizer(run).kind == "byte"


def test_no_checkpoint_is_intact(run: Path) -> None:
    for path in run.glob("*.h5"):
        flip_a_bit(path)
    with pytest.raises(InputError, match="step-5.h5, step-10.h5, last.h5"):
        manager.load_latest(run, lambda path: load_model(path).metadata, lambda line: None)
    assert len(list(run.glob("*.h5"))) == 3  # nothing was set aside
    with pytest.raises(InputError):
        manager.run_tokenizer(run)
    for path in run.glob("*.h5"):
        path.unlink()
    with pytest.raises(InputError):
        manager.load_latest(run, lambda path: load_model(path).metadata, lambda line: None)


def test_an_intact_checkpoint_of_another_version_is_not_passed_over(run: Path) -> None:
    with h5py.File(run / "last.h5", "a") as file:
        file.attrs["schema"] = 99
    seal(run / "last.h5")
    with pytest.raises(InputError, match="newer mmrec") as caught:
        manager.load_latest(run, lambda path: load_model(path).metadata, lambda line: None)
    assert not isinstance(caught.value, DamagedError)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    corpus: Corpus, tmp_path: Path
) -> None:
    """It ends with the same bits as if nothing had happened."""
    first = make_trainer(corpus, tmp_path / "a", keep_checkpoints=1)
    first.fit()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    flip_a_bit(tmp_path / "b" / "last.h5")
    again = make_trainer(corpus, tmp_path / "b", keep_checkpoints=1)
    again.fit(resume=True)
    lines = again.lines  # type: ignore[attr-defined]
    assert any("step-10.h5, step 10" in line for line in lines)
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_last_checkpoint_to_resume_from_is_never_pruned(corpus: Corpus, tmp_path: Path) -> None:
    trainer = make_trainer(corpus, tmp_path, keep_checkpoints=0)
    seen: list[list[str]] = []
    train_step = trainer.train_step

    def recording() -> tuple[float, float, float]:
        seen.append(sorted(p.name for p in tmp_path.glob("step-*.h5")))
        return train_step()

    trainer.train_step = recording  # type: ignore[method-assign]
    trainer.fit()
    assert seen == [[]] * 5 + [["step-5.h5"]] * 5 + [["step-10.h5"]] * 2
    assert sorted(p.name for p in tmp_path.glob("*.h5")) == ["best.h5", "last.h5"]
