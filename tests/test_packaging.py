"""What is built and published: the wheel, the source distribution, and what they say of mmrec.

From a checkout a missing package or file would not be missed.
"""

import email.message
import email.parser
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import mmrec
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
FOR_DEVELOPERS = {"bench", "docs", "dev"}
APART = {"all", "shakespeare"}
"""Extras that ``all`` does not bring: itself, and one that pins old packages."""
FOLDERS = ("mmrec", "cli", "data", "tests", "docs", "benchmarks")
NOT_SOURCES = ("__pycache__", "_build", ".*", "*.egg-info")


class Built(NamedTuple):
    """What ``python -m build`` made."""

    wheel: Path
    source: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both distributions, built from a copy of the checkout: the wheel from the other one."""
    folder = tmp_path_factory.mktemp("built")
    tree, out = folder / "tree", folder / "dist"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    [wheel], [source] = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, source)


def files_of(folder: str) -> set[str]:
    """The files of a folder of the checkout, by their paths from its root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and not {"__pycache__", "_build", "build"} & {*path.relative_to(ROOT).parts}
        and not any(part.endswith(".egg-info") for part in path.parts)
    }


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    assert built.wheel.name == f"mmrec-{mmrec.__version__}-py3-none-any.whl"
    names = {
        name if name.startswith("mmrec/") else f"mmrec/{name}"  # cli and data lie in mmrec
        for folder in ("mmrec", "cli", "data")
        for name in files_of(folder)
    }
    with zipfile.ZipFile(built.wheel) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == names
    assert {"mmrec/py.typed", "mmrec/server/page.html", "mmrec/cli/main.py"} <= found


def test_the_source_distribution_holds_what_its_tests_read(built: Built) -> None:
    with tarfile.open(built.source) as source:
        members = [m for m in source.getmembers() if m.isfile()]
    found = {m.name.partition("/")[2] for m in members}
    wanted = set().union(*map(files_of, FOLDERS))
    wanted = {name for name in wanted if not name.endswith(".png")}
    wanted = {n for n in wanted if not (n.startswith("benchmarks/") and n.endswith(".h5"))}
    wanted |= {"benchmarks/results/race-tinyshakespeare.png"}  # which the README shows
    wanted |= {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"}
    wanted |= {"Makefile", "MANIFEST.in", "pyproject.toml"}
    made = {n for n in found if n.startswith("mmrec.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert found - made == wanted
    assert max(path.stat().st_size for path in built) < 10_000_000


def test_the_metadata(built: Built) -> None:
    from twine.commands.check import check

    assert not check([str(built.wheel), str(built.source)], strict=True)
    with zipfile.ZipFile(built.wheel) as wheel:
        [name] = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.parser.Parser().parsestr(wheel.read(name).decode())
    assert metadata["Name"] == "mmrec"
    assert metadata["Version"] == mmrec.__version__
    assert metadata["License-Expression"] == "MIT"
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {*(metadata.get_all("Provides-Extra") or [])} == {*EXTRAS}
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    assert requirements
    assert [r for r in requirements if r.url] == []


def test_type_checkers_see_the_types(built: Built, tmp_path: Path) -> None:
    """In an environment that has the wheel alone; without py.typed mypy would not read it."""
    from mypy import api

    venv.create(tmp_path / "env", with_pip=False)
    [site] = [*tmp_path.glob("env/lib/*/site-packages"), *tmp_path.glob("env/Lib/site-packages")]
    with zipfile.ZipFile(built.wheel) as wheel:
        wheel.extractall(site)
    [python] = [p for p in tmp_path.glob("env/*/python*") if p.stem == "python"]
    (tmp_path / "script.py").write_text(
        "import mmrec\nreveal_type(mmrec.ModelConfig().width)\nmmrec.ModelConfig(width='wide')\n"
    )
    (tmp_path / "mypy.ini").write_text(  # two modules of a hundred: the others take long
        "[mypy]\n"
        "[mypy-mmrec.*]\nfollow_imports = skip\n"
        "[mypy-mmrec,mmrec.config]\nfollow_imports = normal\n"
    )
    options = ["--python-executable", str(python), "--config-file", str(tmp_path / "mypy.ini")]
    shown, errors, code = api.run([*options, "--no-incremental", str(tmp_path / "script.py")])
    assert not errors
    assert code == 1, shown
    assert 'Revealed type is "int"' in shown.replace("builtins.", "")
    assert 'Argument "width" to "ModelConfig" has incompatible type "str"' in shown


def test_all_is_every_extra_of_a_user() -> None:
    [line] = EXTRAS["all"]
    assert Requirement(line).name == "mmrec"
    assert Requirement(line).extras == set(EXTRAS) - FOR_DEVELOPERS - APART
    assert "mmrec[all]" in EXTRAS["dev"]


def bounded() -> dict[str, Requirement]:
    """The packages that a user installs, and those that the tests of the export need."""
    lines = [*PROJECT["project"]["dependencies"]]
    lines += [line for name in Requirement(EXTRAS["all"][0]).extras for line in EXTRAS[name]]
    lines += [line for line in EXTRAS["dev"] if re.match(r"accelerate|onnxruntime|peft", line)]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in found if r.marker is None or r.marker.evaluate()}


def lower_bound(requirement: Requirement) -> Version:
    [bound] = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
    return Version(bound)


def test_the_ranges_are_what_was_tried() -> None:
    """``make versions`` tried the oldest version of each dependency, and a newer one."""
    text = (ROOT / "benchmarks" / "results" / "versions.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    assert [row["tests"] for row in rows if row["tests"].get("failed", 1)] == []
    tried: dict[str, set[Version]] = {}
    for row in rows:
        for name, version in row["versions"].items():
            tried.setdefault(name, set()).add(Version(Version(version).public))
    for name, requirement in bounded().items():
        assert name in tried, f"{name}: add its tests to benchmarks/versions.py; make versions"
        assert min(tried[name]) == lower_bound(requirement), name
        assert all(version in requirement.specifier for version in tried[name]), name


def test_every_dependency_has_tests_for_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """``make versions`` knows every package that a user installs, and its tests exist."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from versions import SETS, TESTS, requirements

    assert set(requirements(SETS["newest"])) - set(TESTS) == {
        "hypothesis",
        "pytest",
        "httpx",
        "openai",
    }
    for name in {name for tests in TESTS.values() for name in tests}:
        file, _, function = name.partition("::")
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8"), name


def test_every_package_is_installed() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for package, folder in setuptools["package-dir"].items()
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert set(setuptools["packages"]) == folders


def test_every_layer_is_checked() -> None:
    """import-linter is told to refuse a module that stands in no layer."""
    config = PROJECT["tool"]["importlinter"]
    [layers] = [c for c in config["contracts"] if c["type"] == "layers"]
    assert layers["exhaustive"]
    listed = {name.strip() for layer in layers["layers"] for name in layer.split(":")}
    found = {p.stem for p in (ROOT / "mmrec").iterdir() if p.suffix == ".py" or p.is_dir()}
    found = {name for name in found if not name.startswith("__")} | {"cli", "data"}
    assert listed == found


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == mmrec.__version__
    assert f"## {citation['version']} ({citation['date-released']})" in changes
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["authors"] == PROJECT["project"]["authors"]
