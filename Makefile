# Everything runs in a virtual environment of its own. 'make demo' trains and talks, 'make test' tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# On Linux the plain torch wheel brings gigabytes of CUDA; this asks for the CPU build, and takes
# what PyPI gives where that build is not to be had.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test setup setup-dev lint types coverage docs wheel clean

demo: setup
	$(BIN)/mmrec train tiny
	$(BIN)/mmrec generate --prompt "def " --max-tokens 120 --seed 1

test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("mmrec needs Python 3.11 or newer; this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)+cpu 2>/dev/null \
	  || $(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH) --index-url $(CPU_INDEX) 2>/dev/null \
	  || $(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.ready

# cli/ and data/ become mmrec.cli and mmrec.data when installed; import-linter and mypy see that tree.
TREE = rm -rf build/tree && mkdir -p build/tree && cp -r mmrec build/tree/mmrec \
  && cp -r cli data build/tree/mmrec/

lint: setup-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(TREE)
	cd build/tree && ../../$(BIN)/lint-imports ../../pyproject.toml

types: setup-dev
	$(TREE)
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p mmrec

# Compiled code shows no lines, so the kernels' tests run a second time as plain Python. There NumPy
# warns of what the loops do on purpose: unsigned steps back wrap round, NaN goes through a sigmoid.
coverage: setup-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	NUMBA_DISABLE_JIT=1 $(BIN)/coverage run -m pytest tests/kernels \
	  -W "ignore:overflow encountered in scalar" -W "ignore:invalid value encountered"
	$(BIN)/coverage combine -q && $(BIN)/coverage report --fail-under=90

# The CLI and configuration pages are made from the program; a warning is an error.
docs: setup-dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

wheel: setup-dev
	$(BIN)/python -m build -q --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info
