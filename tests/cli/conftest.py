"""A run that the tests of several commands use."""

import sys
from pathlib import Path

import pytest

from mmrec.cli import main


@pytest.fixture(scope="session")
def char_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step by character."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "small.toml").write_text(
        'preset = "tiny"\n[model]\nwidth = 32\ndepth = 2\nheads = 2\n'
        '[data]\ntokenizer = "char"\nbatch_size = 2\nseq_len = 32\n'
    )
    (folder / "book.txt").write_text("It was the best of times,\nit was the worst of times.\n" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MMREC_CACHE", str(folder / "cache"))
        words = "train --config small.toml --data book.txt --steps 1 --out run"
        patch.setattr(sys, "argv", ["mmrec", *words.split()])
        with pytest.raises(SystemExit) as caught:
            main.run()
        assert not caught.value.code
    return folder / "run"
