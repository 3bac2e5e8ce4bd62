"""The run folder is not overwritten without --force; the messages and tables of a run."""

import os
from pathlib import Path

import pytest

from mmrec.errors import InputError, RunLockedError
from mmrec.training.metrics import (
    EPOCH_HEADER,
    epoch_row,
    explain_best_model,
    format_duration,
    overfitting_warning,
)
from mmrec.training.run_dir import CONFIG_MARK, FILES, open_run_dir


def test_a_run_is_never_overwritten_without_force(tmp_path: Path) -> None:
    default = tmp_path / "tiny-stdlib"

    def open_and_close(out: str = "", *, force: bool = False) -> Path:
        with open_run_dir(out, default, force=force) as lock:
            return lock.folder

    first = open_and_close()
    assert first == default
    (first / "config.toml").write_text(f"{CONFIG_MARK}preset = 'tiny'\n")
    (first / "best.h5").write_text("precious")
    (first / "step-9.h5").write_text("precious")
    (first / "step-of-mine.h5").write_text("mine")
    (first / "notes.txt").write_text("mine")
    assert open_and_close() == tmp_path / "tiny-stdlib-2"
    with pytest.raises(InputError, match="already holds a run: choose another --out, .*--force"):
        open_and_close(str(first))
    assert (first / "best.h5").read_text() == "precious"
    assert open_and_close(str(first), force=True) == first
    assert sorted(p.name for p in first.iterdir()) == ["notes.txt", "step-of-mine.h5"]
    with pytest.raises(InputError, match="must be a folder; it is a file"):
        open_and_close(str(first / "notes.txt"))
    with pytest.raises(InputError, match="cannot write in the run folder"):
        open_and_close(str(first / "notes.txt" / "below"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_user_is_no_run(tmp_path: Path, name: str) -> None:
    """It is overwritten only by ``force``, and never if the run reads it."""
    folder, default = tmp_path / "exp", tmp_path / "tiny"
    folder.mkdir()
    (folder / name).write_text("mine")
    (tmp_path / "link").symlink_to(folder / name)
    with pytest.raises(InputError, match=f"{name} is there already, and no run wrote it: choose"):
        open_run_dir(str(folder), default, force=False)
    for source in (folder / name, tmp_path / "link", folder / ".." / "exp" / name):
        for force in (False, True):
            with pytest.raises(InputError, match="--out must not be a file that is read"):
                open_run_dir(str(folder), default, force=force, inputs=[source])
    assert (folder / name).read_text() == "mine"
    assert [p.name for p in folder.iterdir()] == [name]
    with open_run_dir("", folder, force=False) as lock:  # nobody asked for this folder
        assert lock.folder == tmp_path / "exp-2"
    with open_run_dir(str(folder), default, force=True):
        assert not (folder / name).exists()


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    default = tmp_path / "tiny"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / ".last.h5.999999999.mmrec.tmp").write_text(
        "left by a process that was killed"
    )
    with open_run_dir("", default, force=False) as first:
        assert all(p.name.startswith(".mmrec.lock") for p in default.iterdir())
        for force in (False, True):
            with pytest.raises(
                RunLockedError, match=f"is being written by process {os.getpid()} on "
            ):
                open_run_dir(str(default), default, force=force)
        with pytest.raises(RunLockedError):
            open_run_dir("", default, force=True)
        with open_run_dir("", default, force=False) as second:
            assert second.folder == tmp_path / "tiny-2"
        assert first.folder == default
    first.release()
    assert list(default.iterdir()) == []


def test_a_row_of_the_epoch_table_is_as_wide_as_its_header() -> None:
    row = {
        "epoch": 1,
        "mean_loss": 5.0,
        "first_loss": 8.0,
        "last_loss": 4.0,
        "val_loss": 4.5,
        "bits_per_byte": 1.9,
        "seconds": 3725.0,
    }
    text = epoch_row(row)
    assert len(text) == len(EPOCH_HEADER)
    assert text.split() == [
        "1",
        "5.0000",
        "8.0000",
        "4.0000",
        "50.0%",
        "4.5000",
        "90.02",
        "1.9000",
        "1:02:05",
    ]
    assert format_duration(61.4) == "1:01"
    assert epoch_row(row | {"val_loss": None}).split()[5] == "-"


def test_the_warning_of_overfitting_is_given_once() -> None:
    def validations(losses: list[float]) -> list[dict[str, float]]:
        return [{"step": 10 * i, "val": x, "train": 3.0 - 0.1 * i} for i, x in enumerate(losses)]

    assert overfitting_warning(validations([3.0, 2.5, 2.4])) is None
    assert overfitting_warning(validations([3.0, 2.5, 2.6, 2.7])) is None
    warning = overfitting_warning(validations([3.0, 2.5, 2.6, 2.7, 2.8]))
    assert warning is not None
    assert warning.startswith(
        "overfitting: since step 10 the training loss fell 2.900 -> 2.600 while"
    )
    assert overfitting_warning(validations([3.0, 2.5, 2.6, 2.7, 2.8, 2.9])) is None
    constant = [{"step": i, "val": 2.0 + i, "train": 3.0} for i in range(4)]
    assert overfitting_warning(constant) is None  # the training loss does not fall either


def test_the_summary_explains_why_a_model_is_the_best() -> None:
    def validations(losses: list[float], slope: float = -0.1) -> list[dict[str, float]]:
        return [
            {"step": 10 * (i + 1), "val": x, "train": 3.0 + slope * i} for i, x in enumerate(losses)
        ]

    falling = explain_best_model(validations([3.0, 2.5, 2.4]), 2.4, 30)
    assert falling == (
        "validation loss 2.4000, the lowest of 3 validations; it was the last one, and "
        "the loss was still falling"
    )
    rising = explain_best_model(validations([3.0, 2.5, 2.6, 2.7]), 2.5, 20)
    assert rising == (
        "validation loss 2.5000, the lowest of 4 validations; it was 2.7000 at step 40, "
        "while the training loss fell 2.9000 -> 2.7000: after step 20 the model "
        "memorised its text"
    )
    assert "memorised" not in explain_best_model(validations([3.0, 2.5, 2.6, 2.7], 0.1), 2.5, 20)
    assert "falling" not in explain_best_model(validations([3.0]), 3.0, 10)
