"""The notebook runs from its first cell to its last, with a short text and little training."""

import functools
import http.server
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "first-model.ipynb"
PLAY = """KING RICHARD III:
Where is thy brother, and what news {number} from the north?

QUEEN ELIZABETH:
My lord, the {number} riders come to-morrow, be it fair or foul.

ROMEO:
O, speak again {number} times, and I shall hear thee in the morn.

"""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where a web server on this machine has a play."""
    folder = tmp_path / "site"
    folder.mkdir()
    text = "".join(PLAY.format(number=number) for number in range(300))
    (folder / "play.txt").write_text(text, encoding="utf-8")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/play.txt"
        server.shutdown()


def output(notebook: NotebookNode, words: str) -> str:
    """Everything that the cell with some words printed or showed."""
    [cell] = [c for c in notebook.cells if c.cell_type == "code" and words in c.source]
    shown = [o.get("text") or o.data.get("text/html") or str([*o.data]) for o in cell.outputs]
    return "\n".join(shown)


def test_the_notebook_runs(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [parameters] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    values = {"TEXT": f'"{address}"', "MINUTES": "0.03"}
    for name, value in values.items():
        parameters.source, count = re.subn(
            rf"(?m)^{name} = .*$", f"{name} = {value}", parameters.source
        )
        assert count == 1
    scripts = Path(sys.executable).parent  # of the command that a cell calls
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert "perplexity" in output(notebook, "mmrec.train(")
    assert "image/png" in output(notebook, "loss.png")
    assert output(notebook, "mmrec.load(run)").count("ROMEO:") >= 3
    assert "bits per byte" in output(notebook, "iframe")
    answers = re.findall(r"(?m)^QUEEN:", output(notebook, "def say"))
    assert len(answers) == 2
    assert (tmp_path / "my-model" / "best.h5").exists()


def test_the_notebook_is_stored_without_results() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert notebook.metadata.kernelspec.name == "python3"
