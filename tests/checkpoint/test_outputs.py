"""An output replaces only what mmrec wrote, of the same kind, and never what is read."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mmrec.checkpoint.checkpoint import load_model, save_checkpoint
from mmrec.checkpoint.outputs import KINDS, REPORT_MARK, check_output
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.data.readers import ReadOptions
from mmrec.data.tokenizer import train_tokenizer
from mmrec.errors import InputError
from mmrec.evaluation.compare import Curve, draw_curves
from mmrec.evaluation.evaluate import TokenScores
from mmrec.evaluation.report import draw_report, make_report
from mmrec.finetune.grow import grow_checkpoint
from mmrec.model import Model
from mmrec.training.plots import draw_loss_curve
from tests.conftest import SMALL


@pytest.fixture
def folder(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of each kind, named after it, and files of a user."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(text_file.read_text()[:9000])
    Path("notes.md").write_text("mine")
    Path("mine.json").write_text('{"mine": 1}')
    prepare("book.txt", "byte", out=Path("corpus.h5"))
    save_checkpoint(Path("checkpoint.h5"), Model(SMALL), train_tokenizer("byte", []), 1, {})
    draw_loss_curve([], Path("picture.png"), "title")
    Path("report.md").write_text(f"{REPORT_MARK}# Generated samples\n")
    Path("stages.json").write_text(json.dumps([{"stage": "1-tiny", "flops": 1.0}]))
    Path("recipe.json").write_text(json.dumps({"stages": [], "start_scores": []}))
    Path("result.json").write_text(json.dumps({"machine": {}}))
    Path("runs.json").write_text(json.dumps({"runs": [{"machine": {}}, {"machine": {}}]}))
    return tmp_path


OURS = {
    ("corpus", "corpus.h5"),
    ("picture", "picture.png"),
    ("report", "report.md"),
    ("stages", "stages.json"),
    ("recipe", "recipe.json"),
    ("benchmark result", "result.json"),
    ("benchmark result", "runs.json"),
}


def test_a_file_is_replaced_by_one_of_its_kind_only(folder: Path) -> None:
    allowed = set()
    files = [p for p in Path().iterdir() if p.is_file()]
    for kind in KINDS:
        for path in files:
            try:
                check_output(path, kind)
                allowed.add((kind, path.name))
            except InputError:
                with pytest.raises(InputError, match=f"{path} is there already.* add --force"):
                    check_output(path, kind)
            check_output(path, kind, force=True)
        check_output(Path("new"), kind)
    assert allowed == OURS


def test_a_file_that_is_read_is_never_replaced(folder: Path) -> None:
    """Under whatever name, and by no force."""
    Path("link").symlink_to("book.txt")
    os.link("book.txt", "hard")
    Path("sub").mkdir()
    for name in ("book.txt", "link", "hard", "./sub/../book.txt", str(folder / "book.txt")):
        for force in (False, True):
            with pytest.raises(InputError, match="--out must not be a file that is read"):
                check_output(Path(name), "picture", inputs=[Path("book.txt")], force=force)
    for source in ("book.txt", "boo*.txt", ".", "1:book.txt,1:notes.md"):
        with pytest.raises(InputError, match="must not be a file that is read"):
            prepare(source, "byte", out=Path("hard"), force=True)
    with pytest.raises(InputError, match="must not be a file that is read"):
        prepare("notes.md", "byte", out=Path("hard"), options=ReadOptions(val_file="book.txt"))


def test_an_output_is_a_file_in_a_folder_that_exists(folder: Path) -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for name, message in (
        ("folder", "must be a file to write; folder is a folder"),
        ("none/x.png", "must lie in a folder that exists; there is no folder none"),
        ("book.txt/x.png", "there is no folder book.txt"),
        ("pipe", "must be a file to write; pipe is a device or pipe"),
        (os.devnull, "must be a file to write; /dev/null is a device or pipe"),
        ("x" * 300, "--plot must be a file to write; x.*File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(Path(name), "picture", option="--plot", force=True)


def test_a_corpus_has_a_name_that_data_knows(folder: Path) -> None:
    for name in ("corp", "corpus.h5.txt", "CORPUS.H5"):
        with pytest.raises(InputError, match=f"must end in .h5 or .hdf5, .* got {name}: name it"):
            prepare("book.txt", "byte", out=Path(name))
        assert not Path(name).exists()
    with pytest.raises(InputError, match="corpus.h5 is a prepared corpus already"):
        prepare("corpus.h5", out=Path("copy.h5"))
    Path("text.h5").write_text("mine")
    with pytest.raises(InputError, match="text.h5 is there already"):
        prepare("book.txt", "byte", out=Path("text.h5"))
    assert Path("text.h5").read_text() == "mine"
    prepare("book.txt", "byte", out=Path("text.h5"), force=True)
    assert Corpus.open(Path("text.h5")).val.n_bytes == 900
    Path("book.txt").write_text(Path("book.txt").read_text() * 2)
    prepare("book.txt", "byte", out=Path("text.h5"))  # a corpus is made anew
    assert Corpus.open(Path("text.h5")).val.n_bytes == 1800


def test_functions_that_write_ask_first(folder: Path) -> None:
    scores = TokenScores(np.ones(9, np.float32), np.ones(9, np.float32), np.ones(9, bool))
    report = make_report(np.arange(9), 0, np.ones(9, int), scores)
    curve = Curve("a", "", 1, 2, 2, 3.0, [(1, 2.0)], 2.0, "done")
    source = load_model(Path("checkpoint.h5"))
    for name in ("notes.md", "corpus.h5", "checkpoint.h5"):
        before = Path(name).read_bytes()
        with pytest.raises(InputError, match=f"{name} is there already"):
            draw_report(report, Path(name), "title")
        with pytest.raises(InputError, match=f"{name} is there already"):
            draw_curves([curve], Path(name))
        with pytest.raises(InputError, match=rf"{name} is (there already|one)"):
            grow_checkpoint(source, SMALL, Path(name), preset="tiny")
        assert Path(name).read_bytes() == before
    with pytest.raises(InputError, match="checkpoint.h5 is one"):
        grow_checkpoint(source, SMALL, Path("checkpoint.h5"), preset="tiny", force=True)
    for _ in range(2):
        draw_report(report, Path("made.png"), "title")
        draw_curves([curve], Path("made.png"))
    draw_curves([curve], Path("notes.md"), force=True)
    assert Path("notes.md").read_bytes()[:4] == b"\x89PNG"
