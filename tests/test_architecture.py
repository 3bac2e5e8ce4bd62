"""The rooms and the arrows between them: who may import whom, and how long a file may be."""

import ast
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = {
    **{f"mmrec.{'.'.join(p.relative_to(ROOT / 'mmrec').with_suffix('').parts)}": p
       for p in (ROOT / "mmrec").rglob("*.py")},
    **{f"mmrec.cli.{p.stem}": p for p in (ROOT / "cli").glob("*.py")},
    **{f"mmrec.data.{p.stem}": p for p in (ROOT / "data").glob("*.py")},
}  # fmt: skip

# What each module may import of ours; longest prefix first.
ALLOWED = {
    "mmrec.kernels": {"mmrec.kernels"},
    "mmrec.config": set(),
    "mmrec.schedule": set(),
    "mmrec.structure": set(),
    "mmrec.files": {"mmrec.config"},
    "mmrec.storage": {"mmrec.config", "mmrec.files", "mmrec.structure"},
    "mmrec.data": {"mmrec.config", "mmrec.files", "mmrec.storage", "mmrec.data"},
    "mmrec.loss": {"mmrec.kernels"},
    "mmrec.machine": set(),
    "mmrec.heap": set(),
    "mmrec.packing": set(),
    "mmrec.recompute": set(),
    "mmrec.model": {"mmrec.config", "mmrec.kernels", "mmrec.loss", "mmrec.packing",
                    "mmrec.recompute"},
    "mmrec.parallel": {"mmrec.config", "mmrec.kernels"},
    "mmrec.lanes": {"mmrec.model", "mmrec.parallel"},
    "mmrec.optimizer": {"mmrec.lanes", "mmrec.parallel"},
    "mmrec.profile": {"mmrec.config", "mmrec.data", "mmrec.kernels", "mmrec.lanes",
                      "mmrec.loss", "mmrec.machine", "mmrec.model", "mmrec.optimizer"},
    "mmrec.lora": {"mmrec.config", "mmrec.model"},
    "mmrec.grow": {"mmrec.config", "mmrec.model"},
    "mmrec.footprint": {"mmrec.config", "mmrec.generate", "mmrec.lanes", "mmrec.model",
                        "mmrec.optimizer"},
    "mmrec.info": {"mmrec.config", "mmrec.footprint", "mmrec.model"},
    "mmrec.evaluate": {"mmrec.config", "mmrec.data", "mmrec.loss", "mmrec.model"},
    "mmrec.prompts": {"mmrec.checkpoint", "mmrec.config", "mmrec.evaluate", "mmrec.generate"},
    "mmrec.harness": {"mmrec.checkpoint", "mmrec.config", "mmrec.evaluate", "mmrec.generate",
                      "mmrec.saved"},
    "mmrec.report": {"mmrec.evaluate", "mmrec.files"},
    "mmrec.generate": {"mmrec.config", "mmrec.data", "mmrec.model"},
    "mmrec.checkpoint": {"mmrec.config", "mmrec.data", "mmrec.lora", "mmrec.model",
                         "mmrec.parallel", "mmrec.storage", "mmrec.structure"},
    "mmrec.saved": {"mmrec.checkpoint", "mmrec.config", "mmrec.data", "mmrec.storage"},
    "mmrec.start": {"mmrec.checkpoint", "mmrec.config", "mmrec.data", "mmrec.grow",
                    "mmrec.model", "mmrec.optimizer", "mmrec.run"},
    "mmrec.compare": {"mmrec.checkpoint", "mmrec.config", "mmrec.files"},
    "mmrec.chain": {"mmrec.checkpoint", "mmrec.compare", "mmrec.config", "mmrec.data",
                    "mmrec.files", "mmrec.grow", "mmrec.info"},
    "mmrec.guard": set(),
    "mmrec.signals": set(),
    "mmrec.run": {"mmrec.config", "mmrec.files"},
    "mmrec.state": {"mmrec.config", "mmrec.data", "mmrec.model", "mmrec.evaluate", "mmrec.guard",
                    "mmrec.checkpoint", "mmrec.optimizer", "mmrec.run", "mmrec.schedule",
                    "mmrec.files", "mmrec.heap", "mmrec.lanes", "mmrec.lora", "mmrec.machine",
                    "mmrec.parallel", "mmrec.signals", "mmrec.start"},
    "mmrec.nn": {"mmrec.kernels", "mmrec.model"},
    "mmrec.peers": {"mmrec.kernels"},
    "mmrec.bench": {"mmrec.kernels", "mmrec.peers"},
    "mmrec.train": {"mmrec.config", "mmrec.data", "mmrec.files", "mmrec.evaluate", "mmrec.guard",
                    "mmrec.checkpoint", "mmrec.parallel", "mmrec.run", "mmrec.signals",
                    "mmrec.state", "mmrec.saved"},
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            package = node.module or ""
            found |= {f"{package}.{a.name}" if package == "mmrec" else package for a in node.names}
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_arrows_point_one_way(name: str) -> None:
    found = imports(FILES[name])
    if not name.startswith("mmrec.kernels"):
        assert not [x for x in found if x.split(".")[0] == "numba"]
    if not name.startswith("mmrec.cli"):
        assert not [x for x in found if x.startswith("mmrec.cli")]
    owner = next((k for k in ALLOWED if name == k or name.startswith(k + ".")), None)
    if owner is not None:
        ours = {x for x in found if x.split(".")[0] == "mmrec"}
        outside = [
            x for x in ours if not any(x == a or x.startswith(a + ".") for a in ALLOWED[owner])
        ]
        assert not outside


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_stay_short(name: str) -> None:
    assert FILES[name].read_text().count("\n") <= 350


def test_every_package_is_installed() -> None:
    """The wheel holds what pyproject.toml lists; from a checkout a missing one is not missed."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {name.rpartition(".")[0] for name in FILES}
    assert set(told) == folders
