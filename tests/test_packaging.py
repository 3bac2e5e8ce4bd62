"""The wheel holds every package; from a checkout a missing one would not be missed."""

import tomllib

from tests.conftest import ROOT


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for package, folder in setuptools["package-dir"].items()
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert set(setuptools["packages"]) == folders


def test_the_data_of_packages_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("mmrec", "cli", "data")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    listed = {
        f"{package.replace('.', '/')}/{name}"
        for package, names in setuptools["package-data"].items()
        for name in names
    }
    assert found == listed != set()


def test_every_layer_is_checked() -> None:
    """import-linter is told to refuse a module that stands in no layer."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [layers] = [c for c in config["contracts"] if c["type"] == "layers"]
    assert layers["exhaustive"]
    listed = {name.strip() for layer in layers["layers"] for name in layer.split(":")}
    found = {p.stem for p in (ROOT / "mmrec").iterdir() if p.suffix == ".py" or p.is_dir()}
    found = {name for name in found if not name.startswith("__")} | {"cli", "data"}
    assert listed == found
